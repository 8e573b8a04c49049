"""Nothing, as a module."""

from __future__ import annotations

import torch
from torch import Tensor

from puzzle.blocklib.plain.part import Part, Ropes


class Nothing(Part):
    """Contributes zeros; `add` gives the stream back as it is."""

    def inner(self, entered: Tensor, ropes: Ropes) -> Tensor:
        return torch.zeros_like(entered)

    def add(self, x: Tensor, ropes: Ropes) -> Tensor:
        return x
