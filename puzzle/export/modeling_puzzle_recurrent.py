"""What Mamba-2 and Gated DeltaNet share in place of attention, for modeling_puzzle.py, and what they keep of each sequence.

Letters: B batch, T new tokens, E hidden_size, I inner channels, C channels of the convolution.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer


class PuzzleState(DynamicLayer):
    """What is kept of each sequence, whatever its length: the last inputs of the convolution (`keys`), the state (`values`)."""

    is_croppable = False

    def __init__(self):
        super().__init__()
        self.cumulative_length = 0

    def put(self, inputs: Tensor, state: Tensor, num_tokens: int) -> None:
        self.keys, self.values, self.device, self.is_initialized = inputs, state, inputs.device, True
        self.cumulative_length += num_tokens

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def crop(self, *args: Any) -> None:
        raise ValueError("a layer with a recurrent state cannot take tokens back: generate without an assistant")


class PuzzleRecurrent(nn.Module):
    """out_proj(gated(recurrence(silu(conv(x)), rest), z)) of z, x, rest = in_proj. The state lives in the cache's slot number `slot`.

    word: of `per_layer_config`, which gives the sizes; known: all of them, None where they have no default.
    """

    word: str
    known: dict[str, Any]
    split: tuple[int, int, int]  # channels of z, x and the rest
    state_shape: tuple[int, int, int]

    def __init__(self, config: Any, slot: int):
        super().__init__()
        given = getattr(config, self.word)
        if unknown := set(given) - set(self.known):
            raise ValueError(f"{self.word} has {sorted(unknown)}, which is not understood: {', '.join(self.known)} are")
        self.slot, self.eps, self.sizes = slot, config.rms_norm_eps, self.known | given
        self.width, self.chunk = self.sizes["conv_width"], self.sizes["chunk_size"]
        self.state_dtype = getattr(torch, self.sizes["state_dtype"])
        inner, norm = self.lay_out()
        size, convolved, bias = config.hidden_size, self.split[1], self.sizes.get("bias", False)
        self.in_proj = nn.Linear(size, sum(self.split), bias=bias)
        conv_bias = self.sizes.get("conv_bias", False)
        self.conv1d = nn.Conv1d(convolved, convolved, self.width, groups=convolved, bias=conv_bias)
        self.norm = nn.ParameterDict({"weight": nn.Parameter(torch.ones(norm))})
        self.out_proj = nn.Linear(inner, size, bias=bias)

    def lay_out(self) -> tuple[int, int]:
        """Make the kind's own parameters, `split` and `state_shape`; I, and the channels of its norm."""
        raise NotImplementedError

    def recurrence(self, x: Tensor, rest: Tensor, real: Any, state: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, C], rest [B, T, …], state [B, …] in float32; real: as in `forward` -> y [B, T, I], the last state"""
        raise NotImplementedError

    def gated(self, y: Tensor, z: Tensor) -> Tensor:
        """y [B, T, I] in float32 -> [B, T, I] in z's dtype"""
        raise NotImplementedError

    def forward(self, x: Tensor, ropes: dict, masks: dict, cache: Cache | None) -> Tensor:
        """x [B, T, E], masks["real"] [B, T, 1], False at padding, which is as if it were not there -> [B, T, E]"""
        real = masks["real"]
        kept: Any = None if cache is None else cache.layers[self.slot]
        if not isinstance(kept, PuzzleState | None):
            what = f"slot {self.slot} of the cache is a {type(kept).__name__}"
            raise ValueError(f"{what}, not of this model: give an empty cache, or none")
        z, new, rest = self.in_proj(x).split(self.split, dim=-1)
        new = new if real is None else new * real
        used: Any = None if kept is None or not kept.get_seq_length() else kept
        before = used.keys if used else new.new_zeros(len(x), self.split[1], self.width - 1)
        inputs = torch.cat((before, new.transpose(1, 2)), dim=-1)
        mixed = F.silu(self.conv1d(inputs)).transpose(1, 2).float()
        state = used.values.float() if used else mixed.new_zeros(len(x), *self.state_shape)
        y, state = self.recurrence(mixed, rest.float(), real, state)
        if kept is not None:
            kept.put(inputs[:, :, inputs.shape[2] - self.width + 1 :], state.to(self.state_dtype), x.shape[1])
        return self.out_proj(self.gated(y, z))


def decays(logs: Tensor) -> tuple[Tensor, Tensor]:
    """From each token of a chunk of L to later ones [..., L, L], and of what it began with [..., L, 1], of logarithms [..., L]."""
    sums = logs[..., None].expand(*logs.shape, logs.shape[-1]).tril(-1).cumsum(-2)
    return sums.exp().tril(), logs.cumsum(-1).exp()[..., None]
