"""Mamba-2 (arXiv 2405.21060) in place of attention, for modeling_puzzle.py, and what it keeps of each sequence.

Letters: B batch, T new tokens, E hidden_size, N num_heads, P head_dim, G num_groups, Z state_size, I = N · P.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

MAMBA = {  # sizes of Mamba-2, None where they have no default
    "num_heads": None, "head_dim": None, "num_groups": None, "state_size": None, "conv_width": 4, "chunk_size": 128,
    "conv_bias": True, "bias": False, "state_dtype": "float32",
}  # fmt: skip


class PuzzleState(DynamicLayer):
    """What Mamba-2 keeps of each sequence, whatever its length: the last inputs of its convolution (`keys`), its state (`values`)."""

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
        raise ValueError("Mamba-2 cannot take tokens back: generate without an assistant")


class PuzzleMamba(nn.Module):
    """A chunk of tokens at a time; its state lives in the cache's slot number `slot`."""

    def __init__(self, config: Any, slot: int):
        super().__init__()
        if unknown := set(config.mamba) - set(MAMBA):
            raise ValueError(f"mamba has {sorted(unknown)}, which is not understood: {', '.join(MAMBA)} are")
        self.slot, self.eps, sizes = slot, config.rms_norm_eps, MAMBA | config.mamba
        heads, self.groups, self.width = sizes["num_heads"], sizes["num_groups"], sizes["conv_width"]
        self.head_dim, self.state_size, self.chunk = sizes["head_dim"], sizes["state_size"], sizes["chunk_size"]
        self.state_dtype = getattr(torch, sizes["state_dtype"])
        inner, shared = heads * self.head_dim, self.groups * self.state_size
        self.split, convolved = (inner, shared, shared), inner + 2 * shared
        self.in_proj = nn.Linear(config.hidden_size, inner + convolved + heads, bias=sizes["bias"])
        self.conv1d = nn.Conv1d(convolved, convolved, self.width, groups=convolved, bias=sizes["conv_bias"])
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.ones(heads)) for _ in range(3))
        self.norm = nn.ParameterDict({"weight": nn.Parameter(torch.ones(inner))})
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=sizes["bias"])

    def forward(self, x: Tensor, ropes: dict, masks: dict, cache: Cache | None) -> Tensor:
        """x [B, T, E], masks["real"] [B, T, 1], False at padding, which is as if it were not there -> [B, T, E]"""
        real = masks["real"]
        kept: Any = None if cache is None else cache.layers[self.slot]
        if not isinstance(kept, PuzzleState | None):
            what = f"slot {self.slot} of the cache is a {type(kept).__name__}"
            raise ValueError(f"{what}, not of this model: give an empty cache, or none")
        z, new, dt = self.in_proj(x).split((self.split[0], sum(self.split), len(self.D)), dim=-1)
        dt = F.softplus(dt.float() + self.dt_bias.float())  # [B, T, N]
        new, dt = (new, dt) if real is None else (new * real, dt * real)
        used: Any = None if kept is None or not kept.get_seq_length() else kept
        before = used.keys if used else new.new_zeros(len(x), sum(self.split), self.width - 1)
        inputs = torch.cat((before, new.transpose(1, 2)), dim=-1)
        mixed = F.silu(self.conv1d(inputs)).transpose(1, 2).float()
        counts = (len(self.D), self.groups, self.groups)
        v, b, c = (t.unflatten(-1, (n, -1)) for t, n in zip(mixed.split(self.split, -1), counts, strict=True))
        b, c = (t.repeat_interleave(len(self.D) // self.groups, dim=2) for t in (b, c))  # [B, T, N, Z]
        state = used.values.float() if used else v.new_zeros(*v.shape[:1], *v.shape[2:], self.state_size)
        y, state = self.scan(v, dt, b, c, state)
        if kept is not None:
            kept.put(inputs[:, :, inputs.shape[2] - self.width + 1 :], state.to(self.state_dtype), x.shape[1])
        y = ((y + self.D.float()[:, None] * v).flatten(-2) * F.silu(z.float())).unflatten(-1, (self.groups, -1))
        y = (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).flatten(-2).to(x.dtype)
        return self.out_proj(self.norm["weight"] * y)

    def scan(self, v: Tensor, dt: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """state = exp(-exp(A_log) dt) state + dt v ⊗ b; y = state · c. v [B, T, N, P], state [B, N, P, Z] -> y and the last state"""
        found, decays = [], -self.A_log.float().exp() * dt
        for v_, dt_, b_, c_, logs in zip(
            *(t.transpose(1, 2).split(self.chunk, 2) for t in (v, dt, b, c, decays)), strict=True
        ):
            sums = logs[..., None].expand(*logs.shape, logs.shape[2]).tril(-1).cumsum(-2)  # from a token to later ones
            decay, since, values = sums.exp().tril(), logs.cumsum(-1).exp()[..., None], dt_[..., None] * v_
            found.append((c_ @ b_.transpose(2, 3) * decay) @ values + since * (c_ @ state.transpose(2, 3)))
            state = since[:, :, -1:] * state + (decay[:, :, -1, :, None] * values).transpose(2, 3) @ b_
        return torch.cat(found, dim=2).transpose(1, 2), state
