"""Sizes of launches: a device's multiprocessors, and the tiles of kernels whose programs take whole rows [R, H]."""

from __future__ import annotations

from functools import cache

import torch

ELEMENTS = 4096  # of a program's rows at once, if one row has no more


@cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors; 2 for the interpreter on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def row_sizes(hidden: int) -> dict[str, int]:
    """H, rows BLOCK_R and columns BLOCK_H of a program's tile, and its warps."""
    block = 1 << (hidden - 1).bit_length()
    return {
        "H": hidden,
        "BLOCK_R": max(1, ELEMENTS // block),
        "BLOCK_H": block,
        "num_warps": min(16, max(4, block // 1024)),
    }
