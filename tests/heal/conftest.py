"""How to heal the tiny child in a few seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from puzzle.heal.log import read_log


@pytest.fixture(scope="session")
def small(corpus) -> tuple:
    """Options of a run of 20 steps, on the CPU: there a run is bit-reproducible."""
    return (
        "--data", corpus, "--tokens", 5120, "--seq-len", 32, "--batch-size", 8, "--lr", 0.01,
        "--validation-sequences", 16, "--eval-every", 10, "--device", "cpu",
    )  # fmt: skip


@pytest.fixture(scope="session")
def kill_at_step(wait):
    """`kill_at_step(work, least, group)`: kill -9 of processes that heal, when the log in `work` has come to this step."""

    def steps(work: Path) -> int:
        lines = read_log(work / "heal.jsonl") if (work / "heal.jsonl").is_file() else []
        return lines[-1]["step"] if lines else -1

    def kill(work: Path, least: int, group: list) -> None:
        wait(lambda: steps(work) >= least, group[0])
        for process in group:
            process.kill()
            process.join()

    return kill
