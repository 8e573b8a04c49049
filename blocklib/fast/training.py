"""The plain modules as they are trained and as the parent runs beside: what lies between the products in one pass over memory each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from puzzle.blocklib.plain.gqa import Attention
from puzzle.blocklib.plain.linear import LinearMap
from puzzle.blocklib.plain.part import Part, RMSNorm
from puzzle.blocklib.plain.swiglu import GatedFfn
from puzzle.kernels.gated import gated_silu
from puzzle.kernels.rope import rope
from puzzle.kernels.trained_norm import trained_norm

PLAIN_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
TILE = 128  # tokens of cuDNN's kernels


def backends(q: Tensor, causal: bool) -> list[SDPBackend]:
    """Of attention with its gradients, the first choice first. cuDNN's is twice as fast on Hopper alone, and only there without a mask or
    sinks and on whole tiles is it right: elsewhere gradients were NaN, results wrong or captures broken (pytorch issues 196678, 193893, pull
    request 167101)."""
    good = causal and q.shape[2] % TILE == 0 and torch.cuda.get_device_capability(q.device)[0] == 9
    return [SDPBackend.CUDNN_ATTENTION, *PLAIN_BACKENDS] if good else PLAIN_BACKENDS


class NormInTraining(RMSNorm):
    """In one kernel, as its gradients are."""

    def forward(self, x: Tensor) -> Tensor:
        return trained_norm(x, self.weight, self.eps, self.offset) if x.is_cuda else super().forward(x)


class InTraining(Part):
    """Its norms in one kernel each."""

    rms_norm = NormInTraining


class AttentionInTraining(InTraining, Attention):
    def turn(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        return rope(x, *tables) if tables[0].shape[-1] == x.shape[-1] else super().turn(x, tables)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not q.is_cuda:
            return super().attend(q, k, v)
        num_tokens = q.shape[2]
        windowed = self.window is not None and self.window < num_tokens
        if (
            windowed
            and self.sinks is None
            and q.dtype == torch.bfloat16
            and self.head_dim <= 256
            and self.head_dim % 8 == 0
        ):
            return self.o_proj(self.flash_window(*(x.transpose(1, 2) for x in (q, k, v))).flatten(2))
        with sdpa_kernel(backends(q, not windowed and self.sinks is None), set_priority=True):
            return super().attend(q, k, v)

    def flash_window(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """FlashAttention's own window, which PyTorch offers under no public name. q [B, T, N, D], k and v [B, T, K, D] -> [B, T, N, D]"""
        assert self.window is not None
        length, bounds = q.shape[1], {"window_size_left": self.window - 1, "window_size_right": 0}
        return torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, length, length, 0.0, False, False, scale=self.scale, **bounds
        )[0]


class FfnInTraining(InTraining, GatedFfn):
    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return gated_silu(gate, up) if self.activation is F.silu else super().gated(gate, up)


class LinearInTraining(InTraining, LinearMap):
    pass
