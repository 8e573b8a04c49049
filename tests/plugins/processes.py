"""Processes that tests start: `puzzle` as others start it, ranks of torchrun, a process that stands still until it is killed."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

LAUNCH = Path(__file__).with_name("launch.py")
PATIENCE = 600  # seconds after which a process counts as hung: what a busy machine takes is far below, and the end does not wait for it


@pytest.fixture(scope="session")
def torchrun():
    return started


def started(processes: int, *arguments: object) -> list[tuple[int, str, str]]:
    """As torchrun starts them. Exit code, standard output and standard error of each."""
    with reserved_port() as port:
        shared = {
            "WORLD_SIZE": processes,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "PYTHONPATH": Path(__file__).parents[2],
        }
        group = [
            subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                env=os.environ | {k: str(v) for k, v in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(processes)
        ]  # fmt: skip
        with ThreadPoolExecutor(processes) as waiting:  # at once: none may wait for another's full pipe
            told = list(waiting.map(outcome, group))
    return [(process.returncode, *texts) for process, texts in zip(group, told, strict=True)]


def outcome(process: subprocess.Popen) -> tuple[str, str]:
    try:
        return process.communicate(timeout=PATIENCE)
    finally:
        process.kill()


@contextmanager
def reserved_port() -> Iterator[int]:
    """One that nobody else is given meanwhile. It is bound, not listened at, so that the first process of a group may do so."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@pytest.fixture(scope="session")
def launch(tmp_path_factory):
    """`launch(arguments)` starts `puzzle ...` in a process of its own; `processes` of them work together, as under torchrun. setup:
    Python that each runs before. What a process says is in the file `process.log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "puzzle.run.pipeline",
            "puzzle.cli.heal",
            "torch._dynamo",
            "torch.distributed.checkpoint",
            "torch.distributed.fsdp",
            "transformers.generation",
            "transformers.models.llama.modeling_llama",
            "transformers.models.auto.tokenization_auto",
            "transformers.tokenization_utils_tokenizers",
        ]
    )
    started, ports = [], ExitStack()

    def start(arguments: tuple, processes: int = 1, setup: str = "") -> list:
        number = ports.enter_context(reserved_port()) if processes > 1 else 0
        group, logs = [], tmp_path_factory.mktemp("logs")
        for rank in range(processes):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
            environment["MASTER_PORT"] = number
            log = logs / f"{rank}.txt"
            given = {
                "arguments": [str(a) for a in arguments],
                "environment": {k: str(v) for k, v in environment.items()},
                "setup": setup,
                "log": str(log),
            }
            process = context.Process(target=runpy.run_path, args=(str(LAUNCH), given), daemon=True)
            process.start()
            process.log = log
            group.append(process)
        started.extend(group)
        return group

    with ports:
        yield start
    for process in started:
        if process.is_alive():
            process.kill()


def join_all(group: list) -> list:
    """The exit codes of processes, which must end by themselves."""
    for process in group:
        process.join(PATIENCE)
    return [process.exitcode for process in group]


@pytest.fixture(scope="session")
def ended():
    return join_all


HELD = """
import pkgutil, threading
owner, calls = pkgutil.resolve_name({owner!r}), []
plain = getattr(owner, {name!r})
def held(*given, **named):
    calls.append(1)
    if len(calls) >= {call}:
        threading.Event().wait()
    return plain(*given, **named)
setattr(owner, {name!r}, held)
"""


def held_at(place: str, call: int = 1) -> str:
    """Setup of a process that stands still at this call of `package.module.function`, or of `package.module.Class.method`: a kill
    finds it at work, however late it comes."""
    owner, _, name = place.rpartition(".")
    return HELD.format(owner=owner, name=name, call=call)


@pytest.fixture(scope="session")
def held():
    return held_at


def wait_until(there, process=None) -> None:
    """Until `there()` is true, which a process that was started brings about; fails where that ends, or hangs, without it."""
    end = time.monotonic() + PATIENCE
    while True:
        goes_on = time.monotonic() < end and (process is None or process.is_alive())
        if there():
            return
        assert goes_on, process and (process.exitcode, process.log.read_text())
        time.sleep(0.005)


@pytest.fixture(scope="session")
def wait():
    return wait_until
