"""Costs of whole models: memory holds the largest workspace, and `solve --engine` prices what `puzzle export` writes for that
engine, not the sub-blocks as they are in the library."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from puzzle.base.errors import UserError
from puzzle.base.workload import Workload
from puzzle.blocklib.none import NO_OP
from puzzle.blocklib.variant import PARENT
from puzzle.choose.cost_model import CostModel
from puzzle.export.lower import lower
from puzzle.library.manifest import Library
from puzzle.profile.cost_table import CostTable
from puzzle.profile.engine import Constants, EngineModel, open_engine
from tiny_children import FFN, FULL, LINEAR, Tiny, build, kv, tiny_child, width

SPACE = {
    "attention": {PARENT: FULL, "kv1": kv(1), "linear": LINEAR, "none": NO_OP},
    "ffn": {PARENT: FFN, "linear": LINEAR, "none": NO_OP},
}
WORK = Workload(input_len=16, output_len=16)
DUMMY, SMALL = kv(1), replace(width(256), bias=True)


@pytest.fixture(scope="module")
def tiny_library() -> Library:
    """Two layers of hidden 256, 8 query heads of 32."""
    structure = tiny_child("kv-heads").around.with_layers([{"attention": FULL, "ffn": FFN}] * 2)
    return Library(Path("tiny"), {}, structure, (SPACE, SPACE), structure)


def priced(library: Library, engine: str, constants: Constants | None = None) -> CostModel:
    structure = library.structure
    return CostModel(
        library, EngineModel(engine, "h100", constants or Constants(), parent=(structure, structure.usual)), WORK
    )


def picked(attention: str, ffn: str):
    return {"attention": SPACE["attention"][attention], "ffn": SPACE["ffn"][ffn]}


@pytest.mark.parametrize(
    ("engine", "index", "attention", "ffn", "wanted"),
    [
        ("vllm", 1, PARENT, PARENT, [FULL, FFN]),
        ("vllm", 0, "none", PARENT, [DUMMY, FFN]),
        ("vllm", 1, "none", "linear", [SMALL]),
        ("vllm", 1, "linear", "none", [SMALL]),
        ("vllm", 0, "linear", "none", [DUMMY, SMALL]),
        ("vllm", 1, "linear", PARENT, [SMALL, replace(FFN, bias=True)]),
        ("vllm", 1, "kv1", PARENT, [DUMMY, FFN]),
        ("vllm==0.26", 1, "kv1", PARENT, [FULL, FFN]),  # KV heads repeated
        ("vllm==0.26", 0, "none", PARENT, [FULL, FFN]),  # the dummy's too
        ("vllm==0.29", 1, "kv1", PARENT, [DUMMY, FFN]),
        ("llama.cpp", 0, "none", PARENT, [LINEAR, FFN]),
        ("llama.cpp", 1, "linear", "none", [LINEAR, width(256)]),
        ("mlx", 0, "none", "linear", [LINEAR]),
        ("another", 0, "none", "linear", [NO_OP, LINEAR]),
    ],
)
def test_an_engine_is_priced_by_what_its_export_holds(tiny_library, engine, index, attention, ffn, wanted):
    costs, layer = priced(tiny_library, engine, open_engine("vllm", "h100").constants), picked(attention, ffn)
    assert costs.runs(layer, index) == wanted
    found, batch, tokens = costs.layer(layer, index).resources(4), 4, 4 * 32
    parameters = sum(sub_block.num_parameters for sub_block in wanted)
    elements = sum(sub_block.state().per_token for sub_block in wanted)
    assert found["memory_bytes"] == 2 * (parameters + elements * tokens)
    assert found["num_parameters"] == sum(sub_block.num_parameters for sub_block in layer.values())
    seconds = sum(sum(costs.part_seconds(part, batch)) for part in wanted)
    assert found["seconds"] == pytest.approx(seconds)
    assert found["seconds"] == found["prefill_seconds"] + found["decode_seconds"]


def test_the_whole_is_the_sum_of_its_layers_as_exported(tiny_library):
    costs = priced(tiny_library, "vllm", open_engine("vllm", "h100").constants)
    layers = [picked("none", "linear"), picked(PARENT, "linear")]
    whole, fixed = costs.predict(layers, 4), costs.fixed(4)
    single = [costs.layer(layer, index).resources(4) for index, layer in enumerate(layers)]
    assert whole.latency_seconds == pytest.approx(fixed["seconds"] + sum(x["seconds"] for x in single))
    assert whole.memory_bytes == fixed["memory_bytes"] + sum(x["memory_bytes"] for x in single)
    assert whole.num_parameters == fixed["num_parameters"] + sum(x["num_parameters"] for x in single)
    assert whole.kv_bytes_per_token == 2 * (256 + 64)  # the parent's attention and the dummy's
    moved = costs.predict(layers[::-1], 4)
    assert moved.latency_seconds < whole.latency_seconds  # a layer 0 that attends needs no dummy
    # three matrices with biases, the dummy's q, k, v and o, a norm each, and keys and values of one head
    gated, dummy = 3 * 256 * 256 + 3 * 256 + 256, 2 * 256 * 32 * 9 + 256
    assert costs.layer(layers[0], 0).cached_bytes(100) == 2 * (gated + dummy + 64 * 100)


def test_an_engine_measured_through_the_plug_in_has_no_rewriting(tiny_library):
    structure = tiny_library.structure
    model = EngineModel("vllm", "h100", Constants(), parent=(structure, structure.usual), format="hf")
    layer = picked("linear", "none")
    assert CostModel(tiny_library, model, WORK).runs(layer, 0) == [LINEAR, NO_OP]


def test_an_engine_takes_no_less_than_its_host(tiny_library):
    """A decode step is the longer of the device's and the host's; limits on time hold for both."""
    fast = priced(tiny_library, "vllm")
    slow = priced(tiny_library, "vllm", Constants(host=1e-4, host_sequence=1e-5))
    layers = tiny_library.structure.layers
    device, both = ([c.predict(layers, b) for b in (1, 64)] for c in (fast, slow))
    assert both[0] == device[0]
    assert both[1].tpot_seconds == pytest.approx(1e-4 + 64e-5)
    assert both[1].ttft_seconds == device[1].ttft_seconds
    assert fast.host_pace(layers, 64) is None
    pace = slow.host_pace(layers, 64)
    assert slow.predict(layers, pace["from_batch"]).tpot_seconds > fast.predict(layers, pace["from_batch"]).tpot_seconds
    assert slow.predict(layers, pace["from_batch"] - 1) == fast.predict(layers, pace["from_batch"] - 1)
    assert pace["host_ms"] == pytest.approx(0.74)
    parts = [slow.fixed(64), *(slow.layer(layer, i).resources(64) for i, layer in enumerate(layers))]
    assert sum(p["host_seconds"] for p in parts) == pytest.approx(both[1].latency_seconds)
    assert sum(p["host_decode_seconds"] for p in parts) == pytest.approx(15 * both[1].tpot_seconds)


def test_the_export_has_as_many_parameters_as_the_price_says(tiny_library):
    """Told from sizes alone, and as `puzzle export` rewrites it: the same matrices."""
    names = (PARENT, "linear", "none")
    engines = (("vllm", "nemotron-nas"), ("vllm==0.26", "nemotron-nas"), ("llama.cpp", "gguf"), ("mlx", "nemotron-nas"))
    for engine, format in engines:
        attentions = (*names, "kv1") if "vllm" in engine else names
        costs = priced(tiny_library, engine)
        for first, second in itertools.product(itertools.product(attentions, names), repeat=2):
            if first == ("none", "none") or all(name != PARENT for name in (first[0], second[0])):
                continue  # an empty layer 0, and children without attention, are rare enough to be priced roughly
            layers = [picked(*pick) for pick in (first, second)]
            built = build("priced", Tiny(layers=tuple((layer["attention"], layer["ffn"]) for layer in layers)))
            lowered, _ = lower(built, engine, format)
            matrices = sum(
                tensor.numel() for layer in lowered.layers for slot in layer.slots
                for tensor in layer.read(slot).values() if tensor.dim() == 2
            )  # fmt: skip
            runs = [part for index, layer in enumerate(layers) for part in costs.runs(layer, index)]
            assert matrices == sum(part.num_matrix_parameters for part in runs), (engine, first, second)
            elements = sum(part.state().per_token for part in runs)
            assert lowered.kv_elements_per_token == elements, (engine, first, second)


def test_memory_holds_the_largest_workspace(library):
    opened, work = Library.open(library), Workload(input_len=16, output_len=4)
    path = next((library / "costs" / "cpu").glob("*.csv"))
    plain, workspace = CostTable(path), {"decode": 7, "prefill": 10**9}
    widest = opened.structure.usual["ffn"].timed().key()
    extra = CostTable(path)
    for phase, size in workspace.items():
        extra._workspace[widest, phase] = {16: size}
    layers = [{"attention": NO_OP, "ffn": NO_OP}] * opened.num_layers  # whichever is chosen
    before, after = (CostModel(opened, t, work).predict(layers, 1) for t in (plain, extra))
    assert before.workspace_bytes == 0
    stream = 2 * 16 * 4 * opened.structure.hidden_size
    assert after.workspace_bytes == 10**9 + stream
    assert after.memory_bytes == before.memory_bytes + 10**9 + stream


def test_a_workload_longer_than_the_parent_takes(tiny_library):
    with pytest.raises(UserError, match=r"`input_len` 500 \+ `output_len` 13 exceed the parent's context of 512"):
        CostModel(tiny_library, open_engine("vllm", "h100"), Workload(input_len=500, output_len=13))
