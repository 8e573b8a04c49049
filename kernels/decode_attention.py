"""One query per sequence over a paged KV cache: split-KV decode attention with grouped query heads (GQA).

    out = softmax(q Kᵀ · scale) V over the last `window` (default: all) of lengths[b] cached tokens; a sink of a head, if there are any, is
    one more logit of its softmax, whose value is 0

Each program takes one sequence, one KV head with all its query heads, and one of `splits` stretches of the context; a second
kernel merges the stretches with their log-sum-exps (Flash-Decoding; online softmax: Milakov and Gimelshein 2018). K and V are
read once. The grid depends on shapes and max_context alone, so that a CUDA graph may replay it while sequences grow.
Letters: B sequences, N query heads, K KV heads, G = N / K, D head_dim, S page size.
"""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

from puzzle.kernels.overlap import launch_options

try:
    import triton
    import triton.language as tl

    from puzzle.kernels.overlap import follow
except ImportError:  # no wheel for this platform: the twin serves
    triton = None  # type: ignore[assignment]

PROGRAMS_PER_SM = {
    2: 2,
    1: 4,
}  # by bytes of a cached value: stretches are cut until the grid has about that many programs
MIN_STRETCH = 256  # tokens: shorter ones cost more in merging than they save
NUM_WARPS, NUM_STAGES = {2: 4, 1: 2}, {2: 3, 1: 2}  # by bytes of a cached value; in fp8 4 and 3 take 52 µs for 42


