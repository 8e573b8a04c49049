"""What a recipe does with the healed child: further healings, and commands of its own (fine-tuning, reinforcement learning)."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from puzzle.base.errors import UserError
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
            if self.result is not None:
                raise UserError(f"`result` {self.result}: a healing's result is known: leave it out")
            return
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
        except (KeyError, ValueError, IndexError, AttributeError) as error:
            known = ", ".join(f"{{{name}}}" for name in PLACES)
            raise UserError(f"`command` {self.command}: {error}; known: {known}; a brace is written {{{{") from error
        if not found:
            raise UserError("`command` is empty: write what is to be run")
        return [sys.executable, *found[1:]] if found[0] in ("python", "python3") else found

    def check_there(self, here: Path) -> None:
        """Raise UserError for a program or a file beside the recipe that is not there."""
        words = self.words({name: f"{{{name}}}" for name in PLACES})
        if shutil.which(words[0]) is None:
            raise UserError(f"`command` {self.command}: no program {words[0]} here: install it, or write its path")
        for word in words[1:]:
            path = Path(word.replace("{here}", str(here)))
            if word.startswith("{here}") and not path.exists():
                raise UserError(f"`command` {self.command}: {path} is not there")

    def run(self, places: dict[str, str]) -> None:
        """Its output goes to standard error, so that ours stays what it is. Raises UserError where it fails, or leaves no checkpoint."""
        words = self.words(places)
        sys.stderr.flush()
        Path(places["out"]).mkdir(parents=True, exist_ok=True)
        ended = subprocess.run(words, stdout=2, env=os.environ | {"PYTHONUNBUFFERED": "1"}, check=False).returncode
        if ended:
            raise UserError(
                f"`command` ended with {ended}: {shlex.join(words)}; what it said stands above; the same `puzzle run` goes on here"
            )
        if self.result is not None:
            try:
                open_model(str(Path(places["out"], self.result)))
            except UserError as error:
                raise UserError(f"`command` left no checkpoint at `result` {self.result}: {error}") from error
