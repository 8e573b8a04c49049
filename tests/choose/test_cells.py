"""What a layer may choose, and what it costs in score."""

from __future__ import annotations

import json
import re

import pytest

from puzzle.base.errors import UserError
from puzzle.blocklib.linear import Linear
from puzzle.blocklib.none import NO_OP
from puzzle.choose.cells import Cell, layer_cells
from puzzle.library.manifest import Library, scores_path


def edit_scores(library: Library, layer: int, edit) -> None:
    path = scores_path(library.root, layer)
    value = json.loads(path.read_text())
    edit(value["scores"])
    path.write_text(json.dumps(value))


def test_every_combination_has_the_sum_of_its_parts(own_library):
    library = Library.open(own_library)
    for layer, cells in enumerate(layer_cells(library)):
        scores, (attention, ffn) = library.scores(layer), library.spaces[layer].values()
        assert len({cell.name for cell in cells}) == len(cells) == len(attention) * len(ffn)
        for cell in cells:
            alone = [scores[f"{slot}/{name}"]["kl"] for slot, name in cell.variants.items() if name != "parent"]
            assert cell.score == sum(alone)
            assert cell.sub_blocks == {slot: library.spaces[layer][slot][name] for slot, name in cell.variants.items()}
            assert cell.is_parent == (alone == [])


def test_a_joint_score_counts_where_it_was_measured(own_library):
    library = Library.open(own_library)
    before = {cell.name: cell.score for cell in layer_cells(library)[1]}
    edit_scores(library, 1, lambda scores: scores.update({"attention/none+ffn/0.5": {"kl": 7.5}}))
    after = {cell.name: cell.score for cell in layer_cells(library)[1]}
    assert after == before | {"none|0.5": 7.5}


def test_a_variant_without_a_score_is_refused(own_library):
    library = Library.open(own_library)
    edit_scores(library, 2, lambda scores: scores.pop("ffn/0.5"))
    with pytest.raises(
        UserError, match=f"layer 2 ffn/0.5 has no score: run `puzzle score {re.escape(str(own_library))}`"
    ):
        layer_cells(library)


def test_layers_without_alternatives_keep_the_parents(own_library):
    facts = json.loads((own_library / "library.json").read_text())
    del facts["layers"]["1"]
    (own_library / "library.json").write_text(json.dumps(facts))
    scores_path(own_library, 1).unlink()
    cells = layer_cells(Library.open(own_library))
    assert [cell.variants for cell in cells[1]] == [{"attention": "parent", "ffn": "parent"}]
    assert cells[1][0].score == 0
    assert len(cells[0]) > 1


def test_what_a_cell_is(own_library):
    cells = {cell.name: cell for cell in layer_cells(Library.open(own_library))[0]}
    ffn = cells["parent|parent"].sub_blocks["ffn"]
    assert [cells[name].attends for name in ("parent|none", "kv1|none", "window-128|none")] == [True] * 3
    assert [cells[name].attends for name in ("none|parent", "linear|parent", "none|none")] == [False] * 3
    assert cells["none|parent"].lone_ffn == ffn
    assert [cells[name].lone_ffn for name in ("parent|parent", "linear|parent", "none|linear", "none|none")] == [
        None
    ] * 4
    twin = cells["none|0.5"].twin()
    assert twin.fused
    assert twin.name == "none|0.5+"
    assert twin.lone_ffn == cells["none|0.5"].lone_ffn
    choice = cells["none|0.5"].choices("bf16")["ffn"]
    assert (choice.variant, choice.sub_block, choice.precision) == ("0.5", twin.sub_blocks["ffn"], "bf16")


def test_a_lone_ffn_may_stand_in_any_slot(own_library):
    ffn = Library.open(own_library).spaces[0]["ffn"]["parent"]
    variants = {"mixer": "parent", "attention": "none"}
    assert Cell(variants=variants, sub_blocks={"mixer": ffn, "attention": NO_OP}, score=0.0).lone_ffn == ffn
    both = {"mixer": ffn, "attention": Linear(hidden_size=32)}
    assert Cell(variants=variants, sub_blocks=both, score=0.0).lone_ffn is None
