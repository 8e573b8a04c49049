"""vLLM measured: refusals, resuming and the promise beside a bench with a stand-in for vLLM, and vLLM itself where it is set up."""

from __future__ import annotations

import csv
import fcntl
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from shlex import quote

import pytest

from puzzle.base.errors import UserError
from puzzle.base.workload import Workload
from puzzle.cli.report import FIT_ERROR
from puzzle.export import write
from puzzle.export.write import export, open_source
from puzzle.parents.known import known_structure
from puzzle.parents.opened import open_model
from puzzle.profile.engine import Constants
from puzzle.serving import engine_profile, engine_run
from puzzle.serving.check import EngineFailed
from puzzle.serving.engine_profile import EngineGrid, architectures, described, fitting, profile_engine
from puzzle.serving.engine_run import Engine, Point, measured_random, write_random
from puzzle.serving.engine_worker import step_of
from serving_environments import python_of

TINY = known_structure("reference")
TRUE = Constants(step=1e-4, attention=2e-5, ffn=1e-5, host=1e-3, host_sequence=3e-4, request=2e-5)
STAND_IN = """
import json, os, sys
from puzzle.parents.child import child
from puzzle.profile.engine import Constants, EngineModel
from puzzle.profile.parts import ends_of
job = json.load(open(sys.argv[2]))
def say(**facts):
    print("puzzle: " + json.dumps(facts), flush=True)
mode = open({mode!r}).read()
if mode in ("missing", "plug-in", "version"):
    say(refused=mode, version="0.25.1")
    sys.exit()
structure = child(json.load(open(os.path.join(job["path"], "config.json"))))
print("INFO vLLM says much", flush=True)
if mode == "crash" and structure.num_layers == 2:
    sys.exit("RuntimeError: CUDA out of memory")
say(engine=dict(versions="vLLM 0.26.0", device="cpu" if mode != "gpu" else "NVIDIA H100 80GB HBM3", weight_bytes=10**9, cache_bytes=3 * 10**9,
    cached_tokens=10**6, card_bytes=8 * 10**10, used_bytes=5 * 10**9), start_seconds=1.0)
model = EngineModel("vllm", "cpu", {constants!r})
parts = [*(part for _, _, part in structure), *ends_of(structure)]
for point in job["points"]:
    b, t, n = (point[k] for k in ("num_seqs", "input_len", "output_len"))
    step = max(model.host_seconds(b), sum(model.seconds(part, "decode", b, t + n // 2) for part in parts))
    prefill = sum(model.seconds(part, "prefill", b, t) for part in parts)
    if mode == "busy" and len(job["points"]) > 1 and (structure.num_layers, b) == (2, 16):  # a point that is measured alone is not held up
        step *= 1.8
    say(point=point, measured=dict(prefill=prefill, step=step, whole=prefill + step * (n - 1)))
say(done=True)
"""


@pytest.fixture
def stand_in(tmp_path):
    """(a Python of an environment with a vLLM whose times are known, what to call to change how it behaves)."""
    mode, script, python = tmp_path / "mode", tmp_path / "stand_in.py", tmp_path / "python"
    mode.write_text("")
    script.write_text(STAND_IN.format(mode=str(mode), constants=TRUE))
    python.write_text(f'#!/bin/sh\nexec {quote(sys.executable)} {quote(str(script))} "$@"\n')
    python.chmod(0o755)
    return python, mode.write_text


def test_a_step_is_the_median_while_all_decode():
    prompts, all_decode, some = [0.5] * 4, [0.01] * 20, [0.005] * 3
    assert step_of([*prompts, *all_decode, *some], 24, 24) == 0.01
    assert step_of([0.5], 0, 1) == 0.5


def test_architectures_tell_the_constants_apart():
    found = architectures(TINY)
    assert list(found) == ["parent", "ffn_half", "attention_none", "kv_heads_fewest", "mixed", "first_layers"]
    kinds = {name: described(one, Engine(gpu="h100"))["sub_blocks"] for name, one in found.items()}
    assert kinds["attention_none"] == {"gqa h256 q8 kv4 d32": 10, "swiglu h256 f704": 16}
    assert kinds["kv_heads_fewest"] == {"gqa h256 q8 kv1 d32": 16, "swiglu h256 f704": 16}
    assert kinds["first_layers"] == {"gqa h256 q8 kv4 d32": 2, "swiglu h256 f704": 2}
    big = known_structure("llama-3.3-70b")
    assert (
        8
        <= fitting(big, Engine(gpu="h100")).num_layers
        < fitting(big, Engine(gpu="h100", precision="fp8")).num_layers
        < 80
    )
    points = [(p.batch, p.work.input_len) for p in EngineGrid().points("h100", 131072)]
    assert points == [(1, 128), (16, 128), (64, 128), (128, 128), (256, 128), (64, 1024), (16, 2048)]
    assert [p.work.input_len for p in EngineGrid(contexts=(64, 9999)).points("h100", 1024)][-1] == 1024 - 64


