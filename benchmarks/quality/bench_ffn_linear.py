"""An FFN replaced by one matrix, untrained: least squares on calibration activations against the product down · up.

Protocol: per layer, both matrices replace the parent's FFN (norm kept); the least squares see --calibration sequences of
training documents. Reported per layer on held-out sequences: normalised MSE of the sub-block's output and
KL(parent‖child) of the whole model. "scaled" is the product times the scalar that is best on the calibration tokens.

    python benchmarks/quality/bench_ffn_linear.py --data /usr/lib/python3.11 --out benchmarks/results/ffn_linear.csv
"""

from __future__ import annotations

import csv
import statistics
import time
from pathlib import Path

import click
import torch
from torch import Tensor

from puzzle.blocklib.distill import calibrate
from puzzle.blocklib.initialize import ffn_as_linear
from puzzle.blocklib.modules import Linear
from puzzle.data.packing import load_tokens
from puzzle.kernels.block_loss import block_loss
from puzzle.parents.family import open_model
from puzzle.runtime.divergence import Divergence
from puzzle.runtime.model import load_model


@click.command()
@click.option("--parent", default="examples/parent", show_default=True)
@click.option("--data", required=True, multiple=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--calibration", type=int, default=64, show_default=True)
@click.option("--sequences", type=int, default=16, show_default=True)
@click.option("--seq-len", type=int, default=512, show_default=True)
@torch.no_grad()
def main(parent: str, data: tuple[str, ...], out: Path, calibration: int, sequences: int, seq_len: int) -> None:
    opened = open_model(parent)
    model, spec = load_model(opened), opened.spec
    tokens = load_tokens(list(data), opened.directory, seq_len=seq_len, num_train=calibration, num_validation=sequences)
    rope = model.rope(seq_len)
    train = [model.embedding(ids.long()) for ids in tokens.train.split(8)]
    held_ids = [ids.long() for ids in tokens.validation.split(8)]
    held = [model.embedding(ids) for ids in held_ids]
    finals = [model.hidden(ids) for ids in held_ids]
    rows = []
    for index, block in enumerate(model.blocks):
        train = [x + block.attention(x, rope) for x in train]
        held = [x + block.attention(x, rope) for x in held]
        weights = opened.layer(index).ffn
        found = calibrate(block.ffn, train, spec)
        product = (weights["down_proj.weight"].float() @ weights["up_proj.weight"].float()).double()
        scale = (product * found.cross).sum() / (product @ found.gram * product).sum()
        for name, matrix in (
            ("least squares", ffn_as_linear(found)),
            ("down · up", product.float()),
            ("down · up, scaled", (scale * product).float()),
        ):
            error, kl = _measure(model, index, matrix, weights["norm.weight"], held, held_ids, finals, rope)
            rows.append((index, name, f"{error:.5f}", f"{kl:.5f}"))
            print(*rows[-1], flush=True)
        train = [x + block.ffn(x, rope) for x in train]
        held = [x + block.ffn(x, rope) for x in held]
    for name in dict.fromkeys(row[1] for row in rows):
        errors = [float(r[2]) for r in rows if r[1] == name]
        kls = [float(r[3]) for r in rows if r[1] == name]
        rows.append(("median", name, f"{statistics.median(errors):.5f}", f"{statistics.median(kls):.5f}"))
        print(*rows[-1])
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["layer", "initialisation", "nmse", "kl", "device", "torch", "date"])
        writer.writerows((*row, "cpu", torch.__version__, time.strftime("%Y-%m-%d")) for row in rows)


def _measure(model, index: int, matrix: Tensor, norm: Tensor, held, held_ids, finals, rope) -> tuple[float, float]:
    module = Linear(model.spec)
    module.load_state_dict({"norm.weight": norm.float(), "linear.weight": matrix})
    meter, errors = Divergence(), []
    for x, ids, final in zip(held, held_ids, finals, strict=True):
        y = module(x, rope)
        errors.append(block_loss(y, model.blocks[index].ffn(x, rope)).item())
        child = x + y
        for later in model.blocks[index + 1 :]:
            child = later(child, rope)
        meter.add(model, final, model, child, ids)
    return statistics.mean(errors), meter.result()["kl"]


if __name__ == "__main__":
    main()
