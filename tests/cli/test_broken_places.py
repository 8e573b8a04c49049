"""What must not be lost, and files that were changed by hand: one line, exit code 2."""

from __future__ import annotations

import csv
import json
import shutil

import pytest

SOLVE = ("--gpu", "cpu", "--input-len", 16, "--output-len", 16, "--throughput", "1.1x")
HEAL = "--teacher P --tokens 256 --seq-len 32 --batch-size 4 --validation-sequences 4"


@pytest.fixture
def places(own_library, parent, child, corpus, tmp_path):
    """{L, P, C, D, O}: library, parent, a child of its own, data, and an output that is not there yet."""
    mine = {"C": shutil.copytree(child, tmp_path / "child"), "D": shutil.copytree(corpus, tmp_path / "text")}
    return mine | {"L": own_library, "P": parent, "O": tmp_path / "out"}


def listing(place):
    return {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("grow C --experts 2 --force --out C", "which is read"),
        ("export C --force --out C", "which is read"),
        ("fuse C --runs 0-1 --force --out C", "which is read"),
        (f"heal C {HEAL} --data D --force --out C", "which is read"),
        (f"heal C {HEAL} --data D --force --out D", "no checkpoint that puzzle wrote (it has no manifest.json)"),
        ("slice P --hidden 16 --data D --seq-len 32 --force --out D", "no checkpoint that puzzle wrote"),
        ("export C --force --out L", "no checkpoint that puzzle wrote"),
        ("export C --force --out .", "--out . is the current directory, or holds it"),
        ("export C --out ..", "--out .. is the current directory, or holds it"),
        (f"heal C {HEAL} --data D --cosine-weight 0 --teacher-logits D --out O", "holds other things"),
        (f"heal C {HEAL} --data D --cosine-weight 0 --teacher-logits O/t --out O", "t lies in --out"),
    ],
)
def test_what_is_read_or_not_ours_stays(puzzle, one_line_error, places, tmp_path, monkeypatch, command, told):
    here = tmp_path / "here"
    here.mkdir()
    (here / "thesis.txt").write_text("mine")
    monkeypatch.chdir(here)
    before = {name: listing(places[name]) for name in "LCD"} | {"here": listing(here)}
    words = [str(places.get(w, w)).replace("O/t", f"{places['O']}/t") for w in command.split()]
    one_line_error(puzzle(*words), told)
    assert {name: listing(places[name]) for name in "LCD"} | {"here": listing(here)} == before
    assert not places["O"].exists()


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (f"heal C {HEAL} --data D --seed -1 --out O", "--seed -1: must not be negative"),
        ("build-library P --data D --seq-len 32 --seed -1 --out O", "--seed -1: must not be negative"),
        ("grow C --experts 2 --seed -1 --out O", "--seed -1: must not be negative"),
        (f"heal C {HEAL} --data D --temperature 1e30 --out O", "--temperature 1e+30: of 0.01 to 100"),
        ("build-library P --data D --seq-len 32 --attention kv１ --out O", "unknown attention variant 'kv１'"),
        ("score L --data D --seq-len 1000 --sequences 2", "--seq-len 1000 is longer than the parent's context of 256"),
        ("solve L --gpu cpu --keep-attention -1", "--keep-attention -1: must not be negative"),
        ("solve L --gpu cpu --params 90% --stages 2 --stage-tolerance 5", "a share from 0 to 1, such as 5% or 0.05"),
    ],
)
def test_impossible_numbers(puzzle, one_line_error, places, command, told):
    one_line_error(puzzle(*(places.get(w, w) for w in command.split())), told)
    assert not places["O"].exists()


def test_a_healing_that_learned_nothing(puzzle, one_line_error, places):
    options = HEAL.replace("--teacher P", "--kl-weight 0 --cosine-weight 0 --lm-weight 1e300").split()
    done = puzzle("heal", places["C"], "--data", places["D"], *options, "--out", places["O"])
    assert done.exit_code == 2
    assert "2 steps in a row up to step 2 had a non-finite gradient" in done.stderr.replace("\n", " ")
    assert not places["O"].exists()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *[("phase", "x"), ("precision", "x"), ("batch", "0"), ("batch", "-1"), ("context", "-1")],
        *[("p50_s", "0"), ("p50_s", "-1"), ("p50_s", "nan"), ("workspace_bytes", "-1")],
    ],
)
def test_a_cost_table_with_impossible_values(puzzle, one_line_error, own_library, column, value):
    path = next((own_library / "costs" / "cpu").glob("*.csv"))
    with open(path, newline="") as handle:
        rows = list(csv.DictReader(handle))
    with open(path, "w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(row | {column: value} for row in rows)
    one_line_error(puzzle("solve", own_library, *SOLVE), f"line 2 has {column} = {value}: profile again")


@pytest.mark.parametrize(
    ("scores", "told"),
    [
        ([], "scores are []"),
        ({"attention/kv1": float("nan")}, "attention/kv1 has kl = None"),
        ({"attention/kv1": {}}, "attention/kv1 has kl = None"),
        ({"attention/kv1": {"kl": "x"}}, "attention/kv1 has kl = 'x'"),
        ({"attention/kv1": {"kl": -1}}, "attention/kv1 has kl = -1"),
        ({"attention/kv1": {"kl": float("nan")}}, "attention/kv1 has kl = nan"),
        ({"attention/kv1": {"kl": float("inf")}}, "attention/kv1 has kl = inf"),
    ],
)
def test_scores_changed_by_hand(puzzle, one_line_error, own_library, scores, told):
    path = sorted((own_library / "scores").glob("*.json"))[0]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scores": scores}))
    one_line_error(puzzle("solve", own_library, *SOLVE), told, "run `puzzle score")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"parent": 3}, "is broken"),
        ({"parent": {}}, "is broken ('"),
        ({"layers": []}, "is broken ("),
        ({"structure": {"max_length": "x"}}, "is broken (max_length is 'x')"),
        ({"structure": {"hidden_size": []}}, "is broken (hidden_size is [])"),
        ({"structure": {"tied": 3}}, "is broken (tied is 3)"),
    ],
)
def test_a_library_changed_by_hand(puzzle, one_line_error, own_library, parent, corpus, changed, told):
    path = own_library / "library.json"
    facts = json.loads(path.read_text())
    for name, value in changed.items():
        facts[name] = facts[name] | value if name == "structure" else value
    path.write_text(json.dumps(facts))
    one_line_error(puzzle("solve", own_library, *SOLVE), told)
    if "structure" not in changed:  # what the message advises works, or says itself what to do
        done = puzzle("build-library", parent, "--data", corpus, "--out", own_library, "--seq-len", 32, "--tokens", 0)
        assert done.exit_code == 2
        assert "remove it, and run the same command again" in done.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("hidden_act", []), ("vocab_size", "x"), ("rms_norm_eps", None), ("max_position_embeddings", "x")],
        *[("max_position_embeddings", 0), ("num_hidden_layers", 10**12), ("num_hidden_layers", "x")],
        *[("per_layer_config", True)],
    ],
)
@pytest.mark.parametrize("which", ["C", "P"])
def test_a_config_changed_by_hand(puzzle, one_line_error, places, tmp_path, which, name, value):
    model = shutil.copytree(places[which], tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {name: value}))
    one_line_error(puzzle("grow", model, "--experts", 2, "--out", places["O"]), str(model))
    assert not places["O"].exists()
