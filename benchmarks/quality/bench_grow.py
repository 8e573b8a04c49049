"""Teach a grown model another model's solutions, beside fine-tuning everything: held-out loss of the old and the new domain.

Protocol: the parent is examples/parent (12.9 M, Python source). Another model (--writer, such as SmolLM2-135M-Instruct) solves word problems
that templates and a seed make, step by step; its text, read with the parent's tokenizer, is the new domain. One problem in sixteen and one
document of the old domain in sixteen (lib/reference_corpus.py) are held out. Every way trains on the same tokens in the same order with the
next-token loss, at every learning rate of --lr: "everything" is the parent itself, "new alone" a grown one with --old-lr 0, "old slowly" with
0.1, "all alike" with 1; "… and old text" has an eighth of its tokens from the old domain. Before any training the largest difference of
logits between parent and grown model is taken in float32 and must be at most 1e-5. Losses and KL(parent‖child) are measured after it by
`puzzle.runtime.divergence`. A --solutions file that is there is read, not written; --append goes on after what a call that was stopped has left.

    python benchmarks/quality/bench_grow.py --writer HuggingFaceTB/SmolLM2-135M-Instruct --solutions solutions.jsonl \\
        --out benchmarks/results/grow.csv                                                                       # one GPU
    python benchmarks/quality/bench_grow.py --writer examples/parent --problems 64 --max-files 40 --max-new-tokens 48 --tokens 2048 \\
        --seq-len 64 --batch-size 4 --held-out 8 --lr 1e-3 --solutions /tmp/solutions.jsonl --out /tmp/grow.csv  # rehearsal on a CPU
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from puzzle.base.device import pick_device
from puzzle.base.files import write_text
from puzzle.base.machine import cpu_name
from puzzle.data.tokenizer import load_tokenizer
from puzzle.grow.verb import GrowOptions, grow_verb
from puzzle.heal.run import heal
from puzzle.heal.settings import HealOptions
from puzzle.runtime.divergence import compare
from puzzle.runtime.model import load_model
from reference_corpus import write_corpus
from write_rows import read_rows, write_rows

PARENT = Path(__file__).resolve().parents[2] / "examples" / "parent"
WAYS: dict[str, tuple[bool, float, float]] = {  # grown, learning rate of the old as a share, share of old text
    "everything": (False, 1.0, 0.0),
    "everything and old text": (False, 1.0, 0.125),
    "new alone": (True, 0.0, 0.0),
    "new alone and old text": (True, 0.0, 0.125),
    "old slowly": (True, 0.1, 0.0),
    "all alike": (True, 1.0, 0.0),
}
NAMES, THINGS = ("Ada", "Ben", "Chloe", "Dan", "Eve", "Finn"), ("apples", "books", "coins", "pens", "stamps", "shells")
PROBLEMS = (
    "{a} has {x} {thing}. {b} gives {a} {y} more, and {a} loses {z}. How many {thing} does {a} have now?",
    "{a} packs {x} boxes with {y} {thing} each and keeps {z} {thing} aside. How many {thing} does {a} have in all?",
    "{a} and {b} share {x} {thing}. {a} takes {z} first, and the rest is split evenly. How many {thing} does {b} get?",
    "A shop sells {thing} for {y} cents each. {a} buys {z} of them and pays with {x} dollars. How much change does {a} get?",
)


def problem(number: int) -> str:
    """The same for the same number."""
    draw = random.Random(number)
    a, b = draw.sample(NAMES, 2)
    sizes = {"x": 2 * draw.randint(10, 49) + 2, "y": draw.randint(2, 40), "z": 2 * draw.randint(1, 9)}
    return draw.choice(PROBLEMS).format(a=a, b=b, thing=draw.choice(THINGS), **sizes)


@torch.no_grad()
def write_solutions(path: Path, writer: str, count: int, max_new_tokens: int, device: torch.device) -> None:
    """A row {"text"} for each problem, with the writer's sampled solution."""
    tokenizer = AutoTokenizer.from_pretrained(writer, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model: Any = AutoModelForCausalLM.from_pretrained(
        writer, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32
    )
    model.to(device).eval()
    size, part = 512 if device.type == "cuda" else 16, path.with_suffix(".part")  # a batch is there as a whole, or not
    rows = json.loads(part.read_text(encoding="utf-8")) if part.is_file() else []
    for begin in range(len(rows), count, size):
        torch.manual_seed(begin)
        asked = [problem(number) for number in range(begin, min(begin + size, count))]
        prompts = [f"{text}\nThink step by step.\n" for text in asked]
        if tokenizer.chat_template:
            chats = [[{"role": "user", "content": text}] for text in prompts]
            prompts = [str(tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True)) for c in chats]
        coded = tokenizer(
            prompts, return_tensors="pt", padding=True, add_special_tokens=False, return_token_type_ids=False
        )
        options = {"max_new_tokens": max_new_tokens, "do_sample": True, "temperature": 0.7, "top_p": 0.95}
        given = model.generate(**coded.to(device), pad_token_id=tokenizer.pad_token_id, **options)
        solved = tokenizer.batch_decode(given[:, coded["input_ids"].shape[1] :], skip_special_tokens=True)
        rows += [f"{text}\n{solution.strip()}\n" for text, solution in zip(asked, solved, strict=True)]
        write_text(part, json.dumps(rows))
        click.echo(f"{len(rows)} of {count} problems solved")
    write_text(path, "".join(json.dumps({"text": row}) + "\n" for row in rows))
    part.unlink()


