"""Cost tables: what sub-blocks work with, between and beyond the measured numbers of rows; which table is taken."""

from __future__ import annotations

from dataclasses import replace

import pytest

from puzzle.base.errors import UserError
from puzzle.base.workload import PREFILL_ROWS, Workload
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.none import NO_OP
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.profile.cost_table import CostRow, CostTable, find_costs, write_costs
from puzzle.profile.parts import Embedding, priced_as

FFN = SwiGLU(hidden_size=8, intermediate_size=24, norm_eps=1e-5)
ATTENTION = Gqa(hidden_size=8, num_attention_heads=4, num_key_value_heads=2, head_dim=2, norm_eps=1e-5)
ROW = CostRow(
    part=priced_as(FFN), phase="decode", batch=1, context=0, precision="float32", p20_s=1.0, p50_s=1.0, p80_s=1.0,
    num_samples=5, device="some", versions="1", date="2026-01-01",
)  # fmt: skip


def table(path, rows) -> CostTable:
    write_costs(path, rows)
    return CostTable(path)


def test_workspace_by_rows(tmp_path):
    decode = [replace(ROW, batch=b, workspace_bytes=w) for b, w in ((1, 10), (64, 640))]
    prefill = [replace(ROW, phase="prefill", context=n, workspace_bytes=100 * n) for n in (128, 1024)]
    costs = table(tmp_path / "x.csv", [*decode, *prefill])
    assert costs.workspace(FFN, 64, 1) == 64 * 100  # 64 prompts of one token, between measured rows
    assert costs.workspace(FFN, 2, 1024) == 2 * 1024 * 100  # beyond them
    assert costs.workspace(FFN, 512, 1024) == PREFILL_ROWS * 100  # no more prompts go through together
    assert costs.workspace(FFN, 1, 2 * PREFILL_ROWS) == 2 * PREFILL_ROWS * 100  # but for one that is longer
    assert costs.workspace(NO_OP, 1, 8) == 0


def test_a_table_without_workspaces(tmp_path):
    path = tmp_path / "x.csv"
    write_costs(path, [ROW])
    path.write_text(path.read_text().replace(",workspace_bytes", "").replace("5,0,some", "5,some"))
    assert "workspace" not in path.read_text()
    assert CostTable(path).workspace(FFN, 4, 8) == 0


def test_what_changes_no_time_is_priced_alike(tmp_path):
    """The epsilon of a norm, which RoPE and the scale of the scores have no price of their own; widths have."""
    costs = table(tmp_path / "x.csv", [ROW, replace(ROW, part=priced_as(ATTENTION), context=16)])
    for part in (FFN, replace(FFN, norm_eps=1e-3), replace(FFN, norm_offset=True)):
        assert costs.seconds(part, "decode", 1, 16) == 1.0
    assert costs.seconds(replace(ATTENTION, rope=None, scale=0.5), "decode", 1, 16) == 1.0
    for other in (
        replace(FFN, intermediate_size=25),
        replace(FFN, bias=True),
        replace(FFN, activation="gelu_tanh"),
        replace(ATTENTION, window=4),
        replace(ATTENTION, qk_norm="head"),
        replace(ATTENTION, norm="both"),
    ):
        assert not costs.has(other)
        with pytest.raises(UserError, match=f"has no decode time of '{priced_as(other)}' at batch 1"):
            costs.seconds(other, "decode", 1, 16)
    assert costs.has(NO_OP)
    assert costs.seconds(NO_OP, "decode", 1, 16) == 0
    assert costs.parts() == sorted([priced_as(FFN), priced_as(ATTENTION)])


def test_the_table_that_holds_all_parts_is_taken(tmp_path):
    folder = tmp_path / "costs" / "some-gpu"
    folder.mkdir(parents=True)
    other = replace(ROW, part=priced_as(ATTENTION))
    for name, rows in (("small", [ROW]), ("both", [ROW, other]), ("both-fp8", [ROW, other])):
        write_costs(folder / f"{name}.csv", rows)
    assert find_costs("some", None, [folder.parent], [FFN, ATTENTION]).path.stem == "both"
    assert find_costs("some", "both-fp8", [folder.parent], [FFN]).path.stem == "both-fp8"
    with pytest.raises(UserError, match="holds this library's sub-blocks: run `puzzle profile LIBRARY --gpu some`"):
        find_costs("some", None, [folder.parent], [Embedding(hidden_size=8, vocab_size=9)])
    with pytest.raises(UserError, match="several cost tables for `gpu` some: both-fp8, both, small; pass `shapes`"):
        find_costs("some", None, [folder.parent])


def test_a_table_of_the_first_version_is_refused(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("kind,shape,phase,batch,context,dtype,p50_s\nffn,h8 f24,decode,1,0,float32,1.0\n")
    with pytest.raises(UserError, match=r"is of an earlier version.*convert_costs\.py"):
        CostTable(path)


def test_decode_seconds_walk_over_the_context(tmp_path):
    """Every step at its own context, linear between measured points."""
    rows = [replace(ROW, part=priced_as(ATTENTION), context=c, p50_s=float(c)) for c in (0, 10, 30)]
    costs = table(tmp_path / "x.csv", [*rows, ROW])
    assert costs.decode_seconds(ATTENTION, 1, Workload(input_len=8, output_len=5)) == pytest.approx(8 + 9 + 10 + 11)
