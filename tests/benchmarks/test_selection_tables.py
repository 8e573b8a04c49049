"""Rows of choosing and healing as tables, also while some of them are not measured yet."""

from __future__ import annotations

import selection_tables
from results_page import BENCHMARKS


def rows(load_script, script: str, columns: str, *told: dict[str, str]) -> list[dict[str, str]]:
    """With every column that the script writes."""
    return [dict.fromkeys(getattr(load_script(script), columns), "") | one for one in told]


def test_chosen(load_script):
    task = "gsm8k exact_match,strict-match {} 0.0250 [0.0100, 0.0400]; hellaswag acc,none {} 0.5 [0.4, 0.6]"
    known = {"speed": "1.5", "promised": "1.501", "library_s": "90", "choose_s": "30", "kl": "0.2"}
    shown = selection_tables.chosen(
        rows(
            load_script,
            "quality/bench_chosen.py",
            "COLUMNS",
            known | {"method": "depth"},
            known | {"method": "mip", "kl_healed": "0.12345", "kl_healed_over_mip": "-0.00123", "kl_healed_over_mip_stderr": "0.0004", "healed_tokens": "10000000", "parent_loss": "2.4111",
                     "tasks_before": task.format("parent", "child"), "tasks": task.format("parent", "child") + "; hellaswag acc,none difference -0.02 [-0.0665, 0.0273]"},
        )
    )  # fmt: skip
    assert (
        "Healed on 10,000,000 tokens; the parent's loss is 2.411. Minutes of a GPU with nothing beside: scores are the library's."
        in shown
    )
    lines = shown.splitlines()
    assert next(n for n, line in enumerate(lines) if "| mip |" in line) < next(
        n for n, line in enumerate(lines) if "| depth |" in line
    )
    assert "| 1.5x | mip | 1.501 | – | – | 0.2000 | – | 0.1235 | -0.0012 ± 0.0004 | – | – | 1.50 | 0.50 | – |" in lines
    assert "|  | parent | 2.5 [1.0, 4.0] | – |" in lines
    assert "| 1.5x | mip, child | – | 50.0 [40.0, 60.0] |" in lines
    assert "| 1.5x | mip, healed child | – | 50.0 [40.0, 60.0] (-2.0 [-6.7, 2.7]) |" in lines


def test_selection(load_script):
    shown = selection_tables.selection(
        rows(
            load_script, "quality/bench_selection.py", "FIELDS",
            {"kind": "method", "speed": "2.0", "method": "pairs", "sum_of_scores": "0.1", "kl": "0.2", "kl_stderr": "0.01",
             "kl_other": "0.3", "children": "90", "seconds": "12.3"},
            {"kind": "method", "speed": "2.0", "method": "mip", "sum_of_scores": "0.1", "kl": "0.2", "kl_stderr": "0.01",
             "kl_other": "0.4", "children": "1", "seconds": "1"},
            {"kind": "method", "speed": "3.0", "method": "pairs", "sum_of_scores": "0.1", "kl": "0.2", "kl_stderr": "0.01",
             "kl_other": "0.4", "children": "1", "seconds": "1"},
            {"kind": "child", "speed": "2.0", "method": "0:ffn/none", "sum_of_scores": "0.1", "kl": "0.2", "kl_stderr": "0.01"},
            {"kind": "rank", "speed": "2.0", "children": "52", "ratio": "1.3", "predicted": "1.01", "spearman": "0.7", "spearman_pairs": "nan"},
        )
    )  # fmt: skip
    assert "| 2x | 52 | 0.700 | – | – | 1.30 | 1.01 | – |" in shown.splitlines()
    assert "| 2x | pairs | 0.1000 | 0.2000 | 0.0100 | 0.3000 | -25.0 % | 90 | 12 |" in shown.splitlines()
    assert "| 3x | pairs | 0.1000 | 0.2000 | 0.0100 | 0.4000 | – | 1 | 1 |" in shown.splitlines()  # without a mip


def test_every_way_of_choosing_has_its_place(load_script):
    assert set(load_script("quality/bench_chosen.py").BASELINES) < set(selection_tables.ORDER)
    assert set(load_script("quality/bench_selection.py").METHODS) < set(selection_tables.ORDER)
    assert (BENCHMARKS / "gpu" / "selection.sh").is_file()
