"""How to heal the tiny child in a few seconds, also in processes of its own."""

from __future__ import annotations

import multiprocessing
import runpy
import socket
from pathlib import Path

import pytest

LAUNCH = Path(__file__).with_name("launch.py")


@pytest.fixture(scope="session")
def small(corpus) -> tuple:
    """Options of a run of 20 steps, on the CPU: there a run is bit-reproducible."""
    return (
        "--data", corpus, "--tokens", 5120, "--seq-len", 32, "--batch-size", 8, "--lr", 0.01,
        "--validation-sequences", 16, "--eval-every", 10, "--device", "cpu",
    )  # fmt: skip


@pytest.fixture(scope="session")
def launch():
    """`launch(arguments)` starts `puzzle heal ...` in a process of its own; `processes` of them train together."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["puzzle.heal.run", "puzzle.cli.heal", "transformers", "torch.distributed.fsdp"])
    started = []

    def start(arguments: tuple, processes: int = 1) -> list:
        port = socket.create_server(("127.0.0.1", 0))
        number = port.getsockname()[1]
        port.close()
        group = []
        for rank in range(processes):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
            environment["MASTER_PORT"] = number
            given = {
                "arguments": [str(a) for a in arguments],
                "environment": {k: str(v) for k, v in environment.items()},
            }
            process = context.Process(target=runpy.run_path, args=(str(LAUNCH), given), daemon=True)
            process.start()
            group.append(process)
        started.extend(group)
        return group

    yield start
    for process in started:
        if process.is_alive():
            process.kill()
