"""A small parent layer with random weights, and its RoPE."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch

from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.plain.part import Ropes, loaded
from puzzle.blocklib.sub_block import ParentBlock
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.parents.rope import Rope

HIDDEN = 24
ROPE = Rope(head_dim=6, max_length=512, parameters={"rope_theta": 40.0})


def parent_layer(**changes: Any) -> dict[str, ParentBlock]:
    """Attention and FFN by slot, with statistics. changes: fields of `Gqa` or `SwiGLU`; of both where both have them."""
    shared = {"hidden_size": HIDDEN, "norm_eps": 1e-5}
    attention = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 6, **shared}
    ffn = {"intermediate_size": 63, **shared}
    for name, value in changes.items():
        for fields, kind in ((attention, Gqa), (ffn, SwiGLU)):
            if name in kind.__dataclass_fields__:
                fields[name] = value
    generator = torch.Generator().manual_seed(1)
    layer = {}
    for slot, sub_block in (("attention", Gqa(**attention)), ("ffn", SwiGLU(**ffn))):
        weights = {n: torch.randn(s, generator=generator) * 0.3 for n, s in sub_block.tensors().items()}
        layer[slot] = ParentBlock(sub_block=sub_block, weights=weights)
    x = torch.randn(3, 40, HIDDEN, generator=generator)
    for block in layer.values():
        part = loaded(block.sub_block, block.weights)
        block.statistics = part.calibrate([x])
        block.moments = cache(partial(part.moments, [x], {"default": ROPE.tables(40)}))
    return layer


@pytest.fixture(scope="session")
def make_layer():
    return parent_layer


@pytest.fixture(scope="session")
def ropes_of():
    """`ropes_of(length)`: the tables that the layer's attention asks for."""

    def ropes(length: int) -> Ropes:
        return {"default": ROPE.tables(length)}

    return ropes
