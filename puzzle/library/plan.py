"""What a library build will take, before anything starts: groups, memory, disk, FLOPs and time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from puzzle.base.device import PLANNED
from puzzle.base.errors import UserError
from puzzle.blocklib.distill import Recipe
from puzzle.blocklib.sub_block import SubBlock
from puzzle.blocklib.variant import PARENT, bundles
from puzzle.library.manifest import Space
from puzzle.parents.structure import Layer, Structure

Spaces = Mapping[int, Mapping[str, Space]]  # per layer and slot

STATE_BYTES = 12  # per trained parameter, all the time: float32 master and AdamW's two moments
START_BYTES = 4  # per trained parameter, in host memory: the initial weights, in case training does not improve them
RESERVED = 1.15  # of the GPU's allocator over what is in use: 27.0 GB for 23.8 GB, benchmarks/results/build_8b.csv
HOST_BYTES = 10**8  # on a CPU, code and buffers of the libraries that the first steps bring in: 63 MB measured
LOGITS_BYTES = 28  # float32 ones of both models, and five more alive at once (kernels/linear_kl.py)
MOST_LOGITS = 2**24 + 2**20
NESTED_STREAMS = 3  # of every nested variant but one: its segment's output, their sum, and its gradient
FLIGHT_BYTES = 12  # per parameter of the one variant that takes its step: float32 gradient, its masked copy, bf16 casts


def layer_parameters(layer: Layer) -> int:
    """Of one parent layer, norms included."""
    return sum(sub_block.num_parameters for sub_block in layer.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildPlan:
    """groups: layer indices trained together. Bytes and FLOPs are predictions by the formulas of `plan_build`."""

    groups: tuple[tuple[int, ...], ...]
    num_trained_parameters: int
    peak_memory_bytes: int
    host_memory_bytes: int
    disk_bytes: int
    flops: float
    num_tokens: int


def forward_flops(sub_block: SubBlock, seq_len: int) -> float:
    """Per token of a causal pass over sequences of `seq_len`, at its mean context."""
    context = (seq_len + 1) / 2
    reach = sub_block.state().reach
    return sub_block.flops(1, context if reach is None else min(reach, context))


def training_flops(layer: Layer, spaces: Mapping[str, Space], seq_len: int, nested: bool) -> float:
    """FLOPs per token: the parent's layer forward, and every trained variant forward and backward (three times a forward)."""
    parent = sum(forward_flops(sub_block, seq_len) for sub_block in layer.values())
    return parent + 3 * sum(forward_flops(sub_block, seq_len) for sub_block in trained(spaces, nested))


def trained(spaces: Mapping[str, Space], nested: bool) -> list[SubBlock]:
    """What is trained in one layer; of nested ones the widest, which holds them all."""
    return [space[names[-1]] for space in spaces.values() for names in bundles(space, nested)]


def widest(layer: Layer) -> int:
    """The longest side of a matrix in the layer."""
    sides = [side for b in layer.values() for shape in b.tensors().values() if len(shape) > 1 for side in shape]
    return max(sides, default=0)


def calibration_bytes(layer: Layer, hidden: int, recipe: Recipe, compute_bytes: int) -> int:
    """While a layer's variants are initialised: the calibration streams, one batch's statistics in float64, the least
    squares, and a float32 copy of a sub-block."""
    tokens = recipe.batch_size * recipe.seq_len
    streams = recipe.calibration_sequences * recipe.seq_len * hidden * compute_bytes
    statistics = tokens * (2 * 8 * widest(layer) + 3 * 8 * hidden)
    return streams + statistics + 6 * 8 * hidden**2 + 4 * layer_parameters(layer)


def workspace_bytes(layer: Layer, hidden: int, tokens: int, compute_bytes: int) -> int:
    """Activations of one variant in flight: the residual streams and targets, and the widest module's saved tensors."""
    streams = 5 * hidden * compute_bytes + 4 * hidden * 4
    return tokens * ((4 * widest(layer) + 6 * hidden) * compute_bytes + streams)


def scoring_bytes(structure: Structure, num_sequences: int, seq_len: int, batch_size: int, compute_bytes: int) -> int:
    """While a library is scored: the parent as a whole, what enters a layer and leaves the model, one batch in flight and its
    logits."""
    hidden, tokens = structure.hidden_size, batch_size * seq_len
    streams = 2 * num_sequences * seq_len * hidden * compute_bytes
    working = max(workspace_bytes(layer, hidden, tokens, compute_bytes) for layer in structure.layers)
    logits = LOGITS_BYTES * min(tokens * structure.vocab_size, MOST_LOGITS)
    return structure.num_parameters * compute_bytes + streams + working + logits


