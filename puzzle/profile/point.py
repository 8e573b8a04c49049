"""Times one point of a profile on a GPU: a chain of copies of one sub-block, as a CUDA graph on cold weights and caches.

What depends on a number of rows alone is loaded once per shape; attention is put together anew for every point, with caches
cut from one pool that is filled once. A first pass through one sub-block compiles its kernels and shows how much memory it
works with.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from puzzle.base.machine import cpu_name
from puzzle.blocklib.fast import PAGE, CachePool, Fast, Stream, kept_pages, new_batch
from puzzle.kernels.rmsnorm import rms_norm
from puzzle.kernels.swiglu import linear
from puzzle.kernels.timer import Graph, Timing, num_copies, rounds_for, time_replays
from puzzle.parents.known import Shapes
from puzzle.profile.chain import chain, fast_copies

MAX_WEIGHT_BYTES = 24 * 2**30  # of one chain
MAX_COPIES = 24
SETTLE_SECONDS = 0.15  # of work with many rows before it is timed: sustained products lower the clocks
SETTLE_ROWS = 1024  # with 256 a chain of products alone is throttled as no model is: 15 ms promised for 13
LONG_SECONDS, LONG_SAMPLES = 4e-3, 3  # no cache matters to a sub-block that takes that long: one copy, a few samples
MAX_SPREAD, RETRIES = 0.06, 3  # a point is timed again while its p80 lies this far above its p20
POOL_ROOM = 20 * 2**30  # left beside the pool, for weights and what prefill works with
BYTES_PER_SECOND, FLOPS_PER_SECOND, SECONDS_PER_SUB_BLOCK = 3e12, 7e14, 6e-6  # to guess how long a graph will take


@dataclass(slots=True)
class Target:
    """One sub-block shape to be measured. make: a module of it with random weights, or a head's weight."""

    kind: str
    shape: str
    by_rows: bool
    make: Callable[[], Any]
    points: list[tuple[str, int, int]] = field(default_factory=list)  # phase, batch, context


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """What was measured. workspace: bytes at the peak of one sub-block, beside its weights, its cache and the stream that comes
    in; 0 where nobody counts them."""

    timing: Timing
    workspace: int


