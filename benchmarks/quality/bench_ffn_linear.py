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

from puzzle.blocklib.initialize import ffn_as_linear
from puzzle.blocklib.linear import Linear
from puzzle.blocklib.plain.part import Part, loaded
from puzzle.blocklib.sub_block import Normed
from puzzle.data.packing import load_tokens
from puzzle.kernels.block_loss import block_loss
from puzzle.parents.opened import open_model
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
    model = load_model(opened)
    tokens = load_tokens(list(data), opened.directory, seq_len=seq_len, num_train=calibration, num_validation=sequences)
    ropes = model.ropes(seq_len)
    train = [model.embed(ids.long()) for ids in tokens.train.split(8)]
    held_ids = [ids.long() for ids in tokens.validation.split(8)]
    held = [model.embed(ids) for ids in held_ids]
    finals = [model.hidden(ids) for ids in held_ids]

    def measured(index: int, ffn: Part, linear: Part) -> tuple[float, float]:
        """nMSE of `linear` in place of `ffn` in layer `index`, and KL of the whole model."""
        meter, errors = Divergence(), []
        for x, ids, final in zip(held, held_ids, finals, strict=True):
            y = linear(x, ropes)
            errors.append(block_loss(y, ffn(x, ropes)).item())
            child = x + y
            for later in model.blocks[index + 1 :]:
                child = later(child, ropes)
            meter.add(model, final, model, child, ids)
        return statistics.mean(errors), meter.result()["kl"]

    rows: list[tuple[object, str, str, str]] = []
    for index, slot, part in model.parts():
        if slot == "ffn":
            assert isinstance(part.sub_block, Normed)
            found, weights = part.calibrate(train), opened.weights(index, slot)
            assert found is not None
            product = (weights["down_proj.weight"].float() @ weights["up_proj.weight"].float()).double()
            scale = (product * found.cross).sum() / (product @ found.gram * product).sum()
            for name, matrix in (
                ("least squares", ffn_as_linear(found)),
                ("down · up", product.float()),
                ("down · up, scaled", (scale * product).float()),
            ):
                tensors = {"norm.weight": weights["norm.weight"].float(), "linear.weight": matrix}
                linear = loaded(Linear(**part.sub_block.norm_fields()), tensors)
                error, kl = measured(index, part, linear)
                rows.append((index, name, f"{error:.5f}", f"{kl:.5f}"))
                print(*rows[-1], flush=True)
        train = [part.add(x, ropes) for x in train]
        held = [part.add(x, ropes) for x in held]
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


if __name__ == "__main__":
    main()
