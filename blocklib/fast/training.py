"""The plain modules as they are trained and as the parent runs beside: what lies between the products in one pass over memory each."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from puzzle.blocklib.plain.gqa import Attention
from puzzle.blocklib.plain.part import Part
from puzzle.blocklib.plain.swiglu import GatedFfn
from puzzle.blocklib.sub_block import Normed
from puzzle.kernels.gated import gated_silu
from puzzle.kernels.rmsnorm import rms_norm
from puzzle.kernels.rope import rope

# cuDNN's is the fastest on Hopper, the last ones take what it does not
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class InTraining(Part):
    """The norm before in one kernel, as long as it does not learn by a gradient that passes through it."""

    def enter(self, x: Tensor) -> Tensor:
        sub_block = self.sub_block
        assert isinstance(sub_block, Normed)
        if not sub_block.norm_before or sub_block.norm_offset or self.norm.weight.requires_grad:
            return super().enter(x)
        return rms_norm(x, None, self.norm.weight, sub_block.norm_eps)[0]


class AttentionInTraining(InTraining, Attention):
    def turn(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        return rope(x, *tables) if tables[0].shape[-1] == x.shape[-1] else super().turn(x, tables)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not q.is_cuda:
            return super().attend(q, k, v)
        with sdpa_kernel(BACKENDS, set_priority=True):
            return super().attend(q, k, v)


class FfnInTraining(InTraining, GatedFfn):
    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return gated_silu(gate, up) if self.activation is F.silu else super().gated(gate, up)
