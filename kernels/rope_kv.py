"""RoPE on Q and K, and K and V into the paged cache, in one pass.

    rotated = (a cos - b sin, b cos + a sin)    a, b: first and second half of a head (arXiv 2104.09864; the halves, and
                                                not neighbouring channels, form the pairs, as in Hugging Face models)
    cache   = K / k_scale, V / v_scale          in bf16, fp16, fp32, or fp8 e4m3 (clamped to ±448)

float32 inside, one rounding at the end. Letters: M tokens in all, B sequences, N query heads, K kv heads, D head_dim,
S page size. The cache is [num_blocks, 2 (k, v), K, S, D]; token t of sequence b lies in block
block_table[b, positions[t] // S] at row positions[t] % S.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from puzzle.kernels.fp8 import FP8_MAX
from puzzle.kernels.overlap import launch_options

try:
    import triton
    import triton.language as tl

    from puzzle.kernels.overlap import follow
except ImportError:  # no wheel for this platform: the twin serves
    triton = None  # type: ignore[assignment]

# tokens at least -> heads per program, warps
CONFIGS = ((512, {"BLOCK_HEADS": 32, "num_warps": 4}), (0, {"BLOCK_HEADS": 4, "num_warps": 1}))


def rope_kv_reference(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, cache: Tensor,
    block_table: Tensor | None, *, sequences: Tensor | None = None, slots: Tensor | None = None,
    k_scale: float = 1.0, v_scale: float = 1.0, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The twin of `rope_kv` in plain PyTorch: same arguments, same results up to rounding."""
    num_tokens, dim, page = q.shape[0], q.shape[2], cache.shape[3]
    half = dim // 2
    wide = torch.promote_types(q.dtype, torch.float32)
    row_cos, row_sin = (table[positions.long(), None, :half].to(wide) for table in (cos, sin))

    def rotate(x: Tensor) -> Tensor:
        first, second = x.to(wide).split(half, dim=-1)
        return torch.cat((first * row_cos - second * row_sin, second * row_cos + first * row_sin), dim=-1)

    if slots is None:
        assert block_table is not None
        owner = sequences
        if owner is None:
            owner = torch.arange(num_tokens, device=q.device) // (num_tokens // block_table.shape[0])
        slots = block_table[owner.long(), positions.long() // page].long() * page + positions.long() % page
    stored = slots >= 0
    block, row = slots[stored].long() // page, slots[stored].long() % page
    for index, (value, scale) in enumerate(((rotate(k), k_scale), (v.to(wide), v_scale))):
        value = value[stored] / scale
        if cache.dtype == torch.float8_e4m3fn:  # indexed writes know no fp8: its bytes go in
            value = value.clamp(-FP8_MAX, FP8_MAX).to(cache.dtype).view(torch.uint8)
            cache.view(torch.uint8)[block, index, :, row] = value
        else:
            cache[block, index, :, row] = value.to(cache.dtype)
    rotated = rotate(q).to(q.dtype)
    return rotated if out is None else out.copy_(rotated)


if triton is not None:

    @triton.jit
    def rope_kv_kernel(
        q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, positions_ptr, cache_ptr, block_table_ptr, sequences_ptr, slots_ptr, out_ptr,
        tokens_per_sequence, max_pages, k_inverse, v_inverse,
        q_token, q_head, k_token, k_head, v_token, v_head, out_token, out_head, table_row, cache_block, cache_kv,
        cache_head,
        N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, HAS_SEQUENCES: tl.constexpr,
        HAS_SLOTS: tl.constexpr, FP8: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
        PDL: tl.constexpr,
    ):  # fmt: skip
        """Program (token, part): the first cdiv(N, BLOCK_HEADS) parts rotate Q, the others rotate and store K and V.

        Names such as q_token are strides in elements; heads are contiguous.
        """
        HALF: tl.constexpr = D // 2
        Q_PARTS: tl.constexpr = (N + BLOCK_HEADS - 1) // BLOCK_HEADS
        follow(PDL)
        token = tl.program_id(0).to(tl.int64)
        part = tl.program_id(1)
        lanes = tl.arange(0, BLOCK_HALF)
        position = tl.load(positions_ptr + token).to(tl.int64)
        at = position * table_row + lanes
        cos = tl.load(cos_ptr + at, mask=lanes < HALF, other=0.0).to(tl.float32)[None, :]
        sin = tl.load(sin_ptr + at, mask=lanes < HALF, other=0.0).to(tl.float32)[None, :]
        if part < Q_PARTS:
            heads = part * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
            inside = (heads < N)[:, None] & (lanes < HALF)[None, :]
            source = q_ptr + token * q_token + heads[:, None] * q_head + lanes[None, :]
            a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
            target = out_ptr + token * out_token + heads[:, None] * out_head + lanes[None, :]
            tl.store(target, (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=inside)
            tl.store(target + HALF, (b * cos + a * sin).to(out_ptr.dtype.element_ty), mask=inside)
        else:
            if HAS_SLOTS:
                slot = tl.load(slots_ptr + token).to(tl.int64)
                block, row = slot // PAGE, slot % PAGE
                wanted = slot >= 0
            else:
                owner = tl.load(sequences_ptr + token).to(tl.int64) if HAS_SEQUENCES else token // tokens_per_sequence
                block = tl.load(block_table_ptr + owner * max_pages + position // PAGE).to(tl.int64)
                row = position % PAGE
                wanted = block >= 0
            heads = (part - Q_PARTS) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
            inside = (heads < K)[:, None] & (lanes < HALF)[None, :] & wanted
            source = k_ptr + token * k_token + heads[:, None] * k_head + lanes[None, :]
            a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
            source = v_ptr + token * v_token + heads[:, None] * v_head + lanes[None, :]
            v_first = tl.load(source, mask=inside, other=0.0).to(tl.float32) * v_inverse
            v_second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32) * v_inverse
            k_first = (a * cos - b * sin) * k_inverse
            k_second = (b * cos + a * sin) * k_inverse
            if FP8:
                k_first, k_second = tl.clamp(k_first, -448.0, 448.0), tl.clamp(k_second, -448.0, 448.0)
                v_first, v_second = tl.clamp(v_first, -448.0, 448.0), tl.clamp(v_second, -448.0, 448.0)
            # not `target` again: branches may not give one name two types of pointer
            cached = cache_ptr + block * cache_block + heads[:, None] * cache_head + row * D + lanes[None, :]
            stored = cache_ptr.dtype.element_ty
            tl.store(cached, k_first.to(stored), mask=inside)
            tl.store(cached + HALF, k_second.to(stored), mask=inside)
            tl.store(cached + cache_kv, v_first.to(stored), mask=inside)
            tl.store(cached + cache_kv + HALF, v_second.to(stored), mask=inside)


def _check(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, block_table: Tensor | None, slots: Tensor | None) -> None:
    num_tokens, _, dim = q.shape
    if dim % 2 or k.shape != v.shape or k.shape[0] != num_tokens or k.shape[2] != dim:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: want [M, heads, even head_dim]")
    if cache.dim() != 5 or (cache.shape[1], cache.shape[2], cache.shape[4]) != (2, k.shape[1], dim):
        raise ValueError(f"cache {tuple(cache.shape)} is not [num_blocks, 2, {k.shape[1]}, page_size, {dim}]")
    if cache.stride()[3:] != (dim, 1) or any(x.stride(2) != 1 for x in (q, k, v)):
        raise ValueError("head_dim must be contiguous in q, k and v, and a page [page_size, head_dim] in the cache")
    if (block_table is None) == (slots is None):
        raise ValueError("give block_table or slots, and not both")


def rope_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    cache: Tensor,
    block_table: Tensor | None,
    *,
    sequences: Tensor | None = None,
    slots: Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out: Tensor | None = None,
    config: dict[str, int] | None = None,
) -> Tensor:
    """Rotated q [M, N, D] (new, or in `out`, which may be q); K and V of every token go into the cache.

    q [M, N, D], k and v [M, K, D]: any token and head strides, so slices of one QKV projection serve.
    cos, sin [P, D] or [P, D/2]: tables indexed by position, contiguous. positions [M] int32 or int64.
    cache [num_blocks, 2, K, S, D]. block_table [B, max_pages] int32, contiguous; a token belongs to sequence
    sequences[t], or, without `sequences`, to t // (M / B): M = B is decode, M = B · T prefill of T tokens each.
    slots [M] replaces block_table: block · S + row, negative for "do not store" (a window's older prompt tokens).
    A value in the cache is x / scale. No gradient. Raises ValueError for shapes or strides that do not fit.
    """
    _check(q, k, v, cache, block_table, slots)
    num_tokens, num_heads, dim = q.shape
    per_sequence = 1
    if block_table is not None and sequences is None:
        if num_tokens % block_table.shape[0]:
            raise ValueError(f"{num_tokens} tokens over {block_table.shape[0]} sequences: give `sequences`")
        per_sequence = num_tokens // block_table.shape[0]
    if triton is None or not (q.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return rope_kv_reference(
            q, k, v, cos, sin, positions, cache, block_table,
            sequences=sequences, slots=slots, k_scale=k_scale, v_scale=v_scale, out=out,
        )  # fmt: skip
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    config = config or next(config for least, config in CONFIGS if num_tokens >= least)
    block_heads = min(config["BLOCK_HEADS"], triton.next_power_of_2(max(num_heads, k.shape[1])))
    parts = triton.cdiv(num_heads, block_heads) + triton.cdiv(k.shape[1], block_heads)
    rope_kv_kernel[(num_tokens, parts)](
        q, k, v, cos, sin, positions, cache, block_table, sequences, slots, out,
        per_sequence, 0 if block_table is None else block_table.shape[1], 1.0 / k_scale, 1.0 / v_scale,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), out.stride(0), out.stride(1),
        cos.stride(0), cache.stride(0), cache.stride(1), cache.stride(2),
        N=num_heads, K=k.shape[1], D=dim, PAGE=cache.shape[3], HAS_SEQUENCES=sequences is not None,
        HAS_SLOTS=slots is not None, FP8=cache.dtype == torch.float8_e4m3fn, BLOCK_HEADS=block_heads,
        BLOCK_HALF=triton.next_power_of_2(dim // 2), num_warps=config["num_warps"], **launch_options(q.device),
    )  # fmt: skip
    return out
