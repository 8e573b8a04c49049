"""Where generated code runs: a process of its own with limits, in an empty directory, without network or other people's files where
the system allows. It keeps accidents in; it is no wall against an attacker."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from functools import cache

SECONDS = 10
MEMORY, FILE, FILES, PROCESSES = 2**31, 2**24, 64, 64

# What the process does first, on its own: limits; namespaces of its own for network and users; Landlock, by which no file outside its
# directory can be written, made or removed (modes, owners and times are none of Landlock's). It says what it got, then runs the program and, at its end, says the word that only we know.
START = f"""
import ctypes, os, resource, struct, sys
told, code, word = int(sys.argv[1]), sys.argv[2], sys.stdin.read()
for name, value in (("CPU", {SECONDS}), ("AS", {MEMORY}), ("FSIZE", {FILE}), ("NOFILE", {FILES}), ("NPROC", {PROCESSES}), ("CORE", 0)):
    try:
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
    except (ValueError, OSError):  # a lower one holds already
        pass
try:
    call = ctypes.CDLL(None, use_errno=True)
    apart = call.unshare(0x10000000 | 0x40000000) == 0 or call.unshare(0x40000000) == 0
    writes = {{1: 0x1FF2, 2: 0x3FF2}}.get(call.syscall(444, None, 0, 1), 0x7FF2)  # all that changes files, by Landlock's version
    rules = call.syscall(444, struct.pack("Q", writes), 8, 0)
    own = os.open(".", os.O_PATH)
    inside = rules >= 0 and call.syscall(445, rules, 1, struct.pack("=QI", writes, own), 0) == 0
    inside = inside and call.prctl(38, 1, 0, 0, 0) == 0 and call.syscall(446, rules, 0) == 0
    os.close(own)
except (OSError, AttributeError):
    apart = inside = False
os.write(told, b"%d%d" % (apart, inside))
exec(compile(open(code).read(), "answer.py", "exec"), {{"__name__": "__main__"}})
os.write(told, word.encode())
"""


def run(program: str, seconds: float = SECONDS) -> tuple[bool, str]:
    """Whether the program came to its end, and "11": it had no network, and could write, make and remove files in its own directory alone."""
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as directory:
        path, (read, write) = os.path.join(directory, "answer.py"), os.pipe()
        with open(path, "w", encoding="utf-8", errors="replace") as handle:
            handle.write(program)
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", START, str(write), path],
            cwd=directory,
            env={"PATH": os.defpath, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(write,),
            start_new_session=True,
        )
        os.close(write)
        with contextlib.suppress(subprocess.TimeoutExpired, BrokenPipeError):
            process.communicate(word.encode(), timeout=seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it has started too
        process.wait()
        os.set_blocking(read, False)
        try:
            said = os.read(read, 4096).decode(errors="replace")
        except BlockingIOError:  # a process that got away holds the other end
            said = ""
        os.close(read)
    return said[2:] == word, said[:2]


@cache
def guarantees() -> dict[str, bool]:
    """What this system allows."""
    said = run("")[1].ljust(2, "0")
    return {"no_network": said[0] == "1", "writes_inside_only": said[1] == "1"}
