"""`puzzle WORDS` as forks of a process that has imported what its verbs need, which takes longer than many of them."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

NEEDED = [
    "puzzle.cli", "puzzle.heal.run", "puzzle.measure.evaluate", "puzzle.measure.bench", "puzzle.export.checkpoint",
    "transformers.models.auto.tokenization_auto", "transformers.tokenization_utils_tokenizers", "transformers.models.llama.modeling_llama",
]  # fmt: skip


def begin_imports() -> None:
    """Of the process that is forked, beside what the caller does first."""
    _context()
    forkserver.ensure_running()


def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(NEEDED)
    return context


def run_puzzle(words: list[str], seconds: float) -> str:
    """What the verb printed. Raises subprocess's CalledProcessError where it fails, and TimeoutExpired after `seconds`."""
    context = _context()
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory, "out")
        process = context.Process(target=_verb, args=(words, str(out)))
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(words, seconds)
        if process.exitcode:
            raise subprocess.CalledProcessError(process.exitcode, words)
        return out.read_text(encoding="utf-8")


def _verb(words: list[str], out: str) -> None:
    from puzzle.cli import main

    os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT), 1)
    sys.argv[:] = ["puzzle", *words]
    main()
