"""Peak memory of exporting a child of Llama-3.1-8B's shapes, and what a kill in the middle leaves.

    python benchmarks/serving/bench_export.py [--layers 32] [--directory DIR] --out benchmarks/results/export.csv

Protocol: a random-weight child on disk as `--format hf` writes it, bfloat16: hidden 4096, 32 layers, vocabulary 128256, every
kind of layer in it (kv1-kv8, FFNs of 14336, 8192, 3584 and 2000 channels, linear and no attention, linear and no FFN).
Then `puzzle export` of it in each format, in a process of its own whose greatest resident set (VmHWM, file pages that are mapped
included) is read from the kernel when it ends. Each format once more, killed with SIGKILL when half of the bytes are
written: nothing may stand under the final name. The bound is 3 GB (3·10⁹ bytes). Needs about twice the child on disk; the
files are deleted. Exit code 1 when a bound or a kill fails.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from puzzle.base.machine import cpu_name
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.linear import Linear
from puzzle.blocklib.none import NO_OP
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.export.child import Child
from puzzle.export.hf import write_hf
from puzzle.parents.known import known_structure
from puzzle.parents.structure import Layer
from random_child import random_child

BENCHMARKS = Path(__file__).resolve().parents[1]
LIMIT = 3 * 10**9  # bytes
NOISE_ROWS = 64
FORMATS: tuple[tuple[str, list[str], str], ...] = (
    ("hf", [], "child-hf"),
    ("nemotron-nas", ["--engine", "vllm"], "child-vllm"),
    ("gguf", [], "child.gguf"),
    ("gguf", ["--dtype", "q8_0"], "child-q8_0.gguf"),
)


def kinds_of_layers(usual: Layer) -> list[Layer]:
    """What is repeated over the layers."""
    full, wide = usual["attention"], usual["ffn"]
    assert isinstance(full, Gqa)
    assert isinstance(wide, SwiGLU)
    linear = Linear(**full.norm_fields())
    pairs = [
        (full, wide),
        (replace(full, num_key_value_heads=4), replace(wide, intermediate_size=8192)),
        (NO_OP, replace(wide, intermediate_size=3584)),
        (replace(full, num_key_value_heads=1), wide),
        (linear, wide),
        (full, linear),
        (replace(full, num_key_value_heads=2), NO_OP),
        (full, replace(wide, intermediate_size=2000)),
    ]
    return [{"attention": attention, "ffn": ffn} for attention, ffn in pairs]


def big_child(num_layers: int) -> Child:
    """Rows repeat a block of noise, so that making 16 GB takes no longer than writing them."""
    structure = known_structure("llama-3.1-8b")
    usual, kinds = structure.usual, kinds_of_layers(structure.usual)
    columns = max(shape[-1] for sub_block in usual.values() for shape in sub_block.tensors().values())
    noise = (0.02 * torch.randn(NOISE_ROWS, columns, generator=torch.Generator().manual_seed(0))).bfloat16()

    def matrix(shape: tuple[int, ...]) -> Tensor:
        return noise[:, : shape[1]].repeat(-(-shape[0] // NOISE_ROWS), 1)[: shape[0]]

    layers = [kinds[index % len(kinds)] for index in range(num_layers)]
    return random_child(structure.with_layers(layers), usual, matrix, torch.bfloat16, tokenizer=None)


def size_of(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def command(source: Path, out: Path, format: str, extra: list[str]) -> list[str]:
    return [
        str(Path(sys.executable).with_name("puzzle")),
        "export",
        str(source),
        "--format",
        format,
        *extra,
        "--out",
        str(out),
    ]


def run(source: Path, out: Path, format: str, extra: list[str]) -> tuple[int, float]:
    """(peak resident bytes of the whole life of the process, seconds)"""
    begin = time.perf_counter()
    started = subprocess.Popen(command(source, out, format, extra))
    _, status, used = os.wait4(started.pid, 0)
    if status:
        sys.exit(f"error: the export to {format} failed with status {status}")
    return used.ru_maxrss * 1024, time.perf_counter() - begin


def killed(source: Path, out: Path, format: str, extra: list[str], size: int) -> tuple[int, bool]:
    """Kill an export when half of `size` bytes are written. (bytes written by then, nothing stands under the final name)"""
    started = subprocess.Popen(command(source, out, format, extra))
    written = 0
    while started.poll() is None:
        written = sum(size_of(path) for path in out.parent.glob(f".{out.name}*"))
        if written >= size / 2:
            started.send_signal(signal.SIGKILL)
            started.wait()
            break
        time.sleep(0.02)
    clean = started.returncode == -signal.SIGKILL and not out.exists()
    for path in out.parent.glob(f".{out.name}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return written, clean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--directory", type=Path, default=None, help="Where the big files go for a while.")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "results" / "export.csv")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-export-", dir=arguments.directory) as name:
        root = Path(name)
        source = root / "child"
        write_hf(big_child(arguments.layers), source, card="")
        source_bytes = size_of(source)
        print(f"child: {source_bytes / 1e9:.1f} GB", flush=True)
        for format, extra, target in FORMATS:
            out = root / target
            peak, seconds = run(source, out, format, extra)
            size = size_of(out)
            shutil.rmtree(out) if out.is_dir() else out.unlink()
            written, clean = killed(source, out, format, extra, size)
            rows.append(
                {
                    "format": " ".join([format, *extra]),
                    "num_layers": arguments.layers,
                    "source_gb": f"{source_bytes / 1e9:.2f}",
                    "written_gb": f"{size / 1e9:.2f}",
                    "peak_resident_gb": f"{peak / 1e9:.2f}",
                    "limit_gb": LIMIT / 1e9,
                    "seconds": f"{seconds:.0f}",
                    "killed_at_gb": f"{written / 1e9:.2f}",
                    "nothing_under_final_name": clean,
                    "device": cpu_name(),
                    "torch": torch.__version__,
                    "date": datetime.date.today().isoformat(),
                    "command": " ".join(["bench_export.py", *sys.argv[1:]]),
                }
            )
            print(rows[-1], flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with open(arguments.out, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {arguments.out}")
    sys.exit(
        0 if all(float(r["peak_resident_gb"]) <= r["limit_gb"] and r["nothing_under_final_name"] for r in rows) else 1
    )


if __name__ == "__main__":
    main()
