"""Fitting an engine's constants: it finds what made the data, the shipped fit's errors, and measurements that are none."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from puzzle.base.errors import UserError
from puzzle.base.workload import Workload
from puzzle.profile.engine import ENGINES, Constants, EngineModel, read_architectures
from puzzle.profile.engine_fit import (
    WHAT,
    Measurement,
    compared,
    fit,
    fit_engine,
    leave_one_out,
    predicted,
    read_measurements,
    summary,
)

SHIPPED = ENGINES / "vllm-h100"


@pytest.mark.parametrize(
    ("name", "gpu", "host", "step", "throughput"),
    [
        ("vllm-h100", "h100", False, 0.02, 0.02),
        ("vllm-h100-llama-3.1-8b", "h100", True, 0.03, 0.04),
        ("vllm-h100-llama-3.1-8b-fp8", "h100", True, 0.04, 0.03),
        ("vllm-cpu", "cpu", False, 0.07, 0.11),
    ],
)
def test_the_shipped_fits_are_those_of_the_shipped_measurements(tmp_path, name, gpu, host, step, throughput):
    """step, throughput: mean relative error of an architecture that was left out."""
    again = fit_engine("vllm", ENGINES / name / "measured.csv", tmp_path / "fit.json", gpu=gpu)
    shipped = json.loads((ENGINES / name / "fit.json").read_text())
    assert again["constants"] == pytest.approx(shipped["constants"], rel=1e-3)
    assert (again["constants"]["host"] > 0) == host
    left_out = again["leave_one_out"]
    assert left_out["decode_step"]["mean"] <= step
    assert left_out["throughput"]["mean"] <= throughput
    assert left_out["pairs_ranked_right"] >= 0.8 * left_out["pairs"]


def test_every_shipped_fit_is_tested():
    marks = test_the_shipped_fits_are_those_of_the_shipped_measurements.pytestmark
    assert {path.name for path in ENGINES.iterdir()} == {values[0] for values in marks[0].args[1]}


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


SMALL = {
    name: {"sub_blocks": {f"gqa h576 q9 kv{kv} d64": attention, f"swiglu h576 f{width}": ffn}, "head": "head h576 v49152"}
    for name, kv, attention, width, ffn in (
        ("parent", 3, 30, 1536, 30), ("ffn_half", 3, 30, 768, 30), ("attention_none", 3, 19, 1536, 30),
        ("kv_heads_fewest", 1, 30, 1536, 30), ("first_layers", 3, 2, 1536, 2),
    )
}  # fmt: skip


@pytest.mark.parametrize("host", [{"host": 6e-4, "host_sequence": 1.2e-5}, {}])
def test_a_fit_finds_where_the_host_sets_the_pace(host):
    """Of a small parent: the line of the host's own time, through figures with 2 % of noise; none where there is none. Prompts that
    something held up, of which some took twice as long, change nothing."""
    true = Constants(
        weights=0.8,
        kv=0.7,
        matmul=0.5,
        prefill=0.55,
        step=3e-4,
        attention=2e-5,
        ffn=8e-6,
        sequence=1e-6,
        tail=40,
        launch=1.5e-4,
        request=6e-5,
        **host,
    )
    engine, chance = EngineModel("made", "h100", true), random.Random(0)
    described = {"gpu": "h100", "device": "made", "precision": "bf16", "architectures": SMALL}
    made = []
    for name, what in itertools.product(SMALL, WHAT):
        for batch, prompt in ((1, 128), (16, 128), (64, 128), (128, 128), (256, 128), (64, 1024), (16, 2048)):
            one = Measurement(
                architecture=name, what=what, batch=batch, work=Workload(input_len=prompt, output_len=64), value=1.0
            )
            held_up = 2 if what == "prefill" and chance.random() < 0.1 else 1
            made.append(replace(one, value=predicted(engine, SMALL[name], one) * held_up * chance.gauss(1, 0.02)))
    found = fit("made", described, made)
    for name in ("host", "host_sequence"):
        assert getattr(found.constants, name) == pytest.approx(getattr(true, name), rel=0.05), name
    for name in ("weights", "prefill", "launch"):
        assert getattr(found.constants, name) == pytest.approx(getattr(true, name), rel=0.1), name
    assert summary(compared(found, described, made))["decode_step"]["mean"] < 0.025
    assert found.batches[-1] == 256
    assert {row["architecture"] for row in leave_one_out(found, described, made)} == set(SMALL)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda t: t.replace("num_seqs", "sequences"), "line 2 is broken"),
        (lambda t: t.replace("parent,8.03", "mother,8.03", 1), "'mother' is not in architectures.json"),
        (lambda t: t.replace("6.57", "-6.57"), "above 0"),
        (lambda t: t.replace(",C1,1,", ",C1,99999999999,", 1), "num_seqs 65536 at most"),
        (lambda t: "\n".join(t.splitlines()[:3]), "at least 8"),
        (lambda t: t + "p" * 200_000, "field larger than"),
        (lambda t: t.encode("utf-16"), "cannot be read ('utf-8'"),
    ],
)
def test_bad_measurements(puzzle, tmp_path, change, wanted):
    (tmp_path / "architectures.json").write_text((SHIPPED / "architectures.json").read_text())
    found = change((SHIPPED / "measured.csv").read_text())
    (tmp_path / "m.csv").write_bytes(found if isinstance(found, bytes) else found.encode())
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


def test_one_architecture_alone(puzzle, tmp_path):
    """It shows nothing of others, and the report says so."""
    facts = json.loads((SHIPPED / "architectures.json").read_text())
    (tmp_path / "architectures.json").write_text(json.dumps(facts))
    head, *lines = (SHIPPED / "measured.csv").read_text().splitlines()
    (tmp_path / "m.csv").write_text("\n".join([head, *(x for x in lines if x.startswith("parent,"))]))
    done = puzzle("profile", "--engine", "vllm", "--gpu", "h100", "--fit", tmp_path / "m.csv")
    assert done.exit_code == 0, done.output
    assert "no architecture could be left out" in done.output
    assert "decode step" in done.output
    assert "0 of 0" not in done.output


def test_a_fit_of_what_is_exactly_as_usual():
    """No error at all has no logarithm."""
    usual = EngineModel("made", "h100", Constants(tail=64.0))
    described = {"gpu": "h100", "device": "made", "precision": "bf16", "architectures": SMALL}
    work = Workload(input_len=8, output_len=8)
    made = [Measurement(architecture="parent", what="decode_step", batch=b, work=work, value=1.0) for b in (1, 2, 4, 8)]
    made = [replace(one, value=predicted(usual, SMALL["parent"], one)) for one in made]
    assert fit("made", described, made).constants.host == 0
