"""What one matrix in place of a sub-block starts from: least squares on calibration activations against products of the weights.

Protocol: in each of --layers, in both slots, a matrix stands in for the parent's sub-block (norm kept), whole and of rank --rank
(`initialize.low_rank`); the least squares see --calibration sequences of training documents. Then each is distilled on --tokens of
them, as a library's blocks are: the same batches for all, and the start is kept where training ends above it. Reported on held-out
sequences, before and after: normalised MSE of the sub-block's output and KL(parent‖child) of the whole model. "scaled" is the product
times the scalar that is best on the calibration tokens, whole alone; "nothing" leaves the sub-block out.

    python benchmarks/quality/bench_linear.py --data /usr/lib/python3.11 --out benchmarks/results/linear.csv
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from torch import Tensor

from puzzle.base.units import parse_layers
from puzzle.blocklib.distill import Recipe, Shown, VariantTrainer
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.initialize import least_squares, low_rank
from puzzle.blocklib.linear import Linear
from puzzle.blocklib.moments import Moments
from puzzle.blocklib.plain.part import Part, loaded
from puzzle.blocklib.sub_block import Normed, ParentBlock, Variant
from puzzle.data.packing import load_tokens
from puzzle.kernels.block_loss import block_loss
from puzzle.parents.opened import open_model
from puzzle.runtime.divergence import Divergence
from puzzle.runtime.model import load_model


def product_of(sub_block: Normed, weights: dict[str, Tensor]) -> tuple[str, Tensor]:
    """(its name, [H, H]): of attention where every token sees only itself, each KV head repeated for its query heads; of an FFN without
    its gate."""
    if not isinstance(sub_block, Gqa):
        return "down · up", weights["down_proj.weight"].double() @ weights["up_proj.weight"].double()
    heads = sub_block.num_attention_heads // sub_block.num_key_value_heads
    value = weights["v_proj.weight"].double().unflatten(0, (sub_block.num_key_value_heads, -1))
    return "O · V", weights["o_proj.weight"].double() @ value.repeat_interleave(heads, dim=0).flatten(0, 1)


def starts(block: ParentBlock, moments: Moments, rank: int) -> Iterator[tuple[str, Variant]]:
    """(what it starts from, the variant)"""
    assert isinstance(block.sub_block, Normed)
    fields = block.sub_block.norm_fields()
    norms = {n: t.float() for n, t in block.weights.items() if n in ("norm.weight", "post_norm.weight")}

    def variant(tensors: dict[str, Tensor], rank: int | None) -> Variant:
        name = "linear" if rank is None else f"linear-{rank}"
        return Variant(name=name, sub_block=Linear(**fields, rank=rank), initialise=lambda _: norms | tensors)

    name, product = product_of(block.sub_block, block.weights)
    scale = (product * moments.cross).sum() / (product @ moments.grams.sum(0) * product).sum()
    matrices = {"least squares": least_squares(moments), name: product.float()}
    for start, matrix in matrices.items():
        yield start, variant({"linear.weight": matrix}, None)
        u, v = low_rank(matrix, moments.damped, rank)
        yield start, variant({"linear.v.weight": v, "linear.u.weight": u}, rank)
    yield f"{name}, scaled", variant({"linear.weight": (scale * product).float()}, None)
    yield "nothing", variant({"linear.weight": torch.zeros_like(matrix)}, None)


@click.command()
@click.option("--parent", default="examples/parent", show_default=True)
@click.option("--data", required=True, multiple=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--layers", default="0,2,5,8,13", show_default=True)
@click.option("--rank", type=int, default=32, show_default=True)
@click.option("--tokens", type=float, default=262_144, show_default=True)
@click.option("--lr", type=float, default=3e-3, show_default=True)
@click.option("--calibration", type=int, default=64, show_default=True)
@click.option("--sequences", type=int, default=8, show_default=True)
@click.option("--seq-len", type=int, default=512, show_default=True)
@click.option("--batch-size", type=int, default=4, show_default=True)
@torch.no_grad()
def main(
    parent: str,
    data: tuple[str, ...],
    out: Path,
    layers: str,
    rank: int,
    tokens: float,
    lr: float,
    calibration: int,
    sequences: int,
    seq_len: int,
    batch_size: int,
) -> None:
    opened, cpu = open_model(parent), torch.device("cpu")
    model = load_model(opened)
    steps = int(tokens) // (batch_size * seq_len)
    recipe = Recipe(num_steps=steps, batch_size=batch_size, seq_len=seq_len, lr=lr)
    text = load_tokens(
        list(data),
        opened.directory,
        seq_len=seq_len,
        num_train=max(steps * batch_size, calibration),
        num_validation=sequences,
    )
    ropes = model.ropes(seq_len)
    train = [model.embed(ids.long()) for ids in text.train.split(batch_size)]
    held_ids = [ids.long() for ids in text.validation.split(8)]
    held = [model.embed(ids) for ids in held_ids]
    finals = [model.hidden(ids) for ids in held_ids]
    chosen = parse_layers("layers", layers, opened.structure.num_layers)

    parts = list(model.parts())

    def measured(place: int, linear: Part) -> tuple[float, float]:
        """nMSE of `linear` in place of one of `parts`, and KL of the whole model."""
        meter, errors = Divergence(), []
        for x, ids, final in zip(held, held_ids, finals, strict=True):
            y = linear(x, ropes)
            errors.append(block_loss(y, parts[place][2](x, ropes)).item())
            child = x + y
            for _, _, later in parts[place + 1 :]:
                child = later.add(child, ropes)
            meter.add(model, final, model, child, ids)
        return statistics.mean(errors), meter.result()["kl"]

    def distilled(index: int, slot: str, part: Part, variants: list[Variant], block: ParentBlock) -> list[Part]:
        """Each after training."""
        rate = torch.zeros(())
        trainers = [VariantTrainer(index, slot, [variant], block, recipe, cpu, rate) for variant in variants]
        for step in range(steps):
            rate.fill_(recipe.lr_at(step))
            shown = Shown(part, train[step], ropes)
            with torch.enable_grad():
                for trainer in trainers:
                    trainer.step(shown)
        return [loaded(v.sub_block, t.masters.values()) for v, t in zip(variants, trainers, strict=True)]

    rows: list[list[object]] = []
    for place, (index, slot, part) in enumerate(parts):
        if index in chosen:
            block = ParentBlock(sub_block=part.sub_block, weights=opened.weights(index, slot))
            moments = part.moments(train[: -(-calibration // batch_size)], ropes)
            names, variants = zip(*starts(block, moments, rank), strict=True)
            ended = distilled(index, slot, part, list(variants[:-1]), block)
            for start, variant, trained in zip(names, variants, [*ended, None], strict=True):
                before = measured(place, loaded(variant.sub_block, variant.initialise(block)))
                after = before if trained is None else min(before, measured(place, trained))
                rows.append([slot, index, variant.name, start, *(f"{n:.5f}" for n in (*before, *after))])
                print(*rows[-1], flush=True)
        train = [part.add(x, ropes) for x in train]
        held = [part.add(x, ropes) for x in held]
    for key in dict.fromkeys((r[0], r[2], r[3]) for r in rows):
        same = [r for r in rows if (r[0], r[2], r[3]) == key]
        medians = [statistics.median(float(str(r[column])) for r in same) for column in range(4, 8)]
        rows.append([key[0], "median", *key[1:], *(f"{n:.5f}" for n in medians)])
        print(*rows[-1])
    out.parent.mkdir(parents=True, exist_ok=True)
    head = "slot,layer,map,initialisation,nmse,kl,nmse_trained,kl_trained,tokens,lr,device,torch,date"
    with open(out, "w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(head.split(","))
        common = (steps * batch_size * seq_len, lr, "cpu", torch.__version__, time.strftime("%Y-%m-%d"))
        writer.writerows((*row, *common) for row in rows)


if __name__ == "__main__":
    main()
