"""Maps of low rank from the parent to the engines: library, scores, solution, exports, one set of logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from puzzle.export.picture import picture
from puzzle.library.assemble import assemble
from puzzle.library.manifest import Library, score_name
from puzzle.library.store import BlockStore
from puzzle.measure.architecture import Choice, read_architecture, write_architecture
from puzzle.parents.opened import open_model
from puzzle.runtime.model import load_model
from puzzle.serving.reference import find_export, load_reference

ASKED = ("--attention", "kv1,linear,linear-8,linear-8-svd", "--ffn", "0.5,linear,linear-12,linear-12-svd")
LOW = {"attention": "linear-8", "ffn": "linear-12"}
LAYERS = [
    {"attention": "parent", "ffn": "linear-12"},
    {"attention": "linear-8", "ffn": "parent"},
    {"attention": "linear-8-svd", "ffn": "linear-12"},
    {"attention": "kv1", "ffn": "linear-12-svd"},
]
IDS = torch.randint(0, 384, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def built(tmp_path_factory, puzzle, parent, corpus, build_options):
    """(library, directory of an architecture.json with LAYERS)"""
    lib, solution = (tmp_path_factory.mktemp("low_rank") / name for name in ("lib", "solution"))
    timed = ("--batches", 1, "--prefill", 16, "--contexts", "16,32", "--seconds", 0.005, "--rounds", 1)
    for command in (
        ("build-library", parent, "--data", corpus, "--out", lib, *build_options, *ASKED),
        ("profile", lib, "--gpu", "cpu", *timed),
        ("solve", lib, "--gpu", "cpu", "--params", "80%", "--input-len", 16, "--output-len", 16, "--out", solution),
    ):
        done = puzzle(*command)
        assert done.exit_code == 0, (done.output, done.exception)
    spaces = Library.open(lib).spaces
    chosen = tuple(
        {s: Choice(variant=v, sub_block=space[s][v], precision="float32") for s, v in layer.items()}
        for layer, space in zip(LAYERS, spaces, strict=True)
    )
    write_architecture(solution / "architecture.json", replace(read_architecture(solution), layers=chosen))
    return lib, solution


def test_they_start_by_the_formula_and_both_matrices_learn(built, puzzle, parent, corpus, build_options, tmp_path):
    """U is orthogonal and V = Uᵀ W of what `linear` starts from; it is a better start than plain SVD."""
    options, start = [*build_options], tmp_path / "lib"
    options[options.index("--tokens") + 1] = 0
    done = puzzle("build-library", parent, "--data", corpus, "--out", start, *options, *ASKED, "--layers", "1-2")
    assert done.exit_code == 0, (done.output, done.exception)
    start, trained = BlockStore(start), BlockStore(built[0])
    for layer in (1, 2):
        for slot, name in LOW.items():
            whole, first = start.read(layer, slot, "linear")["linear.weight"], start.read(layer, slot, name)
            u, v, rank = first["linear.u.weight"].float(), first["linear.v.weight"].float(), int(name.split("-")[1])
            assert (u.shape, v.shape) == ((32, rank), (rank, 32))
            torch.testing.assert_close(u.T @ u, torch.eye(rank), rtol=0, atol=1e-5)
            torch.testing.assert_close(v, u.T @ whole.float(), rtol=1e-4, atol=1e-5)
            last = trained.read(layer, slot, name)
            assert not any(torch.equal(last[key], first[key]) for key in first)
    for slot, name in LOW.items():
        names = (name, f"{name}-svd")
        before = [sum(start.record(i, slot, name)["validation_loss_before"] for i in (1, 2)) for name in names]
        assert before[0] < before[1]


def test_all_are_trained_scored_and_priced(built, parent):
    library, store, better = Library.open(built[0]), BlockStore(built[0]), []
    for layer in library.layers:
        scores = library.scores(layer)
        for slot, name in LOW.items():
            for variant in (name, f"{name}-svd"):
                assert library.spaces[layer][slot][variant].rank == int(name.split("-")[1])
                record = store.record(layer, slot, variant)
                better.append(record["validation_loss_after"] < record["validation_loss_before"])
                assert scores[score_name({slot: variant})]["kl"] > 0
    assert sum(better) > len(better) / 2  # eight steps from a good start need not improve each
    table = next((built[0] / "costs" / "cpu").glob("*.csv")).read_text()
    assert "linear h32 rank8" in table
    assert "linear h32 rank12" in table


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ((), 1e-5),
        (("--engine", "vllm"), 1e-4),
        (("--format", "nemotron-nas"), 1e-4),
        (("--format", "gguf", "--dtype", "float32"), 1e-4),
    ],
    ids=["hf", "vllm", "nemotron-nas", "gguf"],
)
def test_every_export_computes_the_child(built, puzzle, parent, tmp_path, options, tolerance):
    lib, solution = built
    child = assemble(Library.open(lib), LAYERS, open_model(parent))
    out = tmp_path / ("child.gguf" if "gguf" in options else "child")
    done = puzzle("export", lib, solution, *options, "--out", out)
    assert done.exit_code == 0, (done.output, done.exception)
    with torch.no_grad():
        wanted = child(IDS)
        models = [load_reference(find_export(out))]
        if not options:
            models.append(load_model(out))
            assert list(open_model(out).structure.layers) == list(child.structure.layers)
        found = [model(IDS) for model in models]
        if "gguf" not in options:
            found.append(
                AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, trust_remote_code=True)
                .eval()(IDS)
                .logits
            )
    for logits in found:
        assert (logits - wanted).abs().max() <= tolerance * wanted.std()


def test_what_is_shown(built):
    _, solution = built
    assert [choice["attention"].variant for choice in read_architecture(solution).layers] == [
        x["attention"] for x in LAYERS
    ]
    layers = read_architecture(solution).sub_blocks
    lines = picture(layers, [read_architecture(solution).parent.layers[i] for i in range(4)])
    assert lines[0].split() == ["attention", "█", "r", "r", "1"]
    assert lines[1].split() == ["ffn", "r", "█", "r", "r"]
    assert "r low rank" in lines[2]


def test_other_ranks_are_refused_in_one_line(puzzle, one_line_error, parent, corpus, tmp_path):
    for name in ("linear-0", "linear-33", "linear-x"):
        done = puzzle("build-library", parent, "--data", corpus, "--out", tmp_path / "lib", "--ffn", name)
        one_line_error(done, f"--ffn {name}: variant '{name}': a rank is a whole number from 1 to the hidden size 32")
    assert not (tmp_path / "lib").exists()
