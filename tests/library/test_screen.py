"""The second-order screen: its formula, how it orders variants, and that what it drops is never chosen."""

from __future__ import annotations

import json

import pytest
import torch

from puzzle.choose.cells import layer_cells
from puzzle.library.manifest import Library
from puzzle.library.screen import label_gradient, spearman, worst
from puzzle.measure.architecture import read_architecture
from puzzle.runtime.model import load_model

SCORE = ("--sequences", 6, "--device", "cpu")


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 2, 3], [1, 3, 2, 4], 0.9486832980505138),  # as scipy.stats.spearmanr
        ([1, 1, 1], [1, 2, 3], None),
        ([1, 2], [1, 2], None),
    ],
)
def test_spearman(a, b, wanted):
    assert spearman(a, b) == (None if wanted is None else pytest.approx(wanted, abs=1e-12))


def test_the_worst_over_all_layers():
    found = {0: {"a": 1.0, "b": 5.0}, 3: {"a": 4.0, "b": 0.5}}
    assert worst(found, 0.5) == {(0, "b"), (3, "a")}
    assert worst(found, 0.2) == set()


def test_gradients_have_the_fishers_mean(parent):
    """Over many draws: a small change of the last stream costs half of mean (g · change)²."""
    model = load_model(parent, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, 1, 32, dtype=torch.float64, generator=generator)
    change = 0.05 * torch.randn(1, 1, 32, dtype=torch.float64, generator=generator)
    many = label_gradient(model, hidden.expand(1, 4000, 32), generator).double()
    estimate = (many * change).sum(-1).square().mean() / 2
    p, q = (model.logits(x).log_softmax(-1) for x in (hidden, hidden + change))
    assert estimate.item() == pytest.approx((p.exp() * (p - q)).sum().item(), rel=0.15)


def test_screened_blocks_are_never_chosen(puzzle, own_library, corpus, parent, tmp_path):
    score = ("score", own_library, "--data", corpus, "--parent", parent, *SCORE)
    done = puzzle(*score, "--sub-block-screen", 0)
    assert done.exit_code == 0, (done.output, done.exception)
    facts = json.loads((own_library / "scores/screen.json").read_text())
    blocks = sum(len(names) - 1 for space in Library.open(own_library).spaces for names in space.values())
    assert facts["num_compared"] == blocks
    assert facts["spearman"] > 0.8
    for path in (own_library / "scores").glob("L*.json"):
        path.unlink()
    planned = json.loads(puzzle(*score, "--sub-block-screen", 0.5, "--dry-run", "--json").stdout)
    assert (planned["missing"], planned["screened_out_at_most"]) == (blocks, blocks // 2)
    assert planned["screen"]["device_bytes"] > 0
    done = puzzle(*score, "--sub-block-screen", 0.5, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    for share in (0.25, 0.5):  # all is estimated: the dry run knows what another share leaves out
        planned = json.loads(puzzle(*score, "--sub-block-screen", share, "--dry-run", "--json").stdout)
        assert planned["missing"] == (0 if share == 0.5 else blocks // 2 - int(share * blocks))
    library = Library.open(own_library)
    dropped = {(n, name) for n in library.layers for name in library.screened(n)}
    assert len(dropped) == blocks // 2
    assert all(name not in library.scores(n) for n, name in dropped)
    assert sum(row.get("screened", 0) for row in json.loads(done.stdout)["variants"]) == len(dropped)
    goal = ("--gpu", "cpu", "--input-len", 16, "--output-len", 16, "--throughput", "1.1x")
    done = puzzle("solve", own_library, *goal, "--out", tmp_path / "solution")
    assert done.exit_code == 0, (done.output, done.exception)
    assert f"{len(dropped)} blocks were screened out" in done.stderr
    chosen = read_architecture(tmp_path / "solution/architecture.json").layers
    names = {(n, f"{slot}/{choice.variant}") for n, layer in enumerate(chosen) for slot, choice in layer.items()}
    assert not names & dropped
    offered = {
        (n, f"{s}/{v}") for n, cells in enumerate(layer_cells(library)) for c in cells for s, v in c.variants.items()
    }
    assert not offered & dropped
    assert len(offered) == blocks - len(dropped) + 8  # and the parent's own
    assert puzzle(*score).exit_code == 0  # without the screen, all are scored
    assert not any(library.screened(n) for n in library.layers)
    assert sum(map(len, (library.scores(n) for n in library.layers))) == blocks


@pytest.mark.parametrize("share", [1, -0.1])
def test_a_share_out_of_range(puzzle, one_line_error, library, corpus, share):
    one_line_error(
        puzzle("score", library, "--data", corpus, "--sub-block-screen", share), "--sub-block-screen", "below 1"
    )
