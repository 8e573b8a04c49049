"""A parent with fewer hidden channels, fewer layers and smaller Mamba-2, read from the whole one a sub-block at a time.

Letters: H hidden_size, V vocab_size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial

from torch import Tensor

from puzzle.base.files import content_hash
from puzzle.blocklib.hidden import at_hidden, with_channels
from puzzle.blocklib.mamba2 import Mamba2
from puzzle.blocklib.sub_block import Normed, ParentBlock, SubBlock, Variant
from puzzle.blocklib.variant import variant_of
from puzzle.parents.names import FINAL_NORM, HEAD, stored_tensors
from puzzle.parents.opened import HfModel
from puzzle.parents.structure import Structure
from puzzle.slice.statistics import ParentStatistics, Use


@dataclass(frozen=True, kw_only=True, slots=True)
class Axes:
    """What is asked for; None: as the parent has it. mamba: the variant of every Mamba-2, such as "heads120-dim64"."""

    hidden: int | None = None
    depth: int | None = None
    mamba: str | None = None

    def smaller(self, sub_block: SubBlock, slot: str) -> Variant | None:
        """What stands for it before hidden channels are taken; None: itself. Raises UserError for sizes that cannot be."""
        return variant_of(sub_block, self.mamba, slot) if self.mamba and isinstance(sub_block, Mamba2) else None

    def structure(self, whole: Structure, layers: list[int]) -> Structure:
        """Of the parent with these of its layers."""
        hidden, found = self.hidden or whole.hidden_size, []
        for index in layers:
            layer = {}
            for slot, own in whole.layers[index].items():
                variant = self.smaller(own, slot)
                layer[slot] = at_hidden(own if variant is None else variant.sub_block, hidden)
            found.append(layer)
        return replace(whole.with_layers(found), hidden_size=hidden)


@dataclass(frozen=True, kw_only=True, slots=True)
class SlicedParent:
    """`runtime.model.Weights`. layers: of the whole parent, in order. channels: hidden ones of it, in order. [H] of this one."""

    parent: HfModel
    axes: Axes
    statistics: ParentStatistics
    layers: list[int]
    channels: Tensor

    @classmethod
    def of(cls, parent: HfModel, axes: Axes, statistics: ParentStatistics) -> SlicedParent:
        """With the best layers and channels by these statistics."""
        whole = parent.structure
        layers = statistics.best_layers(axes.depth or whole.num_layers)
        channels = statistics.best_channels(axes.hidden or whole.hidden_size, layers)
        return cls(parent=parent, axes=axes, statistics=statistics, layers=layers, channels=channels)

    @property
    def structure(self) -> Structure:
        return self.axes.structure(self.parent.structure, self.layers)

    def fingerprint(self) -> str:
        """Of the parent, and of what is left of it."""
        return content_hash([self.parent.fingerprint(), asdict(self.axes), self.layers, self.channels.tolist()])

    def weights(self, layer: int, slot: str) -> dict[str, Tensor]:
        """In the parent's dtypes."""
        index = self.layers[layer]
        own, weights = self.parent.structure.layers[index][slot], self.parent.weights(index, slot)
        if (variant := self.axes.smaller(own, slot)) is not None:
            block = ParentBlock(sub_block=own, weights=weights, statistics=self.statistics.mixers[index, slot])
            weights = {name: t.to(weights[name].dtype) for name, t in variant.initialise(block).items()}
            own = variant.sub_block
        found = with_channels(own, weights, self.channels)
        for name in found:
            if (use := self.statistics.norms.get((index, slot, name))) is not None:
                assert isinstance(own, Normed)
                found[name] = self._rescaled(found[name], use, own.norm_offset)
        return found

    def _rescaled(self, scale: Tensor, use: Use, offset: bool) -> Tensor:
        """A norm's scale over the channels that are left, so that what it gives stays as large as it was."""
        if len(self.channels) == self.parent.structure.hidden_size:
            return scale
        return ((scale.double() + int(offset)) * use.scale(self.channels) - int(offset)).to(scale.dtype)

    def embedding(self) -> Tensor:
        return self.parent.embedding()[:, self.channels]

    def final_norm(self) -> Tensor:
        found = self.parent.final_norm()[self.channels]
        return self._rescaled(found, self.statistics.final, self.parent.structure.norm_offset)

    def lm_head(self) -> Tensor:
        return self.parent.lm_head()[:, self.channels]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) as the parent's own files have them, layers counted anew."""
        stored, structure = self.parent.checkpoint.stored, self.structure
        yield stored(self.parent.embedding_name), self.embedding()
        for layer, slot, sub_block in structure:
            where = partial(self.parent.family.where, self.layers[layer], slot, sub_block)  # by the parent's numbers
            for name, tensor in stored_tensors((where(n), t) for n, t in self.weights(layer, slot).items()):
                yield re.sub(r"\blayers\.\d+\.", f"layers.{layer}.", stored(name), count=1), tensor.contiguous()
        yield stored(FINAL_NORM), self.final_norm()
        if not structure.tied:
            yield stored(HEAD), self.lm_head()
