"""What fp8 costs in quality: KL to the parent of the same child in bf16 and in fp8, as it is stored and as engines run it.

Protocol: every checkpoint given is exported in bf16 and with `--dtype fp8 --kv-dtype fp8` (cache calibrated on training text of the
same data), and KL(parent‖child) measured on the same held-out sequences, in float32 on a CPU:
    bf16                as `puzzle evaluate` has it
    weights             fp8 weights, what `puzzle evaluate` says of the child in fp8
    activations         beside them what every matrix reads, rounded per token, as vLLM does
    cache               beside both, keys and values with the calibrated scales
The parent itself, in fp8, is the first of them. "1.65x" is the quickstart's child for `throughput: 1.65x`.

    puzzle run examples/quickstart.yaml --data /usr/lib/python3.11 --out runs/1.65x       # with goal.throughput 1.65x in a copy
    python benchmarks/quality/bench_fp8.py 1.65x --data /usr/lib/python3.11 --sequences 16 --out benchmarks/results/fp8.csv
"""

from __future__ import annotations

import datetime
import sys
import tempfile
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from fp8_served import round_cache
from puzzle.base.device import compute_dtype, name_of, pick_device
from puzzle.blocklib.plain.fp8 import round_activations
from puzzle.data.packing import load_tokens
from puzzle.export.write import export, open_source
from puzzle.parents.opened import open_model
from puzzle.runtime.divergence import compare
from puzzle.runtime.model import load_model
from write_rows import write_rows


@click.command()
@click.argument("children", type=click.Path(path_type=Path), nargs=-1)
@click.option("--parent", type=click.Path(path_type=Path), default="examples/parent", show_default=True)
@click.option("--data", required=True, multiple=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--sequences", type=int, default=64, show_default=True)
@click.option("--seq-len", type=int, default=512, show_default=True)
@click.option("--device", default="auto", show_default=True)
@torch.no_grad()
def main(children: tuple[Path, ...], parent: Path, data: tuple[str, ...], out: Path, sequences: int, seq_len: int, device: str) -> None:  # fmt: skip
    opened, on = open_model(parent), pick_device(device)
    dtype = compute_dtype(on)
    tokens = load_tokens(list(data), opened.directory, seq_len=seq_len, num_train=1, num_validation=sequences)
    whole = load_model(opened, device=on, dtype=dtype)
    facts = {"device": name_of(on), "torch": torch.__version__, "date": datetime.date.today().isoformat()}
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for child in (parent, *children):
            paths = {"bf16": Path(temporary) / "bf16", "fp8": Path(temporary) / "fp8"}
            export(open_source(child), paths["bf16"], dtype="bfloat16", force=True)
            export(
                open_source(child),
                paths["fp8"],
                dtype="fp8",
                kv_dtype="fp8",
                data=list(data),
                device=device,
                force=True,
            )
            for what in ("bf16", "weights", "activations", "cache"):
                path = paths["bf16" if what == "bf16" else "fp8"]
                model = load_model(path, device=on, dtype=dtype)
                if what in ("activations", "cache"):
                    round_activations(model.blocks)
                if what == "cache":
                    round_cache(model, path)
                found = compare(whole, model, tokens.validation)
                size = sum(shard.stat().st_size for shard in path.glob("*.safetensors"))
                rows.append(
                    {
                        "child": "parent" if child == parent else child.name,
                        "in_fp8": what,
                        "kl": f"{found['kl']:.5f}",
                        "kl_stderr": f"{found['kl_stderr']:.5f}",
                        "lm_loss": f"{found['lm_loss']:.4f}",
                        "top1_agreement": f"{found['top1_agreement']:.4f}",
                        "bytes": size,
                        "num_tokens": int(found["num_tokens"]),
                        **facts,
                    }
                )
                print(*rows[-1].values(), flush=True)
                write_rows(out, rows)


if __name__ == "__main__":
    main()
