"""`solve --engine` prices what `puzzle export` writes for that engine, not the shapes as they are in the library."""

import itertools

import pytest

from puzzle.base.workload import Workload
from puzzle.choose.cost_model import CostModel
from puzzle.export.child import ABSENT, LINEAR, Gqa, SwiGlu
from puzzle.export.lower import lower
from puzzle.profile.engine import Constants, EngineModel, open_engine, sizes_of_part


class TinyLibrary:
    """What `CostModel` asks of a library: two layers of hidden 256, 8 query heads of 32."""

    num_layers = 2
    facts = {"model": {"max_length": 512, "head_shape": "h256 v384", "num_fixed_parameters": 98304}}  # noqa: RUF012
    VARIANTS = {  # noqa: RUF012
        ("attention", "parent"): ("h256 q8 kv4 d32", 196608, 256),
        ("attention", "linear"): ("h256 linear", 65536, 0),
        ("attention", "none"): ("none", 0, 0),
        ("ffn", "parent"): ("h256 f512", 393216, 0),
        ("ffn", "linear"): ("h256 linear", 65536, 0),
        ("ffn", "none"): ("none", 0, 0),
    }

    def variants(self, kind):
        return [name for k, name in self.VARIANTS if k == kind]

    def variant(self, kind, name):
        shape, num_parameters, elements = self.VARIANTS[kind, name]
        return {"shape": shape, "num_parameters": num_parameters, "kv_elements_per_token": elements, "window": None}


DUMMY = ("attention", "h256 q8 kv1 d32")


@pytest.mark.parametrize(
    ("engine", "index", "attention", "ffn", "wanted"),
    [
        ("vllm", 1, "parent", "parent", [("attention", "h256 q8 kv4 d32"), ("ffn", "h256 f512")]),
        ("vllm", 0, "none", "parent", [DUMMY, ("attention", "none"), ("ffn", "h256 f512")]),
        ("vllm", 1, "none", "linear", [("attention", "none"), ("ffn", "h256 f256")]),
        ("vllm", 1, "linear", "none", [("ffn", "h256 f256"), ("attention", "none"), ("ffn", "none")]),
        ("vllm", 0, "linear", "none", [("ffn", "h256 f256"), DUMMY, ("attention", "none"), ("ffn", "none")]),
        ("llama.cpp", 0, "none", "parent", [("attention", "h256 linear"), ("attention", "none"), ("ffn", "h256 f512")]),
        ("llama.cpp", 1, "linear", "none", [("attention", "h256 linear"), ("ffn", "h256 f256")]),
        ("mlx", 0, "none", "linear", [("attention", "none"), ("ffn", "h256 linear")]),
        ("another", 0, "none", "linear", [("attention", "none"), ("ffn", "h256 linear")]),
    ],
)
def test_an_engine_is_priced_by_what_its_export_holds(engine, index, attention, ffn, wanted):
    table = EngineModel(engine, "h100", open_engine("vllm", "h100").constants)
    costs = CostModel(TinyLibrary(), table, Workload(input_len=16, output_len=16))
    choice = {"attention": attention, "ffn": ffn}
    assert costs.parts(choice, index) == wanted
    own = sum(TinyLibrary.VARIANTS[kind, choice[kind]][1] for kind in choice)
    found, batch, tokens = costs.resources(choice, 4, index), 4, 4 * 32
    parameters = sum(sizes_of_part(*part)[0] for part in wanted)
    elements = sum(sizes_of_part(*part)[1] for part in wanted)
    assert found["memory_bytes"] == 2 * (parameters + elements * tokens)
    assert found["num_parameters"] == own
    seconds = sum(sum(costs.part_seconds(*part, batch)) for part in wanted)
    assert found["seconds"] == pytest.approx(seconds)


def test_the_whole_is_the_sum_of_its_layers_as_exported():
    costs = CostModel(TinyLibrary(), open_engine("vllm", "h100"), Workload(input_len=16, output_len=16))
    layers = [{"attention": "none", "ffn": "linear"}, {"attention": "parent", "ffn": "linear"}]
    whole, fixed = costs.predict(layers, 4), costs.fixed(4)
    single = [costs.resources(layer, 4, index) for index, layer in enumerate(layers)]
    assert whole.latency_seconds == pytest.approx(fixed["seconds"] + sum(x["seconds"] for x in single))
    assert whole.memory_bytes == fixed["memory_bytes"] + sum(x["memory_bytes"] for x in single)
    assert whole.kv_bytes_per_token == 2 * (256 + 64)  # the parent's attention and the dummy's
    moved = costs.predict(layers[::-1], 4)
    assert moved.latency_seconds < whole.latency_seconds  # a layer 0 that attends needs no dummy
    assert costs.cached_bytes(layers[0], 100, 0) == 2 * (65536 + 131072 + 2 * 256 * 32 * 9 + 64 * 100)


def test_the_export_has_as_many_parameters_as_the_price_says(tiny):
    """Told from shapes alone, and as `puzzle export` rewrites it: the same matrices."""
    shapes = {
        "parent": (Gqa(num_key_value_heads=4), SwiGlu(width=512)), "linear": (LINEAR, LINEAR), "none": (ABSENT, ABSENT)
    }  # fmt: skip
    for engine, format in (("vllm", "nemotron-nas"), ("llama.cpp", "gguf"), ("mlx", "nemotron-nas")):
        costs = CostModel(
            TinyLibrary(), EngineModel(engine, "h100", Constants()), Workload(input_len=16, output_len=16)
        )
        for first, second in itertools.product(itertools.product(shapes, repeat=2), repeat=2):
            if first == ("none", "none") or all(name != "parent" for name in (first[0], second[0])):
                continue  # an empty layer 0, and children without attention, are rare enough to be priced roughly
            picks = [dict(zip(("attention", "ffn"), pick, strict=True)) for pick in (first, second)]
            built = tiny.build(
                "priced", tiny.Tiny(layers=tuple((shapes[a][0], shapes[f][1]) for a, f in (first, second)))
            )
            lowered, _ = lower(built, engine, format)
            matrices = sum(
                tensor.numel() for layer in lowered.layers for kind in ("attention", "ffn")
                for tensor in layer.read(kind).values() if tensor.dim() == 2
            )  # fmt: skip
            priced = sum(sizes_of_part(*part)[0] for i, pick in enumerate(picks) for part in costs.parts(pick, i))
            assert matrices == priced, (engine, first, second)
            kv = sum(sizes_of_part(*part)[1] for i, pick in enumerate(picks) for part in costs.parts(pick, i))
            assert lowered.kv_elements_per_token == kv, (engine, first, second)
