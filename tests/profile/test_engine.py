"""The engine model: physics that must hold, and `solve` on it."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import pytest

from puzzle.base.errors import UserError
from puzzle.base.files import write_json
from puzzle.base.workload import Workload
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.linear import Linear
from puzzle.blocklib.none import NO_OP
from puzzle.blocklib.sub_block import State, parse_key
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.profile import engine as fits
from puzzle.profile.engine import ENGINES, Constants, EngineModel, open_engine, read_fit
from puzzle.profile.engine_fit import fit_engine
from puzzle.profile.parts import Embedding, Head

ATTENTION = Gqa(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
FFN = SwiGLU(hidden_size=4096, intermediate_size=14336)
HEAD = Head(hidden_size=4096, vocab_size=128256)


def test_more_work_takes_longer():
    model = open_engine("vllm", "h100")
    model.windows = True

    def decode(part, batch, context=1024):
        return model.seconds(part, "decode", batch, context)

    for batch in (1, 16, 256):
        assert decode(replace(FFN, intermediate_size=7168), batch) < decode(FFN, batch)
        assert decode(replace(ATTENTION, num_key_value_heads=2), batch) < decode(ATTENTION, batch)
        assert decode(replace(ATTENTION, window=256), batch) < decode(ATTENTION, batch)
        assert decode(Linear(hidden_size=4096), batch) < decode(FFN, batch)
    assert decode(NO_OP, 1) == 0
    assert decode(Embedding(hidden_size=4096, vocab_size=128256), 1) == 0
    assert decode(HEAD, 1) > model.constants.step
    assert model.seconds(ATTENTION, "prefill", 1, 2048) > model.seconds(ATTENTION, "prefill", 1, 1024)


def test_decode_seconds_are_the_sum_of_the_steps():
    model, work = open_engine("vllm", "h100"), Workload(input_len=100, output_len=65)
    model.windows = True
    for part in (ATTENTION, replace(ATTENTION, window=128)):
        steps = [model.seconds(part, "decode", 8, 100 + i) for i in range(64)]
        assert model.decode_seconds(part, 8, work) == pytest.approx(sum(steps), rel=0.01)


@pytest.mark.parametrize("chosen", [2, 8])
def test_a_mixture_is_no_dense_ffn(chosen):
    """Nor where a token takes all of its experts: which rows each of them has is only known as it runs."""
    part = parse_key(f"moe h64 e8 k{chosen} f32")
    assert (part.active_parameters() == part.num_parameters) == (chosen == 8)
    model = open_engine("vllm", "h100")
    assert model.unfitted(part) == "sub-blocks of kind 'moe'"
    with pytest.raises(UserError, match="`engine` vllm: sub-blocks of kind 'moe' have not been fitted"):
        model.seconds(part, "decode", 1, 16)


def test_a_fit_is_read_once(monkeypatch):
    """Whatever the version of the engine, which its device names."""
    read, plain = [], fits.read_json
    monkeypatch.setattr(fits, "read_json", lambda path, by: read.append(path) or plain(path, by))
    found = [open_engine(name, "h100") for name in ("vllm", "vllm==0.26")]
    assert read == [ENGINES / "vllm-h100" / "fit.json"] * 2
    assert [(one.engine, one.device.rpartition(", ")[2]) for one in found] == [("vllm",) * 2, ("vllm==0.26",) * 2]
    assert found[0].device.partition(",")[0] == found[1].device.partition(",")[0]


def test_what_keeps_a_state_of_its_own_has_not_been_fitted(monkeypatch):
    monkeypatch.setattr(Gqa, "state", lambda self: State(per_sequence=4096))
    with pytest.raises(UserError, match="`engine` vllm: sub-blocks of kind 'gqa' have not been fitted"):
        open_engine("vllm", "h100").seconds(
            replace(ATTENTION, head_dim=40), "decode", 1, 16
        )  # nobody asks for it again


@pytest.mark.parametrize("window", [None, 64])
def test_windows_are_priced_where_architectures_with_some_were_measured(tmp_path, window):
    """vLLM keeps a table of cache blocks for every few layers that reach as far, which costs its Python time that no other fit knows."""
    described = json.loads((ENGINES / "vllm-h100" / "architectures.json").read_text())
    if window is not None:
        described["architectures"]["windows"] = {
            "sub_blocks": {"gqa h4096 q32 kv8 d128 window64": 32},
            "head": "head h4096 v128256",
        }
    (tmp_path / "architectures.json").write_text(json.dumps(described))
    shutil.copy(ENGINES / "vllm-h100" / "measured.csv", tmp_path)
    fit_engine("vllm", tmp_path / "measured.csv", gpu="h100")
    model = read_fit(tmp_path / "fit.json")
    part = replace(ATTENTION, window=64)
    assert model.windows == (window is not None)
    if window is None:
        assert model.unfitted(part) == "sub-blocks of kind 'gqa' with a window"
        with pytest.raises(UserError, match="'gqa' with a window have not been fitted"):
            model.seconds(part, "decode", 1, 16)
    else:
        assert model.seconds(part, "decode", 1, 16) > 0
    assert model.kept(part.state(), 768) == 768
    assert model.kept(part.state(), 32768) == 63 + 8192
    assert model.kept(ATTENTION.state(), 32768) == 32768


def test_windows_are_left_out_and_said(puzzle, library, tmp_path):
    """The parent's own is refused, as nothing could be promised."""
    where = ("--gpu", "h100", "--engine", "vllm", "--input-len", 16, "--output-len", 16, "--json", "--out", tmp_path)
    done = puzzle("solve", library, "--throughput", "1.01x", *where)
    assert done.exit_code == 0, done.output
    told = "no fit of vllm on h100 has measured attention/window-128"
    assert told in " ".join(done.stderr.split())
    solved = json.loads(done.stdout)
    assert not any("window" in slot["sub_block"] for layer in solved["layers"] for slot in layer.values())


