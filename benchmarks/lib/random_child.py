"""A child of any structure whose tensors are made when they are read: to write checkpoints that no memory holds whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from puzzle.blocklib.sub_block import SubBlock
from puzzle.export.child import Child, ChildLayer, Tensors
from puzzle.parents.structure import Layer, Structure

Make = Callable[[tuple[int, ...]], Tensor]  # a tensor of this shape


def random_child(structure: Structure, base: Layer, make: Make, dtype: torch.dtype, tokenizer: Path | None) -> Child:
    """base: what config.json's global values describe. make: a matrix of the shape, in `dtype`; norms are ones."""

    def read(sub_block: SubBlock) -> Tensors:
        return {n: torch.ones(s, dtype=dtype) if len(s) == 1 else make(s) for n, s in sub_block.tensors().items()}

    layers = tuple(
        ChildLayer(slots=layer, reads={slot: partial(read, b) for slot, b in layer.items()}, origin=index)
        for index, layer in enumerate(structure.layers)
    )
    matrix = partial(make, (structure.vocab_size, structure.hidden_size))
    return Child(
        name="random",
        layers=layers,
        around=structure.with_layers([]),
        base=base,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        dtype=dtype,
        tokenizer=tokenizer,
        generation_config=None,
        parent_name="random",
        licence=None,
        read_embedding=matrix,
        read_final_norm=partial(torch.ones, structure.hidden_size, dtype=dtype),
        read_head=matrix,
    )
