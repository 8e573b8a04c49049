"""Seconds and memory of `puzzle score` and `puzzle evaluate` at the shapes of a well-known parent: random weights in shards, a library of
random blocks (one file for all layers), text of random words.

    python benchmarks/speed/bench_score.py llama-3.1-8b WORK --sequences 64 --seq-len 1024
    python benchmarks/speed/bench_score.py llama-3.3-70b WORK --layers 28 --memory-limit 40GB --attention none --ffn none,0.5 --evaluate

WORK is kept, so that a second run measures alone; --again removes the scores first. Prints a JSON line for each part.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

from puzzle.base.device import pick_device
from puzzle.base.files import content_hash
from puzzle.base.units import parse_bytes
from puzzle.blocklib.distill import Recipe
from puzzle.blocklib.variant import PARENT, search_spaces
from puzzle.data.packing import TokenData
from puzzle.export.write import Source, export
from puzzle.library.describe import write_library
from puzzle.library.score import ScoreOptions, plan_scores, score_library
from puzzle.library.store import BlockStore
from puzzle.measure.evaluate import EvaluateOptions, evaluate
from puzzle.measure.measurable import name_of
from puzzle.parents.known import known_structure
from puzzle.parents.opened import open_model
from random_child import random_child

TOKENIZER = Path(__file__).parents[2] / "examples" / "parent"
NOISE = 2**27


def noise(seed: int):
    """A maker of matrices cut from one pool, scaled by what enters them: making 70 billion numbers anew takes minutes."""
    pool = torch.randn(NOISE, generator=torch.Generator().manual_seed(seed)).bfloat16()
    place = [0]

    def make(shape: tuple[int, ...]) -> torch.Tensor:
        count = shape[0] * shape[1]
        place[0] = (place[0] + 7919) % (NOISE // 2)
        rest = pool[place[0] :]
        flat = rest[:count] if count <= len(rest) else rest.repeat(-(-count // len(rest)))[:count]
        return (flat.view(shape) * (0.5 / shape[1] ** 0.5)).contiguous()

    return make


def make_parent(out: Path, name: str, layers: int | None) -> None:
    structure = known_structure(name)
    structure = structure.with_layers(structure.layers[: layers or structure.num_layers])
    child = random_child(structure, structure.usual, noise(0), torch.bfloat16, TOKENIZER)
    export(Source(child=child, solved=None, facts=None, measured=None), out, force=True)


def make_library(root: Path, parent: Path, attention: str, ffn: str, seq_len: int) -> None:
    opened, store, make = open_model(parent), BlockStore(root), noise(1)
    spaces = search_spaces(dict(enumerate(opened.structure.layers)), {"attention": attention, "ffn": ffn})
    empty = torch.empty(0)
    data = TokenData(train=empty, validation=empty, num_documents=0, hash="none")
    recipe = Recipe(num_steps=0, batch_size=1, seq_len=seq_len, lr=1e-3)
    write_library(root, opened, data, recipe, 0, spaces)
    for layer, slots in spaces.items():
        for slot, space in slots.items():
            for name, sub_block in space.items():
                if name == PARENT:
                    continue
                path, first = store.path(layer, slot, name), store.path(min(spaces), slot, name)
                if path == first:
                    shapes = sub_block.tensors().items()
                    tensors = {n: torch.ones(s).bfloat16() if len(s) == 1 else make(s) for n, s in shapes}
                    losses = {"validation_loss_before": 1.0, "validation_loss_after": 1.0}
                    record = {"status": "random", "key": content_hash([slot, name]), "num_tokens": 0, **losses}
                    store.write(layer, slot, name, tensors, {"sub_block": sub_block.key()}, record)
                else:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    for suffix in (".safetensors", ".json"):
                        os.link(
                            first.with_suffix(suffix) if suffix == ".json" else first,
                            path.with_suffix("").parent / f"{name}{suffix}",
                        )


def make_text(path: Path, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (tokens * 8,), generator=generator).to(torch.uint8)
    letters[torch.randint(0, len(letters), (len(letters) // 6,), generator=generator)] = 32
    text = bytes(letters.tolist()).decode()
    step = 4000
    path.write_text("\n".join(json.dumps({"text": text[at : at + step]}) for at in range(0, len(text), step)))


@click.command()
@click.argument("name")
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--layers", type=int, help="Only the first ones.")
@click.option("--attention", default="kv4,kv2,kv1,window-512,linear,none")
@click.option("--ffn", default="0.75,0.5,0.25,0.1,linear,none")
@click.option("--sequences", default=64)
@click.option("--seq-len", default=1024)
@click.option("--batch-size", default=8)
@click.option("--memory-limit", help="e.g. 40GB, to stream what would fit.")
@click.option("--screen", type=float, help="FRACTION of score --sub-block-screen.")
@click.option("--evaluate", "evaluated", is_flag=True, help="Also evaluate the parent against itself.")
@click.option("--again", is_flag=True)
@click.option("--device", default="auto")
def main(
    name, work, layers, attention, ffn, sequences, seq_len, batch_size, memory_limit, screen, evaluated, again, device
):
    wanted = sequences * seq_len
    parent, library, text = work / "parent", work / "lib", work / f"text-{wanted}.jsonl"
    if not (parent / "config.json").is_file():
        make_parent(parent, name, layers)
    if not (library / "library.json").is_file():
        make_library(library, parent, attention, ffn, seq_len)
    if not text.is_file():
        make_text(text, 12 * max(wanted, 2**16))  # of which one document in about thirty is held out
    if again:
        shutil.rmtree(library / "scores", ignore_errors=True)
    limit = None if memory_limit is None else parse_bytes(memory_limit)
    on = pick_device(device)
    cuda = on.type == "cuda"
    options = ScoreOptions(
        sequences=sequences,
        seq_len=seq_len,
        batch_size=batch_size,
        memory_limit=limit,
        device=device,
        sub_block_screen=screen,
    )
    facts = {"name": name, "layers": layers, "sequences": sequences, "seq_len": seq_len, "memory_limit": memory_limit}
    facts["device"] = name_of(on)

    def timed(what: str, work, **more) -> None:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        work()
        peak = torch.cuda.max_memory_allocated() if cuda else 0
        print(
            json.dumps({**facts, "what": what, "seconds": time.perf_counter() - begin, "peak_bytes": peak, **more}),
            flush=True,
        )

    planned = plan_scores(library, [str(text)], options, parent=str(parent))
    if planned["num_tokens"] != wanted:
        raise click.ClickException(
            f"{planned['num_tokens']} held-out tokens, and {wanted} were asked for: make more text"
        )
    timed("score", lambda: score_library(library, [str(text)], options, parent=str(parent)), **planned)
    if evaluated:
        asked = EvaluateOptions(sequences=sequences, seq_len=seq_len, memory_limit=limit, device=device)
        timed("evaluate", lambda: print(evaluate(str(parent), str(parent), [str(text)], asked).to_json()["child"]))


if __name__ == "__main__":
    main()
