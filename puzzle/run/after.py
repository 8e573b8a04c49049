"""What a recipe does with the healed child: further healings, and commands of its own (fine-tuning, reinforcement learning)."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from puzzle.base.errors import UserError, writing
from puzzle.base.lock import locked
from puzzle.heal.memory import MASTER_BYTES
from puzzle.heal.settings import HealOptions
from puzzle.parents.opened import open_model

PLACES = ("child", "out", "parent", "here", "run")  # words of a command that a run fills in


@dataclass(frozen=True, kw_only=True, slots=True)
class After:
    """One stage: `heal`, or `command`, whose {child} is the newest child, {out} the stage's own directory, {parent} the parent, {here} the
    recipe's directory, {run} that of the run. result: the checkpoint that it leaves, as a path in {out}; None: the child stays.
    For --dry-run alone: tokens that are trained on (forward and backward), only read, and sampled; seq_len of them;
    bytes_per_parameter: of the model in training, its gradients and the optimiser, without activations; gpu_hours: what is known of
    it, in place of what follows from tokens."""

    heal: HealOptions | None = None
    command: str | None = None
    result: str | None = None
    trains: float = 0.0
    reads: float = 0.0
    samples: float = 0.0
    seq_len: int = 4096
    bytes_per_parameter: float = MASTER_BYTES
    gpu_hours: float | None = None

    def check(self) -> None:
        """Raise UserError for a stage that does nothing, or two things, and for a command that cannot be filled in."""
        if (self.heal is None) == (self.command is None):
            raise UserError("`heal` and `command`: a stage has one of them")
        if self.command is None:
            return
        place = Path(self.result or "")
        if place.is_absolute() or ".." in place.parts:
            raise UserError(f"`result` {self.result}: must be a path in {{out}}, which the command is given")
        for name in ("trains", "reads", "samples", "bytes_per_parameter", "gpu_hours"):
            if not 0 <= (getattr(self, name) or 0.0) < float("inf"):
                raise UserError(f"`{name}` {getattr(self, name):g}: must not be negative")
        if self.seq_len < 1:
            raise UserError(f"`seq_len` {self.seq_len}: must be above 0")
        self.words(dict.fromkeys(PLACES, "x"))

    def words(self, places: dict[str, str]) -> list[str]:
        """The command to run. Raises UserError for a {word} that nobody knows."""
        try:
            found = [word.format(**places) for word in shlex.split(self.command or "")]
        except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
            known = ", ".join(f"{{{name}}}" for name in PLACES)
            raise UserError(f"`command` {self.command}: {error}; known: {known}; a brace is written {{{{") from error
        if not found:
            raise UserError("`command` is empty: write what is to be run")
        return [sys.executable, *found[1:]] if found[0] in ("python", "python3") else found

    def check_there(self, here: Path, before: list[str]) -> None:
        """Raise UserError for a program or a file beside the recipe that is not there, and for one of a stage that is not among those
        before."""
        words = self.words({name: f"{{{name}}}" for name in PLACES} | {"here": str(here)})
        made = words[0].startswith(tuple(f"{{{name}}}" for name in PLACES))  # by then
        if not made and shutil.which(words[0]) is None:
            raise UserError(f"`command` {self.command}: no program {words[0]} here: install it, or write its path")
        for given, word in zip(shlex.split(self.command or "")[1:], words[1:], strict=True):
            if given.startswith("{here}") and not Path(word).exists():
                raise UserError(f"`command` {self.command}: {word} is not there")
        for name in re.findall(r"\{run\}/after/([\w-]+)", " ".join(words)):
            if name not in before:
                raise UserError(f"`command` {self.command}: no stage {name} comes before it, which would write that")

    def run(self, places: dict[str, str]) -> None:
        """Its output goes to standard error, so that ours stays what it is. Raises UserError where it fails, or leaves no checkpoint."""
        words, out = self.words(places), Path(places["out"])
        sys.stderr.flush()
        lock = out.with_name(f"{out.name}.lock")
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        with locked(lock, out) as handle:  # the program holds it too: where it outlives us, no second one is started
            handle.truncate(0)
            handle.write("the command that a run before this one has started")
            handle.flush()
            try:
                ended = subprocess.run(
                    words, stdout=2, env=os.environ | {"PYTHONUNBUFFERED": "1"}, check=False, pass_fds=[handle.fileno()]
                ).returncode
            except OSError as error:
                raise UserError(f"`command` cannot be run: {shlex.join(words)} ({error.strerror})") from error
            finally:
                lock.unlink(missing_ok=True)
        if ended:
            raise UserError(
                f"`command` ended with {ended}: {shlex.join(words)}; what it said stands above; the same `puzzle run` goes on here"
            )
        if self.result is not None:
            try:
                open_model(str(Path(places["out"], self.result)))
            except UserError as error:
                raise UserError(f"`command` left no checkpoint at `result` {self.result}: {error}") from error
