"""The one yardstick: what it reports of either runtime."""

from __future__ import annotations

import pytest
import torch

from puzzle.base.workload import Workload
from puzzle.blocklib.variant import PARENT, variant_of
from puzzle.measure.serve import _Serving, serve
from puzzle.parents.known import known_structure
from puzzle.parents.opened import open_model
from puzzle.runtime.fast import FastRuntime
from puzzle.runtime.model import load_model, random_model
from puzzle.runtime.open import open_runtime


def test_it_reports_bytes(parent):
    model, made = load_model(parent), []

    def make():
        made.append(open_runtime(model, 2, 12, "float32"))
        return made[-1]

    found = serve({"a": make}, Workload(input_len=8, output_len=4), repeats=1)["a"]
    (runtime,) = made
    assert runtime.weight_bytes == 4 * sum(p.numel() for p in model.parameters())
    assert runtime.state_bytes == 4 * 2 * 2 * 2 * 8 * 12 * 4  # layers, K and V, batch, KV heads, head_dim, slots, bytes
    assert found.memory_bytes == runtime.weight_bytes + runtime.state_bytes
    assert found.batch == 2
    assert found.tokens_per_second > 0


def test_it_reports_what_a_fast_runtime_holds(parent):
    structure = open_model(parent).structure
    names = [{"attention": "kv1", "ffn": "0.5"}, {"attention": "none", "ffn": PARENT}]
    layers = [{s: variant_of(structure.usual[s], name).sub_block for s, name in layer.items()} for layer in names]
    model = random_model(structure.with_layers(layers), "cpu", torch.float32)
    weights, work = model.weight_bytes, Workload(input_len=10, output_len=6)
    found = serve({"it": lambda: FastRuntime(model, 2, 16, consume=True)}, work, repeats=1)["it"]
    assert found.memory_bytes == weights + 4 * 2 * 2 * 64 * 8  # one layer, one KV head, a page of 64 a sequence
    assert found.tokens_per_second == pytest.approx(12 / (found.ttft_seconds + 5 * found.tpot_seconds))
    assert len(model.blocks) == 0


def test_runtimes_take_turns(parent):
    """On a CPU: after a round that warms up, one call of each, again and again."""
    model, calls = load_model(parent), []

    def make(name):
        runtime = open_runtime(model, 1, 8, "float32")
        real = runtime.prefill
        runtime.prefill = lambda prompts: (calls.append(name), real(prompts))[1]
        return lambda: runtime

    work = Workload(input_len=4, output_len=3)
    found = serve({name: make(name) for name in ("a", "b")}, work, repeats=2)
    assert calls == ["a", "b"] * 3
    assert list(found) == ["a", "b"]


@pytest.mark.gpu
def test_memory_is_of_one_model_alone():
    """What models before it held, and what is held beside it, is not counted."""
    structure, device = known_structure("reference"), torch.device("cuda")
    beside = torch.zeros(2**28, dtype=torch.uint8, device=device)

    def make() -> FastRuntime:
        return FastRuntime(random_model(structure, device, torch.bfloat16), 256, 192, consume=True)

    work = Workload(input_len=128, output_len=64)
    found = serve({"first": make, "second": make, "third": make}, work, repeats=1)
    sizes = [served.memory_bytes for served in found.values()]
    state = sum(sub_block.state().per_token for _, _, sub_block in structure) * 2 * 256 * 192
    assert 0 < sizes[0] - state < 400e6
    assert max(sizes) - min(sizes) < 100e6, sizes
    assert len(beside) == 2**28


@pytest.mark.parametrize(("walls", "calls"), [([9, 9.1, 5], 2), ([9, 8, 8.1, 5], 3), ([9, 8, 7, 6, 5], 4)])
def test_no_more_repeats_than_it_takes(parent, monkeypatch, walls, calls):
    """Two in a row that agree end the measurement."""
    left = list(walls)
    monkeypatch.setattr(_Serving, "once", lambda self: (1.0, left.pop(0)))
    model = load_model(parent)
    serve({"a": lambda: open_runtime(model, 1, 8, "float32")}, Workload(input_len=4, output_len=3), repeats=4)
    assert len(walls) - len(left) == calls
