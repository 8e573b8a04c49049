"""What a library build will take, before anything starts: groups, memory, disk, FLOPs and time.

Letters: P parameters, T tokens of a sequence, N·D query heads · head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from puzzle.base.errors import UserError
from puzzle.blocklib.distill import Recipe
from puzzle.blocklib.layer import KINDS, Kind, LayerSpec, attention_shapes, ffn_shapes
from puzzle.blocklib.variant import PARENT, parse_variant

STATE_BYTES = 12  # per trained parameter, all the time: float32 master and AdamW's two moments
START_BYTES = (
    4  # per trained parameter, in host memory: the initial weights, kept in case training does not improve them
)
RESERVED = (
    1.15  # what the GPU's allocator holds over what is in use: 27.0 GB for 23.8 GB, benchmarks/results/build_8b.csv
)
FLIGHT_BYTES = 12  # per parameter of the one variant that takes its step: float32 gradient, its masked copy, bf16 casts


def _numel(shapes: dict[str, tuple[int, ...]]) -> int:
    total = 0
    for shape in shapes.values():
        total += shape[0] * (shape[1] if len(shape) > 1 else 1)
    return total


def layer_parameters(spec: LayerSpec) -> int:
    """Parameters of one parent layer, norms included."""
    return _numel(attention_shapes(spec)) + _numel(ffn_shapes(spec))


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildPlan:
    """groups: layer indices trained together. Bytes and FLOPs are predictions by the formulas of `plan_build`."""

    groups: tuple[tuple[int, ...], ...]
    trained_parameters_per_layer: int
    peak_memory_bytes: int
    host_memory_bytes: int
    disk_bytes: int
    flops: float
    num_tokens: int


def attention_flops(spec: LayerSpec, seq_len: int, window: int | None) -> float:
    """Forward FLOPs per token of the causal score and value products: 4 · N·D · mean context."""
    context = (seq_len + 1) / 2 if window is None else min(window, (seq_len + 1) / 2)
    return 4 * spec.num_attention_heads * spec.head_dim * context


def training_flops(spec: LayerSpec, variants: dict[Kind, list[str]], seq_len: int) -> float:
    """FLOPs per token and layer: the parent forward (2P) and every trained variant forward and backward (6P)."""
    total = 2 * layer_parameters(spec) + attention_flops(spec, seq_len, spec.window)
    for kind in KINDS:
        for name in variants[kind]:
            if name == PARENT:
                continue
            footprint = parse_variant(kind, name, spec).footprint(spec)
            total += 6 * footprint.num_parameters
            if footprint.kv_elements_per_token:
                total += 3 * attention_flops(spec, seq_len, footprint.window)
    return total


def variant_parameters(spec: LayerSpec, variants: dict[Kind, list[str]]) -> list[int]:
    """Of every variant that is trained, in one layer."""
    return [
        parse_variant(kind, name, spec).footprint(spec).num_parameters
        for kind in KINDS
        for name in variants[kind]
        if name != PARENT
    ]


def calibration_bytes(spec: LayerSpec, recipe: Recipe, compute_bytes: int) -> int:
    """While a layer's variants are initialised: the calibration streams, one batch's statistics in float64, the least
    squares, and a float32 copy of a sub-block."""
    tokens, hidden = recipe.batch_size * recipe.seq_len, spec.hidden_size
    streams = recipe.calibration_sequences * recipe.seq_len * hidden * compute_bytes
    statistics = tokens * (2 * 8 * spec.intermediate_size + 3 * 8 * hidden)
    return streams + statistics + 6 * 8 * hidden**2 + 4 * layer_parameters(spec)


def workspace_bytes(spec: LayerSpec, recipe: Recipe, compute_bytes: int) -> int:
    """Activations of one variant in flight: the residual streams and targets, and the widest module's saved tensors."""
    tokens = recipe.batch_size * recipe.seq_len
    inner = 4 * spec.intermediate_size + 6 * spec.hidden_size
    attention = 4 * spec.num_attention_heads * spec.head_dim + 6 * spec.hidden_size
    streams = 5 * spec.hidden_size * compute_bytes + 4 * spec.hidden_size * 4
    return tokens * (max(inner, attention) * compute_bytes + streams)


