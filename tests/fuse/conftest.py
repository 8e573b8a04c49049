"""Children with rows of attention-free layers of unequal widths, on a tiny parent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.linear import Linear
from puzzle.blocklib.none import NO_OP
from puzzle.blocklib.sub_block import SubBlock
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.export.child import ChildLayer
from puzzle.export.sources import child_of_checkpoint
from puzzle.export.write import Source, export

HIDDEN = 32
FFN = SwiGLU(hidden_size=HIDDEN, intermediate_size=96)
BLOCK = (Gqa(hidden_size=HIDDEN, num_attention_heads=4, num_key_value_heads=2, head_dim=8), FFN)
NOTHING = (NO_OP, NO_OP)
MATRIX = (NO_OP, Linear(hidden_size=HIDDEN))


def free(width: int):
    return NO_OP, replace(FFN, intermediate_size=width)


def random_child(parent: Path, shapes, *, mlp_bias: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0):
    """A child in memory with these (attention, FFN) layers and random weights around a real tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    child = child_of_checkpoint(parent)
    base = {slot: with_bias(sub_block, mlp_bias) for slot, sub_block in child.base.items()}
    child = replace(child, base=base, dtype=dtype, layers=())

    def tensors(sub_block: SubBlock):
        found = {}
        for name, dims in sub_block.tensors().items():
            noise = torch.randn(dims, generator=generator, dtype=torch.float64)
            value = 1 + 0.5 * noise if "norm" in name else noise / (dims[1] ** 0.5 if len(dims) == 2 else 3)
            found[name] = value.to(dtype)
        return lambda: dict(found)

    layers = []
    for index, (attention, ffn) in enumerate(shapes):
        slots = {"attention": attention, "ffn": with_bias(ffn, mlp_bias)}
        reads = {slot: tensors(sub_block) for slot, sub_block in slots.items()}
        layers.append(ChildLayer(slots=slots, reads=reads, origin=index))
    ends = {
        name: (lambda read: lambda: read().to(dtype))(getattr(child, name))
        for name in ("read_embedding", "read_final_norm", "read_head")
    }
    return replace(child, layers=tuple(layers), **ends)


def with_bias(sub_block: SubBlock, bias: bool) -> SubBlock:
    return replace(sub_block, bias=bias) if isinstance(sub_block, SwiGLU) else sub_block


def write(child, out: Path) -> Path:
    export(Source(child=child, solved=None, facts=None, measured=None), out, force=True)
    return out


@pytest.fixture(scope="session")
def fusible(tmp_path_factory, parent) -> Path:
    """attention, 3 free, attention, 4 free with an empty one, a linear FFN, attention. Not to be changed."""
    shapes = [BLOCK, free(48), free(96), free(16), BLOCK, free(40), NOTHING, free(96), free(24), MATRIX, BLOCK]
    return write(random_child(parent, shapes), tmp_path_factory.mktemp("fuse") / "child")
