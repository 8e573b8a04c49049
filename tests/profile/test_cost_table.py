"""Cost tables: what sub-blocks work with, between and beyond the measured numbers of rows, and in a model's memory."""

from __future__ import annotations

from dataclasses import replace

from puzzle.base.workload import PREFILL_ROWS, Workload
from puzzle.choose.cost_model import CostModel
from puzzle.library.manifest import Library
from puzzle.profile.cost_table import CostRow, CostTable, write_costs

ROW = CostRow(
    kind="ffn", shape="h8 f24", phase="decode", batch=1, context=0, dtype="float32", p20_s=1.0, p50_s=1.0, p80_s=1.0,
    num_samples=5, device="some", versions="1", date="2026-01-01",
)  # fmt: skip


def table(path, rows) -> CostTable:
    write_costs(path, rows)
    return CostTable(path)


def test_workspace_by_rows(tmp_path):
    decode = [replace(ROW, batch=b, workspace_bytes=w) for b, w in ((1, 10), (64, 640))]
    prefill = [replace(ROW, phase="prefill", context=n, workspace_bytes=100 * n) for n in (128, 1024)]
    costs = table(tmp_path / "x.csv", [*decode, *prefill])
    assert costs.workspace("ffn", "h8 f24", 64, 1) == 64 * 100  # 64 prompts of one token, between measured rows
    assert costs.workspace("ffn", "h8 f24", 2, 1024) == 2 * 1024 * 100  # beyond them
    assert costs.workspace("ffn", "h8 f24", 512, 1024) == PREFILL_ROWS * 100  # no more prompts go through together
    assert costs.workspace("ffn", "h8 f24", 1, 2 * PREFILL_ROWS) == 2 * PREFILL_ROWS * 100  # but for one that is longer
    assert costs.workspace("ffn", "none", 1, 8) == 0


def test_a_table_without_workspaces(tmp_path):
    path = tmp_path / "x.csv"
    write_costs(path, [ROW])
    path.write_text(path.read_text().replace(",workspace_bytes", "").replace("2026-01-01,0", "2026-01-01"))
    assert CostTable(path).workspace("ffn", "h8 f24", 4, 8) == 0


def test_memory_holds_the_largest_workspace(library):
    opened, work = Library.open(library), Workload(input_len=16, output_len=4)
    path = next((library / "costs" / "cpu").glob("*.csv"))
    plain, workspace = CostTable(path), {"decode": 7, "prefill": 10**9}
    widest = opened.variant("ffn", "parent")["shape"]
    extra = CostTable(path)
    for phase, size in workspace.items():
        extra._workspace["ffn", widest, phase] = {16: size}
    layers = [{"attention": "none", "ffn": "none"}] * opened.num_layers  # whichever is chosen
    before, after = (CostModel(opened, t, work).predict(layers, 1) for t in (plain, extra))
    assert before.workspace_bytes == 0
    stream = 2 * 16 * 4 * opened.facts["model"]["spec"]["hidden_size"]
    assert after.workspace_bytes == 10**9 + stream
    assert after.memory_bytes == before.memory_bytes + 10**9 + stream
