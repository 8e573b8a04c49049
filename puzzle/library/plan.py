"""What a library build will take, before anything starts: groups, memory, disk, FLOPs and time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from puzzle.base.errors import UserError
from puzzle.blocklib.distill import Recipe
from puzzle.blocklib.sub_block import SubBlock
from puzzle.blocklib.variant import PARENT
from puzzle.library.manifest import Space
from puzzle.parents.structure import Layer, Structure

Spaces = Mapping[int, Mapping[str, Space]]  # per layer and slot

STATE_BYTES = 12  # per trained parameter, all the time: float32 master and AdamW's two moments
START_BYTES = (
    4  # per trained parameter, in host memory: the initial weights, kept in case training does not improve them
)
RESERVED = (
    1.15  # what the GPU's allocator holds over what is in use: 27.0 GB for 23.8 GB, benchmarks/results/build_8b.csv
)
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


def training_flops(layer: Layer, spaces: Mapping[str, Space], seq_len: int) -> float:
    """FLOPs per token: the parent's layer forward, and every trained variant forward and backward (three times a forward)."""
    parent = sum(forward_flops(sub_block, seq_len) for sub_block in layer.values())
    return parent + 3 * sum(forward_flops(sub_block, seq_len) for sub_block in trained(spaces))


def trained(spaces: Mapping[str, Space]) -> list[SubBlock]:
    """What is trained in one layer."""
    return [sub_block for space in spaces.values() for name, sub_block in space.items() if name != PARENT]


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


def workspace_bytes(layer: Layer, hidden: int, recipe: Recipe, compute_bytes: int) -> int:
    """Activations of one variant in flight: the residual streams and targets, and the widest module's saved tensors."""
    streams = 5 * hidden * compute_bytes + 4 * hidden * 4
    return recipe.batch_size * recipe.seq_len * ((4 * widest(layer) + 6 * hidden) * compute_bytes + streams)


def plan_build(
    structure: Structure,
    spaces: Spaces,
    recipe: Recipe,
    *,
    memory_bytes: int,
    compute_bytes: int,
    stored_bytes: int,
    on_host: bool,
    group_size: int | None = None,
) -> BuildPlan:
    """Fit as many layers as memory takes into a group; one group means that no activations are stored.

    spaces: of the layers to train. memory_bytes: what the device may use; compute_bytes, stored_bytes: per weight while training
    and on disk; on_host: the device is the CPU, so that what waits in host memory counts as device memory. Where layers differ,
    the dearest counts for all. Raises UserError when not even one layer fits.
    """
    layers, hidden = sorted(spaces), structure.hidden_size
    chosen = [structure.layers[index] for index in layers]
    sizes = [[sub_block.num_parameters for sub_block in trained(spaces[index])] for index in layers]
    most, state = max(map(sum, sizes)), STATE_BYTES + (START_BYTES if on_host else 0)
    per_layer = max(state * sum(s) + layer_parameters(x) * compute_bytes for s, x in zip(sizes, chosen, strict=True))
    working = max(workspace_bytes(layer, hidden, recipe, compute_bytes) for layer in chosen)
    step = FLIGHT_BYTES * max((size for s in sizes for size in s), default=0) + working
    calibration = max(calibration_bytes(layer, hidden, recipe, compute_bytes) for layer in chosen)
    fixed = structure.vocab_size * hidden * compute_bytes + max(step, calibration)
    reserved = 1.0 if on_host else RESERVED
    fitting = int((memory_bytes / reserved - fixed) // per_layer)
    if fitting < 1:
        raise UserError(
            f"one layer with its variants needs {reserved * (fixed + per_layer) / 1e9:.1f} GB, {memory_bytes / 1e9:.1f} GB are free: "
            "use a smaller `batch_size` or `seq_len`, or fewer variants"
        )
    size = min(len(layers), fitting if group_size is None else group_size)
    size = -(-len(layers) // -(-len(layers) // size))  # as many groups, evenly filled
    groups = tuple(tuple(layers[i : i + size]) for i in range(0, len(layers), size))
    num_tokens = recipe.num_steps * recipe.batch_size * recipe.seq_len
    sequences = max(recipe.num_steps * recipe.batch_size, recipe.calibration_sequences) + recipe.validation_sequences
    stored = sequences * recipe.seq_len
    activations = stored * hidden * compute_bytes if len(groups) > 1 else 0
    flops = sum(training_flops(structure.layers[index], spaces[index], recipe.seq_len) for index in layers)
    passed = [structure.layers[index] for index in range(max(layers)) if index not in spaces]
    flops += sum(forward_flops(sub_block, recipe.seq_len) for layer in passed for sub_block in layer.values())
    num_trained = sum(map(sum, sizes))
    return BuildPlan(
        groups=groups,
        num_trained_parameters=num_trained,
        peak_memory_bytes=int(reserved * (fixed + size * per_layer)) + (activations if on_host else 0),
        host_memory_bytes=activations + (0 if on_host else START_BYTES * size * most),
        disk_bytes=num_trained * stored_bytes + size * most * 12,
        flops=num_tokens * flops,
        num_tokens=num_tokens,
    )


def describe(plan: BuildPlan, seconds: float, spaces: Spaces, device: str) -> dict:
    """The plan as JSON-ready facts; every number in it is predicted."""
    slots = dict.fromkeys(slot for layer in spaces.values() for slot in layer)
    names = {s: dict.fromkeys(n for layer in spaces.values() for n in layer.get(s, {})) for s in slots}
    return {
        "device": device,
        "variants": {slot: list(found) for slot, found in names.items()},
        "groups": [list(group) for group in plan.groups],
        "num_trained_parameters": plan.num_trained_parameters,
        "predicted": {
            "peak_memory_bytes": plan.peak_memory_bytes,
            "host_memory_bytes": plan.host_memory_bytes,
            "disk_bytes": plan.disk_bytes,
            "flops": plan.flops,
            "num_tokens": plan.num_tokens,
            "seconds": round(seconds, 1),
            "tokens_per_second": round(plan.num_tokens / seconds, 1) if seconds else 0.0,
        },
    }