def plan_build(
    structure: Structure,
    spaces: Spaces,
    recipe: Recipe,
    *,
    memory_bytes: int,
    compute_bytes: int,
    stored_bytes: int,
    on_host: bool,
    held_bytes: int = 0,
    group_size: int | None = None,
    nested: bool = False,
) -> BuildPlan:
    """Fit as many layers as memory takes into a group; one group means that no activations are stored.

    spaces: of the layers to train. memory_bytes: what the device may use; compute_bytes, stored_bytes: per weight while training
    and on disk; on_host: the device is the CPU, so that what waits in host memory counts as device memory. held_bytes: of the
    process before it begins, which the peak has too. The scores that follow need room for one sequence at a time. Where layers
    differ, the dearest counts for all. nested: as `bundles` has it. Raises UserError when not even one layer fits.
    """
    layers, hidden = sorted(spaces), structure.hidden_size
    chosen = [structure.layers[index] for index in layers]
    sizes = [[sub_block.num_parameters for sub_block in trained(spaces[index], nested)] for index in layers]
    most, state = max(map(sum, sizes)), STATE_BYTES + (START_BYTES if on_host else 0)
    per_layer = max(state * sum(s) + layer_parameters(x) * compute_bytes for s, x in zip(sizes, chosen, strict=True))
    tokens = recipe.batch_size * recipe.seq_len
    working = max(workspace_bytes(layer, hidden, tokens, compute_bytes) for layer in chosen)
    most_nested = max(
        len(names) for index in layers for s in spaces[index].values() for names in [(), *bundles(s, nested)]
    )
    working += NESTED_STREAMS * max(0, most_nested - 1) * tokens * hidden * compute_bytes
    step = FLIGHT_BYTES * max((size for s in sizes for size in s), default=0) + working
    calibration = max(calibration_bytes(layer, hidden, recipe, compute_bytes) for layer in chosen)
    sequences = max(recipe.num_steps * recipe.batch_size, recipe.calibration_sequences) + recipe.validation_sequences
    waiting = sequences * recipe.seq_len * hidden * compute_bytes  # between groups, in host memory
    extra, reserved = (HOST_BYTES, 1.0) if on_host else (0, RESERVED)
    fixed = structure.vocab_size * hidden * compute_bytes + max(step, calibration) + extra

    def peak(size: int) -> int:
        return int(reserved * (fixed + size * per_layer)) + (waiting if on_host and size < len(layers) else 0)

    scoring = scoring_bytes(structure, recipe.validation_sequences, recipe.seq_len, 1, compute_bytes) + extra
    size = next((n for n in range(len(layers), 0, -1) if peak(n) <= memory_bytes), 0)
    if size < 1 or scoring > memory_bytes:
        least = held_bytes + max(min(peak(1), peak(len(layers))), scoring) / PLANNED
        raise UserError(
            f"one layer with its variants needs {least / 1e9:.2f} GB in all, {(held_bytes + memory_bytes / PLANNED) / 1e9:.2f} "
            "GB are there: use a smaller `batch_size` or `seq_len`, fewer variants, or a larger `memory_limit`"
        )
    size = min(len(layers), size if group_size is None else group_size)
    size = -(-len(layers) // -(-len(layers) // size))  # as many groups, evenly filled
    groups = tuple(tuple(layers[i : i + size]) for i in range(0, len(layers), size))
    num_tokens = recipe.num_steps * recipe.batch_size * recipe.seq_len
    activations = waiting if len(groups) > 1 else 0
    flops = sum(training_flops(structure.layers[index], spaces[index], recipe.seq_len, nested) for index in layers)
    passed = [structure.layers[index] for index in range(max(layers)) if index not in spaces]
    flops += sum(forward_flops(sub_block, recipe.seq_len) for layer in passed for sub_block in layer.values())
    num_trained = sum(map(sum, sizes))
    every = [b for index in layers for space in spaces[index].values() for n, b in space.items() if n != PARENT]
    num_stored = sum(sub_block.num_parameters for sub_block in every)
    return BuildPlan(
        groups=groups,
        num_trained_parameters=num_trained,
        peak_memory_bytes=held_bytes + max(peak(size), scoring),
        host_memory_bytes=activations + (0 if on_host else START_BYTES * size * most),
        disk_bytes=num_stored * stored_bytes + size * most * 12,
        flops=num_tokens * flops,
        num_tokens=num_tokens,
    )


def describe(plan: BuildPlan, seconds: float, spaces: Spaces, device: str) -> dict:
    """The plan as JSON-ready facts; every number in it is predicted."""
    names: dict[str, list[str]] = {}
    for slot, space in (item for layer in spaces.values() for item in layer.items()):
        names[slot] = list(dict.fromkeys([*names.get(slot, ()), *space]))
    predicted = asdict(plan)
    rates = {
        "seconds": round(seconds, 1),
        "tokens_per_second": round(plan.num_tokens / seconds, 1) if seconds else None,
    }
    return {
        "device": device,
        "variants": names,
        "groups": [list(group) for group in predicted.pop("groups")],
        "num_trained_parameters": predicted.pop("num_trained_parameters"),
        "predicted": predicted | rates,
    }
