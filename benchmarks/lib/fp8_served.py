"""A plain model as an engine runs a child in fp8: cached keys and values with their scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puzzle.blocklib.plain.gqa import Attention
from puzzle.kernels.fp8 import FP8_MAX
from puzzle.parents.checkpoint import Checkpoint
from puzzle.runtime.model import CausalModel


def round_cache(model: CausalModel, checkpoint: Path) -> None:
    """Keys and values, with the scales that the checkpoint has."""
    stored = Checkpoint(checkpoint)

    def rounded(x: Tensor, scale: float) -> Tensor:
        return ((x / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(x.dtype)) * scale

    def projecting(part: Attention, k_scale: float, v_scale: float) -> Any:
        exact = part.project

        def project(entered: Tensor, ropes: Any) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = exact(entered, ropes)
            return q, rounded(k, k_scale), rounded(v, v_scale)

        return project

    for index, _, part in model.parts():
        if isinstance(part, Attention):
            scales = [stored.tensor(f"model.layers.{index}.self_attn.{letter}_scale").item() for letter in "kv"]
            part.project = projecting(part, *scales)  # type: ignore[method-assign]
