"""A kind that puzzle has never seen, registered from outside: what it can do is done, and what it cannot is refused by its name.

It keeps a state of its own (nothing per token), has no path on our kernels, no words in any export, and "linear" in its name.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from puzzle.base.errors import UserError
from puzzle.base.workload import Workload
from puzzle.blocklib import sub_block as registry
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.plain.part import Part
from puzzle.blocklib.sub_block import MissingFace, Normed, State, Variant, parse_key, register
from puzzle.choose.goal import Goal, Target
from puzzle.choose.problem import Request, fitted
from puzzle.choose.solve import open_costs, solve_library
from puzzle.export.write import export, open_source
from puzzle.library.assemble import architecture_of, assemble, open_parent
from puzzle.library.build import Builder, BuildOptions, build_library
from puzzle.library.estimate import predict_seconds
from puzzle.library.manifest import Library
from puzzle.library.score import ScoreOptions, score_library
from puzzle.measure.architecture import read_architecture, write_architecture
from puzzle.measure.bench import bench
from puzzle.parents.opened import open_model
from puzzle.profile.grid import Grid, gpu_grid, targets
from puzzle.profile.profile import profile, subject_of
from puzzle.runtime.fast import FastRuntime
from puzzle.runtime.plain import PlainRuntime

WORK = Workload(input_len=16, output_len=8)
ON_CPU = {"batches": (1, 2), "contexts": (8, 32), "seconds": 1e-4, "min_samples": 1}
GRID = Grid(**ON_CPU, prompts=((1, 8), (1, 32), (2, 8), (2, 32)), whole=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearMemory(Normed):
    """M s of the running sum s ← rate · s + n of the normed input n, channel by channel. Letters: B, T, H as everywhere."""

    kind = "linear_memory"
    plain = f"{__name__}:Memory"

    def inner_tensors(self):
        return {"rate": (self.hidden_size,), "mix.weight": (self.hidden_size, self.hidden_size)}

    def state(self):
        return State(per_sequence=self.hidden_size)

    def symbol(self, parent):
        return "m"

    @classmethod
    def stand_ins(cls, parent):
        return ["memory"] if isinstance(parent, Gqa) else []

    @classmethod
    def stand_in(cls, parent, name):
        if name != "memory" or not isinstance(parent, Gqa):
            return None

        def initialise(block):
            rate = torch.full((parent.hidden_size,), 0.5)
            return {"norm.weight": block.weights["norm.weight"], "rate": rate, "mix.weight": parent.linear_map(block)}

        return Variant(name=name, sub_block=cls(**parent.norm_fields()), initialise=initialise)


class Memory(Part):
    def __init__(self, sub_block):
        super().__init__(sub_block)
        self.rate = nn.Parameter(torch.zeros(sub_block.hidden_size))
        self.mix = nn.Linear(sub_block.hidden_size, sub_block.hidden_size, bias=False)
        self.finish()

    def sums(self, entered, begin):
        """[B, T, H] and [B, H] -> [B, T, H]"""
        found = [begin]
        for token in entered.unbind(1):
            found.append(self.rate * found[-1] + token)
        return torch.stack(found[1:], dim=1)

    def inner(self, entered, ropes):
        return self.mix(self.sums(entered, torch.zeros_like(entered[:, 0])))

    def new_state(self, batch, max_length, like):
        return Kept(like.new_zeros(batch, self.sub_block.hidden_size))

    def prefill(self, x, ropes, state):
        sums = self.sums(self.enter(x), torch.zeros_like(x[:, 0]))
        state.sum = sums[:, -1]
        return x + self.leave(self.mix(sums))

    def decode(self, x, ropes, state, position):
        sums = self.sums(self.enter(x), state.sum)
        state.sum = sums[:, -1]
        return x + self.leave(self.mix(sums))


@dataclass
class Kept:
    sum: torch.Tensor

    @property
    def num_bytes(self):
        return self.sum.numel() * self.sum.element_size()

    def randomize(self):
        self.sum.normal_()


@pytest.fixture(scope="module", autouse=True)
def known():
    """The kind is registered for the tests of this file alone."""
    register(LinearMemory)
    yield
    del registry._KINDS[LinearMemory.kind]


def goal(share: float) -> Goal:
    """At most this share of the parent's parameters."""
    return Goal(limits={"params": Target(value=share, relative=True)})


def options(corpus, out) -> BuildOptions:
    sizes = {"tokens": 512, "seq_len": 32, "batch_size": 4, "calibration_sequences": 4, "validation_sequences": 4}
    return BuildOptions(data=[str(corpus)], out=out, attention="memory", ffn="parent", device="cpu", **sizes)


@pytest.fixture(scope="module")
def made(tmp_path_factory, parent, corpus, known):
    """The directory of a library that offers the kind in place of every attention: built, scored, profiled on the CPU."""
    out = tmp_path_factory.mktemp("new-kind") / "lib"
    build_library(str(parent), options(corpus, out))
    score_library(out, [str(corpus)], ScoreOptions(sequences=4, device="cpu"))
    profile(subject_of(Library.open(out)), gpu="cpu", out=out / "costs" / "cpu", grid=GRID)
    return out


