"""One engine in a process of its own, measured: of a checkpoint, or of any structure with random weights (vLLM's `load_format="dummy"`).

The process runs `engine_worker.py` in this Python or in another one that has vLLM; every point is given on as soon as it comes, so
that a crash, or a killed call, loses one point.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from puzzle.base.errors import UserError, writing
from puzzle.base.files import write_json
from puzzle.base.workload import Workload
from puzzle.export.checkpoint import DECILM_CODE
from puzzle.export.child import empty_child
from puzzle.export.engines import CARD_SHARE
from puzzle.export.fp8 import quantization_config
from puzzle.export.hf import hf_config
from puzzle.export.lower import lower
from puzzle.export.nemotron_nas import decilm_config
from puzzle.parents.structure import Layer, Structure
from puzzle.serving.check import INSTALL, EngineFailed, last_words
from puzzle.serving.vllm_plugin import READ_AGAINST

ENGINE = "vllm"
DTYPES = {"bf16": "bfloat16", "fp8": "bfloat16", "float32": "float32"}  # of activations, by precision
READERS = ("hf", "nemotron-nas")  # formats: the first by the plug-in
SEQUENCES = 256  # that a GPU's vLLM makes ready for, whatever is asked of it: its workspace is the same in all runs
PAGES = 128  # tokens: whole pages of any engine, so that a sequence of full length leaves none half filled


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A batch of requests that start together."""

    batch: int
    work: Workload

    def to_json(self) -> dict[str, int]:
        return {"num_seqs": self.batch, "input_len": self.work.input_len, "output_len": self.work.output_len}


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """Which vLLM, and how it runs. python: of its environment; None: this one. reader: the format that it is given; "parent" is what vLLM's own
    models read. precision: of
    weights and, on a GPU, caches. utilization: the share of the card that it takes. repeats: medians of as many runs."""

    gpu: str
    python: Path | None = None
    reader: str = "hf"
    precision: str = "bf16"
    utilization: float = CARD_SHARE
    repeats: int = 1

    def __post_init__(self) -> None:
        known = ("float32", "bf16", "fp8") if self.gpu == "cpu" else ("bf16", "fp8")
        if self.precision not in known:
            raise UserError(f"precision {self.precision} on {self.gpu}: {', '.join(known)} can be measured in vLLM")
        if self.reader not in (*READERS, "parent"):
            raise UserError(f"`format` {self.reader}: vLLM reads {' and '.join(READERS)}")


def check_engine(name: str) -> None:
    """Raise UserError for an engine that nothing here can run."""
    if name != ENGINE:
        raise UserError(
            f"`engine` {name}: {ENGINE} alone, in the version that is installed, can be measured; of others fit a CSV of yours"
        )


def write_random(structure: Structure, base: Layer, how: Engine, directory: Path) -> None:
    """config.json of a checkpoint whose weights vLLM makes up, and the code that a nemotron-nas one needs.

    Raises UserError for a sub-block that the reader cannot take.
    """
    child = empty_child(structure, base, "random", getattr(torch, DTYPES[how.precision]))
    if how.reader == "nemotron-nas":
        child, _ = lower(child, ENGINE, how.reader)
        config = decilm_config(child, ENGINE)
    else:
        config = hf_config(child, child.dtype)
        del config["auto_map"]
    if how.precision == "fp8":
        config["quantization_config"] = quantization_config(weights=True, cache=False)  # the cache's is an argument
    with writing(directory):
        for path in DECILM_CODE if how.reader == "nemotron-nas" else ():
            shutil.copy(path, directory)
    write_json(directory / "config.json", config)