def decode_attention_reference(
    q: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor, *, max_context: int, window: int | None = None,
    scale: float | None = None, k_scale: float = 1.0, v_scale: float = 1.0, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The twin of `decode_attention` in plain PyTorch: same arguments, same results up to rounding."""
    batch, heads, dim = q.shape
    kv_heads, page = cache.shape[2], cache.shape[3]
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(batch, heads, dim, dtype=wide, device=q.device)
    for b, length in enumerate(lengths.tolist()):
        if length == 0:
            continue
        stored = cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache  # torch 2.9 indexes no fp8
        pages = stored[block_table[b, : -(-length // page)].long()].view(cache.dtype).to(wide)  # [P, 2, K, S, D]
        keys, values = (x.transpose(0, 1).reshape(kv_heads, -1, dim)[:, :length] for x in pages.unbind(1))
        first = 0 if window is None else max(0, length - window)
        keys, values = keys[:, first:] * k_scale, values[:, first:] * v_scale
        rows = q[b].view(kv_heads, heads // kv_heads, dim).to(wide)
        logits = rows @ keys.transpose(1, 2) * (dim**-0.5 if scale is None else scale)
        if sinks is not None:
            logits = torch.cat((logits, sinks.to(wide).view(kv_heads, -1, 1)), dim=-1)
        weights = torch.softmax(logits, dim=-1)[..., : keys.shape[1]]
        out[b] = (weights @ values).reshape(heads, dim)
    return out.to(q.dtype)


if triton is not None:

    @triton.jit(
        do_not_specialize=["splits"]
    )  # one kernel for all numbers of stretches: a compilation takes half a second
    def split_kernel(
        q_ptr, cache_ptr, table_ptr, lengths_ptr, out_ptr, part_ptr, lse_ptr, sinks_ptr,
        q_stride_b, q_stride_n, cache_stride_block, cache_stride_kv, cache_stride_head, table_stride,
        scale, v_scale, splits,
        G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, WINDOW: tl.constexpr,
        BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
        FP8: tl.constexpr, SINKS: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        follow(PDL)
        b, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
        kv_heads = tl.num_programs(1)
        length = tl.load(lengths_ptr + b)
        first = tl.maximum(0, length - WINDOW) if WINDOW > 0 else 0
        first_page, num_pages = first // S, tl.cdiv(length, S)
        stretch = tl.cdiv(num_pages - first_page, splits)
        begin = first_page + split * stretch
        end = tl.minimum(begin + stretch, num_pages)

        g, d, s = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
        inside_d = d < D
        heads = head * G + g
        q = tl.load(
            q_ptr + b * q_stride_b + heads[:, None] * q_stride_n + d[None, :],
            mask=(g < G)[:, None] & inside_d[None, :], other=0.0,
        )  # fmt: skip
        # fp8 becomes fp16 in one instruction for two values, bf16 takes many; base 2 throughout: exp2 is one instruction
        compute = tl.float16 if FP8 else q_ptr.dtype.element_ty
        q = (q.to(tl.float32) * (scale * 1.4426950408889634)).to(compute)
        top = tl.full((BLOCK_G,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_G,), tl.float32)
        if SINKS:  # of the first stretch alone, which begins as if it had seen a key with that logit and the value 0
            sink = tl.load(sinks_ptr + heads, mask=g < G, other=0.0).to(tl.float32) * 1.4426950408889634
            top, total = tl.where(split == 0, sink, top), tl.where(split == 0, 1.0, total)
        found = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
        inner = cache_ptr + head * cache_stride_head + s[:, None] * D + d[None, :]
        for page in tl.range(begin, end, num_stages=STAGES):
            block = tl.load(table_ptr + b * table_stride + page).to(tl.int64)
            at = page * S + s
            seen = (s < S) & (at < length) & (at >= first)
            mask = seen[:, None] & inside_d[None, :]
            k = tl.load(inner + block * cache_stride_block, mask=mask, other=0.0).to(compute)
            v = tl.load(inner + block * cache_stride_block + cache_stride_kv, mask=mask, other=0.0).to(compute)
            logits = tl.where(seen[None, :], tl.dot(q, tl.trans(k), input_precision="ieee"), -float("inf"))
            new_top = tl.maximum(top, tl.max(logits, axis=1))
            safe = tl.where(new_top == -float("inf"), 0.0, new_top)
            shrink, weights = tl.exp2(top - safe), tl.exp2(logits - safe[:, None])
            total = total * shrink + tl.sum(weights, axis=1)
            found = found * shrink[:, None] + tl.dot(weights.to(compute), v, input_precision="ieee")
            top = new_top
        kept = tl.where(total > 0.0, total, 1.0)
        found = found / kept[:, None] * v_scale
        rows = b * kv_heads * G + heads
        mask = (g < G)[:, None] & inside_d[None, :]
        if SPLIT:
            tl.store(part_ptr + (rows[:, None] * splits + split) * D + d[None, :], found, mask=mask)
            lse = tl.where(total > 0.0, top + tl.log2(kept), -float("inf"))
            tl.store(lse_ptr + rows * splits + split, lse, mask=g < G)
        else:
            tl.store(out_ptr + rows[:, None] * D + d[None, :], found.to(out_ptr.dtype.element_ty), mask=mask)

    @triton.jit(do_not_specialize=["splits"])
    def merge_kernel(
        part_ptr, lse_ptr, out_ptr, splits, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
        PDL: tl.constexpr,
    ):  # fmt: skip
        follow(PDL)
        row = tl.program_id(0).to(tl.int64)
        d, split = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_SPLITS)
        lse = tl.load(lse_ptr + row * splits + split, mask=split < splits, other=-float("inf"))
        top = tl.max(lse, axis=0)
        weights = tl.exp2(lse - tl.where(top == -float("inf"), 0.0, top))
        part = tl.load(
            part_ptr + (row * splits + split[:, None]) * D + d[None, :],
            mask=(split < splits)[:, None] & (d < D)[None, :], other=0.0,
        )  # fmt: skip
        total = tl.sum(weights, axis=0)
        found = tl.sum(part * weights[:, None], axis=0) / tl.where(total > 0.0, total, 1.0)
        tl.store(out_ptr + row * D + d, found.to(out_ptr.dtype.element_ty), mask=d < D)


@cache
def _num_multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def num_splits(batch: int, kv_heads: int, max_context: int, itemsize: int, device: torch.device) -> int:
    """Stretches that fill the device without becoming shorter than MIN_STRETCH tokens."""
    wanted = PROGRAMS_PER_SM.get(itemsize, 2) * (
        _num_multiprocessors(device.index or 0) if device.type == "cuda" else 4
    )
    return max(1, min(wanted // (batch * kv_heads), -(-max_context // MIN_STRETCH), 64))


def decode_attention(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    max_context: int,
    window: int | None = None,
    scale: float | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    sinks: Tensor | None = None,
    splits: int | None = None,
    num_warps: int | None = None,
) -> Tensor:
    """q [B, N, D], head_dim contiguous -> [B, N, D]

    cache [num_blocks, 2 (k, v), K, S, D] in q's dtype or float8_e4m3fn (value = cached · scale). block_table [B, pages]
    int32. lengths [B] int32: cached tokens, the query's own included; 0 gives zeros. max_context: no length exceeds it.
    window: only the last `window` tokens count. scale: of the logits, D^-½ by default. sinks [N]: of every head. splits: stretches of the context.
    Raises ValueError for shapes that do not fit.
    """
    batch, heads, dim = q.shape
    kv_heads, page = cache.shape[2], cache.shape[3]
    if heads % kv_heads or cache.shape[4] != dim or block_table.shape[0] != batch or lengths.shape != (batch,):
        raise ValueError(
            f"q {tuple(q.shape)} does not fit cache {tuple(cache.shape)}, block_table {tuple(block_table.shape)}, "
            f"lengths {tuple(lengths.shape)}"
        )
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks {tuple(sinks.shape)} do not fit q {tuple(q.shape)}: one a head")
    if triton is None or not (q.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return decode_attention_reference(
            q, cache, block_table, lengths, max_context=max_context, window=window, scale=scale, k_scale=k_scale,
            v_scale=v_scale, sinks=sinks,
        )  # fmt: skip
    reach = max_context if window is None else min(window, max_context)
    count = splits or num_splits(batch, kv_heads, reach, cache.itemsize, q.device)
    out = torch.empty(batch, heads, dim, dtype=q.dtype, device=q.device)
    part = torch.empty((batch * heads, count, dim) if count > 1 else (1, 1, 1), dtype=torch.float32, device=q.device)
    lse = torch.empty((batch * heads, count) if count > 1 else (1, 1), dtype=torch.float32, device=q.device)
    group, block_d = heads // kv_heads, triton.next_power_of_2(dim)
    fp8 = cache.dtype == torch.float8_e4m3fn
    split_kernel[(batch, kv_heads, count)](
        q, cache, block_table, lengths, out, part, lse, out if sinks is None else sinks.contiguous(),
        q.stride(0), q.stride(1), cache.stride(0), cache.stride(1), cache.stride(2), block_table.stride(0),
        (dim**-0.5 if scale is None else scale) * k_scale, v_scale, count,
        G=group, D=dim, S=page, WINDOW=window or 0,
        BLOCK_G=max(16, triton.next_power_of_2(group)), BLOCK_D=max(16, block_d),
        BLOCK_S=max(16, triton.next_power_of_2(page)), SPLIT=count > 1, STAGES=NUM_STAGES.get(cache.itemsize, 3),
        FP8=fp8, SINKS=sinks is not None, num_warps=num_warps or NUM_WARPS.get(cache.itemsize, 4), **launch_options(q.device),
    )  # fmt: skip
    if count > 1:
        merge_kernel[(batch * heads,)](
            part, lse, out, count, D=dim, BLOCK_D=max(16, block_d), BLOCK_SPLITS=max(2, triton.next_power_of_2(count)),
            num_warps=1 if dim <= 64 else 2, **launch_options(q.device),
        )  # fmt: skip
    return out