class Stage:
    """Holds the copies of the shape in hand and times any of its points. seconds, min_samples: spent on a point."""

    def __init__(
        self, shapes: Shapes, device: torch.device, dtype: torch.dtype, fp8: bool, seconds: float, min_samples: int
    ):
        self.shapes, self.device, self.dtype, self.fp8 = shapes, device, dtype, fp8
        self.seconds, self.min_samples = seconds, min_samples
        versions = f"torch {torch.__version__}"
        if device.type == "cuda":
            import triton

            versions += f", triton {triton.__version__}"
        self.facts = {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
            "versions": versions,
            "dtype": "fp8" if fp8 else str(dtype).removeprefix("torch."),
            "date": time.strftime("%Y-%m-%d"),
        }
        self.on_gpu = device.type == "cuda"
        self.target: Target | None = None
        self.modules: list[Any] = []  # of attention; weights of a head
        self.parts: list[Fast] = []  # of what goes by rows
        self.weight_bytes = 0  # of one copy
        self.pool: CachePool | None = None
        hidden = shapes.spec.hidden_size
        rows, count = (2**26 // hidden, 8) if self.on_gpu else (4 * hidden, 1)
        weights = [torch.randn(rows, hidden, device=device).to(dtype) for _ in range(count)]
        x = torch.randn(16, hidden, device=device).to(dtype)
        self._reference = Graph(lambda: [F.linear(x, w) for w in weights], device)

    def reference(self) -> float:
        """Seconds of a fixed piece of work: drift shows here."""
        return time_replays(self._reference.replay, 1, self.device, 0.02, 20).p50

    def load(self, target: Target) -> bool:
        """Copies of `target`, enough to run on cold weights; False when they do not fit in memory."""
        try:
            self._load(target)
        except torch.cuda.OutOfMemoryError:
            self.modules, self.parts, self.pool = [], [], None
            self._release()
            return False
        return True

    def _load(self, target: Target) -> None:
        self.target, self.modules, self.parts = target, [], []
        is_attention = not target.by_rows
        if not is_attention:
            self.pool = None
        self._release()
        first = target.make()
        tensors = [first] if isinstance(first, torch.Tensor) else list(first.parameters())
        size = sum(t.numel() * t.element_size() for t in tensors)
        self.weight_bytes = size // (2 if self.fp8 and isinstance(first, nn.Module) else 1)
        count = num_copies(self.weight_bytes, self.device, MAX_COPIES)
        while count > 1 and count * size > MAX_WEIGHT_BYTES:
            count -= 1
        self.modules = [first]
        if isinstance(first, nn.Module) and not is_attention:
            state = new_batch(self.shapes.spec, 1, PAGE, self.device, self.fp8)
            for index in range(count):
                self.parts += fast_copies([first if index == 0 else target.make()], state)
            self.modules = []
        else:
            self.modules += [target.make() for _ in range(count - 1)]
        del first, tensors
        if is_attention and self.pool is None and self.on_gpu:
            self._release()
            kept = torch.float8_e4m3fn if self.fp8 else self.dtype
            free = torch.cuda.mem_get_info()[0]
            self.pool = CachePool(free - min(POOL_ROOM, free // 3), kept, self.device)

    def _release(self) -> None:
        if self.on_gpu:
            torch.cuda.empty_cache()

    def time(self, phase: str, batch: int, context: int) -> Point | None:
        """None when the point does not fit in memory."""
        assert self.target is not None
        try:
            if self.target.kind in ("embedding", "head"):
                return self._fixed(batch)
            return self._time(phase, batch, context)
        except torch.cuda.OutOfMemoryError:
            self._release()
            return None

    def _time(self, phase: str, batch: int, context: int) -> Point | None:
        assert self.target is not None
        num_rows = batch * context if phase == "prefill" else batch
        cache_bytes = 0
        if self.target.by_rows:
            parts, state = self.parts, new_batch(self.shapes.spec, 1, PAGE, self.device, self.fp8)
        else:
            length = context + 1 if phase == "decode" else context
            module = self.modules[0]
            pages = kept_pages(-(-length // PAGE), module.window)
            elements = 2 * batch * pages * PAGE * module.num_kv_heads * module.head_dim
            cache_bytes = elements * (1 if self.fp8 else self.dtype.itemsize)
            count = min(len(self.modules), num_copies(self.weight_bytes + cache_bytes, self.device, MAX_COPIES))
            if self.pool is not None:
                if cache_bytes > self.pool.num_bytes:
                    return None
                count = min(count, self.pool.num_bytes // cache_bytes)
                self.pool.used = 0
            state = new_batch(self.shapes.spec, batch, length, self.device, self.fp8)
            state.pool = self.pool
            state.at(context if phase == "decode" else 0)
            parts = fast_copies(self.modules[:count], state)
        delta = torch.randn(num_rows, self.shapes.spec.hidden_size, device=self.device).to(self.dtype)
        residual = torch.randn_like(delta)
        elements = self.weight_bytes // (1 if self.fp8 else self.dtype.itemsize)
        read = cache_bytes if phase == "decode" else 0
        least = max((self.weight_bytes + read) / BYTES_PER_SECOND, 2 * elements * num_rows / FLOPS_PER_SECOND)
        if least > LONG_SECONDS:
            parts = parts[:1]
        run = chain(parts, state, phase, delta, residual)
        guess = len(parts) * (least + SECONDS_PER_SUB_BLOCK)
        settle = SETTLE_SECONDS if num_rows >= SETTLE_ROWS else 0.0
        workspace = self._workspace(chain(parts[:1], state, phase, delta, residual))
        return self._measured(run, len(parts), guess, settle, workspace)

    def _fixed(self, batch: int) -> Point:
        """The embedding's rows, or final norm, head and argmax."""
        assert self.target is not None
        kind, spec = self.target.kind, self.shapes.spec
        ids = torch.randint(0, self.shapes.vocab_size, (batch,), device=self.device)
        x = torch.randn(batch, spec.hidden_size, device=self.device).to(self.dtype)
        scale = torch.ones(spec.hidden_size, device=self.device, dtype=self.dtype)

        def run() -> None:
            for weight in self.modules:
                if kind == "embedding":
                    F.embedding(ids, weight)
                else:
                    stream: Stream = rms_norm(x, x, scale, spec.rms_norm_eps)
                    ids.copy_(linear(stream[0], weight).argmax(-1))

        read = 0 if kind == "embedding" else self.weight_bytes
        guess = len(self.modules) * (read / BYTES_PER_SECOND + SECONDS_PER_SUB_BLOCK)
        return self._measured(run, len(self.modules), guess, 0.0, self._workspace(run))

    def _measured(self, run: Callable[[], object], length: int, guess: float, settle: float, workspace: int) -> Point:
        """Of one of the `length` links of `run`. guess: seconds of one run, roughly; settle: seconds of work before."""
        if workspace > 2**30:  # the graph has memory of its own
            self._release()
        graph = Graph(run, self.device, warm_ups=0, rounds=rounds_for(guess) if self.on_gpu else 1)
        best: Timing | None = None
        min_samples = self.min_samples if guess < LONG_SECONDS else min(self.min_samples, LONG_SAMPLES)
        for _ in range(RETRIES):
            found = time_replays(graph.replay, length * graph.rounds, self.device, self.seconds, min_samples, settle)
            settle = 0.0
            if best is None or found.p80 - found.p20 < best.p80 - best.p20:
                best = found
            if best.p80 - best.p20 <= MAX_SPREAD * best.p50:
                break
        assert best is not None
        return Point(timing=best, workspace=workspace)

    def _workspace(self, run: Callable[[], object]) -> int:
        """Runs once, which also compiles kernels."""
        if not self.on_gpu:
            run()
            return 0
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
