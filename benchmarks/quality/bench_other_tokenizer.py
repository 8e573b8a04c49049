"""A child with another tokenizer than its teacher: what it reaches from text alone, by token alignment, and from what the teacher writes.

Protocol: the teacher is the reference parent. The child has its layers and another byte-level tokenizer of --words words, trained on the same text
(lib/reference_corpus.py); a word's embedding is the mean of the teacher's embeddings of what the teacher reads it as. All ways take the same number of
the child's tokens, with embeddings that learn: the next-token loss on the text; `--align-tokens` on the text; the next-token loss on texts that
the teacher has written (examples/post_training/generate.py, at temperature 1, from the first --prompt-bytes of documents). Measured is the loss on held-out
text in nats per byte, which other tokenizers do not change; the teacher's is on rows of its own.

    python benchmarks/quality/bench_other_tokenizer.py --tokens 20e6 --batch-size 64 --written 20000 --out benchmarks/results/other_tokenizer.csv
    python benchmarks/quality/bench_other_tokenizer.py --tokens 2e3 --max-files 40 --written 8 --out /tmp/other_tokenizer.csv       # rehearsal
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from puzzle.base.device import pick_device
from puzzle.base.machine import cpu_name
from puzzle.data.align import word_bytes
from puzzle.data.packing import load_tokens
from puzzle.data.tokenizer import load_tokenizer
from puzzle.heal.run import heal
from puzzle.heal.settings import HealOptions
from puzzle.runtime.divergence import compare
from puzzle.runtime.model import load_model
from reference_corpus import write_corpus
from write_rows import read_rows, write_rows

ROOT = Path(__file__).resolve().parents[2]
PARENT = ROOT / "examples" / "parent"
TEXT = {"kl_weight": 0.0, "lm_weight": 1.0}
WAYS: dict[str, dict[str, Any]] = {
    "text alone": TEXT,
    "aligned": {"align_tokens": True},
    "aligned and text": {"align_tokens": True, "lm_weight": 0.3},
    "written by the teacher": TEXT,
}


def write_child(texts: list[str], words: int, out: Path) -> None:
    """The teacher's layers under another tokenizer."""
    shutil.copytree(PARENT, out, ignore=shutil.ignore_patterns("training.csv", "README.md"), dirs_exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=words,
        show_progress=False,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    own, teacher = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>"), load_tokenizer(PARENT)
    own.save_pretrained(out)
    weights = load_file(PARENT / "model.safetensors")
    table, rows = weights["model.embed_tokens.weight"].float(), []
    for _, data in sorted(word_bytes(own, out).items()):
        ids = teacher(data.decode(errors="replace"), add_special_tokens=False)["input_ids"] or [teacher.eos_token_id]
        rows.append(table[ids].mean(0))
    rows[own.eos_token_id] = table[teacher.eos_token_id]
    weights["model.embed_tokens.weight"] = torch.stack(rows).to(torch.bfloat16)
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    config = json.loads((PARENT / "config.json").read_text(encoding="utf-8"))
    config |= {"vocab_size": len(rows), "eos_token_id": own.eos_token_id, "bos_token_id": None, "pad_token_id": None}
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")


def per_byte(place: Path, corpus: Path, seq_len: int, device: torch.device) -> float:
    """Held-out loss in nats per byte."""
    held_out = load_tokens([str(corpus)], place, seq_len=seq_len, num_train=1, num_validation=32).validation
    known = word_bytes(load_tokenizer(place), place)
    size = sum(len(known[n]) for n in held_out[:, 1:].flatten().tolist())
    model = load_model(place, device=device)
    return compare(model, model, held_out)["lm_loss"] * held_out[:, 1:].numel() / size


@click.command()
@click.option("--tokens", type=float, default=2e6)
@click.option("--words", default=6144)
@click.option("--seq-len", default=512)
@click.option("--batch-size", default=8)
@click.option("--lr", default=1e-3)
@click.option("--written", default=2000, help="Texts that the teacher writes.")
@click.option("--prompt-bytes", default=200)
@click.option("--new-tokens", default=512)
@click.option("--max-files", type=int)
@click.option("--device", default="auto")
@click.option("--work", type=click.Path(path_type=Path), help="Where text and child stay for the next call.")
@click.option("--append", is_flag=True, help="What --out has stays, and is not measured again.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    tokens: float,
    words: int,
    seq_len: int,
    batch_size: int,
    lr: float,
    written: int,
    work: Path | None,
    append: bool,
    out: Path,
    **o: Any,
) -> None:
    """A row per way."""
    with tempfile.TemporaryDirectory() as folder:
        root, rows = Path(folder) if work is None else work, read_rows(out, append)
        root.mkdir(parents=True, exist_ok=True)
        write_corpus(root / "corpus.jsonl", o["max_files"])
        texts = [json.loads(line)["text"] for line in (root / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]
        if not (root / "child").is_dir():
            write_child(texts, words, root / ".child")
            (root / ".child").rename(root / "child")
        prompts = "".join(json.dumps({"text": text[: o["prompt_bytes"]]}) + "\n" for text in texts[:written])
        (root / "prompts.jsonl").write_text(prompts, encoding="utf-8")
        script = [
            sys.executable,
            str(ROOT / "examples/post_training/generate.py"),
            str(PARENT),
            str(root / "prompts.jsonl"),
        ]
        given = ["--temperature", "1", "--max-new-tokens", str(o["new_tokens"]), "--device", o["device"]]
        subprocess.run([*script, "--out", str(root / "written.jsonl"), *given], check=True)
        corpus, on = root / "corpus.jsonl", pick_device(o["device"])
        start, goal = (per_byte(place, corpus, seq_len, on) for place in (root / "child", PARENT))
        for way, options in WAYS.items():
            if way in [row["way"] for row in rows]:
                continue
            begin = time.monotonic()
            record = heal(
                HealOptions(
                    child=str(root / "child"), teacher=None if way in ("text alone", "written by the teacher") else str(PARENT),
                    data=[str(root / ("written.jsonl" if "written" in way else "corpus.jsonl"))], out=root / "out", tokens=int(tokens),
                    seq_len=seq_len, batch_size=batch_size, lr=lr, cosine_weight=0.0, train_embeddings=True, eval_every=0, save_every=0,
                    validation_sequences=8, device=o["device"], force=True, **options,
                )
            )  # fmt: skip
            rows.append(
                {
                    "way": way,
                    "tokens": record["num_tokens"],
                    "nats_per_byte_before": f"{start:.5f}",
                    "nats_per_byte": f"{per_byte(root / 'out', corpus, seq_len, on):.5f}",
                    "nats_per_byte_teacher": f"{goal:.5f}",
                    "tokens_aligned": record.get("aligned", {}).get("tokens", ""),
                    "words_in_both": record.get("aligned", {}).get("words", ""),
                    "words": words,
                    "seconds": f"{time.monotonic() - begin:.1f}",
                    "device": cpu_name() if not torch.cuda.is_available() else torch.cuda.get_device_name(),
                    "torch": torch.__version__,
                    "date": time.strftime("%Y-%m-%d"),
                }
            )
            click.echo(rows[-1])
            write_rows(out, rows)


if __name__ == "__main__":
    main()
