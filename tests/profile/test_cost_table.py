"""Cost tables: what sub-blocks work with, between and beyond the measured numbers of rows; which table is taken."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from puzzle.base.errors import UserError
from puzzle.base.workload import PAGE, PREFILL_ROWS, Workload
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.none import NO_OP
from puzzle.blocklib.sub_block import State
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.parents.known import known_structure
from puzzle.parents.structure import Structure
from puzzle.profile.cost_table import CostRow, CostTable, append_costs, find_costs, write_costs
from puzzle.profile.parts import Embedding, Whole, ends_of, priced_as

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
    rows = [replace(ROW, part=priced_as(ATTENTION), context=c, p50_s=c or 1e-9) for c in (0, 10, 30)]
    costs = table(tmp_path / "x.csv", [*rows, ROW])
    assert costs.decode_seconds(ATTENTION, 1, Workload(input_len=8, output_len=5)) == pytest.approx(8 + 9 + 10 + 11)


def test_what_the_whole_adds_on_a_gpu(tmp_path):
    """A factor on prefill, and in decode as much again for each sub-block that runs; the first two of three layers were measured."""
    parent = replace(known_structure("reference"), hidden_size=8, vocab_size=16)
    parent = parent.with_layers([{"attention": ATTENTION, "ffn": FFN}] * 3)
    attention, whole = priced_as(ATTENTION), Whole(2).key()
    seconds = {priced_as(FFN): 1.0, attention: 2.0, whole: 11.0} | {end.key(): 0.5 for end in ends_of(parent)}
    decode = [
        replace(ROW, part=part, batch=4, context=8 if part in (attention, whole) else 0, p50_s=s)
        for part, s in seconds.items()
    ]
    both = [replace(row, batch=2) for row in decode if row.part not in (attention, whole)]
    prefill = [
        replace(ROW, part=part, phase="prefill", batch=b, context=t, p50_s=s)
        for part, b, t, s in ((priced_as(FFN), 1, 16, 4.0), (attention, 2, 8, 5.0), (whole, 2, 8, 38.0))
    ]
    costs = table(tmp_path / "t.csv", [*decode, *both, *prefill])
    assert costs.whole_over_parts(parent, "decode", 4, 8) == 1.0
    assert costs.between_parts(parent, 4) == (11.0 - 7.0) / 4
    assert costs.between_parts(parent, 2) == 0.0  # not measured there
    assert costs.whole_over_parts(parent, "prefill", 2, 8) == pytest.approx(38.0 / (2 * 9.0 + 1.0))
    assert costs.page == 1  # as a CPU has it
    rows = [replace(row, precision="bf16") for row in decode]
    assert table(tmp_path / "bf16.csv", rows).page == PAGE


SECONDS = {FFN: 1.0, ATTENTION: 2.0}  # of a decode step
EACH, ENDS = -0.25, 1.0  # chains of parts are measured too long


def with_whole(path, num_layers: int, depths=(5,), precision="bf16", lacking=()) -> tuple[Structure, CostTable]:
    """A parent of which `depths` layers were measured, at batch 4; None: all. lacking: depths that did not fit."""
    parent = replace(known_structure("reference"), hidden_size=8, vocab_size=16)
    parent = parent.with_layers([{"attention": ATTENTION, "ffn": FFN}] * num_layers)
    row = replace(ROW, batch=4, precision=precision)
    rows = [replace(row, part=priced_as(p), context=8 if p is ATTENTION else 0, p50_s=s) for p, s in SECONDS.items()]
    rows += [replace(row, part=end.key(), p50_s=ENDS / 2) for end in ends_of(parent)]
    for depth in depths:
        count = depth or num_layers
        seconds = ENDS + count * sum(SECONDS.values()) + 2 * count * EACH
        measured = {"p50_s": 0.0, "num_samples": 0} if depth in lacking else {"p50_s": seconds}
        rows.append(replace(row, part=Whole(depth).key(), context=8, **measured))
    return parent, table(path, rows)


@pytest.mark.parametrize(("depths", "each"), [((5,), EACH), ((None,), EACH), ((4,), 0.0), ((1,), 0.0)])
def test_a_decode_step_is_corrected_by_most_of_the_layers(tmp_path, depths, each):
    """Of nine. Few of them say nothing of all: whatever they take beside their parts, the sum of these is the promise."""
    parent, costs = with_whole(tmp_path / "t.csv", 9, depths)
    assert costs.between_parts(parent, 4) == each
    assert costs.between_parts(parent, 2) == 0.0  # not measured there


def test_of_two_depths_the_deeper_counts(tmp_path):
    """As some tables have them."""
    for depths in ((2, 5), (5, 2), (2, None)):
        parent, costs = with_whole(tmp_path / "t.csv", 9, depths)
        assert costs.between_parts(parent, 4) == EACH
    parent, costs = with_whole(tmp_path / "t.csv", 9, (2, 5), lacking=(5,))
    assert costs.between_parts(parent, 4) == 0.0


def test_prefill_takes_the_deepest(tmp_path):
    parent, costs = with_whole(tmp_path / "t.csv", 12, (2, 5))
    assert costs.whole_over_parts(parent, "prefill", 1, 8) == 1.0  # not measured
    row = replace(ROW, precision="bf16")
    seconds = {priced_as(FFN): 1.0, priced_as(ATTENTION): 2.0, Whole(2).key(): 70.0, Whole(5).key(): 32.0}
    for part, s in seconds.items():
        append_costs(costs.path, replace(row, part=part, phase="prefill", context=8, p50_s=s))
    for end in ends_of(parent):
        append_costs(costs.path, replace(row, part=end.key(), p50_s=ENDS / 2))
    costs = CostTable(costs.path)
    assert costs.whole_over_parts(parent, "prefill", 1, 8) == 32.0 / (5 * 3.0 + ENDS)
    assert costs.between_parts(parent, 4) == 0.0  # of twelve
    fast = costs.path.read_text().replace(",1,32,1,", ",1,8,1,")
    (tmp_path / "fast.csv").write_text(fast)
    assert CostTable(tmp_path / "fast.csv").whole_over_parts(parent, "prefill", 1, 8) == 1.0
    nine = parent.with_layers(parent.layers[:9])
    assert CostTable(tmp_path / "fast.csv").whole_over_parts(nine, "prefill", 1, 8) == 0.5


def test_a_cpu_corrects_by_a_factor(tmp_path):
    parent, _ = with_whole(tmp_path / "t.csv", 9, (None,))
    rows = [replace(ROW, part=priced_as(p), batch=4, context=8, p50_s=s) for p, s in SECONDS.items()]
    rows += [replace(ROW, part=end.key(), batch=4, context=8, p50_s=ENDS / 2) for end in ends_of(parent)]
    costs = table(tmp_path / "cpu.csv", [*rows, replace(ROW, part=Whole().key(), batch=4, context=8, p50_s=56.0)])
    assert costs.strict
    assert costs.between_parts(parent, 4) == 0.0
    assert costs.whole_over_parts(parent, "decode", 4, 8) == 2.0


def test_ends_that_took_less_for_more_are_no_less_than_nothing(tmp_path):
    """As an embedding does between 16 and 32 rows."""
    parent = replace(known_structure("reference"), hidden_size=8, vocab_size=16)
    ends, row = ends_of(parent), replace(ROW, precision="bf16")
    rows = [replace(row, part=end.key(), batch=b, p50_s=s) for end in ends for b, s in ((16, 7.6), (32, 1.5))]
    costs = table(tmp_path / "t.csv", rows)
    assert [costs.seconds(ends[0], "prefill", b, 8) for b in (1, 16, 24, 32, 128)] == pytest.approx(
        [7.6, 7.6, 4.55, 1.5, 1.5]
    )


@pytest.mark.parametrize("batches", [(3, 24), (1, 7, 16), (5,), (200, 300)])
def test_prompts_that_go_through_together_are_no_batch(tmp_path, batches):
    """Embedding and head cost what rows do, linear between batches that were measured, whatever the number of prompts in a group."""
    parent = replace(known_structure("reference"), hidden_size=8, vocab_size=16).with_layers([{"ffn": FFN}] * 3)
    ends, row = ends_of(parent), replace(ROW, precision="bf16")
    rows = [replace(row, part=priced_as(p), batch=b, p50_s=1.0 + b) for b in batches for p in (FFN, *ends)]
    rows += [replace(row, part=priced_as(FFN), phase="prefill", context=t, p50_s=float(t)) for t in (128, PREFILL_ROWS)]
    for length in (96, 1000):
        together = PREFILL_ROWS // length
        whole = replace(row, part=Whole().key(), phase="prefill", batch=together, context=length)
        rows.append(replace(whole, p50_s=2.0 * 3 * together * length))
    costs = table(tmp_path / "t.csv", rows)
    every = [costs.seconds(ends[0], "prefill", b, 96) for b in range(1, 400)]
    assert every == sorted(every)
    assert every[batches[0] - 1] == every[0] == 1.0 + batches[0]
    if len(batches) > 1:
        assert every[batches[0] - 1 :] == pytest.approx([1.0 + b for b in range(batches[0], 400)])
    for batch, length in itertools.product((*batches, 64, 170), (96, 1000)):
        assert 1.8 < costs.whole_over_parts(parent, "prefill", batch, length) <= 2.0


def test_prompts_go_through_in_groups(tmp_path):
    """As the runtime takes them: PREFILL_ROWS tokens at most together; between measured numbers of prompts linear."""
    length = PREFILL_ROWS // 4
    rows = [
        replace(ROW, part=priced_as(ATTENTION), phase="prefill", batch=b, context=length, p50_s=s)
        for b, s in {1: 1.0, 3: 5.0, 4: 6.0}.items()
    ]
    costs = table(tmp_path / "t.csv", [*rows, ROW])
    wanted = {1: 1.0, 2: 3.0, 4: 6.0, 5: 7.0, 8: 12.0, 10: 15.0}
    assert {b: costs.seconds(ATTENTION, "prefill", b, length) for b in wanted} == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("reach", "num_tokens", "page", "kept"),
    [(None, 100, 1, 100), (None, 100, 64, 128), (128, 100, 64, 128), (128, 500, 64, 192), (130, 500, 64, 256), (128, 500, 1, 128)],
)  # fmt: skip
def test_pages_that_are_kept(reach, num_tokens, page, kept):
    state = State(per_token=3, reach=reach, per_sequence=5, own_bytes=7)
    assert state.num_bytes(num_tokens, "bf16", page) == 2 * (3 * kept + 5) + 7
    assert state.num_bytes(num_tokens, "fp8", page) == 3 * kept + 2 * 5 + 7


@pytest.mark.parametrize(
    ("phase", "option", "what"), [("prefill", "--prefill", "prompts"), ("decode", "--contexts", "contexts")]
)
def test_a_length_that_a_cpu_did_not_measure_names_the_option_that_measures_it(tmp_path, phase, option, what):
    rows = [replace(ROW, part=priced_as(ATTENTION), phase=phase, context=c) for c in (128, 256)]
    with pytest.raises(
        UserError, match=rf"has {what} of 128 to 256 tokens of 'gqa .*, batch 1, and 64 are asked for.*{option}`"
    ):
        table(tmp_path / "x.csv", rows).seconds(ATTENTION, phase, 1, 64)
