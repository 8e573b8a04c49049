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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puzzle.base.machine import cpu_name
from puzzle.export.checkpoint import write_checkpoint
from puzzle.parents.family import hf_name

BENCHMARKS = Path(__file__).resolve().parents[1]
LIMIT = 3 * 10**9  # bytes
HIDDEN, HEADS, KV_HEADS, DIM, WIDTH, VOCAB = 4096, 32, 8, 128, 14336, 128256
ENTRIES: list[dict[str, Any]] = [
    {},
    {"num_key_value_heads": 4, "intermediate_size": 8192},
    {"skip": ["attention"], "intermediate_size": 3584},
    {"num_key_value_heads": 1},
    {"linear": ["attention"]},
    {"linear": ["mlp"]},
    {"skip": ["mlp"], "num_key_value_heads": 2},
    {"intermediate_size": 2000},
]  # repeated over the layers
FORMATS = (
    ("hf", [], "child-hf"),
    ("nemotron-nas", ["--engine", "vllm"], "child-vllm"),
    ("gguf", [], "child.gguf"),
    ("gguf", ["--dtype", "q8_0"], "child-q8_0.gguf"),
)


def config(num_layers: int) -> dict[str, Any]:
    return {
        "architectures": ["PuzzleForCausalLM"],
        "model_type": "puzzle",
        "auto_map": {
            "AutoConfig": "modeling_puzzle.PuzzleConfig",
            "AutoModelForCausalLM": "modeling_puzzle.PuzzleForCausalLM",
        },
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": num_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "intermediate_size": WIDTH,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "per_layer_config": {str(i): ENTRIES[i % len(ENTRIES)] for i in range(num_layers) if ENTRIES[i % len(ENTRIES)]},
    }


def tensors(num_layers: int) -> Iterator[tuple[str, Tensor]]:
    """One after the other; rows repeat a block of noise, so that making 16 GB takes no longer than writing them."""
    noise = (0.02 * torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0))).bfloat16()

    def matrix(rows: int, columns: int) -> Tensor:
        return noise[:, :columns].repeat(-(-rows // 64), 1)[:rows]

    yield "model.embed_tokens.weight", matrix(VOCAB, HIDDEN)
    for index in range(num_layers):
        entry = ENTRIES[index % len(ENTRIES)]
        skip, linear = entry.get("skip", []), entry.get("linear", [])
        kv, width = entry.get("num_key_value_heads", KV_HEADS) * DIM, entry.get("intermediate_size", WIDTH)
        shapes = {
            "attention": {"q_proj": (HIDDEN, HIDDEN), "k_proj": (kv, HIDDEN), "v_proj": (kv, HIDDEN), "o_proj": (HIDDEN, HIDDEN)},
            "ffn": {"gate_proj": (width, HIDDEN), "up_proj": (width, HIDDEN), "down_proj": (HIDDEN, width)},
        }  # fmt: skip
        for kind, owner in (("attention", "attention"), ("ffn", "mlp")):
            if owner in skip:
                continue
            yield hf_name(index, kind, "norm.weight"), torch.ones(HIDDEN, dtype=torch.bfloat16)  # type: ignore[arg-type]
            parts = {"linear": (HIDDEN, HIDDEN)} if owner in linear else shapes[kind]
            for name, shape in parts.items():
                yield hf_name(index, kind, f"{name}.weight"), matrix(*shape)  # type: ignore[arg-type]
    yield "model.norm.weight", torch.ones(HIDDEN, dtype=torch.bfloat16)
    yield "lm_head.weight", matrix(VOCAB, HIDDEN)


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
        write_checkpoint(
            source,
            config=config(arguments.layers),
            tensors=tensors(arguments.layers),
            tokenizer_from=None,
            generation_config=None,
            card="",
        )
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
