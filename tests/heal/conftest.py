"""How to heal the tiny child in a few seconds."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def small(corpus) -> tuple:
    """Options of a run of 20 steps, on the CPU: there a run is bit-reproducible."""
    return (
        "--data", corpus, "--tokens", 5120, "--seq-len", 32, "--batch-size", 8, "--lr", 0.01,
        "--validation-sequences", 16, "--eval-every", 10, "--device", "cpu",
    )  # fmt: skip
