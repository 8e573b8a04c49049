"""A cheap look at every variant before it is scored: what it would cost by a second-order estimate.

The divergence of a model from itself has no gradient; its second derivative by the logits is the Fisher information, the mean of
g gᵀ over labels that are drawn from the model's own distribution, g the gradient of their log-probability. So one forward and one
backward pass of the parent, over a few sequences, gives for what each sub-block adds the gradients g [tokens, H], and of a variant, run
on the parent's own input alone,

    estimate = 1/2 · mean over tokens (g · Δ)²,    Δ = what the variant adds - what the parent adds

(Gauss-Newton; Puzzle scores exactly, arXiv 2411.19146. In place of g's outer products over all dimensions the square of one product a
token is taken, which has their mean.) What a change of one token does through others is left out, and Δ is no small change: the
estimate orders variants, and is no score. Letters: S sequences, T tokens, H hidden_size, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from puzzle.base.console import progress
from puzzle.blocklib.plain.part import Part, Ropes
from puzzle.runtime.model import Block, CausalModel
from puzzle.runtime.residency import MOST_LOGITS
from puzzle.runtime.stream import Job, Layered, Room, Stream

SEQUENCES = 16  # of the held-out ones
AT_ONCE = 2  # of them, with what their backward pass needs
Variants = Mapping[str, Mapping[str, Part]]  # by slot and name


def estimates(
    model: Layered, batches: Sequence[Tensor], room: Room, layers: Sequence[int], read: Callable[[int], Variants]
) -> dict[int, dict[str, float]]:
    """Nats per token, of every variant of these layers, as {layer: {"slot/name": estimate}}.

    batches: ids [B, T] each. read: the variants of a layer. Streams that wait: one a layer, and two.
    """
    ropes = model.ropes(batches[0].shape[1])
    entering, last = _forward(model, batches, room, ropes)
    generator = torch.Generator(model.device).manual_seed(0)
    ends = model.last()
    back = room.filled(label_gradient(ends, x, generator) for x in room.fetched((last, n) for n in range(len(batches))))
    room.drop(last)
    del ends
    first, found = min(layers), {}
    variants = model.parts((partial(read, layer) for layer in sorted(layers, reverse=True)), _tensors)
    num_tokens = sum(ids.numel() for ids in batches)
    with progress("screen", len(model.structure.layers) - first) as bar:
        for layer, block in model.blocks(first, backwards=True):
            own = next(variants) if layer in layers else {}
            sums = {
                f"{slot}/{name}": torch.zeros((), dtype=torch.float64, device=model.device)
                for slot in own
                for name in own[slot]
            }
            pairs = room.fetched((stream, n) for n in range(len(batches)) for stream in (entering[layer], back))
            for n in range(len(batches)):
                x, g = next(pairs), next(pairs)
                room.put(back, n, _through(block, x, g, ropes, own, sums))
            room.drop(entering[layer])
            if own:
                found[layer] = {name: total.item() / (2 * num_tokens) for name, total in sums.items()}
            bar.advance()
    room.drop(back)
    return found


@torch.no_grad()
def _forward(model: Layered, batches: Sequence[Tensor], room: Room, ropes: Ropes) -> tuple[list[Stream], Stream]:
    """What enters every layer, and what leaves the last one."""
    streams = [room.filled(model.embedded(batches))]
    for _, block in model.blocks():
        streams.append(room.stream())
        room.run([Job(streams[-2], streams[-1], lambda x: block(x, ropes))])  # noqa: B023 (run before the next block)
    return streams[:-1], streams[-1]


def label_gradient(last: CausalModel, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient, by the last residual stream [B, T, H], of the log-probabilities of labels drawn from the model itself, one of
    every token. Logits are made of a few rows at a time."""
    rows, found = hidden.flatten(0, 1), []
    for part in rows.split(max(1, MOST_LOGITS // len(last.head_weight))):
        with torch.enable_grad():
            leaf = part.detach().requires_grad_()
            logits = last.logits(leaf).float()
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
            chosen = logits.log_softmax(-1).gather(-1, labels).sum()
            found.append(torch.autograd.grad(chosen, leaf)[0])
    return torch.cat(found).view_as(hidden)


def _through(block: Block, x: Tensor, g: Tensor, ropes: Ropes, variants: Variants, sums: dict[str, Tensor]) -> Tensor:
    """The gradient by what enters a layer [B, T, H], from that by what leaves it; on the way, what each variant's change would do."""
    parts = block.parts()
    entering = [x]
    with torch.no_grad():
        for part in list(parts.values())[:-1]:
            entering.append(part.add(entering[-1], ropes))
    for (slot, part), into in reversed(list(zip(parts.items(), entering, strict=True))):
        with torch.enable_grad():
            leaf = into.detach().requires_grad_()
            adds = part(leaf, ropes)
        with torch.no_grad():
            for name, variant in variants.get(slot, {}).items():
                change = (variant(into, ropes) - adds).float()
                sums[f"{slot}/{name}"] += (g.float() * change).sum(-1).square().sum()
        if adds.requires_grad:
            g = g + torch.autograd.grad(adds, leaf, g)[0]
    return g


def _tensors(variants: Variants) -> list[Tensor]:
    return [tensor for some in variants.values() for part in some.values() for tensor in part.parameters()]


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation, equal values sharing their mean rank; None of fewer than three pairs, or where all are equal."""
    ranks = torch.stack([_ranks(torch.tensor(x, dtype=torch.float64)) for x in (a, b)]) if len(a) > 2 else None
    if ranks is None or (ranks.std(dim=1) == 0).any():
        return None
    return torch.corrcoef(ranks)[0, 1].item()


def _ranks(values: Tensor) -> Tensor:
    below = (values[:, None] > values[None, :]).sum(1)
    same = (values[:, None] == values[None, :]).sum(1)
    return below + (same - 1).double() / 2


def worst(found: Mapping[int, Mapping[str, float]], fraction: float) -> set[tuple[int, str]]:
    """(layer, name) of that share of all variants, rounded down, whose estimates are largest, over all layers together."""
    every = sorted(
        ((value, layer, name) for layer, some in found.items() for name, value in some.items()), reverse=True
    )
    return {(layer, name) for _, layer, name in every[: int(fraction * len(every))]}


def compared(files: Mapping[int, Any]) -> tuple[float | None, int]:
    """Spearman's correlation of estimates and scores over the variants that have both, and how many these are."""
    both = [
        (estimate, file.scores[name]["kl"])
        for file in files.values()
        for name, estimate in file.estimates.items()
        if name in file.scores
    ]
    return spearman([e for e, _ in both], [s for _, s in both]), len(both)
