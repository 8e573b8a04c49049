"""What follows the healing, as rows and as tables: of files such as the scripts write."""

from __future__ import annotations

import csv
import json

import pytest

import post_training_rows
import training_tables
from write_rows import read_rows, write_rows

MACHINE = {"device": "a GPU", "versions": "trl 1", "torch": "2", "date": "2026-11-28"}


@pytest.fixture
def work(tmp_path):
    """A child that was assessed, one after SFT, one after GRPO that was stopped once."""
    for name in ("assessed", "curves"):
        (tmp_path / name).mkdir()
    figures = {"format": 0.5, "format_stderr": 0.01, "accuracy": 0.25, "accuracy_stderr": 0.02}
    found = {"questions": 8, "detailed thinking on": figures, "detailed thinking off": figures | {"format": 1.0}}
    sft = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "train_runtime": 3.25}]
    rewards = {"rewards/accuracy/mean": 0.1, "rewards/format/mean": 0.9, "kl": 0.001, "completions/mean_length": 20.0}
    grpo = [{"step": n, "loss": 0.0, "step_time": 2.5, **rewards} for n in range(1, 13)] + [{"train_runtime": 9.0}]
    for step, logged in {"healed": None, "sft": sft, "grpo_plain": grpo}.items():
        (tmp_path / "assessed" / f"{step}.json").write_text(json.dumps(found))
        (tmp_path / "assessed" / f"{step}.machine.json").write_text(json.dumps(MACHINE))
        if logged is not None:
            (tmp_path / "curves" / f"{step}.json").write_text(json.dumps({"log_history": logged}))
    return tmp_path


def test_rows_of_what_is_there(work):
    assessed, curves = post_training_rows.rows_of(work)
    assert [(r["child"], r["thinking"], r["steps"], r["train_seconds"]) for r in assessed[::2]] == [
        ("as it was healed", "on", 0, ""),
        ("SFT", "on", 2, 3.2),
        ("GRPO, without", "on", 12, 30.0),  # all calls together
    ]
    assert [r["loss"] for r in curves if r["child"] == "SFT"] == [2.0, 1.0]
    assert len(curves) == 14


def test_tables(work, tmp_path):
    for name, rows in zip(("post_training", "post_training_curves"), post_training_rows.rows_of(work), strict=True):
        write_rows(tmp_path / f"{name}.csv", rows)
        with open(tmp_path / f"{name}.csv", newline="") as handle:
            shown = getattr(training_tables, name)(list(csv.DictReader(handle)))
        if name == "post_training":
            assert "| SFT | 2 | 3 | 50.0 % ± 1.0 % | 25.0 % ± 2.0 % | 100.0 % ± 1.0 % | 25.0 % ± 2.0 % |" in shown
        else:
            assert "| SFT | 1 to 2 | 1.500 | – | – | – | – | – |".replace("–", training_tables.NONE) in shown
            assert "| GRPO, without | 11 to 12 | 0.000 | 0.100 | 0.900 | 20.0 | 0.0010 | 2.50 |" in shown


def test_rows_that_are_there_stay_where_that_is_wanted(tmp_path):
    write_rows(tmp_path / "x.csv", [{"way": "a", "tokens": 1}])
    assert read_rows(tmp_path / "x.csv", True) == [{"way": "a", "tokens": "1"}]
    assert read_rows(tmp_path / "x.csv", False) == read_rows(tmp_path / "y.csv", True) == []


def test_a_long_stage_and_a_grown_model():
    long = {"parent": "p", "seq_len": "32768", "batch_size": "1", "promised_bytes": "4e9", "measured_bytes": "3e9", "alive_bytes": "", "loss_after": "2",
            "promised_tokens_per_second": "1000", "measured_tokens_per_second": "1100"}  # fmt: skip
    assert "| 32,768 | 1 | 4.00 | 3.00 |" in training_tables.long_heal([long])
    assert "| 0.750 | 1,000 | 1,100 | 2.000 |" in training_tables.long_heal([long])
    first = {"way": "the parent", "lr": "", "tokens": "0", "new_loss": "4", "old_loss": "3", "old_kl": "0", "active_parameters": "12853504",
             "busiest_expert": "", "seconds": "", "writer": "w", "experts": "4", "top_k": "1", "logits_apart": "0.0e+00"}  # fmt: skip
    shown = training_tables.grow(
        [first, first | {"way": "new alone", "lr": "0.001", "tokens": "2000000", "seconds": "9"}]
    )
    assert shown.startswith("2,000,000 tokens written by w; 4 experts")
    assert "| new alone | 0.001 | 4.0000 | 3.0000 | 0.0000 | 12.9 |" in shown


def test_another_tokenizer():
    first = {"way": "aligned", "tokens": "1024", "words": "512", "nats_per_byte_before": "1.9681", "nats_per_byte": "1.91808", "seconds": "55.7",
             "nats_per_byte_teacher": "0.61256", "tokens_aligned": "0.281496", "words_in_both": "491"}  # fmt: skip
    shown = training_tables.other_tokenizer(
        [first, first | {"way": "text alone", "tokens_aligned": "", "words_in_both": ""}]
    )
    assert "| aligned | 1.9181 | 28.1 % | 491 | 55.7 |" in shown
    assert f"| text alone | 1.9181 | {training_tables.NONE} | {training_tables.NONE} | 55.7 |" in shown
