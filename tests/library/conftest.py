"""A parent whose weights are most of what it takes to run it, and its library."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def deep(tmp_path_factory, corpus, make_parent) -> Path:
    """Twelve wide layers."""
    sizes = {"hidden_size": 64, "intermediate_size": 768, "num_hidden_layers": 12}
    return make_parent(tmp_path_factory.mktemp("models") / "deep", corpus, **sizes)


@pytest.fixture(scope="session")
def deep_library(tmp_path_factory, deep, corpus, puzzle) -> Path:
    """Its library, as initialised, without scores. Tests that change it must copy it."""
    out = tmp_path_factory.mktemp("libraries") / "deep"
    sizes = ("--tokens", 0, "--seq-len", 32, "--calibration-sequences", 4, "--validation-sequences", 2)
    offered = ("--attention", "kv1,none", "--ffn", "0.5,none", "--no-score", "--device", "cpu")
    done = puzzle("build-library", deep, "--data", corpus, "--out", out, *sizes, *offered)
    assert done.exit_code == 0, (done.output, done.exception)
    return out
