"""Full disks, limits on files, names that are too long, files where directories are meant: one line, exit code 2, nothing left."""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from puzzle.base.errors import UserError, writing
from puzzle.base.lock import holding, holding_file

SOLVE = ("--gpu", "cpu", "--input-len", 16, "--output-len", 16, "--throughput", "1.1x")


@pytest.fixture
def places(own_library, parent, child, corpus, tmp_path):
    """{L, P, C, D, O}: library, parent, child, data, and an output that is not there yet."""
    return {"L": own_library, "P": parent, "C": child, "D": corpus, "O": tmp_path / "new" / "out"}


@contextmanager
def limited(size: int):
    """No file of this process may grow beyond that. [bytes]"""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def filled(command: str, places: dict[str, Path]) -> list[str]:
    """Its words, where a place may also have an ending: O.json."""
    parts = [word.partition(".") for word in command.split()]
    return ["".join((str(places[name]), *rest) if name in places else (name, *rest)) for name, *rest in parts]


HEAL = "heal C --teacher P --data D --out O --tokens 512 --seq-len 32 --batch-size 4 --validation-sequences 4"
BUILD = "build-library P --data D --out O --tokens 512 --seq-len 32 --batch-size 4"


@pytest.mark.parametrize(
    ("command", "limit"),
    [
        (BUILD, 200),
        (BUILD, 11_000),  # library.json fits, a block does not
        ("score L --data D --parent P --sequences 2", 200),
        ("profile L --gpu cpu --batches 1 --prefill 16 --contexts 16 --seconds 0.005 --rounds 1 --out O", 200),
        (f"solve L {' '.join(map(str, SOLVE))} --out O", 200),
        ("solve L --gpu cpu --input-len 16 --output-len 16 --pareto throughput --points 3 --out O", 200),
        ("export C --out O", 20_000),
        ("export C --format gguf --out O.gguf", 200),
        ("fuse C --data D --dependency-only --seq-len 32 --sequences 2 --out O.json", 200),
        (HEAL, 200),
        (HEAL, 20_000),  # run.json and the log fit, a checkpoint does not
    ],
)
def test_a_file_that_may_not_grow(puzzle, one_line_error, places, command, limit):
    shutil.rmtree(places["L"] / "scores" if command.startswith("score") else places["O"], ignore_errors=True)
    with limited(limit):
        done = puzzle(*filled(command, places))
    one_line_error(done, "is larger than a file may be here (File too large): raise `ulimit -f`")
    found = [path for root in (places["O"].parent, places["L"]) for path in root.rglob("*")]
    assert not [path for path in found if ".tmp" in path.name or path.name == ".lock"]


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (OSError(28, "No space left on device"), "disk full while writing x: free some space"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "disk full while"),
        (RuntimeError("[enforce fail at inline_container.cc] No space left on device"), "disk full while writing x"),
        (OSError(27, "File too large"), "x is larger than a file may be here"),
        (OSError(36, "File name too long"), "cannot write x .File name too long.: choose a shorter name"),
        (OSError(5, "Input/output error"), "cannot write x .Input/output error."),
        (UserError("kept (os error 28)"), r"kept \(os error 28\)"),
    ],
)
def test_what_the_system_says_of_a_write(error, wanted):
    with pytest.raises(UserError, match=wanted), writing(Path("x")):
        raise error


def test_other_errors_of_a_writing_block_stay():
    with pytest.raises(KeyError), writing(Path("x")):
        raise KeyError("a bug")


@pytest.mark.parametrize("bad", ["file", "file/below", "a" * 300])
@pytest.mark.parametrize(
    "command",
    [
        "build-library BAD --data D --out O", "build-library P --data D --out BAD --seq-len 32", "score BAD --data D",
        "score L --data D --parent BAD", "profile BAD --gpu cpu",
        "profile L --gpu cpu --batches 1 --prefill 16 --contexts 16 --seconds 0.005 --rounds 1 --out BAD",
        "solve BAD --gpu cpu --throughput 1.1x", "solve L --gpu cpu --throughput 1.1x --out BAD",
        "solve L --gpu cpu --input-len 16 --output-len 16 --pareto throughput --points 2 --out BAD", "export BAD --out O",
        "export L BAD --out O", "export C --out BAD", "fuse BAD --runs 1-2 --out O", "fuse C --runs 1-2 --out BAD",
        "heal BAD --teacher P --data D --out O", "heal C --teacher BAD --data D --out O",
        "heal C --teacher P --data D --seq-len 32 --out BAD", "evaluate BAD C --data D", "evaluate P BAD --data D",
        "bench BAD --gpu cpu", "run BAD --out O", "serve-check BAD --engine hf",
    ],
)  # fmt: skip
def test_no_directory(puzzle, one_line_error, places, tmp_path, command, bad):
    (tmp_path / "file").write_text("precious")
    done = puzzle(*filled(command, places | {"BAD": tmp_path / bad}))
    one_line_error(done, str(tmp_path / bad.split("/")[0]))
    if bad == "file" and "--out BAD" in command:
        one_line_error(done, "is a file: give a directory")
    assert (tmp_path / "file").read_text() == "precious"
    assert not places["O"].parent.exists()