def measured(
    path: Path, vocab_size: int, max_length: int, points: Sequence[Point], how: Engine, *, random: bool
) -> Iterator[dict]:
    """What the engine says of itself, {"engine": facts}, then for every point {"point", "measured"}, as they come. max_length: the most
    tokens that the model takes.

    Raises UserError where there is no vLLM, none that was read, no plug-in, or another GPU than `how.gpu`; EngineFailed where vLLM fails.
    """
    longest = max(p.work.input_len + p.work.output_len for p in points)
    if longest > max_length:
        raise UserError(f"{longest} tokens of a request exceed the model's context of {max_length}")
    job = {
        "path": str(path),
        "reader": how.reader,
        "random": random,
        "dtype": DTYPES[how.precision],
        "kv_dtype": "fp8" if random and how.precision == "fp8" and how.gpu != "cpu" else None,
        "utilization": how.utilization,
        "max_model_len": min(max_length, -(-longest // PAGES) * PAGES),
        "max_num_seqs": max(SEQUENCES if how.gpu != "cpu" else 1, *(p.batch for p in points)),
        "points": [p.to_json() for p in points],
        "vocab_size": vocab_size,
        "repeats": how.repeats,
        "oldest": list(READ_AGAINST[0]),
        "newest": list(READ_AGAINST[1]),
    }
    with _process(job, how.python or Path(sys.executable)) as lines:
        for line in lines:
            if "refused" in line:
                raise UserError(_refusal(line, how.python or Path(sys.executable)))
            if "engine" in line:
                _check_device(line["engine"]["device"], how.gpu)
            if "done" not in line:
                yield line


@contextmanager
def _process(job: dict[str, Any], python: Path) -> Iterator[Iterator[dict[str, Any]]]:
    """The worker's lines; its process ends with the block."""
    with tempfile.TemporaryDirectory(prefix="puzzle-engine-") as name:
        directory = Path(name)
        write_json(directory / "job.json", job)
        # A script's own directory is searched first for imports: from a copy, no file of ours hides a library.
        worker = shutil.copy(Path(__file__).with_name("engine_worker.py"), directory)
        with open(directory / "log", "w+", encoding="utf-8", errors="replace") as log:
            try:
                process = subprocess.Popen(
                    [str(python), worker, str(directory / "job.json")],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, errors="replace", env={**os.environ, "PYTHONUNBUFFERED": "1"},
                )  # fmt: skip
            except OSError as error:
                raise UserError(
                    f"`python` {python}: {error.strerror}; give the Python of vLLM's environment"
                ) from error
            try:
                yield _lines(process, log)
            finally:
                process.kill()
                process.wait()


def _lines(process: subprocess.Popen, log: Any) -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    said, ended = [], False
    for text in process.stdout:
        if text.startswith("puzzle: "):
            line = json.loads(text.removeprefix("puzzle: "))
            ended = ended or "done" in line or "refused" in line
            yield line
        else:
            said.append(text)
    code = process.wait()
    if not ended:
        log.seek(0)
        raise EngineFailed(f"vLLM failed: {last_words(''.join(said) + log.read(), code)}")


def _refusal(line: dict[str, Any], python: Path) -> str:
    oldest, newest = (".".join(map(str, bound)) for bound in READ_AGAINST)
    return {
        "missing": f"vLLM is not installed in {python}: {INSTALL[ENGINE]}, or give `python` of the environment that has it",
        "plug-in": f"vLLM in {python} has no puzzle plug-in, which serves hf exports: install puzzle-nas there, or pass `format` "
        "nemotron-nas",
        "version": f"vLLM {line['version']} in {python} was not read: what is measured here is known of vLLM {oldest} to {newest}; "
        "install one of these",
    }[line["refused"]]


def _check_device(here: str, gpu: str) -> None:
    if gpu.split("-")[0] not in here.lower():
        raise UserError(f"`gpu` {gpu}: vLLM runs on {here} here; a cost is measured where it will be paid")


def measured_random(structure: Structure, base: Layer, points: Sequence[Point], how: Engine) -> Iterator[dict]:
    """`measured` of a structure with random weights."""
    with tempfile.TemporaryDirectory(prefix="puzzle-random-") as name:
        write_random(structure, base, how, Path(name))
        sizes = structure.vocab_size, structure.max_length
        yield from measured(Path(name), *sizes, points, how, random=True)