def test_solve_prices_an_engine_without_a_table(puzzle, library, tmp_path):
    arguments = [
        "--gpu",
        "h100",
        "--engine",
        "vllm",
        "--input-len",
        16,
        "--output-len",
        16,
        "--json",
        "--out",
        tmp_path,
    ]
    done = puzzle("solve", library, "--throughput", "1.05x", *arguments)
    assert done.exit_code == 0, done.output
    solved = json.loads(done.stdout)
    assert "vllm" in solved["costs"]["device"]
    assert solved["speedup"] >= 1.05
    old = puzzle(
        "solve", library, "--throughput", "1.05x", *["vllm==0.26" if word == "vllm" else word for word in arguments]
    )
    assert old.exit_code == 0, old.output
    dearer = json.loads(old.stdout)
    assert "vllm==0.26" in dearer["costs"]["device"]
    assert dearer["predicted"]["kv_bytes_per_token"] >= solved["predicted"]["kv_bytes_per_token"]
    for engine, told in (
        ("vllm==0.17", "what vllm takes was read in 0.18 to 0.32 alone"),
        ("vllm==new", "'new' is no release"),
    ):
        refused = puzzle("solve", library, "--throughput", "2x", "--gpu", "h100", "--engine", engine)
        assert refused.exit_code == 2
        assert f"--engine {engine}: {told}" in " ".join(refused.output.split())
    unknown = puzzle("solve", library, "--throughput", "2x", "--gpu", "h100", "--engine", "tgi")
    assert unknown.exit_code == 2
    assert "vllm-h100" in unknown.output


def test_fits_of_ones_own_come_first_and_are_named(tmp_path):
    shipped = json.loads((ENGINES / "vllm-h100" / "fit.json").read_text())
    for name, step in (("mine", 1e-3), ("mine-fp8", 2e-3)):
        facts = shipped | {
            "precision": "fp8" if "fp8" in name else "bf16",
            "largest_batch": 96,
            "room_bytes": 7,
            "format": "hf",
        }
        write_json(
            tmp_path / "h100" / "vllm" / name / "fit.json",
            facts | {"constants": {**shipped["constants"], "step": step}},
        )
    assert open_engine("vllm", "h100", measured=tmp_path).constants.step == 1e-3
    eighth = open_engine("vllm", "h100", name="mine-fp8", measured=tmp_path)
    assert (eighth.constants.step, eighth.batches[-1], eighth.room_bytes, eighth.weight_bytes) == (2e-3, 96, 7, 1)
    whole, half = (
        EngineModel("vllm", "h100", Constants(), precision=p).seconds(FFN, "decode", 1, 16) for p in ("bf16", "fp8")
    )
    assert half < 0.6 * whole
    with pytest.raises(UserError, match="`shapes` other: the fits of `engine` vllm on `gpu` h100 are mine, mine-fp8"):
        open_engine("vllm", "h100", name="other", measured=tmp_path)
    shutil.copytree(tmp_path / "h100" / "vllm" / "mine", tmp_path / "h100" / "vllm" / "second")
    with pytest.raises(UserError, match=r"several fits .* pass `shapes` with one of them"):
        open_engine("vllm", "h100", measured=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "int3"}, "is no engine fit .precision 'int3'"),
        ({"precision": None}, "precision None"),
        ({"format": "zzz"}, "format 'zzz'"),
        ({"room_bytes": "x"}, "largest_batch or room_bytes"),
        ({"largest_batch": 0}, "largest_batch or room_bytes"),
        ({"largest_batch": 2.5}, "largest_batch or room_bytes"),
        ({"device": 5}, "its device"),
        ({"constants": {"weights": 0.0}}, "constants weights cannot be"),
        ({"constants": {"step": math.nan}}, "constants step cannot be"),
        ({"constants": {"kv": -1.0}}, "constants kv cannot be"),
        ({"constants": {"sea": 1.0}}, "constants sea cannot be"),
        ({"constants": {"step": "a"}}, "is no engine fit"),
        ({"constants": []}, "is no engine fit"),
        ({"gpu": "h200"}, "is a fit of vllm on h200, not of vllm on h100"),
        ({"leave_one_out": {"throughput": {"mean": "small"}}}, "is no engine fit .*small"),
        ({"engine": "sglang"}, "is a fit of sglang on h100, not of vllm on h100"),
    ],
)
def test_what_is_no_fit(tmp_path, change, message):
    fit = json.loads((ENGINES / "vllm-h100" / "fit.json").read_text()) | {
        "largest_batch": 96,
        "room_bytes": 7,
        "format": "hf",
    }
    own = change.get("constants")
    change = change | ({"constants": {**fit["constants"], **own}} if isinstance(own, dict) else {})
    path = tmp_path / "h100" / "vllm" / "mine" / "fit.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(fit | change))
    with pytest.raises(UserError, match=message):
        open_engine("vllm", "h100", measured=tmp_path)


def test_an_earlier_fit_lacks_what_was_not_fitted(tmp_path):
    fit = json.loads((ENGINES / "vllm-h100" / "fit.json").read_text())
    path = tmp_path / "h100" / "vllm" / "mine" / "fit.json"
    late = {"tail", "host", "host_sequence", "launch", "request"}
    for dropped, found in ((late, 0.0), ({"step"}, None)):
        write_json(path, fit | {"constants": {k: v for k, v in fit["constants"].items() if k not in dropped}})
        if found is None:
            with pytest.raises(UserError, match=r"is no engine fit .'step'"):
                open_engine("vllm", "h100", measured=tmp_path)
        else:
            assert open_engine("vllm", "h100", measured=tmp_path).constants.tail == found
