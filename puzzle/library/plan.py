"""What a library build will take, before anything starts: groups, memory, disk, FLOPs and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache

from puzzle.base.device import PLANNED
from puzzle.base.errors import UserError
from puzzle.blocklib.distill import Recipe
from puzzle.blocklib.ffn import SURGEON
from puzzle.blocklib.linear import Linear
from puzzle.blocklib.sub_block import SubBlock
from puzzle.blocklib.variant import PARENT, bundles
from puzzle.library.manifest import Replacement, Space
from puzzle.parents.structure import Layer, Structure
from puzzle.runtime.residency import Passing, layer_parameters, widest, workspace_bytes

Spaces = Mapping[int, Mapping[str, Space]]  # per layer and slot

# Per trained parameter, all the time, beside a copy to compute with: float32 master and AdamW's two moments.
STATE_BYTES = 12
START_BYTES = 4  # per trained parameter, in host memory: the initial weights, in case training does not improve them
RESERVED = 1.15  # of the GPU's allocator over what is in use: 27.0 GB for 23.8 GB, docs/lessons.md
HOST_BYTES = 10**8  # on a CPU, code and buffers of the libraries that the first steps bring in: 63 MB measured
NESTED_STREAMS = 3  # of every nested variant but one: its segment's output, their sum, and its gradient
TWIN_BYTES = 12  # per parameter of the variant in its step, on a CPU: gradients, scaled and clipped; a GPU holds one of `compute_bytes`


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildPlan:
    """groups: layer indices trained together. longest: share of the FLOPs that is done one after another, where several processes
    take a group each. Bytes are of one process, but for the disk; they and FLOPs are predictions by the formulas of `plan_build`."""

    groups: tuple[tuple[int, ...], ...]
    longest: float
    num_trained_parameters: int
    peak_memory_bytes: int
    host_memory_bytes: int
    disk_bytes: int
    flops: float
    num_tokens: int


def forward_flops(sub_block: SubBlock, seq_len: int) -> float:
    """Per token of a causal pass over sequences of `seq_len`, at its mean context."""
    return sub_block.flops(1, mean_context(sub_block, seq_len))


def mean_context(sub_block: SubBlock, seq_len: int) -> float:
    """Tokens of state that a token sees, of a causal pass over `seq_len`."""
    context, reach = (seq_len + 1) / 2, sub_block.state().reach
    return context if reach is None else min(reach, context)


def training_flops(layer: Layer, spaces: Mapping[str, Space], seq_len: int, nested: bool) -> float:
    """FLOPs per token that a step must do: the parent's layer forward, and what training each variant takes (`SubBlock.training_flops`).
    MFU is tokens per second times the sum over layers, over the GPU's dense bf16 FLOPs."""
    parent = sum(forward_flops(sub_block, seq_len) for sub_block in layer.values())
    return parent + sum(b.training_flops(mean_context(b, seq_len)) for b in trained(spaces, nested))


def trained(spaces: Mapping[str, Space], nested: bool) -> list[SubBlock]:
    """What is trained in one layer; of nested ones the widest, which holds them all."""
    return [space[names[-1]] for space in spaces.values() for names in bundles(space, nested)]


def calibration_bytes(layer: Layer, hidden: int, recipe: Recipe, compute_bytes: int) -> int:
    """While a layer's variants are initialised: the calibration streams, one batch's statistics in float64, the moments of both halves and
    their least squares, and a float32 copy of a sub-block."""
    tokens = recipe.batch_size * recipe.seq_len
    streams = recipe.calibration_sequences * recipe.seq_len * hidden * compute_bytes
    statistics = tokens * (2 * 8 * widest(layer) + 3 * 8 * hidden)
    return streams + statistics + 12 * 8 * hidden**2 + 4 * layer_parameters(layer)