def split(path: Path, seq_len: int, held_out: int) -> tuple[Path, Tensor]:
    """All rows of a .jsonl but each sixteenth as another one, and those packed. [held_out at most, seq_len]"""
    rows, train = path.read_text(encoding="utf-8").splitlines(keepends=True), path.with_suffix(".train.jsonl")
    train.write_text("".join(row for number, row in enumerate(rows) if number % 16), encoding="utf-8")
    tokenizer = load_tokenizer(PARENT)
    coded = tokenizer([json.loads(row)["text"] for row in rows[::16]], add_special_tokens=False)["input_ids"]
    flat = torch.tensor([token for ids in coded for token in (*ids, tokenizer.eos_token_id)])
    count = min(held_out, len(flat) // seq_len)
    return train, flat[: count * seq_len].view(count, seq_len)


@click.command()
@click.option("--writer", default="HuggingFaceTB/SmolLM2-135M-Instruct", show_default=True)
@click.option("--solutions", type=click.Path(path_type=Path), required=True)
@click.option("--problems", default=8192, show_default=True)
@click.option("--max-new-tokens", default=160, show_default=True)
@click.option("--max-files", type=int, help="Of the old domain.")
@click.option("--experts", default=4, show_default=True)
@click.option("--top-k", default=1, show_default=True)
@click.option("--width", type=int)
@click.option("--lr", default="3e-4,1e-3", show_default=True)
@click.option("--tokens", default=4_000_000, show_default=True)
@click.option("--seq-len", default=256, show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--held-out", default=128, show_default=True, help="Sequences of each domain.")
@click.option("--device", default="auto", show_default=True)
@click.option("--append", is_flag=True, help="What --out has stays, and is not measured again.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    writer: str, solutions: Path, problems: int, max_new_tokens: int, max_files: int | None, experts: int, top_k: int, width: int | None,
    lr: str, tokens: int, seq_len: int, batch_size: int, held_out: int, device: str, append: bool, out: Path,
) -> None:  # fmt: skip
    """A row per way and learning rate, and one of the parent."""
    on = pick_device(device)
    if not solutions.is_file():
        write_solutions(solutions, writer, problems, max_new_tokens, on)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_corpus(root / "old.jsonl", max_files)
        (root / "new.jsonl").write_text(solutions.read_text(encoding="utf-8"), encoding="utf-8")
        (new, new_held), (old, old_held) = (
            split(root / name, seq_len, held_out) for name in ("new.jsonl", "old.jsonl")
        )
        told = grow_verb(str(PARENT), GrowOptions(out=root / "grown", experts=experts, top_k=top_k, width=width))
        parent = load_model(PARENT, device=on, dtype=torch.float32)
        grown = load_model(root / "grown", device=on, dtype=torch.float32)
        with torch.no_grad():
            ids = new_held[:2].to(on)
            apart = (parent(ids) - grown(ids)).abs().max().item()
        assert apart <= 1e-5, f"logits differ by {apart} before training"
        del grown
        rows = read_rows(out, append)
        there = [(row["way"], row["lr"]) for row in rows]

        def measured(path: Path, **facts: Any) -> None:
            model = load_model(path, device=on, dtype=torch.float32)
            found = {name: compare(parent, model, held) for name, held in (("old", old_held), ("new", new_held))}
            losses = {f"{name}_loss": f"{value['lm_loss']:.5f}" for name, value in found.items()}
            rows.append({**facts, **losses, "old_kl": f"{found['old']['kl']:.5f}"})
            rows[-1] |= {"held_out_tokens": [old_held.numel(), new_held.numel()], "logits_apart": f"{apart:.1e}"}
            rows[-1] |= {
                "experts": experts,
                "top_k": top_k,
                "width": width or "as the FFN",
                "writer": Path(writer).name,
            }
            rows[-1] |= {"device": cpu_name() if on.type == "cpu" else torch.cuda.get_device_name(on)}
            rows[-1] |= {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
            click.echo(rows[-1])
            write_rows(out, rows)

        nothing = {"lr": "", "tokens": 0, "seconds": "", "busiest_expert": ""}
        active = dict(zip((False, True), told["active_parameters"], strict=True))
        if ("the parent", "") not in there:
            measured(PARENT, way="the parent", active_parameters=active[False], **nothing)
        for way, (is_grown, old_lr, share) in WAYS.items():
            sources = [{"path": str(new), "weight": 1 - share}] + [{"path": str(old), "weight": share}] * bool(share)
            (root / "blend.yaml").write_text(yaml.safe_dump({"sources": sources}), encoding="utf-8")
            for rate in map(float, lr.split(",")):
                if (way, str(rate)) in there:
                    continue
                record = heal(
                    HealOptions(
                        child=str(root / "grown" if is_grown else PARENT), blend=root / "blend.yaml", out=root / "out", kl_weight=0.0,
                        cosine_weight=0.0, lm_weight=1.0, tokens=tokens, seq_len=seq_len, batch_size=batch_size, lr=rate, old_lr=old_lr,
                        eval_every=0, save_every=0, validation_sequences=8, allow_repeats=True, device=device, force=True,
                    )
                )  # fmt: skip
                load = [max(shares) * len(shares) for shares in record.get("expert_load", {}).values()]
                facts = {"lr": rate, "tokens": record["num_tokens"], "seconds": record["seconds"]}
                facts |= {"busiest_expert": f"{max(load):.2f}" if load else ""}
                measured(root / "out", way=way, active_parameters=active[is_grown], **facts)


if __name__ == "__main__":
    main()
