"""Products of experts: each expert's rows times its own matrix, rows gathered on the way in, the activation on the way out.

    out = x[place] Wᵀ                           x [N, K], place [M], W [O, K] of the expert whose row it is
    out = act(x[place] gateᵀ) · (x[place] Wᵀ)   gated: silu or gelu_tanh; relu2 has no gate

Tiles of rows are counted over all experts, and how many there may be follows from the shapes alone, so that nobody waits for the
experts' numbers of rows and a CUDA graph holds it; programs beyond the last tile end at once. float32 sums, one rounding at the end.
Letters: N tokens, M rows (of all experts, those of one together), E experts, K columns of a row, O of what comes out.
"""

from __future__ import annotations

import os
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the twin serves
    triton = None  # type: ignore[assignment]

# Mean rows of an expert, from and to, at which this is faster than torch's grouped products with their gathering and activation, in
# benchmarks/kernels/bench_grouped.py (H200, 2026-11-28: 1.3 to 2.3 times up to 32; at 192 and 256 0.8 and 1.0 times). None: torch's run.
FASTER: tuple[float, float] | None = (0.0, 32.0)


class Tile(NamedTuple):
    """Of one program: rows, columns and depth of a step, warps, and stages of the pipeline."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def measured(x: Tensor) -> bool:
    """Whether kernels of experts were timed in x's dtype on such a GPU; of a CPU, where their twins run, they need not be."""
    return not x.is_cuda or (x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device)[0] == 9)


def faster(x: Tensor, num_rows: int, num_experts: int) -> bool:
    """Whether this is to be run for so many rows of all experts together, of x's device and dtype: on a GPU of what was measured alone, since
    tiles want more shared memory than others have."""
    return measured(x) and FASTER is not None and FASTER[0] <= num_rows / num_experts <= FASTER[1]


def choose_tile(num_rows: int, num_experts: int) -> Tile:
    """The fastest at 0.4 to 3, at 24 and at 192 rows an expert, of Nemotron 3 Nano's experts on an H200 (`bench_grouped.py --sweep`,
    2026-11-27, no CSV)."""
    mean = num_rows / num_experts
    if mean <= 16:
        return Tile(16, 64, 128, 4, 4)
    return Tile(64, 128, 64, 4, 3) if mean <= 64 else Tile(128, 128, 64, 8, 3)


def activated(gate: Tensor | None, up: Tensor, activation: str | None) -> Tensor:
    """Of products of one shape; activations as of `grouped_linear`."""
    if gate is None:
        return F.relu(up).square() if activation == "relu2" else up
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def grouped_linear_reference(
    x: Tensor, weight: Tensor, ends: Tensor, place: Tensor | None = None, gate: Tensor | None = None, activation: str | None = None
) -> Tensor:  # fmt: skip
    """The twin of `grouped_linear` in plain PyTorch: expert after expert."""
    wide, rows = torch.promote_types(x.dtype, torch.float32), x if place is None else x[place]
    out = rows.new_empty(len(rows), weight.shape[1])
    for expert, (begin, end) in enumerate(pairwise([0, *ends.tolist()])):
        own = rows[begin:end].to(wide)
        gated = None if gate is None else own @ gate[expert].to(wide).T
        out[begin:end] = activated(gated, own @ weight[expert].to(wide).T, activation).to(x.dtype)
    return out


