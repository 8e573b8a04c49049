"""The selection problem of a goal on the tiny library."""

from __future__ import annotations

import json

SOLVE = ("--gpu", "cpu", "--input-len", 16, "--output-len", 16)


def test_structure_of_the_child(puzzle, own_library, tmp_path):
    """Pins, equal layers and counts hold in the answer."""
    out = ["--out", tmp_path / "s", "--json"]
    done = puzzle("solve", own_library, "--throughput", "1.1x", "--pin", "0", "--keep-attention", "3", *SOLVE, *out)
    layers = json.loads(done.stdout)["layers"]
    assert {slot: choice["variant"] for slot, choice in layers[0].items()} == {"attention": "parent", "ffn": "parent"}
    assert sum(la["attention"]["variant"] != "none" for la in layers) >= 3
    done = puzzle("solve", own_library, "--throughput", "1.1x", "--alike", "0-3", *SOLVE, *out)
    layers = json.loads(done.stdout)["layers"]
    assert all(la == layers[0] for la in layers)