def scoring(
    structure: Structure,
    replacements: Mapping[int, Sequence[Replacement]],
    spaces: Spaces | Sequence[Mapping[str, Space]],
    *,
    sequences: int,
    seq_len: int,
    compute_bytes: int,
) -> Passing:
    """What goes through the parent while these are scored, by layer: beside them its own stream, what leaves it, and what the next
    pass begins with; and on the device the variants in hand, all of a layer's where some are scored together."""
    joint = any(len(one) > 1 for wanted in replacements.values() for one in wanted)
    sizes = {n: [b.num_parameters for b in trained(spaces[n], False)] for n in replacements}
    beside = max((sum(s) if joint else 3 * max(s, default=0) for s in sizes.values()), default=0)
    return Passing(
        models=[structure],
        sequences=sequences,
        seq_len=seq_len,
        compute_bytes=compute_bytes,
        spare=3,
        wanted=sum(map(len, replacements.values())),
        at_once=max(map(len, replacements.values()), default=0),
        beside=beside,
        ahead=0 if joint else max(map(sum, sizes.values()), default=0),
    )


def screening(
    structure: Structure, spaces: Mapping[int, Mapping[str, Space]], *, sequences: int, seq_len: int, compute_bytes: int
) -> Passing:
    """What goes forth and back through the parent while the variants of these layers are estimated: what enters every layer waits."""
    beside = max((sum(b.num_parameters for b in trained(space, False)) for space in spaces.values()), default=0)
    return Passing(
        models=[structure],
        sequences=sequences,
        seq_len=seq_len,
        compute_bytes=compute_bytes,
        spare=structure.num_layers + 2,
        beside=2 * beside,
    )


def scoring_costs(structure: Structure) -> dict[int, float]:
    """Of one replacement in each layer: the parameters that it passes through from there on."""
    costs, passed = {}, float(structure.vocab_size * structure.hidden_size)
    for index in reversed(range(structure.num_layers)):
        passed += layer_parameters(structure.layers[index])
        costs[index] = passed
    return costs