if triton is not None:

    @triton.jit
    def grouped_kernel(
        x_ptr, place_ptr, gate_ptr, w_ptr, ends_ptr, out_ptr, E, OUT, K,
        EXPERTS: tl.constexpr, GATHER: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        tile = tl.program_id(0)
        e = tl.arange(0, EXPERTS)
        last = tl.load(ends_ptr + e, mask=e < E, other=0)
        first = tl.load(ends_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
        tiles = (last - tl.where(e < E, first, 0) + BLOCK_M - 1) // BLOCK_M
        after = tl.cumsum(tiles, 0)
        if tile < tl.sum(tiles, 0):
            mine = tl.sum((after <= tile).to(tl.int32), 0)  # experts whose tiles all come before
            own = e == mine
            before = tl.sum(tl.where(own, after - tiles, 0), 0)
            rows = tl.sum(tl.where(own, first, 0), 0) + (tile - before) * BLOCK_M + tl.arange(0, BLOCK_M)
            valid = rows < tl.sum(tl.where(own, last, 0), 0)
            n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
            source = tl.load(place_ptr + rows, mask=valid, other=0).to(tl.int64) if GATHER else rows.to(tl.int64)
            matrix = (mine.to(tl.int64) * OUT + n.to(tl.int64)) * K
            up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for begin in tl.range(0, K, BLOCK_K):
                k = begin + tl.arange(0, BLOCK_K)
                mask = valid[:, None] & (k < K)[None, :]
                a = tl.load(x_ptr + source[:, None] * K + k[None, :], mask=mask, other=0.0)
                inside = (n < OUT)[None, :] & (k < K)[:, None]
                w = tl.load(w_ptr + matrix[None, :] + k[:, None], mask=inside, other=0.0)
                up += tl.dot(a, w, input_precision="ieee")
                if (ACTIVATION == "silu") | (ACTIVATION == "gelu_tanh"):
                    g = tl.load(gate_ptr + matrix[None, :] + k[:, None], mask=inside, other=0.0)
                    gate += tl.dot(a, g, input_precision="ieee")
            if ACTIVATION == "silu":
                up = gate * tl.sigmoid(gate) * up
            elif ACTIVATION == "gelu_tanh":  # tanh(u) = 2 sigmoid(2u) - 1
                up = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
            elif ACTIVATION == "relu2":
                up = tl.maximum(up, 0.0) * tl.maximum(up, 0.0)
            at = rows.to(tl.int64)[:, None] * OUT + n[None, :]
            tl.store(out_ptr + at, up.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (n < OUT)[None, :])


def grouped_linear(
    x: Tensor, weight: Tensor, ends: Tensor, *, place: Tensor | None = None, gate: Tensor | None = None,
    activation: str | None = None, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """x [N, K], weight and gate [E, O, K], ends [E] after each expert's last row, place [M] (None: row m is x's) -> [M, O].

    activation: silu or gelu_tanh of the gate's product, relu2 of the product itself, or None. No gradients. Raises ValueError for
    shapes that do not fit, and for an activation without the gate that it needs, or with one that it has not.
    """
    if weight.ndim != 3 or x.ndim != 2 or x.shape[1] != weight.shape[2] or len(ends) != len(weight):
        raise ValueError(f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and ends {tuple(ends.shape)} do not fit")
    if activation not in (None, "relu2", "silu", "gelu_tanh") or (gate is None) != (activation in (None, "relu2")):
        raise ValueError(f"activation {activation!r} {'without' if gate is None else 'with'} a gate")
    if gate is not None and gate.shape != weight.shape:
        raise ValueError(f"gate {tuple(gate.shape)} is not as weight {tuple(weight.shape)}")
    if triton is None or not (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return grouped_linear_reference(x, weight, ends, place, gate, activation)
    count, outer, inner = weight.shape
    num_rows = len(x if place is None else place)
    x, weight, out = x.contiguous(), weight.contiguous(), x.new_empty(num_rows, outer)
    tile = tile or choose_tile(num_rows, count)
    most = num_rows // tile.block_m + min(count, num_rows)  # an expert's last tile may be anything but empty
    grouped_kernel[(most, triton.cdiv(outer, tile.block_n))](
        x, x if place is None else place, weight if gate is None else gate.contiguous(), weight, ends.int(), out, count, outer, inner,
        EXPERTS=triton.next_power_of_2(count), GATHER=place is not None, ACTIVATION=activation or "none", BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out
