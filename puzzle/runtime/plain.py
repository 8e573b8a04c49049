"""The runtime in plain PyTorch, on any device. Letters: B batch, T prompt tokens, H hidden_size."""

from __future__ import annotations

import torch
from torch import Tensor

from puzzle.blocklib.plain.part import Ropes
from puzzle.runtime.interface import Runtime, check_lengths
from puzzle.runtime.model import CausalModel


class PlainRuntime(Runtime):
    """The modules of `model` with a state each, for up to `max_length` tokens of each of `batch` sequences."""

    def __init__(self, model: CausalModel, batch: int, max_length: int):
        self.model, self.max_length = model, max_length
        like = model.embedding.weight
        self.device, self.vocab_size, self.weight_bytes = like.device, len(like), model.weight_bytes
        self.head = model.head_weight.data
        self.tables = model.ropes(max_length)
        self.parts = [part for _, _, part in model.parts()]
        self.states = [part.new_state(batch, max_length, like) for part in self.parts]
        self.ids = torch.zeros(batch, dtype=torch.long, device=self.device)
        self.position = 0

    @property
    def state_bytes(self) -> int:
        return sum(state.num_bytes for state in self.states if state is not None)

    def randomize(self) -> None:
        for state in self.states:
            if state is not None:
                state.randomize()

    def at(self, position: int) -> None:
        self.position = position

    def _ropes(self, begin: int, end: int) -> Ropes:
        return {name: (cos[begin:end], sin[begin:end]) for name, (cos, sin) in self.tables.items()}

    @torch.inference_mode()
    def prefill(self, prompts: Tensor) -> Tensor:
        num_tokens = prompts.shape[1]
        check_lengths(self.model.structure, num_tokens, self.max_length)
        ropes, x = self._ropes(0, num_tokens), self.model.embed(prompts)
        for part, state in zip(self.parts, self.states, strict=True):
            x = part.prefill(x, ropes, state)
        self.ids.copy_(self.choose(self.model.logits(x[:, -1])))
        self.position = num_tokens
        return self.ids.clone()

    @torch.inference_mode()
    def hidden(self, prompts: Tensor) -> Tensor:
        check_lengths(self.model.structure, prompts.shape[1], self.max_length)
        return self.model.final(self.model.hidden(prompts))

    @torch.inference_mode()
    def step(self) -> None:
        ropes, x = self._ropes(self.position, self.position + 1), self.model.embed(self.ids[:, None])
        for part, state in zip(self.parts, self.states, strict=True):
            x = part.decode(x, ropes, state, self.position)
        self.ids.copy_(self.choose(self.model.logits(x[:, 0])))
        self.position += 1