def balanced(costs: Sequence[float], count: int, most: int) -> tuple[tuple[int, int], ...]:
    """`count` consecutive stretches [begin, end) of `costs`, none empty or longer than `most`, with the least sum of squares."""

    @cache
    def best(begin: int, count: int) -> tuple[float, tuple[tuple[int, int], ...]]:
        left = len(costs) - begin
        if not count <= left <= count * most:
            return float("inf"), ()
        if count == 0:
            return 0.0, ()
        found = ((end, best(end, count - 1)) for end in range(begin + 1, min(begin + most, len(costs)) + 1))
        return min((sum(costs[begin:end]) ** 2 + rest, ((begin, end), *bounds)) for end, (rest, bounds) in found)

    return best(0, count)[1]


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
    world: int = 1,
    nested: bool = False,
) -> BuildPlan:
    """Fit as many layers as memory takes into a group; one group means that no activations are stored.

    spaces: of the layers to train. memory_bytes: what the device may use; compute_bytes, stored_bytes: per weight while training
    and on disk; on_host: the device is the CPU, so that what waits in host memory counts as device memory. held_bytes: of the
    process before it begins, which the peak has too. The scores that follow need room for one sequence at a time. Where layers
    differ, the dearest counts for all. world: processes, which take groups of about the same FLOPs; as many as there are layers
    can be used. nested: as `bundles` has it. Raises UserError when not even one layer fits.
    """
    layers, hidden = sorted(spaces), structure.hidden_size
    chosen = [structure.layers[index] for index in layers]
    sizes = [[sub_block.num_parameters for sub_block in trained(spaces[index], nested)] for index in layers]
    most, state = max(map(sum, sizes)), STATE_BYTES + compute_bytes + (START_BYTES if on_host else 0)
    flight = TWIN_BYTES if on_host else compute_bytes
    per_layer = max(state * sum(s) + layer_parameters(x) * compute_bytes for s, x in zip(sizes, chosen, strict=True))
    tokens = recipe.batch_size * recipe.seq_len
    working = max(workspace_bytes(layer, hidden, tokens, compute_bytes) for layer in chosen)
    most_nested = max(
        len(names) for index in layers for s in spaces[index].values() for names in [(), *bundles(s, nested)]
    )
    working += NESTED_STREAMS * max(0, most_nested - 1) * tokens * hidden * compute_bytes
    step = flight * max((size for s in sizes for size in s), default=0) + working
    calibration = max(calibration_bytes(layer, hidden, recipe, compute_bytes) for layer in chosen)
    if any(name.endswith(SURGEON) for index in layers for space in spaces[index].values() for name in space):
        calibration += 4 * 8 * max(map(widest, chosen)) ** 2  # Hessian, its inverse, and what changes them, in float64
    if any(b.rank for index in layers for b in trained(spaces[index], False) if isinstance(b, Linear)):
        calibration += 6 * 8 * hidden**2  # from the matrix and the moments to the directions that are kept, in float64
    sequences = max(recipe.num_steps * recipe.batch_size, recipe.calibration_sequences) + recipe.validation_sequences
    waiting = sequences * recipe.seq_len * hidden * compute_bytes  # between groups, in host memory
    extra, reserved = (HOST_BYTES, 1.0) if on_host else (0, RESERVED)
    fixed = structure.vocab_size * hidden * compute_bytes + max(step, calibration) + extra

    def peak(size: int) -> int:
        return int(reserved * (fixed + size * per_layer)) + (waiting if on_host and size * world < len(layers) else 0)

    one = {index: [{next(iter(spaces[index])): PARENT}] for index in layers}
    shape = {"sequences": recipe.validation_sequences, "seq_len": recipe.seq_len, "compute_bytes": compute_bytes}
    scored = scoring(structure, one, spaces, **shape).least(on_host) + extra
    size = next((n for n in range(len(layers), 0, -1) if peak(n) <= memory_bytes), 0)
    if size < 1 or scored > memory_bytes:
        least = held_bytes + max(min(peak(1), peak(len(layers))), scored) / PLANNED
        raise UserError(
            f"one layer with its variants needs {least / 1e9:.2f} GB in all, {(held_bytes + memory_bytes / PLANNED) / 1e9:.2f} "
            "GB are there: use a smaller `batch_size` or `seq_len`, fewer variants, or a larger `memory_limit`"
        )
    size = min(len(layers), size if group_size is None else group_size)
    rounds = -(-len(layers) // (size * world))
    costs = [training_flops(structure.layers[index], spaces[index], recipe.seq_len, nested) for index in layers]
    bounds = balanced(costs, min(len(layers), max(-(-len(layers) // size), rounds * world if world > 1 else 1)), size)
    groups = tuple(tuple(layers[a:b]) for a, b in bounds)
    size, flops = max(map(len, groups)), sum(costs)
    in_turn = [max(sum(costs[a:b]) for a, b in bounds[i : i + world]) for i in range(0, len(bounds), world)]
    longest = sum(in_turn) / flops
    num_tokens = recipe.num_steps * recipe.batch_size * recipe.seq_len
    activations = waiting if rounds > 1 else 0
    passed = [structure.layers[index] for index in range(max(layers)) if index not in spaces]
    flops += sum(forward_flops(sub_block, recipe.seq_len) for layer in passed for sub_block in layer.values())
    num_trained = sum(map(sum, sizes))
    every = [b for index in layers for space in spaces[index].values() for n, b in space.items() if n != PARENT]
    num_stored = sum(sub_block.num_parameters for sub_block in every)
    return BuildPlan(
        groups=groups,
        longest=longest,
        num_trained_parameters=num_trained,
        peak_memory_bytes=held_bytes + max(peak(size), scored),
        host_memory_bytes=activations + (0 if on_host else START_BYTES * size * most),
        disk_bytes=num_stored * stored_bytes + min(len(layers), size * world) * most * 12,
        flops=num_tokens * flops,
        num_tokens=num_tokens,
    )


def describe(plan: BuildPlan, seconds: float, spaces: Spaces, device: str) -> dict:
    """The plan as JSON-ready facts; every number in it is predicted."""
    names: dict[str, list[str]] = {}
    for slot, space in (item for layer in spaces.values() for item in layer.items()):
        names[slot] = list(dict.fromkeys([*names.get(slot, ()), *space]))
    predicted = asdict(plan)
    del predicted["longest"]
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
