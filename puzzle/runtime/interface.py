"""One interface for running a model: a static batch of equally long prompts, then one token a step, greedily.

`plain.PlainRuntime` runs the plain modules and is the twin that is trusted; `fast.FastRuntime` runs our kernels on a GPU.
Letters: B batch, T prompt tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from puzzle.base.errors import UserError
from puzzle.parents.structure import Structure


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8:
    """What of a model runs in fp8. weights: the sub-blocks, by layer and slot; cache: keys and values."""

    weights: frozenset[tuple[int, str]]
    cache: bool


class Runtime(ABC):
    """ids [B]: the token in hand of each sequence, which is the next step's input; position: where it stands. head [V, H]: what
    makes logits of `hidden`."""

    ids: Tensor
    head: Tensor
    noise: Tensor | None = None  # [B, V]: tokens are sampled with it, see `choose`
    nonfinite: Tensor | None = None  # [B] bool: whose logits were NaN or infinite once; None: nobody looks
    temperature: Tensor  # [B, 1], beside it
    device: torch.device
    vocab_size: int
    max_length: int  # tokens of a sequence
    weight_bytes: int  # of the whole model as it runs

    @property
    @abstractmethod
    def state_bytes(self) -> int:
        """Of what all sequences keep between tokens."""

    @abstractmethod
    def randomize(self) -> None:
        """Fill the states with noise, to time a step without a prompt."""

    @abstractmethod
    def at(self, position: int) -> None:
        """Make `position` that of the token in hand, of every sequence."""

    @abstractmethod
    def prefill(self, prompts: Tensor) -> Tensor:
        """prompts [B, T] -> the first generated token of each sequence [B], now in hand."""

    @abstractmethod
    def hidden(self, prompts: Tensor) -> Tensor:
        """prompts [≤ B, T] -> what the head multiplies, of every token [≤ B, T, H]; states count for nothing afterwards."""

    def choose(self, logits: Tensor, rows: slice = slice(None)) -> Tensor:
        """The next token of some sequences: the likeliest, or with noise, drawn from an exponential distribution, a sample of
        softmax(logits / temperature) (Gumbel's trick). logits [rows, V] -> [rows]"""
        if self.nonfinite is not None:
            self.nonfinite[rows] |= ~logits.amax(-1).isfinite()
        if self.noise is None:
            return logits.argmax(-1)
        return (logits.float() / self.temperature[rows] - self.noise[rows].log()).argmax(-1)

    @abstractmethod
    def step(self) -> None:
        """The token in hand of each sequence -> the next one, now in hand at the next position."""

    def replayed(self, call: Callable[[], object], warm_ups: int = 2) -> Callable[[], object]:
        """`call`, which is a prefill or a step of this runtime, as it is repeated most cheaply. warm_ups: calls before, where
        that takes any."""
        return call

    def agreed(self, prefill: float, decode: float) -> tuple[float, float]:
        """Seconds as all that run this model together took them."""
        return prefill, decode

    @torch.inference_mode()
    def generate(self, prompts: Tensor, num_tokens: int) -> Tensor:
        """Greedy continuation. prompts [B, T] -> [B, num_tokens]"""
        step = self.replayed(self.step)
        out = [self.prefill(prompts)]
        for _ in range(num_tokens - 1):
            step()
            out.append(self.ids.clone())
        return torch.stack(out, dim=1)


def check_lengths(structure: Structure, prompt: int, total: int) -> None:
    """Raise UserError where RoPE would change under a cache that holds keys of its old frequencies."""
    for rope in structure.ropes.values():
        if (limit := rope.switches_at) is not None and prompt <= limit < total:
            raise UserError(
                f"prompts of {prompt} tokens and {total - prompt} new ones cross {limit}, where this model's longrope changes "
                f"all its frequencies: stay within {limit} tokens, or give longer prompts"
            )