@pytest.fixture(scope="module")
def solved(made):
    """What `solve` chooses where only a child without any attention has few enough parameters."""
    library = Library.open(made)
    layers = [{slot: list(space.values())[-1] for slot, space in layer.items()} for layer in library.spaces]
    fewest = library.structure.with_layers(layers).num_parameters
    request = Request(work=WORK, goal=goal((fewest + 0.5) / library.structure.num_parameters))
    found = solve_library(library, open_costs(library, "cpu", None), request)
    (made / "solution").mkdir()
    write_architecture(made / "solution" / "architecture.json", found)
    return found


def test_it_is_built_and_scored(made, parent, corpus):
    library = Library.open(made)
    assert [list(space["attention"]) for space in library.spaces] == [["parent", "memory"]] * 4
    assert library.spaces[0]["attention"]["memory"].key() == "linear_memory h32"
    for layer in range(4):
        (score,) = library.scores(layer).values()
        assert 0 < score["kl"] < 10
    builder = Builder(open_model(parent), options(corpus, made / "new"))
    assert predict_seconds(builder, builder.plan()) > 0


def test_it_is_chosen_and_priced(made, solved):
    library = Library.open(made)
    assert solved.variants == [{"attention": "memory", "ffn": "parent"}] * 4
    assert solved.predicted.kv_bytes_per_token == 0
    states = 4 * 4 * 32 * solved.predicted.batch  # layers, bytes, channels
    assert solved.predicted.memory_bytes == 4 * solved.predicted.num_parameters + states
    assert solved.predicted.num_parameters == solved.structure().num_parameters
    assert architecture_of(made / "solution", library) == read_architecture(made / "solution") == solved


def test_it_runs_with_its_state(made, solved):
    """Prefill and decode = a full forward for every token, and the bytes are those that were promised."""
    library = Library.open(made)
    model = assemble(library, solved.variants, open_parent(library, None))
    prompt = torch.randint(2, 384, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = prompt
    with torch.no_grad():
        for _ in range(12):
            expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(PlainRuntime(model, 2, 32).generate(prompt, 12), expected[:, 9:])
    found = bench(made / "solution", gpu="cpu", repeats=1)["child"]
    assert found["measured"]["memory_bytes"] == found["predicted"]["memory_bytes"]


def test_its_name_does_not_decide_where_it_is_measured(made):
    """What keeps a state is timed at every context, on a GPU too; `linear` by rows alone."""
    library = Library.open(made)
    space = library.spaces[0]["attention"]
    linear = parse_key("linear h32")
    offered = [("attention", sub_block) for sub_block in (*space.values(), linear)]
    points = {t.key: t.points for t in targets(library.structure, offered, gpu_grid())}
    assert points["linear_memory h32"] == points[space["parent"].timed().key()]
    assert {at.context for at in points["linear_memory h32"] if at.phase == "decode"} == {128, 256}
    assert {at.context for at in points["linear h32"] if at.phase == "decode"} == {0}


def test_what_it_cannot_do_is_refused_by_its_name(made, solved, tmp_path):
    library = Library.open(made)
    model = assemble(library, solved.variants, open_parent(library, None))
    by_name = "kind 'linear_memory'"
    with pytest.raises(MissingFace, match=f"{by_name} have no path on our kernels"):
        FastRuntime(model, 1, 32)
    small = Grid(**ON_CPU, prompts=((1, 8),), rows=(8,), by_rows=True)
    with pytest.raises(MissingFace, match=f"{by_name} have no profile on a GPU of what it keeps between tokens"):
        profile(subject_of(library), gpu="h100", out=tmp_path / "costs", device="cpu", grid=small)
    engine = open_costs(library, "h100", None, "vllm")
    kept, left_out = fitted(library, engine)
    assert left_out == [
        f"attention/{name}" for name, one in library.spaces[0]["attention"].items() if one.kind == "linear_memory"
    ]
    assert kept.spaces[0]["attention"].keys() == library.spaces[0]["attention"].keys() - {left_out[0].partition("/")[2]}
    with pytest.raises(UserError, match=f"`engine` vllm: sub-blocks of {by_name} have not been fitted"):
        engine.seconds(parse_key("linear_memory h32"), "decode", 1, 16)
    for format, message in (
        ("hf", f"{by_name} have no entry in per_layer_config where other layers have 'gqa'"),
        ("nemotron-nas", f"layer 0 attention: .* has no sub-blocks of {by_name}"),
        ("gguf", f"layer 0 attention: .* has no sub-blocks of {by_name}"),
    ):
        with pytest.raises(UserError, match=message):
            export(open_source(made, made / "solution"), tmp_path / format, format=format)
        assert not (tmp_path / format).exists()


def test_a_library_of_a_kind_that_is_not_installed(made, monkeypatch):
    monkeypatch.delitem(registry._KINDS, "linear_memory")
    with pytest.raises(UserError, match=r"library\.json is broken .*kind 'linear_memory' is unknown"):
        Library.open(made)
    monkeypatch.undo()
    assert Library.open(made)
