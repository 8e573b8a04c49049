"""Seconds and memory of `puzzle score` and `puzzle evaluate` at the shapes of a well-known parent: random weights in shards, a library of
random blocks (one file for all layers), text of random words.

    python benchmarks/speed/bench_score.py llama-3.1-8b WORK --sequences 64 --seq-len 1024
    python benchmarks/speed/bench_score.py llama-3.3-70b WORK --layers 28 --memory-limit 40GB --attention none --ffn none,0.5 --evaluate

WORK is kept, so that a second run measures alone; --again removes the scores first. Prints a JSON line for each part: `seconds` of it, models
loaded and text read; what its dry run says; peak_bytes of the device by torch's allocator (reserved_bytes: what that has taken); of host
memory, rss_bytes is the most that the process had, pages of files that it reads included, anonymous_bytes without these (looked at ten times
a second), pinned_bytes what a GPU reads of it. Layers but the first are copies of it under their own names: 141 GB are written in a minute.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
from puzzle.measure.evaluate import EvaluateOptions, evaluate, plan_evaluation
from puzzle.measure.measurable import name_of
from puzzle.parents.checkpoint import read_header
from puzzle.parents.known import known_structure
from puzzle.parents.opened import open_model
from random_child import random_child

TOKENIZER = Path(__file__).parents[2] / "examples" / "parent"
NOISE = 2**27


def noise(seed: int, hidden: int):
    """A maker of matrices cut from one pool, scaled by what enters them: making 70 billion numbers anew takes minutes."""
    size = min(NOISE, 2**15 * hidden)
    pool = torch.randn(size, generator=torch.Generator().manual_seed(seed)).bfloat16()
    place = [0]

    def make(shape: tuple[int, ...]) -> torch.Tensor:
        count = shape[0] * shape[1]
        place[0] = (place[0] + 7919) % (size // 2)
        rest = pool[place[0] :]
        flat = rest[:count] if count <= len(rest) else rest.repeat(-(-count // len(rest)))[:count]
        return (flat.view(shape) * (0.5 / shape[1] ** 0.5)).contiguous()

    return make


def make_parent(out: Path, name: str, layers: int | None) -> None:
    structure = known_structure(name)
    structure = structure.with_layers(structure.layers[: layers or structure.num_layers])
    alike = all(layer == structure.layers[0] for layer in structure.layers)
    written = structure.with_layers(structure.layers[:1]) if alike else structure
    child = random_child(written, structure.usual, noise(0, structure.hidden_size), torch.bfloat16, TOKENIZER)
    first = out.with_name(out.name + "-first")
    shutil.rmtree(first, ignore_errors=True)  # of a run that was cut off
    export(Source(child=child, solved=None, facts=None, measured=None), first, max_shard_bytes=2**50)
    (first / "manifest.json").unlink()
    if alike:
        repeat(first, structure.num_layers)
    shutil.rmtree(out, ignore_errors=True)
    first.rename(out)


def repeat(checkpoint: Path, layers: int) -> None:
    """Give a checkpoint of one layer and one file so many layers like it, a file each."""
    whole = checkpoint / "model.safetensors"
    header = read_header(whole)
    with open(whole, "rb") as handle:
        begin = 8 + struct.unpack("<Q", handle.read(8))[0]
        own = {n: e for n, e in header.items() if ".layers.0." in n}
        data, entries = bytearray(), {}
        for name, entry in own.items():
            handle.seek(begin + entry["data_offsets"][0])
            at = len(data)
            data += handle.read(entry["data_offsets"][1] - entry["data_offsets"][0])
            entries[name] = entry | {"data_offsets": [at, len(data)]}

    def write(layer: int) -> None:
        names = {n.replace(".layers.0.", f".layers.{layer}."): e for n, e in entries.items()}
        text = json.dumps(names).encode()
        text += b" " * (-len(text) % 8)
        with open(checkpoint / f"model-{layer:03}.safetensors", "wb") as handle:
            handle.write(struct.pack("<Q", len(text)) + text)
            handle.write(data)

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        list(pool.map(write, range(1, layers)))
    places = {n: whole.name for n in header if n != "__metadata__"}
    for layer in range(1, layers):
        file = f"model-{layer:03}.safetensors"
        places |= {n.replace(".layers.0.", f".layers.{layer}."): file for n in own}
    size = whole.stat().st_size + (layers - 1) * len(data)
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}, indent=2))


def make_library(root: Path, parent: Path, attention: str, ffn: str, seq_len: int) -> None:
    opened, store = open_model(parent), BlockStore(root)
    make = noise(1, opened.structure.hidden_size)
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


class HostMemory:
    """The most that this process had in host memory, from here on."""

    def __enter__(self) -> HostMemory:
        self.anonymous, self._ends = 0, threading.Event()
        with contextlib.suppress(OSError):  # where it is refused, the peak is that of the whole process
            Path("/proc/self/clear_refs").write_text("5")
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._ends.wait(0.1):
            self.anonymous = max(self.anonymous, self._said("RssAnon"))

    def _said(self, what: str) -> int:
        rows = Path("/proc/self/status").read_text().splitlines()
        return next(int(row.split()[1]) * 1024 for row in rows if row.startswith(what + ":"))

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()
        self.rss = self._said("VmHWM")


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
@click.option("--no-score", "unscored", is_flag=True, help="Evaluate alone.")
@click.option("--make", "made", is_flag=True, help="Write parent, library and text alone.")
@click.option("--again", is_flag=True)
@click.option("--device", default="auto")
def main(
    name, work, layers, attention, ffn, sequences, seq_len, batch_size, memory_limit, screen, evaluated, unscored, made, again, device
):  # fmt: skip
    wanted, begin = sequences * seq_len, time.perf_counter()
    work.mkdir(parents=True, exist_ok=True)
    parent, library, text = work / "parent", work / "lib", work / f"text-{wanted}.jsonl"
    if not (parent / "config.json").is_file():
        make_parent(parent, name, layers)
    if not unscored and not (library / "library.json").is_file():
        make_library(library, parent, attention, ffn, seq_len)
    if not text.is_file():
        make_text(text, 12 * max(wanted, 2**16))  # of which one document in about thirty is held out
    print(json.dumps({"name": name, "what": "make", "seconds": round(time.perf_counter() - begin, 3)}), flush=True)
    if made:
        return
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
    facts = {"name": name, "layers": layers, "sequences": sequences, "seq_len": seq_len, "batch_size": batch_size}
    facts |= {"memory_limit": memory_limit, "device": name_of(on), "torch": torch.__version__}

    def timed(what: str, work: Callable[[], object], planned: dict[str, Any]) -> None:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        with HostMemory() as host:
            work()
        seconds = time.perf_counter() - begin
        told: dict[str, Any] = {"rss_bytes": host.rss, "anonymous_bytes": host.anonymous}
        if cuda:
            pinned = torch.cuda.host_memory_stats() if hasattr(torch.cuda, "host_memory_stats") else {}
            told |= {
                "peak_bytes": torch.cuda.max_memory_allocated(),
                "reserved_bytes": torch.cuda.max_memory_reserved(),
                "pinned_bytes": pinned.get("allocated_bytes.peak"),
            }
        print(json.dumps({**facts, "what": what, "seconds": round(seconds, 3), **told, "planned": planned}), flush=True)

    if not unscored:
        planned = plan_scores(library, [str(text)], options, parent=str(parent))
        if planned["num_tokens"] != wanted:
            raise click.ClickException(
                f"{planned['num_tokens']} held-out tokens, and {wanted} were asked for: make more text"
            )
        timed("score", lambda: score_library(library, [str(text)], options, parent=str(parent)), planned)
    if evaluated or unscored:
        asked = EvaluateOptions(sequences=sequences, seq_len=seq_len, memory_limit=limit, device=device)
        planned = plan_evaluation(str(parent), str(parent), [str(text)], asked)
        timed(
            "evaluate",
            lambda: print(json.dumps(evaluate(str(parent), str(parent), [str(text)], asked).to_json()["child"])),
            planned,
        )


if __name__ == "__main__":
    main()
