"""Fitting an engine's constants: it finds what made the data, the shipped fit's errors, and measurements that are none."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from puzzle.base.errors import UserError
from puzzle.profile.engine import ENGINES, Constants, EngineModel, read_architectures
from puzzle.profile.engine_fit import fit, fit_engine, predicted, read_measurements

SHIPPED = ENGINES / "vllm-h100"


def test_the_shipped_fit_is_that_of_the_shipped_measurements(tmp_path):
    """And leaving one architecture out predicts it within 4 % per decode step and 6 % of throughput."""
    again = fit_engine("vllm", SHIPPED / "measured.csv", tmp_path / "fit.json", gpu="h100")
    shipped = json.loads((SHIPPED / "fit.json").read_text())
    known = Constants(**shipped["constants"])  # of an earlier version, which knew no host
    assert again["constants"] == pytest.approx(asdict(known), rel=1e-3)
    assert again["constants"]["host"] == 0
    left_out = again["leave_one_out"]
    assert left_out["decode_step"]["mean"] <= 0.04
    assert left_out["throughput"]["mean"] <= 0.06
    assert left_out["pairs_ranked_right"] >= left_out["pairs"] - 1


def test_a_fit_finds_the_constants_that_made_the_data():
    described = read_architectures(SHIPPED / "architectures.json")
    measured = read_measurements(SHIPPED / "measured.csv", list(described["architectures"]))
    true = Constants(weights=0.8, kv=0.7, matmul=0.5, prefill=0.55, step=5e-4, attention=2e-5, ffn=8e-6, sequence=4e-6)
    model = EngineModel("made", "h100", true)
    made = [
        type(m)(
            architecture=m.architecture,
            what=m.what,
            batch=m.batch,
            work=m.work,
            value=predicted(model, described["architectures"][m.architecture], m),
        )
        for m in measured
    ]
    found = asdict(fit("made", described, made).constants)
    for name in ("weights", "kv", "prefill", "attention"):
        assert found[name] == pytest.approx(getattr(true, name), rel=0.1), name


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda t: t.replace("num_seqs", "sequences"), "line 2 is broken"),
        (lambda t: t.replace("parent,8.03", "mother,8.03", 1), "'mother' is not in architectures.json"),
        (lambda t: t.replace("6.57", "-6.57"), "above 0"),
        (lambda t: "\n".join(t.splitlines()[:3]), "at least 8"),
    ],
)
def test_bad_measurements(puzzle, tmp_path, change, wanted):
    (tmp_path / "architectures.json").write_text((SHIPPED / "architectures.json").read_text())
    (tmp_path / "m.csv").write_text(change((SHIPPED / "measured.csv").read_text()))
    done = puzzle("profile", "--engine", "vllm", "--gpu", "h100", "--fit", tmp_path / "m.csv")
    assert done.exit_code == 2
    assert wanted in done.output
    assert not (tmp_path / "fit.json").exists()


def test_profile_fits_from_the_command_line(puzzle, tmp_path):
    for name in ("architectures.json", "measured.csv"):
        (tmp_path / name).write_text((SHIPPED / name).read_text())
    done = puzzle("profile", "--engine", "vllm", "--gpu", "h100", "--fit", tmp_path / "measured.csv")
    assert done.exit_code == 0, done.output
    assert "decode step (16)" in done.output
    assert (tmp_path / "fit.json").is_file()
    other = puzzle("profile", "--engine", "vllm", "--gpu", "h200", "--fit", tmp_path / "measured.csv")
    assert "was measured on h100, not on h200" in other.output
    with pytest.raises(UserError, match="architectures"):
        read_architectures(Path(tmp_path / "measured.csv"))
