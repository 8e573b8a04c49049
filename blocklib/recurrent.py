"""What kinds share that keep a state of one size whatever the length: one matrix, a short convolution over some of what it gives, a
recurrence, one matrix.

    z, x, rest = in_proj(n);  y, state = recurrence(silu(conv(x)), rest, state);  out_proj(gate_norm(y, z))

Letters: H hidden_size, I inner channels, W conv_width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from puzzle.blocklib.sub_block import MissingFace, Normed, State

if TYPE_CHECKING:
    from torch import Tensor

STATE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Recurrent(Normed):
    """Every such kind has these as fields, in places of its own. chunk_size: tokens that are multiplied together, which changes no
    result. state_dtype: of the recurrent state, which engines keep apart from the cache's (vLLM: mamba_ssm_cache_dtype)."""

    if TYPE_CHECKING:
        conv_width: int = 4
        chunk_size: int = 64
        state_dtype: str = "float32"

    @property
    def inner_size(self) -> int:
        """I, which out_proj reads."""
        raise MissingFace(self.kind, "inner channels")

    @property
    def conv_channels(self) -> int:
        """What the convolution reads."""
        raise MissingFace(self.kind, "channels of a convolution")

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Of the recurrent state, a matrix for each head."""
        raise MissingFace(self.kind, "shape of a state")

    def parts(self) -> dict[str, tuple[int, ...]]:
        """By the first word of a tensor's name, the lengths of what stands one after another in its rows, of out_proj in its columns; each
        of them is divided between ranks. What is left out is whole on every one."""
        raise MissingFace(self.kind, "parts")

    def saved(self, context: int) -> int:
        """Of what `widest` counts, with what the norm keeps in float32; chunks are computed again."""
        return 5 * self.widest // 2

    def state(self) -> State:
        """Of the convolution, its last W - 1 inputs; and the recurrent state."""
        return State(
            per_sequence=self.conv_channels * (self.conv_width - 1),
            own_bytes=STATE_BYTES[self.state_dtype] * math.prod(self.state_shape),
        )

    def cut(self, weights: Mapping[str, Tensor], rank: int, tp: int) -> dict[str, Tensor]:
        """The rows of in_proj and of the convolution are several things one after another, each of which is cut."""
        import torch

        found, parts = {}, self.parts()
        for name, tensor in weights.items():
            if (sizes := parts.get(name.partition(".")[0])) is None or name in self.added_once:
                found[name] = torch.zeros_like(tensor) if rank and name in self.added_once else tensor
                continue
            dim = int(name == "out_proj.weight")
            split = zip(tensor.split(sizes, dim), sizes, strict=True)
            found[name] = torch.cat([part.narrow(dim, rank * size // tp, size // tp) for part, size in split], dim)
        return found
