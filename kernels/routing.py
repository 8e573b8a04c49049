"""A mixture's routing: the router's logits to every token's experts, with the rows of an expert together; and back to the tokens.

    scores = softmax(logits), or sigmoid(logits); a token's experts are the K best of scores + bias
    out[n] = Σ_k weights[n, k] · given[back[n, k]] + sigmoid(gate[n]) · shared[n]

With groups only experts of the best groups count, by the sum of their two best (DeepSeek-V3, arXiv 2412.19437). Of equal ones the lower
index comes first, and a NaN counts as infinity. Rows of an expert stand in the order of their tokens. Few tokens are routed by one
program, others by a program each and then, from all tokens' choices, by one an expert: no atomics, so equal inputs give equal bits; and
nobody waits for numbers, so that a CUDA graph holds it. Letters: N tokens, E experts, K experts of a token, M = N·K rows, H channels.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from puzzle.kernels.overlap import launch_options

try:
    import triton
    import triton.language as tl

    from puzzle.kernels.overlap import follow
except ImportError:  # no wheel for this platform: the twins serve
    triton = None  # type: ignore[assignment]

# `bench_routing.py` on an H200: with experts' products faster up to 4,096 tokens, one program faster at 128 tokens times experts and
# slower at 1,024; between these nothing was measured.
MAX_ROWS = 4096  # tokens of a batch that is routed here in the fast runtime
ONE_PROGRAM = 512  # tokens times experts, both up to a power of 2, that one program holds


class Routing(NamedTuple):
    """chosen [N, K]: a token's experts, the best first. weights [N, K] float32 (of the twin float64, of such logits): what each is multiplied by.
    place [M]: the token of each row, those of an expert together. ends [E]: after each expert's last row. back [N, K]: the row of a
    token's expert. All but the weights are int32."""

    chosen: Tensor
    weights: Tensor
    place: Tensor
    ends: Tensor
    back: Tensor


def best(value: Tensor, count: int) -> Tensor:
    """Places of the `count` largest in the last dimension, of equal ones the first first; a NaN counts as infinity."""
    return value.masked_fill(value.isnan(), torch.inf).argsort(dim=-1, descending=True, stable=True)[..., :count]


