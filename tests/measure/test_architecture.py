"""architecture.json: written and read as equal, and what an architecture is made of once its runs are fused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from puzzle.base.errors import UserError
from puzzle.blocklib.none import NO_OP
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.measure.architecture import read_architecture, write_architecture
from puzzle.parents.known import known_structure
from puzzle.runtime.model import random_model


@pytest.fixture(scope="module")
def fused(puzzle, synthetic, tmp_path_factory):
    """The directory of an architecture with runs that are priced as one wide FFN."""
    out = tmp_path_factory.mktemp("fused")
    arguments = (
        "--throughput",
        "3x",
        "--fusion",
        "--gpu",
        "h100",
        "--input-len",
        128,
        "--output-len",
        64,
        "--out",
        out,
    )
    done = puzzle("solve", synthetic("reference"), *arguments, "--also", "64/32:latency=90%", "--explain")
    assert done.exit_code == 0, done.output
    return out


def test_read_as_written(fused, tmp_path):
    found = read_architecture(fused)
    assert found.fuse
    assert found.also
    assert found.prices
    write_architecture(tmp_path / "architecture.json", found)
    assert read_architecture(tmp_path) == found
    assert (tmp_path / "architecture.json").read_text() == (fused / "architecture.json").read_text()


def test_a_fused_architecture_runs_fused(fused):
    """What `solve --fusion` prices as one wide FFN is measured as one, and holds as many parameters as it says."""
    solved, parent = read_architecture(fused), known_structure("reference")
    structure = solved.structure()
    assert structure.num_layers == parent.num_layers - sum(last - first for first, last in solved.fuse)
    model = random_model(structure, "cpu", torch.float32)
    assert model.weight_bytes == 4 * solved.predicted.num_parameters
    # in bf16: weights, caches, and the workspace of the widest FFN, which is wider than any of the library's
    predicted, work = solved.predicted, solved.workload
    tokens = predicted.batch * (work.input_len + work.output_len)
    held = 2 * predicted.num_parameters + predicted.kv_bytes_per_token * tokens
    width = max(b.intermediate_size for _, _, b in structure if isinstance(b, SwiGLU))
    needs = 16384 * 2 * (3 * width)  # gate, up and their product
    assert width > 2 * parent.usual["ffn"].intermediate_size
    assert predicted.workspace_bytes >= needs
    assert predicted.memory_bytes >= held + needs


def test_a_run_is_one_layer_of_all_channels(fused):
    """Layers around a run stay as they are; what `fuse` has done counts, not what was to be done."""
    solved = read_architecture(fused)
    ffn = known_structure("reference").usual["ffn"]
    layers = [
        {slot: replace(choice, sub_block=NO_OP if slot == "attention" else ffn) for slot, choice in layer.items()}
        for layer in solved.layers
    ]
    alone = {"attention": NO_OP, "ffn": ffn}

    def run(count):
        return {"attention": NO_OP, "ffn": replace(ffn, intermediate_size=count * ffn.intermediate_size)}

    planned = replace(solved, layers=tuple(layers), fuse=((0, 1), (4, 6)), fused=())
    assert list(planned.structure().layers) == [run(2), alone, alone, run(3), *[alone] * 9]
    assert list(replace(planned, fused=((14, 15),)).structure().layers) == [*[alone] * 14, run(2)]
    assert list(replace(planned, fuse=None).structure().layers) == [alone] * 16


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda v: v["layers"][1]["ffn"].update(sub_block="swiglo h256 f512"), "kind 'swiglo' is unknown"),
        (lambda v: v["layers"][1]["ffn"].pop("precision"), "'precision'"),
        (lambda v: v["predicted"].pop("batch"), "batch"),
        (lambda v: v.update(colour="red"), "colour"),
        (lambda v: v["parent"]["layers"][0].update(ffn="ffn"), "kind 'ffn' is unknown"),
        (lambda v: v.update(layers=[]), "it has no layers"),
        (lambda v: v.update(goal=None), "goal: None"),
        (lambda v: v.update(costs={}), "costs: {}"),
        (lambda v: v["predicted"].update(batch="x"), "batch is 'x'"),
    ],
)
def test_what_is_not_understood_is_refused(fused, tmp_path, change, wanted):
    value = json.loads((fused / "architecture.json").read_text())
    change(value)
    (tmp_path / "architecture.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=f"is no architecture .*{wanted}.*solve again"):
        read_architecture(tmp_path)
