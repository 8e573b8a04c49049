"""Random weights of a sub-block, and a random stream into it, for tests of kinds against their twins."""

from __future__ import annotations

import torch
from torch import Tensor

from puzzle.blocklib.sub_block import SubBlock


def weights(sub_block: SubBlock, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Of every name; norms near 1, and decays of recurrent kinds from nearly none to nearly all."""
    generator = torch.Generator().manual_seed(seed)
    found = {n: torch.randn(s, generator=generator, dtype=dtype) / s[-1] ** 0.5 for n, s in sub_block.tensors().items()}
    for name in found:
        if "norm" in name:
            found[name] = 1 + 0.2 * torch.randn(found[name].shape, generator=generator, dtype=dtype)
    if "A_log" in found:
        for name, least, most in (("A_log", -3, 3), ("dt_bias", -6, 2)):
            found[name] = torch.empty(found[name].shape, dtype=dtype).uniform_(least, most, generator=generator)
    return found


def stream(batch: int, length: int, hidden: int = 20) -> Tensor:
    """[B, T, H]"""
    return torch.randn(batch, length, hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(length))