def test_a_parent_with_windows_is_described_through_every_reader():
    """What is about to be measured needs no fit."""
    layers = [{**layer, "attention": replace(layer["attention"], window=64)} for layer in TINY.layers]
    for reader in ("hf", "nemotron-nas"):
        found = described(TINY.with_layers(layers), Engine(gpu="h100", reader=reader))["sub_blocks"]
        assert found == {"gqa h256 q8 kv4 d32 window64": 16, "swiglu h256 f704": 16}


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        ("missing", "vLLM is not installed in"),
        (
            "plug-in",
            "has no puzzle plug-in, which serves hf exports: install puzzle-nas there, or pass --format nemotron-nas",
        ),
        ("version", "vLLM 0.25.1 in"),
        ("gpu", "--gpu cpu: vLLM runs on NVIDIA H100 80GB HBM3 here"),
    ],
)
def test_refusals(puzzle, one_line_error, stand_in, tmp_path, mode, wanted):
    python, behave = stand_in
    behave(mode)
    asked = ("--engine", "vllm", "--gpu", "cpu", "--run", "--python", python, "--out", tmp_path / "costs")
    one_line_error(puzzle("profile", "--shapes", "reference", *asked), wanted)
    assert not list((tmp_path / "costs").rglob("*.csv"))


def test_refusals_before_vllm(puzzle, one_line_error, tmp_path):
    shapes = ("profile", "--shapes", "reference", "--gpu", "cpu")
    one_line_error(puzzle(*shapes, "--engine", "sglang", "--run"), "--engine sglang: vllm alone, in the version")
    for name in ("sglang", "vllm==0.26"):
        one_line_error(puzzle(*shapes, "--engine", name, "--run", "--dry-run"), f"--engine {name}: vllm alone, in the")
    one_line_error(puzzle(*shapes, "--run"), "--run needs --engine")
    one_line_error(puzzle(*shapes, "--engine", "vllm"), "--engine goes with --run")
    one_line_error(puzzle(*shapes, "--engine", "vllm", "--run", "--format", "gguf"), "--format gguf: vLLM reads hf and")
    nowhere = ("--engine", "vllm", "--run", "--python", tmp_path / "nope", "--out", tmp_path)
    one_line_error(puzzle(*shapes, *nowhere), "nope: No such file")
    one_line_error(puzzle("bench", tmp_path, "--gpu", "cpu", "--engine", "vllm"), "is neither a checkpoint nor an arch")
    with pytest.raises(UserError, match="precision float32 on h100"):
        Engine(gpu="h100", precision="float32")


def test_what_is_measured_stays(stand_in, tmp_path):
    """A crash loses one architecture; the next call measures what is missing, and the fit sees the host's pace."""
    python, behave = stand_in
    how, folder = Engine(gpu="cpu", python=python, precision="float32"), tmp_path / "costs"
    grid = EngineGrid(batches=(1, 4, 16, 64), contexts=(32, 256), output_len=32)
    behave("crash")
    with pytest.raises(UserError, match=r"1 of the architectures failed in vLLM .first_layers: .*out of memory"):
        profile_engine("vllm", TINY, how, folder, grid)
    rows = list(csv.DictReader((folder / "measured.csv").read_text().splitlines()))
    assert {r["architecture"] for r in rows} == set(architectures(TINY)) - {"first_layers"}
    assert not (folder / "fit.json").exists()
    behave("")
    text = (folder / "measured.csv").read_text()
    (folder / "measured.csv").write_text(text + "first_layers,1,3")  # as a killed call leaves it
    value = profile_engine("vllm", TINY, how, folder, grid)
    assert (folder / "measured.csv").read_text().startswith(text)
    assert len((folder / "measured.csv").read_text().splitlines()) == 1 + 6 * 5
    for name in ("prefill", "host", "host_sequence"):
        assert value["constants"][name] == pytest.approx(getattr(TRUE, name), rel=0.05), name
    assert (value["largest_batch"], value["format"]) == (64, "hf")
    wide = EngineGrid(batches=(2,), contexts=(32,), output_len=32)
    with pytest.raises(UserError, match="holds figures of another parent's 'parent': give another `out`"):
        profile_engine("vllm", TINY.with_layers(TINY.layers[:8]), how, folder, wide)
    with pytest.raises(UserError, match="holds figures of precision 'float32', and this is 'fp8'"):
        profile_engine("vllm", TINY, Engine(gpu="cpu", python=python, precision="fp8"), folder, wide)


