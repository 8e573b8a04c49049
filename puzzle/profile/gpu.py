"""Times single points on a GPU: a chain of copies of one sub-block, as a CUDA graph on cold weights and caches.

Copies follow each other as a model's layers do: the stream of one is the input of the next, and by the time a copy's turn
comes again its weights have left the cache (the L2 of an H100 holds 50 MB). What depends on a number of rows alone is loaded once
per part; what keeps a state is put together anew for every point, with caches cut from one pool that is filled once. A first pass
through one sub-block compiles its kernels and shows how much memory it works with. Parts are timed in bursts too short to lower
the clocks, and the whole parent as it is served: a factor takes the one to the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from puzzle.base.device import name_of
from puzzle.base.workload import PAGE
from puzzle.blocklib.fast.batch import Batch, CachePool, Fast, Stream, make_fast, new_batch
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.plain.part import Part as Module
from puzzle.blocklib.recurrent import Recurrent
from puzzle.blocklib.sub_block import MissingFace, SubBlock
from puzzle.kernels.rmsnorm import rms_norm
from puzzle.kernels.swiglu import linear
from puzzle.kernels.timer import Graph, Timing, long_enough, num_copies, rounds_for, time_replays
from puzzle.parents.structure import Structure
from puzzle.profile.grid import At, Grid, Target
from puzzle.profile.parts import Embedding, Whole
from puzzle.runtime.fast import FastRuntime, rope_tables
from puzzle.runtime.model import CausalModel, random_model, random_part

MAX_WEIGHT_BYTES = 24 * 2**30  # of one chain
MAX_COPIES = 24
WHOLE_SECONDS = 0.1
LONG_SECONDS, LONG_SAMPLES = 4e-3, 3  # no cache matters to a sub-block that takes that long: one copy, a few samples
MAX_SPREAD, RETRIES = 0.06, 3  # a point is timed again while its p80 lies this far above its p20
POOL_ROOM = 20 * 2**30  # left beside the pool, for weights and what prefill works with
BYTES_PER_SECOND, FLOPS_PER_SECOND, SECONDS_PER_SUB_BLOCK = 3e12, 7e14, 1e-5  # to guess how long a graph will take


class GpuTimer:
    """Holds the copies of the part in hand and times any of its points. device: a CPU too, to rehearse."""

    def __init__(self, structure: Structure, grid: Grid, device: torch.device, fp8: bool):
        self.structure, self.grid, self.device, self.fp8 = structure, grid, device, fp8
        self.on_gpu = device.type == "cuda"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        versions = f"torch {torch.__version__}"
        if self.on_gpu:
            import triton

            versions += f", triton {triton.__version__}"
        self.facts = {
            "device": name_of(device),
            "versions": versions,
            "precision": "fp8" if fp8 else "bf16" if self.on_gpu else "float32",
            "date": time.strftime("%Y-%m-%d"),
        }
        self.target: Target
        self.modules: list[Module] = []  # of what keeps a state
        self.weights: list[Tensor] = []  # of an embedding or a head
        self.parts: list[Fast] = []  # of what goes by rows
        self.stack: CausalModel | None = None  # of the whole
        self.weight_bytes = 0  # of one copy
        self.pool: CachePool | None = None
        hidden = structure.hidden_size
        rows, count = (2**26 // hidden, 8) if self.on_gpu else (4 * hidden, 1)
        weights = [torch.randn(rows, hidden, device=device).to(self.dtype) for _ in range(count)]
        x = torch.randn(16, hidden, device=device).to(self.dtype)
        F.linear(x, weights[0])  # what cuBLAS keeps for a stream is no part's workspace
        self._reference = Graph(lambda: [F.linear(x, w) for w in weights], device)

    def reference(self) -> float:
        """Seconds of a fixed piece of work: drift shows here."""
        return time_replays(self._reference.replay, 1, self.device, 0.02, 20).p50

    def load(self, target: Target) -> bool:
        try:
            self._load(target)
        except torch.cuda.OutOfMemoryError:
            self.modules, self.parts, self.weights, self.pool = [], [], [], None
            self._release()
            return False
        return True

    def _load(self, target: Target) -> None:
        self.target, self.modules, self.parts, self.weights, self.stack = target, [], [], [], None
        part = target.part
        keeps_state = isinstance(part, SubBlock) and not part.by_rows
        if not isinstance(part, Gqa):  # whose caches are cut from the pool; states that do not grow are made anew
            self.pool = None
        self._release()
        if isinstance(part, Whole):
            first = self.structure.layers[: part.num_layers]
            self.stack = random_model(self.structure.with_layers(first), self.device, self.dtype)
            return
        if not isinstance(part, SubBlock):
            vocab, hidden = self.structure.vocab_size, self.structure.hidden_size
            self.weight_bytes = vocab * hidden * self.dtype.itemsize
            count = self._copies(self.weight_bytes, self.weight_bytes)
            self.weights = [torch.randn(vocab, hidden, device=self.device).to(self.dtype) for _ in range(count)]
            return
        first = random_part(part, self.device, self.dtype)
        size = sum(t.numel() * t.element_size() for t in first.parameters())
        self.weight_bytes = size // (2 if self.fp8 else 1)
        count = self._copies(self.weight_bytes, size)
        if not keeps_state:
            state = self._batch(part, 1, PAGE)
            for index in range(count):
                self.parts += fast_copies([first if index == 0 else random_part(part, self.device, self.dtype)], state)
            return
        self.modules = [first, *(random_part(part, self.device, self.dtype) for _ in range(count - 1))]
        if self.pool is None and self.on_gpu and isinstance(part, Gqa):
            self._release()
            kept = torch.float8_e4m3fn if self.fp8 else self.dtype
            free = torch.cuda.mem_get_info()[0]
            self.pool = CachePool(free - min(POOL_ROOM, free // 3), kept, self.device)

    def _copies(self, cold_bytes: int, held_bytes: int) -> int:
        """That make the L2 cold, as far as memory goes."""
        return max(1, min(num_copies(cold_bytes, self.device, MAX_COPIES), MAX_WEIGHT_BYTES // max(1, held_bytes)))

    def _batch(self, sub_block: SubBlock, size: int, length: int) -> Batch:
        tables = rope_tables(self.structure, [sub_block], length, self.device)
        return new_batch(size, length, tables, self.device, self.fp8)

    def _release(self) -> None:
        if self.on_gpu:
            torch.cuda.empty_cache()

    def time(self, at: At) -> tuple[Timing, int] | None:
        try:
            if isinstance(self.target.part, Whole):
                return self._whole(at)
            if isinstance(self.target.part, SubBlock):
                return self._time(self.target.part, at)
            return self._fixed(at.batch)
        except torch.cuda.OutOfMemoryError:
            self._release()
            return None

    def _time(self, sub_block: SubBlock, at: At) -> tuple[Timing, int] | None:
        phase, batch, context = at
        num_rows = batch * context if phase == "prefill" else batch
        cache_bytes = 0
        if sub_block.by_rows:
            parts, state = self.parts, self._batch(sub_block, 1, PAGE)
        else:
            if not isinstance(sub_block, Gqa | Recurrent):
                raise MissingFace(sub_block.kind, "profile on a GPU of what it keeps between tokens")
            length = context + 1 if phase == "decode" else context
            cache_bytes = batch * sub_block.state().num_bytes(length, "fp8" if self.fp8 else "bf16", PAGE)
            count = min(len(self.modules), num_copies(self.weight_bytes + cache_bytes, self.device, MAX_COPIES))
            if self.pool is not None:
                if cache_bytes > self.pool.num_bytes:
                    return None
                count = min(count, self.pool.num_bytes // cache_bytes)
                self.pool.used = 0
            state = self._batch(sub_block, batch, length)
            state.pool = self.pool
            state.at(context if phase == "decode" else 0)
            parts = fast_copies(self.modules[:count], state)
        delta = torch.randn(num_rows, self.structure.hidden_size, device=self.device).to(self.dtype)
        residual = torch.randn_like(delta)
        elements = self.weight_bytes // (1 if self.fp8 else self.dtype.itemsize)
        read = cache_bytes if phase == "decode" else 0
        least = max((self.weight_bytes + read) / BYTES_PER_SECOND, 2 * elements * num_rows / FLOPS_PER_SECOND)
        if least > LONG_SECONDS:
            parts = parts[:1]
        run = chain(parts, state, phase, delta, residual)
        guess = len(parts) * (least + SECONDS_PER_SUB_BLOCK)
        workspace = self._workspace(chain(parts[:1], state, phase, delta, residual))
        return self._measured(run, len(parts), guess, workspace)

    def _whole(self, at: At) -> tuple[Timing, int]:
        """The parent's layers as they are served: at clocks that sustained work leaves, with what lies between two steps."""
        assert self.stack is not None
        runtime = FastRuntime(self.stack, at.batch, at.context + 1, fp8=self.fp8)
        call: Callable[[], object] = runtime.step_again
        if at.phase == "prefill":
            prompts = torch.randint(0, self.structure.vocab_size, (at.batch, at.context), device=self.device)
            call = partial(runtime.prefill, prompts)
        else:
            runtime.randomize()
            runtime.at(at.context)
        replay = runtime.replayed(call, warm_ups=1)
        return time_replays(replay, 1, self.device, WHOLE_SECONDS, LONG_SAMPLES), 0

    def _fixed(self, batch: int) -> tuple[Timing, int]:
        """The embedding's rows, or final norm, head and argmax."""
        only_rows, hidden = isinstance(self.target.part, Embedding), self.structure.hidden_size
        ids = torch.randint(0, self.structure.vocab_size, (batch,), device=self.device)
        x = torch.randn(batch, hidden, device=self.device).to(self.dtype)
        scale = torch.ones(hidden, device=self.device, dtype=self.dtype)

        def run() -> None:
            for weight in self.weights:
                if only_rows:
                    F.embedding(ids, weight)
                else:
                    stream: Stream = rms_norm(x, x, scale, self.structure.norm_eps)
                    ids.copy_(linear(stream[0], weight).argmax(-1))

        read = 0 if only_rows else self.weight_bytes
        guess = len(self.weights) * (read / BYTES_PER_SECOND + SECONDS_PER_SUB_BLOCK)
        return self._measured(run, len(self.weights), guess, self._workspace(run))

    def _measured(self, run: Callable[[], object], length: int, guess: float, workspace: int) -> tuple[Timing, int]:
        """Of one of the `length` links of `run`. guess: seconds of one run, roughly."""
        if workspace > 2**30:  # the graph has memory of its own
            self._release()
        graph = Graph(run, self.device, warm_ups=0, rounds=rounds_for(guess) if self.on_gpu else 1)
        if guess < LONG_SECONDS:
            graph = long_enough(run, self.device, graph)
        least = self.grid.min_samples if guess < LONG_SECONDS else min(self.grid.min_samples, LONG_SAMPLES)
        calls, found = length * graph.rounds, []
        while True:
            found.append(time_replays(graph.replay, calls, self.device, self.grid.seconds, least))
            best = min(found, key=lambda timing: timing.p80 - timing.p20)
            if best.p80 - best.p20 <= MAX_SPREAD * best.p50 or len(found) == RETRIES:
                return best, workspace

    def _workspace(self, run: Callable[[], object]) -> int:
        """Runs once, which also compiles kernels."""
        if not self.on_gpu:
            run()
            return 0
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before


def fast_copies(modules: Sequence[Module], batch: Batch) -> list[Fast]:
    """The modules ready to run in `batch`; states that come from no pool hold noise."""
    found = [part for module in modules if (part := make_fast(module, batch)) is not None]
    if batch.pool is None:
        for part in found:
            part.randomize()
    return found


def chain(parts: Sequence[Fast], batch: Batch, phase: str, delta: Tensor, residual: Tensor) -> Callable[[], Stream]:
    """One pass through all parts."""

    def run() -> Stream:
        stream: Stream = (delta, residual)
        for part in parts:
            stream = part.prefill(stream, batch) if phase == "prefill" else part.decode(stream, batch)
        return stream

    return run
