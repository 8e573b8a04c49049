"""Checkpoints with experts in MXFP4 (gpt-oss): four bits a value, and one exponent for every 32 of them.

    NAME_blocks [..., K/32, 16] U8    two values a byte, the low half first      NAME_scales [..., K/32] U8    exponent + 127

Dequantised to bf16, as transformers does (`integrations/mxfp4.py`): every value that is finite is exact there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from puzzle.base.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

STORED, BLOCK, BIAS = "U8", 32, 127
BLOCKS, SCALES = "_blocks", "_scales"
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of three bits; the fourth is the sign
KNOWN = {"quant_method", "modules_to_not_convert", "dequantize"}  # the last of which says what a reader makes of it


def is_mxfp4(config: Mapping[str, Any]) -> bool:
    """Whether config.json says so. Raises UserError for a word beside it that is not understood."""
    said = config.get("quantization_config")
    if not isinstance(said, Mapping) or said.get("quant_method") != "mxfp4":
        return False
    for word in sorted(set(said) - KNOWN):
        if said[word]:
            raise UserError(
                f"quantization_config.{word} = {said[word]} in config.json is a quantisation that is not read"
            )
    return True


def scales_of(blocks: str) -> str:
    """The name of the scales beside these blocks."""
    return blocks.removesuffix(BLOCKS) + SCALES


def check(blocks: str, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UserError unless the headers have scales of the right shape and dtype for these blocks."""
    wanted, found = list(entries[blocks]["shape"][:-1]), entries.get(scales_of(blocks))
    if found is None:
        raise UserError(
            f"weight {blocks} is stored as {STORED} without its scales {scales_of(blocks)}: download it again"
        )
    if found["dtype"] != STORED or list(found["shape"]) != wanted:
        raise UserError(
            f"scales {scales_of(blocks)} are {found['dtype']} of shape {list(found['shape'])}, and {blocks} asks for {STORED} of "
            f"{wanted}: they do not belong together"
        )


def dequantised(blocks: Tensor, scales: Tensor) -> Tensor:
    """[E, N, K/32, 16] and [E, N, K/32] -> [E, N, K] in bf16, an expert at a time: indices and powers take several times its size. A scale of
    255 gives infinity, which is no weight."""
    import torch

    table = torch.tensor([*VALUES, *(-value for value in VALUES)], dtype=torch.bfloat16)
    found = torch.empty(*scales.shape, BLOCK, dtype=torch.bfloat16)
    for out, packed, scale in zip(found, blocks, scales, strict=True):
        halves = torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(-2)
        torch.ldexp(table[halves.int()], scale.int()[..., None] - BIAS, out=out)
    return found.flatten(-2)