def route_reference(
    logits: Tensor, count: int, *, sigmoid: bool = False, bias: Tensor | None = None, num_groups: int = 1,
    num_topk_groups: int = 1, normalise: bool = False, scale: float = 1.0,
) -> Routing:  # fmt: skip
    """The twin of `route` in plain PyTorch: same arguments, same results up to rounding."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = wide.sigmoid() if sigmoid else wide.softmax(-1)
    choice = scores if bias is None else scores + bias.to(wide.dtype)
    choice = choice.masked_fill(choice.isnan(), torch.inf)
    if num_groups > 1:
        grouped = choice.unflatten(-1, (num_groups, -1))
        merit = grouped.gather(-1, best(grouped, 2)).sum(-1)
        outside = torch.ones_like(merit, dtype=torch.bool).scatter_(1, best(merit, num_topk_groups), False)
        # below all others, an expert of -∞ in a group that counts included
        order = choice.argsort(dim=-1, descending=True, stable=True)
        behind = outside.repeat_interleave(grouped.shape[-1], dim=-1).gather(1, order).byte()
        chosen = order.gather(1, behind.argsort(dim=-1, stable=True))[:, :count]
    else:
        chosen = best(choice, count)
    weights = scores.gather(1, chosen)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if sigmoid else 0))
    order = chosen.flatten().argsort(stable=True)
    counts = chosen.new_zeros(logits.shape[1]).scatter_add_(0, chosen.flatten(), torch.ones_like(order))
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    place, ends = order // count, counts.cumsum(0)
    return Routing(chosen.int(), weights * scale, place.int(), ends.int(), back.view(chosen.shape).int())


def combine_reference(
    given: Tensor, back: Tensor, weights: Tensor, shared: Tensor | None = None, gate: Tensor | None = None
) -> Tensor:
    """The twin of `combine` in plain PyTorch: same arguments, same results up to rounding."""
    wide = torch.promote_types(given.dtype, torch.float32)
    out = (given[back].to(wide) * weights[..., None].to(wide)).sum(1)
    if shared is not None:
        out = out + (shared.to(wide) if gate is None else shared.to(wide) * gate.to(wide).view(-1, 1).sigmoid())
    return out.to(given.dtype)


if triton is not None:
    NEVER = tl.constexpr(-(2**63))  # a key below all others
    ALWAYS = tl.constexpr(2**63 - 1)

    @triton.jit
    def keys(value, index):
        """One int64 of a float32 and its index from 0: it is larger where the value is, of equal values where the index is lower."""
        bits = tl.where(value == value, value, float("inf")).to(tl.int32, bitcast=True)
        ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        return (ordered.to(tl.int64) << 32) + (0x7FFFFFFF - index)

    @triton.jit
    def values(key):
        """The float32 of a key."""
        ordered = (key >> 32).to(tl.int32)
        return tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)

    @triton.jit(do_not_specialize=["N", "K", "num_groups", "num_topk_groups"])
    def route_kernel(
        logits_ptr, bias_ptr, chosen_ptr, weights_ptr, place_ptr, ends_ptr, back_ptr,
        N, E, K, num_groups, num_topk_groups, scale,
        SIGMOID: tl.constexpr, BIAS: tl.constexpr, GROUPS: tl.constexpr, NORMALISE: tl.constexpr, WHOLE: tl.constexpr,
        BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """BLOCK_N tokens to their experts. WHOLE: these are all tokens, and rows are put in the order of experts too."""
        follow(PDL)
        n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
        e = tl.arange(0, BLOCK_E)[None, :]
        valid = (n < N) & (e < E)
        logits = tl.load(logits_ptr + n.to(tl.int64) * E + e, mask=valid, other=0.0).to(tl.float32)
        if SIGMOID:
            scores = tl.sigmoid(logits)
        else:
            logits = tl.where(e < E, logits, -float("inf"))
            scores = tl.exp(logits - tl.max(logits, 1)[:, None])
            scores = scores / tl.sum(scores, 1)[:, None]
        choice = scores
        if BIAS:
            choice += tl.load(bias_ptr + e, mask=e < E, other=0.0).to(tl.float32)
        key = tl.where(e < E, keys(choice, e), NEVER)
        if GROUPS:
            group = e // (E // num_groups)
            merit = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
            for g in tl.range(0, num_groups):
                own = tl.where(group == g, key, NEVER)
                first = tl.max(own, 1)[:, None]
                second = tl.max(tl.where(own < first, own, NEVER), 1)[:, None]
                merit = tl.where(group == g, values(first) + values(second), merit)
            merits = tl.where(e < E, keys(merit, group), NEVER)
            least = tl.full((BLOCK_N,), ALWAYS, tl.int64)
            for _ in tl.range(0, num_topk_groups):
                least = tl.max(tl.where(merits < least[:, None], merits, NEVER), 1)
            key = tl.where(merits >= least[:, None], key, NEVER)
        slot = tl.full((BLOCK_N, BLOCK_E), -1, tl.int32)  # which of its token's experts this one is
        last = tl.full((BLOCK_N,), ALWAYS, tl.int64)
        for k in tl.range(0, K):
            last = tl.max(tl.where(key < last[:, None], key, NEVER), 1)
            slot = tl.where(key == last[:, None], k, slot)
        picked = valid & (slot >= 0)
        if NORMALISE:
            total = tl.sum(tl.where(picked, scores, 0.0), 1)[:, None]
            scores = scores / ((total + 1e-20) if SIGMOID else total)
        at = n * K + slot
        tl.store(chosen_ptr + at, e + tl.zeros_like(slot), mask=picked)
        tl.store(weights_ptr + at, scores * scale, mask=picked)
        if WHOLE:
            one = picked.to(tl.int32)
            count = tl.sum(one, 0)
            after = tl.cumsum(count, 0)
            row = (after - count)[None, :]
            if BLOCK_N > 1:
                row += tl.cumsum(one, 0) - one
            tl.store(place_ptr + row, n + tl.zeros_like(slot), mask=picked)
            tl.store(back_ptr + at, row, mask=picked)
            expert = tl.arange(0, BLOCK_E)
            tl.store(ends_ptr + expert, after, mask=expert < E)

    @triton.jit(do_not_specialize=["M", "K"])
    def align_kernel(
        chosen_ptr, place_ptr, ends_ptr, back_ptr, M, K, BLOCK: tl.constexpr, PDL: tl.constexpr
    ):  # fmt: skip
        """The rows of one expert, from what all tokens chose."""
        follow(PDL)
        e = tl.program_id(0)
        lanes = tl.arange(0, BLOCK)
        before = tl.zeros((BLOCK,), tl.int32)
        for begin in tl.range(0, M, BLOCK):
            chosen = tl.load(chosen_ptr + begin + lanes, mask=begin + lanes < M, other=e)
            before += (chosen < e).to(tl.int32)
        end = tl.sum(before, 0)
        for begin in tl.range(0, M, BLOCK):
            at = begin + lanes
            mine = (at < M) & (tl.load(chosen_ptr + at, mask=at < M, other=0) == e)
            one = mine.to(tl.int32)
            row = end + tl.cumsum(one, 0) - one
            tl.store(place_ptr + row, at // K, mask=mine)
            tl.store(back_ptr + at, row, mask=mine)
            end += tl.sum(one, 0)
        tl.store(ends_ptr + e, end)

    @triton.jit(do_not_specialize=["K"])
    def combine_kernel(
        given_ptr, back_ptr, weights_ptr, shared_ptr, gate_ptr, out_ptr, H, K,
        SHARED: tl.constexpr, GATE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """BLOCK_H channels of one token."""
        follow(PDL)
        n = tl.program_id(0).to(tl.int64)
        h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        total = tl.zeros((BLOCK_H,), tl.float32)
        for begin in tl.range(0, K, BLOCK_K):
            k = begin + tl.arange(0, BLOCK_K)
            row = tl.load(back_ptr + n * K + k, mask=k < K, other=0).to(tl.int64)
            weight = tl.load(weights_ptr + n * K + k, mask=k < K, other=0.0)
            mask = (k < K)[:, None] & (h < H)[None, :]
            given = tl.load(given_ptr + row[:, None] * H + h[None, :], mask=mask, other=0.0).to(tl.float32)
            total += tl.sum(weight[:, None] * given, 0)
        if SHARED:
            shared = tl.load(shared_ptr + n * H + h, mask=h < H, other=0.0).to(tl.float32)
            if GATE:
                shared *= tl.sigmoid(tl.load(gate_ptr + n).to(tl.float32))
            total += shared
        tl.store(out_ptr + n * H + h, total.to(out_ptr.dtype.element_ty), mask=h < H)


def _on_kernels(x: Tensor) -> bool:
    return triton is not None and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def route(
    logits: Tensor, count: int, *, sigmoid: bool = False, bias: Tensor | None = None, num_groups: int = 1,
    num_topk_groups: int = 1, normalise: bool = False, scale: float = 1.0, one_program: bool | None = None,
) -> Routing:  # fmt: skip
    """logits [N, E], count K of a token's experts -> where everything goes.

    sigmoid: scores in place of a softmax. bias [E]: of the choice alone. normalise: a token's weights sum to 1, before all are multiplied
    by scale. one_program: for few tokens alone; by default for those that fit. No gradients. Raises ValueError for numbers that do not fit.
    """
    if logits.ndim != 2 or (bias is not None and bias.shape != logits.shape[1:]):
        raise ValueError(
            f"logits {tuple(logits.shape)} want two dimensions and a bias for each expert, not {None if bias is None else tuple(bias.shape)}"
        )
    num, experts = logits.shape
    size = experts // num_groups
    fits = size * num_groups == experts and num_topk_groups <= num_groups and (num_groups == 1 or size > 1)
    if not fits or not 1 <= count <= size * num_topk_groups:
        raise ValueError(f"{count} of {experts} experts in {num_topk_groups} of {num_groups} groups")
    if not _on_kernels(logits):
        return route_reference(
            logits, count, sigmoid=sigmoid, bias=bias, num_groups=num_groups, num_topk_groups=num_topk_groups,
            normalise=normalise, scale=scale,
        )  # fmt: skip
    logits, options = logits.contiguous(), launch_options(logits.device)
    chosen, back = torch.empty(2, num, count, dtype=torch.int32, device=logits.device)
    weights = torch.empty(num, count, dtype=torch.float32, device=logits.device)
    place, ends = chosen.new_empty(num * count), chosen.new_empty(experts)
    block_n, block_e = triton.next_power_of_2(max(1, num)), max(32, triton.next_power_of_2(experts))
    whole = block_n * block_e <= ONE_PROGRAM if one_program is None else one_program
    route_kernel[(1 if whole else num,)](
        logits, logits if bias is None else bias, chosen, weights, place, ends, back,
        num, experts, count, num_groups, num_topk_groups, scale,
        SIGMOID=sigmoid, BIAS=bias is not None, GROUPS=num_groups > 1, NORMALISE=normalise, WHOLE=whole,
        BLOCK_N=block_n if whole else 1, BLOCK_E=block_e, num_warps=4 if whole else 1, **options,
    )  # fmt: skip
    if not whole:
        block = min(1024, triton.next_power_of_2(max(1, num * count)))
        align_kernel[(experts,)](chosen, place, ends, back, num * count, count, BLOCK=block, num_warps=4, **options)
    return Routing(chosen, weights, place, ends, back)


def combine(
    given: Tensor, back: Tensor, weights: Tensor, shared: Tensor | None = None, gate: Tensor | None = None
) -> Tensor:
    """given [M, H] of experts, back and weights [N, K] of a `Routing`, shared [N, H], gate [N, 1] -> [N, H] in given's dtype.

    float32 sums, one rounding. No gradients. Raises ValueError for shapes that do not fit.
    """
    num, hidden = len(back), given.shape[1]
    if (
        back.shape != weights.shape
        or len(given) != back.numel()
        or (shared is not None and shared.shape != (num, hidden))
    ):
        raise ValueError(
            f"given {tuple(given.shape)} does not fit back {tuple(back.shape)}, weights {tuple(weights.shape)} and shared "
            f"{None if shared is None else tuple(shared.shape)}"
        )
    if gate is not None and (shared is None or gate.numel() != num):
        raise ValueError(f"gate {tuple(gate.shape)} wants {num} rows of a shared expert")
    if not _on_kernels(given):
        return combine_reference(given, back, weights, shared, gate)
    given, out = given.contiguous(), given.new_empty(num, hidden)
    count, block_h = back.shape[1], min(256, triton.next_power_of_2(hidden))
    combine_kernel[(num, triton.cdiv(hidden, block_h))](
        given, back, weights, given if shared is None else shared.contiguous(), given if gate is None else gate.contiguous(),
        out, hidden, count, SHARED=shared is not None, GATE=gate is not None,
        BLOCK_K=min(16, triton.next_power_of_2(count)), BLOCK_H=block_h, num_warps=4, **launch_options(given.device),
    )  # fmt: skip
    return out