def test_what_was_held_up_is_measured_again(stand_in, tmp_path, monkeypatch, capsys):
    """The fastest of a point counts: a fit of it is that of a quiet machine."""
    python, behave = stand_in
    monkeypatch.setitem(engine_profile.AGAIN, "cpu", 2)
    how, grid = (
        Engine(gpu="cpu", python=python, precision="float32"),
        EngineGrid(batches=(1, 4, 16, 64), contexts=(32, 256), output_len=32),
    )
    quiet = profile_engine("vllm", TINY, how, tmp_path / "quiet", grid)
    behave("busy")
    held_up = profile_engine("vllm", TINY, how, tmp_path / "busy", grid)
    assert "slower than the fit by more than 10 %, measured again: first_layers (1)" in capsys.readouterr().err
    rows = list(csv.DictReader((tmp_path / "busy" / "measured.csv").read_text().splitlines()))
    twice = [r for r in rows if (r["architecture"], r["num_seqs"]) == ("first_layers", "16")]
    slow, fast = (float(r["decode_step_ms"]) for r in twice)
    assert len(rows) == 6 * 5 + 1
    assert slow == pytest.approx(1.8 * fast, rel=1e-3)
    assert held_up["constants"] == pytest.approx(quiet["constants"], rel=1e-6)


def test_a_folder_that_is_complete_is_compared_too(stand_in, tmp_path):
    """Nothing is left to measure there, so that no engine says whose figures they are."""
    python, _ = stand_in
    done, grid = tmp_path / "costs", EngineGrid(batches=(1, 4), contexts=(32,), output_len=8)
    how = {"gpu": "cpu", "python": python, "precision": "float32"}
    profile_engine("vllm", TINY, Engine(**how), done, grid)
    facts = json.loads((done / "architectures.json").read_text())
    others = {name: entry for name, entry in facts["architectures"].items() if name != "mixed"}
    foreign = "is not what this command writes: move it away"
    for number, (structure, more, files, message) in enumerate((
        (TINY.with_layers(TINY.layers[:8]), {}, {}, "holds figures of another parent's 'parent': give another `out`"),
        (TINY, {"reader": "nemotron-nas"}, {}, "holds figures of format 'hf', and this is 'nemotron-nas'"),
        (TINY, {"precision": "fp8"}, {}, "holds figures of precision 'float32', and this is 'fp8'"),
        (TINY, {}, {"measured.csv": b"architecture,num_seqs\nparent,1\n"}, foreign),
        (TINY, {}, {"measured.csv": b"\xff\xfe\x00\n\x00\n"}, foreign),
        (TINY, {}, {"architectures.json": b""}, "does not describe architectures"),
        (TINY, {}, {"architectures.json": json.dumps(facts | {"architectures": others}).encode()}, "another parent's 'mixed'"),
    )):  # fmt: skip
        folder = shutil.copytree(done, tmp_path / str(number))
        for name, content in files.items():
            (folder / name).write_bytes(content)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(UserError, match=message):
            profile_engine("vllm", structure, Engine(**how | more), folder, grid)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_worker_ends_with_its_caller(tmp_path):
    """Also where that is killed and can end nothing itself."""
    worker = Path(engine_run.__file__).with_name("engine_worker.py")
    code = "import importlib.util as u, sys, time; s = u.spec_from_file_location('w', sys.argv[1]); m = u.module_from_spec(s); "
    code += "s.loader.exec_module(m); m.end_with_caller(); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code, str(worker)], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait() == 1


def test_two_processes_do_not_measure_into_one_folder(stand_in, tmp_path):
    python, _ = stand_in
    folder = tmp_path / "costs"
    folder.mkdir()
    with open(folder / ".lock", "a+") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is being changed by"):
            profile_engine("vllm", TINY, Engine(gpu="cpu", python=python, precision="float32"), folder)