@pytest.mark.parametrize(
    "command",
    [
        "build-library P --data D --out O --seq-len 32", "score L --data D --parent P", "fuse C --data D --out O",
        "heal C --teacher P --data D --seq-len 32 --out O", "evaluate P C --data D --seq-len 32",
    ],
)  # fmt: skip
def test_devices_that_are_none(puzzle, one_line_error, places, command):
    for device in ("mps", "meta", "cuda:x", "0"):
        one_line_error(
            puzzle(*filled(command, places), "--device", device), f"--device {device}: use auto, cpu or cuda"
        )
    if command.startswith("heal"):
        done = puzzle(*filled(command, places), "--teacher-device", "mps", "--batch-size", 4)
        one_line_error(done, "--teacher-device mps: use auto, cpu or cuda")
    assert not places["O"].parent.exists()


def test_an_unknown_cost_table(puzzle, one_line_error, own_library):
    done = puzzle("solve", own_library, *SOLVE, "--shapes", "nope")
    (table,) = (own_library / "costs/cpu").glob("*.csv")
    one_line_error(done, f"--shapes nope: the cost tables for --gpu cpu are {table.stem}")


@pytest.mark.parametrize("tokens", [0, 512])
def test_a_dry_run_of_no_tokens(puzzle, parent, corpus, tmp_path, tokens):
    arguments = ("build-library", parent, "--data", corpus, "--out", tmp_path / "o", "--seq-len", 32, "--dry-run")
    for extra in ((), ("--json",)):
        done = puzzle(*arguments, "--tokens", tokens, *extra)
        assert done.exit_code == 0, (done.output, done.exception)
    assert ('"tokens_per_second": null' in done.stdout) == (tokens == 0)
    assert not (tmp_path / "o").exists()


HOLDER = "import sys; from pathlib import Path; from puzzle.base.lock import holding\nwith holding(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


def test_one_process_at_a_time_changes_a_library(puzzle, one_line_error, places):
    """Who holds it is named; a dead process holds nothing, whatever it left; the same process may ask again."""
    for command in (f"{BUILD} --layers 0", "score L --data D --parent P --sequences 2"):
        place = places["O"] if "--out" in command else places["L"]
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(place)], **options)
        assert holder.stdout.readline() == "held\n"
        told = f"{place} is being changed by process {holder.pid} on {socket.gethostname()}: wait for it"
        one_line_error(puzzle(*filled(command, places)), told)
        holder.kill()
        holder.wait()
        assert (place / ".lock").exists()
        with holding(place):
            done = puzzle(*filled(command, places))
        assert done.exit_code == 0, (done.output, done.exception)
        assert not (place / ".lock").exists()


def test_a_lock_leaves_no_directory_behind(tmp_path):
    for _ in range(2):
        with holding(tmp_path / "a" / "b"):
            assert (tmp_path / "a/b/.lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"
        assert not list(tmp_path.iterdir())


def test_a_file_is_locked_by_whatever_name(tmp_path):
    """What a killed process has left there is taken over, and goes."""
    place, name = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    place.touch()
    name.symlink_to(place)
    (tmp_path / ".a.jsonl.lock").write_text("process 1 on nowhere")
    code = HOLDER.replace("holding", "holding_file")
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    holder = subprocess.Popen([sys.executable, "-c", code, str(place)], **options)
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(
            UserError, match=f"b.jsonl is being changed by process {holder.pid} on .*: wait for it, or use another file"
        ),
        holding_file(name),
    ):
        pass
    holder.kill()
    holder.wait()
    with holding_file(name):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".a.jsonl.lock", "a.jsonl", "b.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_a_limit_below_what_is_possible(puzzle, one_line_error, places):
    """It says the least that is, and that is enough: the measured peak of the process stays below it."""
    build = filled(f"{BUILD} --memory-limit", places)
    done = puzzle(*build, "100MB")
    one_line_error(done, "one layer with its variants needs", "0.10 GB are there", "or a larger --memory-limit")
    code = f"""
import re, sys
from puzzle.cli import main
try: main([*{build!r}, sys.argv[1]])
except SystemExit as end:  # getrusage would count the process that this one was started from
    print("peak", int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024, end.code)
"""

    def run(limit: str) -> tuple[int, int, str]:
        done = subprocess.run([sys.executable, "-c", code, limit], capture_output=True, text=True)
        peak, status = re.search(r"peak (\d+) (\d+)", done.stdout).groups()
        return int(peak), int(status), done.stderr

    least, told = 0.1, run("100MB")[2]
    for _ in range(5):  # how much of its libraries a process holds differs from one to the next
        least = max(least, float(re.search(r"needs ([0-9.]+) GB in all", told)[1]) + 0.03)
        peak, status, told = run(f"{least}GB")
        if status == 0:
            break
    assert status == 0, told
    assert peak <= least * 1e9
