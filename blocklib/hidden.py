"""The hidden axis of a sub-block: any kind at another hidden size, its tensors with some of the hidden channels alone.

No kind says which axes are hidden: they are those that `tensors()` makes as long as the hidden size. Letters: H hidden_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from puzzle.blocklib.none import NoOp
from puzzle.blocklib.sub_block import MissingFace, Normed, SubBlock

if TYPE_CHECKING:
    from torch import Tensor


def at_hidden(sub_block: SubBlock, size: int) -> SubBlock:
    """The sub-block at another hidden size. Raises MissingFace for a kind that is not known to have one."""
    if isinstance(sub_block, NoOp):
        return sub_block
    if not isinstance(sub_block, Normed):
        raise MissingFace(sub_block.kind, "hidden axis")
    return replace(sub_block, hidden_size=size)


def hidden_axes(sub_block: SubBlock) -> dict[str, tuple[int, ...]]:
    """The axes of every tensor that are hidden channels; () of one that has none. Raises MissingFace for an axis whose length follows
    from the hidden size in another way."""
    if not isinstance(sub_block, Normed):
        return dict.fromkeys(at_hidden(sub_block, 1).tensors(), ())
    full = sub_block.hidden_size
    other = at_hidden(sub_block, full + 1).tensors()
    found = {}
    for name, shape in sub_block.tensors().items():
        axes = tuple(axis for axis, length in enumerate(shape) if other[name][axis] != length)
        if any((shape[axis], other[name][axis]) != (full, full + 1) for axis in axes):
            raise MissingFace(sub_block.kind, f"hidden channels in {name} that could be told apart")
        found[name] = axes
    return found


def with_channels(sub_block: SubBlock, weights: Mapping[str, Tensor], channels: Tensor) -> dict[str, Tensor]:
    """The tensors of `at_hidden(sub_block, len(channels))`: these channels of every hidden axis, in their order."""
    found = {}
    for name, axes in hidden_axes(sub_block).items():
        tensor = weights[name]
        for axis in axes:
            tensor = tensor.index_select(axis, channels.to(tensor.device))
        found[name] = tensor
    return found