def plan_build(
    spec: LayerSpec,
    variants: dict[Kind, list[str]],
    recipe: Recipe,
    *,
    layers: list[int],
    memory_bytes: int,
    compute_bytes: int,
    stored_bytes: int,
    embedding_bytes: int,
    on_host: bool,
    group_size: int | None = None,
) -> BuildPlan:
    """Fit as many layers as memory takes into a group; one group means that no activations are stored.

    memory_bytes: what the device may use; compute_bytes, stored_bytes: per weight while training and on disk; on_host:
    the device is the CPU, so that what waits in host memory counts as device memory.
    Raises UserError when not even one layer fits.
    """
    per_variant = variant_parameters(spec, variants)
    trained = sum(per_variant)
    parent = layer_parameters(spec) * compute_bytes
    per_layer = (STATE_BYTES + (START_BYTES if on_host else 0)) * trained + parent
    step = FLIGHT_BYTES * max(per_variant, default=0) + workspace_bytes(spec, recipe, compute_bytes)
    fixed = embedding_bytes + max(step, calibration_bytes(spec, recipe, compute_bytes))
    reserved = 1.0 if on_host else RESERVED
    fitting = int((memory_bytes / reserved - fixed) // per_layer)
    if fitting < 1:
        raise UserError(
            f"one layer with its variants needs {reserved * (fixed + per_layer) / 1e9:.1f} GB, {memory_bytes / 1e9:.1f} GB are free: "
            "use a smaller --batch-size or --seq-len, or fewer variants"
        )
    size = min(len(layers), fitting if group_size is None else group_size)
    size = -(-len(layers) // -(-len(layers) // size))  # as many groups, evenly filled
    groups = tuple(tuple(layers[i : i + size]) for i in range(0, len(layers), size))
    num_tokens = recipe.num_steps * recipe.batch_size * recipe.seq_len
    sequences = max(recipe.num_steps * recipe.batch_size, recipe.calibration_sequences) + recipe.validation_sequences
    stored = sequences * recipe.seq_len
    activations = stored * spec.hidden_size * compute_bytes if len(groups) > 1 else 0
    skipped = max(layers) + 1 - len(layers)
    flops = num_tokens * len(layers) * training_flops(spec, variants, recipe.seq_len)
    flops += num_tokens * skipped * (2 * layer_parameters(spec) + attention_flops(spec, recipe.seq_len, spec.window))
    return BuildPlan(
        groups=groups,
        trained_parameters_per_layer=trained,
        peak_memory_bytes=int(reserved * (fixed + size * per_layer)) + (activations if on_host else 0),
        host_memory_bytes=activations + (0 if on_host else START_BYTES * size * trained),
        disk_bytes=len(layers) * trained * stored_bytes + size * trained * 12,
        flops=flops,
        num_tokens=num_tokens,
    )


def describe(plan: BuildPlan, seconds: float, variants: dict[Kind, list[str]], device: str) -> dict:
    """The plan as JSON-ready facts; every number in it is predicted."""
    return {
        "device": device,
        "variants": variants,
        "groups": [list(group) for group in plan.groups],
        "trained_parameters_per_layer": plan.trained_parameters_per_layer,
        "predicted": {
            "peak_memory_bytes": plan.peak_memory_bytes,
            "host_memory_bytes": plan.host_memory_bytes,
            "disk_bytes": plan.disk_bytes,
            "flops": plan.flops,
            "num_tokens": plan.num_tokens,
            "seconds": round(seconds, 1),
            "tokens_per_second": round(plan.num_tokens / seconds, 1),
        },
    }
