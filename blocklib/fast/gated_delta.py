"""Gated DeltaNet by the kernels of flash-linear-attention where it is installed, on a GPU in 16 bits; else as the plain module.

Letters: B batch, T tokens, N num_value_heads, K key_dim, V value_dim.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from puzzle.blocklib.fast.batch import Batch
from puzzle.blocklib.fast.recurrent import FastRecurrent
from puzzle.blocklib.fast.training import InTraining
from puzzle.blocklib.plain.gated_delta import DeltaMixer

# The oldest and the newest fla-core that is called; they were read, and never ran here.
FLA = ((0, 4), (0, 6))
WIDEST_KEY = 256  # of its kernels

Rule = Callable[..., tuple[Tensor, Tensor]]


@cache
def installed() -> tuple[Rule, Rule] | None:
    """(of whole sequences, of single tokens) in flash-linear-attention; None without a version that was read."""
    try:
        found = re.match(r"(\d+)\.(\d+)", version("fla-core"))
        if found is None or not FLA[0] <= (int(found[1]), int(found[2])) <= FLA[1]:
            return None
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
    except (PackageNotFoundError, ImportError):
        return None
    return chunk_gated_delta_rule, fused_recurrent_gated_delta_rule


def fla_rules(device: torch.device, dtype: torch.dtype, key_dim: int) -> tuple[Rule, Rule] | None:
    """`installed`; None for tensors that its kernels do not take."""
    taken = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and key_dim <= WIDEST_KEY
    return installed() if taken else None


class DeltaOnGpu(DeltaMixer):
    """The same by flash-linear-attention where `fla_rules` finds it, else as in plain PyTorch."""

    def by_fla(
        self, which: int, convolved: Tensor, rest: Tensor, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """convolved [B, T, …] -> y [B, T, I], the last state [B, N, K, V]. which: of `fla_rules`"""
        if (rules := fla_rules(rest.device, rest.dtype, self.sizes.key_dim)) is None:
            return None
        q, k, v, beta, logs = self.parts(convolved, rest)  # q and k are of length 1, and q is scaled
        q, k, v = (t.to(rest.dtype) for t in (q, k, v))
        y, last = rules[which](
            q=q, k=k, v=v, g=logs, beta=beta, scale=1.0, initial_state=hidden, output_final_state=True,
            use_qk_l2norm_in_kernel=False,
        )  # fmt: skip
        return y.float().flatten(-2), last

    def recurrence(self, convolved: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        return self.by_fla(0, convolved, rest, None) or super().recurrence(convolved, rest)

    def step(self, convolved: Tensor, rest: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        if (found := self.by_fla(1, convolved[:, None], rest[:, None], hidden)) is None:
            return super().step(convolved, rest, hidden)
        return found[0][:, 0], found[1]


class DeltaInTraining(InTraining, DeltaOnGpu):
    """The norm before in one kernel too."""


class FastDelta(FastRecurrent):
    def __init__(self, part: DeltaMixer, batch: Batch):
        with torch.device("meta"):
            own = DeltaOnGpu(part.sizes)
        own.load_state_dict(part.state_dict(), assign=True)
        super().__init__(own.requires_grad_(False), batch)
