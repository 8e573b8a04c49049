"""The Triton kernels behind `swiglu`: a skinny product for decode, a tiled product for prefill, an activation by rows.

Letters: M tokens, H hidden_size, F intermediate_size, N rows of a weight, K its columns, S splits of K, T tiles of N.
A product is out [M, N] = x [M, K] · w [N, K]^T. Where GATED is set, rows 2f and 2f+1 of w are gate and up of channel f, and
out [M, N/2] is silu(gate) · up: the accumulators of a pair are neighbours in one thread, so the epilogue moves nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

FP8_MAX = 448.0  # largest finite float8_e4m3fn


@triton.jit
def gated(pairs, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """silu(gate) · up of interleaved pairs [ROWS, COLUMNS] float32 -> [ROWS, COLUMNS/2]."""
    gate, up = tl.split(tl.reshape(pairs, (ROWS, COLUMNS // 2, 2)))
    return gate * tl.sigmoid(gate) * up


@triton.jit
def prefetch_rows(w_ptr, first_row, last_row, start, stop, K, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """Ask the L2 for columns start…stop of rows first_row…last_row of w [N, K]; a column is BYTES wide. sm_90 or newer."""
    LANES: tl.constexpr = ROWS if ROWS > 128 else 128
    lane = tl.arange(0, LANES)
    row = first_row + lane % ROWS
    size = tl.where((lane < ROWS) & (row < last_row), tl.maximum(stop - start, 0) * BYTES, 0)
    address = (w_ptr + row.to(tl.int64) * K + start).to(tl.int64)
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.gt.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r", [address, size], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def skinny_store(
    acc, scale_ptr, residual_ptr, out_ptr, tile, M, N, out_row, residual_row,
    GATED: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The epilogue of `skinny_kernel`: acc [BLOCK_N, BLOCK_M] is out transposed."""
    if HAS_SCALE:
        channels = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        acc *= tl.load(scale_ptr + channels, mask=channels < N, other=0.0)[:, None]
    result = tl.trans(acc)
    if GATED:
        result = gated(result, BLOCK_M, BLOCK_N)
        columns = tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        inside = columns < N // 2
    else:
        columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = columns < N
    rows = tl.arange(0, BLOCK_M)
    mask = (rows < M)[:, None] & inside[None, :]
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + rows[:, None] * residual_row + columns[None, :], mask=mask, other=0.0)
        result += residual.to(tl.float32)
    tl.store(out_ptr + rows[:, None] * out_row + columns[None, :], result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def skinny_kernel(
    x_ptr, w_ptr, scale_ptr, residual_ptr, out_ptr, partial_ptr, counter_ptr, M, N, K, x_row, out_row, residual_row,
    GATED: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EVEN_K: tl.constexpr,
    SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile, split): BLOCK_N rows of w times all M ≤ BLOCK_M rows of x, over one of SPLIT_K stretches of K.

    The weight is the left operand (out^T = w · x^T), so it goes from shared memory straight to the tensor cores. fp8 weights
    become x's dtype in registers; scale [N] float32 is applied at the end. With SPLIT_K > 1 every program leaves its sums in
    partial [SPLIT_K, T, BLOCK_N, BLOCK_M] float32 and counts itself in counter [T]; the last one of a tile adds them in the
    order of the splits, so equal inputs give equal bits, and sets the counter back to zero for the next launch.

    PDL: this launch may overlap the end of the one before it. Until griddepcontrol.wait only weights are touched: the first
    PREFETCH columns of the program's share are brought to the L2.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    num_chunks = tl.cdiv(K, BLOCK_K)
    first = split * num_chunks // SPLIT_K
    last = (split + 1) * num_chunks // SPLIT_K
    if PREFETCH > 0:
        start = first * BLOCK_K
        stop = tl.minimum(tl.minimum(start + PREFETCH, last * BLOCK_K), K)
        prefetch_rows(w_ptr, tile * BLOCK_N, N, start, stop, K, BLOCK_N, w_ptr.dtype.element_ty.primitive_bitwidth // 8)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tokens = tl.arange(0, BLOCK_M)
    channels = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    lanes = tl.arange(0, BLOCK_K)
    x_at = x_ptr + tokens[None, :] * x_row + lanes[:, None]
    w_at = w_ptr + channels[:, None].to(tl.int64) * K + lanes[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for chunk in tl.range(first, last):
        k = chunk * BLOCK_K
        if EVEN_K:
            w = tl.load(w_at + k, mask=(channels < N)[:, None], other=0.0)
            x = tl.load(x_at + k, mask=(tokens < M)[None, :], other=0.0)
        else:
            inside = lanes < K - k
            w = tl.load(w_at + k, mask=(channels < N)[:, None] & inside[None, :], other=0.0)
            x = tl.load(x_at + k, mask=(tokens < M)[None, :] & inside[:, None], other=0.0)
        if HAS_SCALE:
            w = w.to(tl.float16).to(
                tl.float32
            )  # not straight to bf16: sm_90 does that a value at a time, four times slower
        acc = tl.dot(w.to(x.dtype), x, acc, input_precision="ieee")
    if SPLIT_K == 1:
        skinny_store(
            acc, scale_ptr, residual_ptr, out_ptr, tile, M, N, out_row, residual_row, GATED, HAS_SCALE, HAS_RESIDUAL,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        within = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tokens[None, :]
        stride = tl.num_programs(0) * (BLOCK_N * BLOCK_M)
        at = partial_ptr + tile * (BLOCK_N * BLOCK_M) + within
        tl.store(at + split.to(tl.int64) * stride, acc)
        tl.debug_barrier()
        arrived = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLIT_K - 1:
            total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            for other in tl.range(0, SPLIT_K):
                total += tl.load(at + other.to(tl.int64) * stride, cache_modifier=".cg")
            skinny_store(
                total, scale_ptr, residual_ptr, out_ptr, tile, M, N, out_row, residual_row, GATED, HAS_SCALE,
                HAS_RESIDUAL, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            tl.store(counter_ptr + tile, 0)


@triton.jit
def tiled_kernel(
    x_desc, w_desc, out_desc, x_scale_ptr, w_scale_ptr, residual_ptr, M, N, K, residual_row,
    GATED: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Persistent tiled product through tensor descriptors; a program takes every num_programs-th tile.

    Blocks of x_desc [BLOCK_M, BLOCK_K], w_desc [BLOCK_N, BLOCK_K], out_desc [BLOCK_M, BLOCK_N or BLOCK_N/2]. Tiles go in
    groups of GROUP_M rows of tiles, so that programs that run together share weights in the L2. HAS_SCALE: x and w are fp8,
    scaled by x_scale [M] and w_scale [N], float32.
    """
    OUT_N: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    num_chunks = tl.cdiv(K, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        group = tile // (GROUP_M * tiles_n)
        height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
        m = (group * GROUP_M + (tile % (GROUP_M * tiles_n)) % height) * BLOCK_M
        n_tile = (tile % (GROUP_M * tiles_n)) // height
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for chunk in range(num_chunks):
            x = x_desc.load([m, chunk * BLOCK_K])
            w = w_desc.load([n_tile * BLOCK_N, chunk * BLOCK_K])
            acc = tl.dot(x, w.T, acc, input_precision="ieee")
        if HAS_SCALE:
            rows = m + tl.arange(0, BLOCK_M)
            channels = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
            acc *= tl.load(x_scale_ptr + rows, mask=rows < M, other=0.0)[:, None]
            acc *= tl.load(w_scale_ptr + channels, mask=channels < N, other=0.0)[None, :]
        if GATED:
            acc = gated(acc, BLOCK_M, BLOCK_N)
        if HAS_RESIDUAL:
            rows = m + tl.arange(0, BLOCK_M)
            columns = n_tile * OUT_N + tl.arange(0, OUT_N)
            at = residual_ptr + rows[:, None].to(tl.int64) * residual_row + columns[None, :]
            acc += tl.load(at, mask=(rows < M)[:, None] & (columns < N)[None, :], other=0.0).to(tl.float32)
        out_desc.store([m, n_tile * OUT_N], acc.to(out_desc.dtype))


@triton.jit
def row_block(
    in_ptr, w_scale_ptr, row_scale, columns, width, GATED: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr
):
    """Columns of one row in float32: as they are, or silu · up of interleaved pairs, scaled first if they have scales."""
    if GATED:
        pairs = tl.arange(0, 2 * BLOCK) + 2 * tl.min(columns)
        value = tl.load(in_ptr + pairs, mask=pairs < 2 * width, other=0.0).to(tl.float32)
        if HAS_SCALE:
            value *= row_scale * tl.load(w_scale_ptr + pairs, mask=pairs < 2 * width, other=0.0)
        gate, up = tl.split(tl.reshape(value, (BLOCK, 2)))
        return gate * tl.sigmoid(gate) * up
    return tl.load(in_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)


@triton.jit
def activate_kernel(
    in_ptr, x_scale_ptr, w_scale_ptr, out_ptr, in_row, width, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr
):
    """Program (row, block): out [M, F] = silu(gate) · up of in [M, 2F], interleaved. width is F."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row_scale = tl.load(x_scale_ptr + row) if HAS_SCALE else 1.0
    value = row_block(in_ptr + row * in_row, w_scale_ptr, row_scale, columns, width, True, HAS_SCALE, BLOCK)
    tl.store(out_ptr + row * width + columns, value.to(out_ptr.dtype.element_ty), mask=columns < width)


@triton.jit
def quantize_kernel(
    in_ptr, x_scale_ptr, w_scale_ptr, out_ptr, scale_ptr, in_row, width, FP8_LIMIT: tl.constexpr, GATED: tl.constexpr,
    HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row: out [M, width] fp8 and scale [M] float32 = largest magnitude / 448; 1 for a row of zeros.

    GATED: the row is silu(gate) · up of in [M, 2 · width], interleaved. The row is read twice, the second time from the L2.
    """
    row = tl.program_id(0).to(tl.int64)
    at = in_ptr + row * in_row
    row_scale = tl.load(x_scale_ptr + row) if HAS_SCALE else 1.0
    lanes = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in tl.range(0, width, BLOCK):
        value = row_block(at, w_scale_ptr, row_scale, start + lanes, width, GATED, HAS_SCALE, BLOCK)
        largest = tl.maximum(largest, tl.abs(value))
    peak = tl.max(largest)
    scale = tl.where(peak > 0, peak / FP8_LIMIT, 1.0)
    tl.store(scale_ptr + row, scale)
    for start in tl.range(0, width, BLOCK):
        value = row_block(at, w_scale_ptr, row_scale, start + lanes, width, GATED, HAS_SCALE, BLOCK) / scale
        value = tl.clamp(value, -FP8_LIMIT, FP8_LIMIT).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * width + start + lanes, value, mask=start + lanes < width)