def test_a_promise_and_its_measurement(puzzle, stand_in, synthetic, tmp_path):
    python, _ = stand_in
    out = tmp_path / "costs"
    asked = ("--engine", "vllm", "--gpu", "cpu", "--python", python)
    done = puzzle("profile", "--shapes", "reference", *asked, "--run", "--out", out)
    assert done.exit_code == 0, done.output
    assert "the engine's own Python takes" in done.output
    mine = tmp_path / "mine"
    mine.mkdir()
    for path in synthetic("reference").iterdir():
        (mine / path.name).symlink_to(path)
    (mine / "costs").symlink_to(out)
    work = ("--input-len", 64, "--output-len", 32, "--concurrency", 8)
    done = puzzle("solve", mine, "--params", "80%", "--gpu", "cpu", "--engine", "vllm", *work, "--out", tmp_path / "s")
    assert done.exit_code == 0, done.output
    told = done.output.replace("\n", " ")
    assert "own Python sets the child's pace from batch" in told
    fit = json.loads((out / "cpu" / "vllm" / "reference" / "fit.json").read_text())
    off = fit["leave_one_out"]["throughput"]["mean"]
    assert (f"misses {100 * off:.1f} % of the tokens/s" in told) == (off > FIT_ERROR)
    done = puzzle("bench", tmp_path / "s", *asked, "--with-parent", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["child"]["measured"]["cached_tokens"] == 10**6
    assert found["child"]["path"] == str(tmp_path / "s")
    assert "fingerprint" not in found["child"]  # random weights
    for who in ("child", "parent"):
        measured, promised = found[who]["measured"], found[who]["predicted"]
        for name in ("tokens_per_second", "ttft_seconds", "tpot_seconds"):
            assert measured[name] == pytest.approx(promised[name], rel=0.02), (who, name)
    assert found["speedup"]["measured"] == pytest.approx(found["speedup"]["predicted"], rel=0.02)
    printed = puzzle("bench", tmp_path / "s", *asked)
    assert "tokens that its cache holds" in printed.output


@pytest.mark.parametrize(
    ("options", "whole", "told"),
    [
        ({}, [], "float32"),
        ({"dtype": "fp8"}, [], "fp8, cache float32"),
        ({"kv_dtype": "fp8", "data": ["x"]}, [], "float32, cache fp8"),
        ({"dtype": "fp8", "kv_dtype": "fp8", "data": ["x"]}, [], "fp8"),
        ({"dtype": "fp8", "kv_dtype": "fp8", "data": ["x"]}, ["a", "b"], "fp8 but for 2 modules in bf16, cache fp8"),
    ],
)
def test_a_bench_says_what_it_measured(puzzle, stand_in, parent, tmp_path, monkeypatch, options, whole, told):
    """Which checkpoint, and what of it is in fp8."""
    monkeypatch.setattr(write, "calibrate", lambda *given: {})
    out, (python, _) = export(open_source(parent), tmp_path / "child", **options).out, stand_in
    config = json.loads((out / "config.json").read_text())
    if whole:
        config["quantization_config"]["ignore"] += whole
        (out / "config.json").write_text(json.dumps(config))
    asked = ("--engine", "vllm", "--gpu", "cpu", "--python", python, "--input-len", 16, "--output-len", 8)
    done = puzzle("bench", out, *asked, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads(done.stdout)
    assert found["precision"] == told
    assert found["child"]["path"] == str(out)
    assert found["child"]["fingerprint"] == open_model(str(out)).fingerprint()


@pytest.mark.parametrize("batches", ["4", "16,1,4,16"])
def test_an_odd_grid(puzzle, stand_in, tmp_path, batches):
    """One batch alone, without order, and twice."""
    python, _ = stand_in
    asked = (
        "--engine",
        "vllm",
        "--gpu",
        "cpu",
        "--python",
        python,
        "--run",
        "--batches",
        batches,
        "--contexts",
        "64,32,64",
    )
    done = puzzle("profile", "--shapes", "reference", *asked, "--out", tmp_path, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    with open(tmp_path / "cpu/vllm/reference/measured.csv", newline="") as handle:
        rows = [(row["architecture"], row["num_seqs"], row["input_len"]) for row in csv.DictReader(handle)]
    assert len(rows) == len(set(rows)) == 6 * (len(set(batches.split(","))) + 1)


def needs_vllm():
    if not python_of("vllm").is_file():
        pytest.skip("no .engines/vllm: run benchmarks/lib/serving_environments.py vllm")


@pytest.mark.parametrize(("precision", "reader"), [("float32", "hf"), ("fp8", "hf"), ("fp8", "nemotron-nas")])
def test_in_vllm(precision, reader, monkeypatch):
    needs_vllm()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    how = Engine(gpu="cpu", python=python_of("vllm"), precision=precision, reader=reader)
    points = [Point(batch=b, work=Workload(input_len=16, output_len=8)) for b in (1, 4)]
    child = architectures(TINY)["mixed"]
    engine, *rest = measured_random(child, TINY.usual, points, how)
    assert engine["engine"]["cached_tokens"] > 4 * 24
    assert [line["point"]["num_seqs"] for line in rest] == [1, 4]
    assert all(0 < line["measured"]["step"] < line["measured"]["whole"] for line in rest)


def test_vllm_that_fails_says_why(monkeypatch, tmp_path):
    needs_vllm()
    how = Engine(gpu="cpu", python=python_of("vllm"), precision="float32")
    write_random(TINY, TINY.usual, how, tmp_path)
    text = (tmp_path / "config.json").read_text()
    monkeypatch.setattr(
        "puzzle.serving.engine_run.hf_config",
        lambda *_: json.loads(text) | {"auto_map": 0, "per_layer_config": {"99": {}}},
    )
    with pytest.raises(EngineFailed, match="per_layer_config has an entry for layer 99"):
        list(measured_random(TINY, TINY.usual, [Point(batch=1, work=Workload(input_len=4, output_len=2))], how))
