"""Times single points on a CPU: each part as it runs inside a model, right after a part that would run before it.

Copies of a sub-block (and of its state) rotate, as a model's layers do, so that a weight is not found in a cache that a real
model would have flushed. Every sample is one call on the next copy. Random weights cost what trained ones do.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from puzzle.base.machine import cpu_name
from puzzle.blocklib.plain.part import Part as Module
from puzzle.blocklib.sub_block import SubBlock
from puzzle.kernels.timer import Timing, percentiles
from puzzle.kernels.timer import time_calls as time_plainly
from puzzle.parents.structure import Structure
from puzzle.profile.grid import At, Grid, Target
from puzzle.profile.parts import Embedding, Whole
from puzzle.runtime.model import random_model, random_part
from puzzle.runtime.plain import PlainRuntime

Call = tuple[Callable[[], object], Callable[[], object]]

COLD_BYTES = 96 * 2**20  # weights rotate through at least this much: three times a large last-level cache


class CpuTimer:
    """Keeps the copies of the part in hand."""

    def __init__(self, structure: Structure, grid: Grid):
        self.structure, self.grid = structure, grid
        self.model = random_model(structure, "cpu", torch.float32)
        self.ropes = self.model.ropes(grid.capacity)
        self.modules = [(slot, part) for _, slot, part in self.model.parts()]
        self.facts = {
            "device": cpu_name(),
            "versions": f"torch {torch.__version__}",
            "precision": "float32",
            "date": time.strftime("%Y-%m-%d"),
        }
        weight = torch.randn(1024, 1024)
        self._reference = [lambda: F.linear(weight, weight)]

    def load(self, target: Target) -> bool:
        self.target, self.copies = target, []
        if isinstance(target.part, SubBlock):
            self.copies = rotating_copies(random_part(target.part, "cpu", torch.float32), self.structure.num_layers)
        return True

    def time(self, at: At) -> tuple[Timing, int]:
        part, seconds, least = self.target.part, self.grid.seconds, self.grid.min_samples
        if isinstance(part, Whole):
            return time_calls([(lambda: None, self._whole(at))], 2 * seconds, least), 0
        if not isinstance(part, SubBlock):
            return time_calls([(self._bind(self.modules[-1][1], at), self._end(at))], seconds, least), 0
        needed = len(self.copies)
        if at.phase == "prefill" and at.batch * at.context * self.structure.hidden_size > 2**22:
            needed = min(needed, 2)  # the activations alone flush every cache
        others = [module for slot, module in self.modules if slot != self.target.slot] or [m for _, m in self.modules]
        calls = [(self._bind(others[i % len(others)], at), self._bind(self.copies[i], at)) for i in range(needed)]
        return time_calls(calls, seconds, least), 0

    def reference(self) -> float:
        return time_plainly(self._reference, device="cpu", seconds=0.02, min_samples=5).p50

    def _bind(self, module: Module, at: At) -> Callable[[], object]:
        """One prefill or decode step on data of its own. Its cache has room for the grid's longest context: reading part of a large
        cache is slower than reading a small one whole (docs/lessons.md)."""
        like = self.model.embedding.weight
        state = module.new_state(at.batch, self.grid.capacity, like)
        begin, end = (0, at.context) if at.phase == "prefill" else (at.context, at.context + 1)
        ropes = {name: (cos[begin:end], sin[begin:end]) for name, (cos, sin) in self.ropes.items()}
        x = torch.randn(at.batch, end - begin, self.structure.hidden_size)
        if at.phase == "prefill":
            return lambda: module.prefill(x, ropes, state)
        if state is not None:
            state.randomize()
        return lambda: module.decode(x, ropes, state, at.context)

    def _end(self, at: At) -> Callable[[], object]:
        """The embedding, or final norm, head and argmax of one position (a prompt needs only its last)."""
        if isinstance(self.target.part, Embedding):
            num_tokens = at.context if at.phase == "prefill" else 1
            ids = torch.randint(0, self.structure.vocab_size, (at.batch, num_tokens))
            return lambda: self.model.embed(ids)
        x = torch.randn(at.batch, 1, self.structure.hidden_size)
        return lambda: self.model.logits(x).argmax(-1)

    def _whole(self, at: At) -> Callable[[], object]:
        """The whole parent: what the sum of its parts is held against."""
        runtime = PlainRuntime(self.model, at.batch, self.grid.capacity)
        if at.phase == "prefill":
            prompts = torch.randint(0, self.structure.vocab_size, (at.batch, at.context))
            return lambda: runtime.prefill(prompts)
        runtime.randomize()
        runtime.ids = torch.randint(0, self.structure.vocab_size, (at.batch,))

        def step() -> None:
            runtime.at(at.context)
            runtime.step()

        return step


def rotating_copies(module: Module, max_copies: int) -> list[Module]:
    """`module` and as many copies as make COLD_BYTES of weights, at most `max_copies`."""
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    count = max(1, min(max_copies, -(-COLD_BYTES // size))) if size else 1
    return [module, *(copy.deepcopy(module) for _ in range(count - 1))]


def time_calls(calls: Sequence[Call], seconds: float, min_samples: int) -> Timing:
    """Walk round the list for `seconds` and at least `min_samples`; each call is one sample, the first round warms up.

    calls: (before, timed): `before` runs untimed, to leave the processor as a model's previous sub-block leaves it.
    """
    for before, call in calls[: max(2, min(len(calls), min_samples))]:
        before()
        call()
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < min_samples or (time.perf_counter() - begin < seconds and len(samples) < 100 * min_samples):
        before, call = calls[len(samples) % len(calls)]
        before()
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return percentiles(samples)
