"""Processes that tests start: `puzzle` as others start it, ranks of torchrun, a process that stands still until it is killed."""

from __future__ import annotations

import multiprocessing
import runpy
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

LAUNCH = Path(__file__).with_name("launch.py")
NEEDED = [
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
PATIENCE = 600  # seconds after which a process counts as hung: what a busy machine takes is far below, and the end does not wait for it


@pytest.fixture(scope="session")
def torchrun():
    return started


@pytest.fixture(scope="session")
def python():
    """`python(ARGUMENTS)` in a process of its own: exit code, standard output, standard error."""
    return lambda *arguments: ran([{}], arguments)[0]


def started(processes: int, *arguments: object) -> list[tuple[int, str, str]]:
    """`python ARGUMENTS` with the environment that torchrun gives. Exit code, standard output and standard error of each."""
    with reserved_port() as port:
        return ran([ranked(rank, processes, port) for rank in range(processes)], arguments)


def ran(environments: list[dict[str, str]], arguments: tuple) -> list[tuple[int, str, str]]:
    with tempfile.TemporaryDirectory() as directory:
        files = [[str(Path(directory, f"{n}.{end}")) for end in ("out", "err")] for n in range(len(environments))]
        words = [str(a) for a in arguments]
        group = [forked(one, words, *told) for one, told in zip(environments, files, strict=True)]
        codes = join_all(group)
        for process in group:
            process.kill()
        return [(code, *(Path(file).read_text() for file in told)) for code, told in zip(codes, files, strict=True)]


def ranked(rank: int, world: int, port: int) -> dict[str, str]:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in numbers.items()}


def forked(environment: dict[str, str], words: list[str], out: str, err: str, setup: str = ""):
    """`python WORDS` as a fork of a process that has imported what most of them need, which takes longer than what they do."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(NEEDED)
    given = {"environment": environment, "words": words, "setup": setup, "out": out, "err": err}
    process = context.Process(target=runpy.run_path, args=(str(LAUNCH), given), daemon=True)
    process.start()
    return process


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
    started, ports = [], ExitStack()

    def start(arguments: tuple, processes: int = 1, setup: str = "") -> list:
        number = ports.enter_context(reserved_port()) if processes > 1 else 0
        group, logs = [], tmp_path_factory.mktemp("logs")
        for rank in range(processes):
            log = logs / f"{rank}.txt"
            words = ["-m", "puzzle", *map(str, arguments)]
            process = forked(ranked(rank, processes, number), words, str(log), str(log), setup)
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
        time.sleep(0.02)


@pytest.fixture(scope="session")
def wait():
    return wait_until
