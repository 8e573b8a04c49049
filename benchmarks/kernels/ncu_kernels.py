"""The kernels that fall short of their targets, a few launches each, for Nsight Compute to look at.

ncu --kernel-name 'regex:skinny|split_kernel|silu' --set full python benchmarks/kernels/ncu_kernels.py
"""

from __future__ import annotations

import bench_decode_attention
import bench_skinny
import torch

from puzzle.kernels.decode_attention import decode_attention
from puzzle.kernels.skinny import skinny_linear
from puzzle.kernels.swiglu import choose_linear, silu_mul_to_fp8

FP8 = torch.float8_e4m3fn


def main() -> None:
    for num, columns in ((1024, 4096), (4096, 4096)):
        config = choose_linear(16, num, columns, FP8)
        assert config is not None
        for x, w, scale in bench_skinny.operands(16, num, columns, FP8, 8):
            skinny_linear(x, w, config, scale=scale, gated=True)
    for q, cache, table, lengths in bench_decode_attention.paged(64, 4096, 1, FP8, 3):
        decode_attention(q, cache, table, lengths, max_context=4096)
    gate_up = torch.randn(8192, 28672, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        silu_mul_to_fp8(gate_up)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
