"""Blocks of a child that learn again on what the child gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from puzzle.blocklib.distill import Recipe, VariantTrainer
from puzzle.blocklib.variant import PARENT
from puzzle.library.assemble import assemble, open_parent
from puzzle.library.build import Builder, BuildOptions, build_library
from puzzle.library.coupled import Coupled
from puzzle.library.manifest import Library
from puzzle.measure.architecture import read_architecture
from puzzle.parents.opened import open_model
from puzzle.runtime.model import embed

CHOSEN = [{"attention": "kv1"}, {"ffn": "0.5", "attention": "none"}, {"ffn": "0.25"}, {}]
LAYERS = "0-1"
AGAIN = ("--tokens", 1024, "--seq-len", 64, "--batch-size", 4, "--validation-sequences", 4, "--seed", 1, "--lr", 1e-3)


@pytest.fixture
def architecture(puzzle, own_library) -> Path:
    done = puzzle("solve", own_library, "--params", "99%", "--gpu", "cpu", "--input-len", 16, "--output-len", 8)
    assert done.exit_code == 0, (done.output, done.exception)
    path, spaces = own_library / "solution" / "architecture.json", Library.open(own_library).spaces
    facts = json.loads(path.read_text())
    for n, layer in enumerate(facts["layers"]):
        for slot, choice in layer.items():
            name = CHOSEN[n].get(slot, "parent")
            choice |= {"variant": name, "sub_block": spaces[n][slot][name].key()}
    path.write_text(json.dumps(facts | {"measured": {"kl": 0.5, "kl_stderr": 0.1, "num_tokens": 64}}))
    return path.parent


def hashes(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): json.loads(p.read_text())["sha256"] for p in root.glob("blocks/*/*/*.json")}


def test_they_learn_and_all_else_stays(puzzle, own_library, architecture, parent, corpus, tmp_path):
    before, out = hashes(own_library), tmp_path / "again"
    given = (
        "build-library",
        parent,
        "--data",
        corpus,
        "--inputs-from",
        architecture,
        "--layers",
        LAYERS,
        "--out",
        out,
        *AGAIN,
    )
    done = puzzle(*given)
    assert done.exit_code == 0, (done.output, done.exception)
    assert hashes(own_library) == before
    after = hashes(out)
    learnt = {"blocks/L00/attention/kv1.json", "blocks/L01/ffn/0.5.json", "blocks/L01/attention/none.json"}
    assert after.keys() == learnt | {"blocks/L02/ffn/0.25.json"}  # an empty one has nothing but a new key
    assert {name for name in after if after[name] != before[name]} == learnt
    solved, first = read_architecture(out / "solution"), read_architecture(architecture)
    assert solved.layers == first.layers
    library = Library.open(out)
    parts = [
        library.scores(n)[f"{s}/{v}"]["kl"]
        for n, layer in enumerate(solved.variants)
        for s, v in layer.items()
        if v != PARENT
    ]
    assert solved.objective == pytest.approx(sum(parts)) != pytest.approx(first.objective)
    assert (solved.status, solved.measured, solved.bound) == ("trained again", None, None)
    done = puzzle(
        "evaluate", parent, out / "solution", "--data", corpus, "--sequences", 4, "--seq-len", 64, "--no-speed"
    )
    assert done.exit_code == 0, (done.output, done.exception)
    assert "nothing to train" in puzzle(*given).stderr
    assert hashes(out) == after
    # one that is gone is trained with all that it learnt from, and so comes out the same
    (out / "blocks/L01/ffn/0.5.safetensors").unlink()
    assert puzzle(*given, "--no-score").exit_code == 0
    assert hashes(out) == after
    solved = read_architecture(out / "solution")
    assert (solved.status, solved.objective) == ("trained again, sum of the scores of before", first.objective)


@pytest.mark.parametrize("mix", [0.25, 1.0])
def test_both_streams(own_library, architecture, parent, corpus, tmp_path, mix):
    """Where nothing learns, they end where parent and child end; what blocks are held against closes the gap."""
    library = Library.open(own_library)
    source, solved = open_parent(library, str(parent)), read_architecture(architecture)
    options = BuildOptions(
        data=[str(corpus)], out=tmp_path / "out", inputs_from=architecture, mix=mix, seq_len=16, device="cpu"
    )
    builder = Builder(open_model(str(parent)), options)
    coupled, structure = builder.coupled, source.structure
    assert isinstance(coupled, Coupled)
    parts = {(n, s): coupled_part(source, n, s) for n, s, _ in structure}
    embedding = source.embedding().float()
    coupled.load(parts, {}, embedding)
    ropes = {name: rope.tables(16, torch.device("cpu")) for name, rope in structure.ropes.items()}
    ids = torch.arange(4 * 16).view(4, 16) + 2
    x = coupled.doubled(embed(ids, embedding, structure.embedding_scale))
    count = round(4 * mix)
    assert len(x) == 4 + count
    ended = coupled.through(parts, {}, ropes, x, VariantTrainer.step)
    whole, child = (assemble(library, layers, source) for layers in ([{}] * 4, solved.variants))
    assert torch.allclose(ended[:4], whole.hidden(ids), atol=1e-5)
    assert torch.allclose(ended[4:], child.hidden(ids[:count]), atol=1e-5)
    assert not torch.allclose(ended[4:], ended[:count], atol=1e-2)
    seen = []
    coupled.load(parts, {(0, "attention"): [object()]}, embedding)
    block = [object()]
    coupled.through(parts, {(0, "attention"): block}, ropes, x, lambda _, shown: seen.append(shown) or [])
    (shown,) = seen
    with torch.no_grad():
        added = parts[0, "attention"](x[:4], ropes)
    assert torch.allclose(shown.target, added, atol=1e-6)  # the first place: nothing has gone wrong before it


def coupled_part(source, layer, slot):
    from puzzle.blocklib.plain.part import loaded

    return loaded(
        source.structure.layers[layer][slot],
        {n: t.float() for n, t in source.weights(layer, slot).items()},
        in_training=True,
    )


def test_what_cannot_learn_so(puzzle, one_line_error, poison, own_library, architecture, parent, corpus, tmp_path):
    given = ("build-library", parent, "--data", corpus, "--inputs-from", architecture)
    out = ("--out", tmp_path / "again")
    one_line_error(
        puzzle(*given, "--out", own_library), "is the library of --inputs-from, whose blocks stay as they are"
    )
    one_line_error(puzzle(*given, *out, "--layers", "3"), "has the parent's own sub-blocks in all of these --layers")
    one_line_error(puzzle(*given, *out, "--mix", 0), "--mix 0: the child's share of a batch, above 0 and at most 1")
    one_line_error(puzzle(*given, *out, "--ffn", "0.5"), "--ffn is not used with --inputs-from")
    one_line_error(puzzle(*given[:-2], *out, "--mix", 0.3), "--mix is not used without --inputs-from")
    lost = shutil.copytree(architecture, tmp_path / "lost")
    one_line_error(puzzle(*given[:-1], lost, *out), f"--inputs-from {lost} lies in no library")
    assert not (tmp_path / "again").exists()


def test_stopped_and_gone_on(architecture, parent, corpus, tmp_path, monkeypatch):
    """The same bits: both streams of the steps that are done are not needed again."""
    shared = {
        "data": [str(corpus)],
        "inputs_from": architecture,
        "device": "cpu",
        "tokens": 1024,
        "seq_len": 64,
        "batch_size": 4,
    }
    shared |= {"validation_sequences": 4, "lr": 1e-3}
    build_library(str(parent), BuildOptions(out=tmp_path / "whole", **shared))
    plain, seen = Recipe.lr_at, []

    def stop_once(self, step):
        seen.append(step)
        if seen == [0, 1, 2]:
            raise KeyboardInterrupt
        return plain(self, step)

    monkeypatch.setattr(Recipe, "lr_at", stop_once)
    stopped = BuildOptions(out=tmp_path / "stopped", snapshot_seconds=0, **shared)
    with pytest.raises(KeyboardInterrupt):
        build_library(str(parent), stopped)
    build_library(str(parent), stopped)
    assert seen == [0, 1, 2, 2, 3]
    assert hashes(tmp_path / "stopped") == hashes(tmp_path / "whole")
