"""What the first version wrote is refused in one line that says how to go on, and the way that is named leads on."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOLVE = ("--gpu", "cpu", "--input-len", 16, "--output-len", 16)
LIBRARY = {
    "schema": 1,
    "puzzle": "0.1.0",
    "parent": {"source": "../tiny", "relative": True, "name": "tiny", "fingerprint": "0" * 64, "config_hash": ""},
    "model": {"num_layers": 4, "vocab_size": 384, "max_length": 256, "tied": True, "head_shape": "h32 v384"},
    "layers": [0, 1, 2, 3],
    "variants": {
        "attention": {"parent": {"shape": "h32 q4 kv2 d8"}, "none": {"shape": "none"}},
        "ffn": {"parent": {"shape": "h32 f96"}, "0.5": {"shape": "h32 f48"}},
    },
}
ARCHITECTURE = {
    "schema": 1,
    "goal": {"throughput": "1.2x", "latency_seconds": None},
    "workload": {"input_len": 16, "output_len": 16},
    "costs": {"device": "cpu", "dtype": "float32", "sha256": ""},
    "layers": [{"attention": "none", "ffn": "parent"}] * 4,
    "predicted": {"batch": 4, "speedup": 1.2},
}
COLUMNS = "kind,shape,phase,batch,context,dtype,p20_s,p50_s,p80_s,num_samples,device,versions,date,workspace_bytes"


@pytest.mark.parametrize("verb", ["solve", "profile", "score", "export"])
def test_a_library(puzzle, one_line_error, own_library, corpus, tmp_path, verb):
    (own_library / "library.json").write_text(json.dumps(LIBRARY))
    rest = {
        "solve": ("--throughput", "1.1x", *SOLVE),
        "profile": ("--gpu", "cpu"),
        "score": ("--data", corpus),
        "export": (own_library / "solution", "--out", tmp_path / "child"),
    }
    done = puzzle(verb, own_library, *rest[verb])
    one_line_error(done, "library.json has schema 1, this version reads 2", "run the `puzzle build-library`", "blocks")


def test_a_library_built_again_keeps_its_blocks(puzzle, own_library, parent, corpus, build_options):
    path = own_library / "library.json"
    path.write_text(json.dumps(LIBRARY | {"parent": json.loads(path.read_text())["parent"]}))
    blocks = {path: path.stat().st_mtime_ns for path in own_library.rglob("*.safetensors")}
    done = puzzle("build-library", parent, "--data", corpus, "--out", own_library, *build_options)
    assert done.exit_code == 0, done.output
    assert blocks
    assert blocks == {path: path.stat().st_mtime_ns for path in own_library.rglob("*.safetensors")}
    assert puzzle("solve", own_library, "--throughput", "1.1x", *SOLVE).exit_code == 0


def test_an_architecture(puzzle, one_line_error, own_library, child, parent, corpus, tmp_path):
    """Asked for by name it is refused; beside a child, where it only says batch sizes, it is left aside."""
    (tmp_path / "architecture.json").write_text(json.dumps(ARCHITECTURE))
    told = ("architecture.json has schema 1, this version reads 2", "make it again with `puzzle solve`")
    one_line_error(puzzle("export", own_library, tmp_path, "--out", tmp_path / "child"), *told)
    one_line_error(puzzle("bench", tmp_path, "--gpu", "cpu"), *told)
    copy = shutil.copytree(child, tmp_path / "copy")
    shutil.copy(tmp_path / "architecture.json", copy)
    options = ("--sequences", 2, "--seq-len", 32, "--input-len", 8, "--output-len", 4, "--repeats", 1, "--json")
    done = puzzle("evaluate", parent, copy, "--data", corpus, *options)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["child"]["batch"] == 1


def earlier(row: dict[str, str]) -> list[dict[str, str]]:
    """A row of today in the columns of then; a linear map had one for each of its slots."""
    kind, _, rest = row["part"].partition(" ")
    kinds = {"gqa": ["attention"], "swiglu": ["ffn"], "linear": ["attention", "ffn"]}.get(kind, [kind])
    shape = f"{rest} linear" if kind == "linear" else rest
    values = row | {"shape": shape, "dtype": row["precision"]}
    return [{"kind": kind} | {name: values[name] for name in COLUMNS.split(",")[1:]} for kind in kinds]


def test_a_cost_table(puzzle, one_line_error, own_library):
    """Of other columns; the script that is named makes the same table of it."""
    path = next((own_library / "costs" / "cpu").glob("*.csv"))
    with open(path, newline="") as handle:
        today = list(csv.DictReader(handle))
    with open(path, "w", newline="") as handle:
        writer = csv.DictWriter(handle, COLUMNS.split(","))
        writer.writeheader()
        writer.writerows(row for one in today for row in earlier(one))
    goal = ("solve", own_library, "--throughput", "1.1x", *SOLVE)
    one_line_error(puzzle(*goal), f"cost table {path} is of an earlier version", "profile again", "convert_costs.py")
    script = Path(__file__).parents[2] / "benchmarks" / "lib" / "convert_costs.py"
    subprocess.run([sys.executable, script, path], check=True, capture_output=True)
    with open(path, newline="") as handle:
        found = list(csv.DictReader(handle))
    assert {row["part"]: float(row["p50_s"]) for row in found} == pytest.approx(
        {row["part"]: float(row["p50_s"]) for row in today}, rel=1e-5
    )
    assert puzzle(*goal).exit_code == 0
