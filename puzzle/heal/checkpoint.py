"""Where a running healing keeps its state: OUT.heal/ with heal.jsonl, run.json and the newest checkpoint.

    HEALED.heal/run.json              what the run depends on; another run is refused
    HEALED.heal/heal.jsonl            a line per step and per evaluation
    HEALED.heal/step-00000500/        torch.distributed.checkpoint: weights, moments, random states; written as
                                      step-….tmp and renamed, then the one before is removed

A process killed at any moment leaves a whole checkpoint behind. Shards are put together anew when the number of
processes changes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puzzle.base.errors import UserError, first_line, writing
from puzzle.base.files import check_room, read_json, write_json
from puzzle.base.ranks import Ranks
from puzzle.heal.train import Trainer

CHECKPOINT_BYTES = 12  # per trained parameter: weight and two moments
KEPT_CHECKPOINTS = 2  # the newest, and the one being written


def disk_bytes(trainer: Trainer) -> int:
    """That a run's checkpoints and the healed child take at most."""
    exported = 2 * sum(tensor.numel() for _, tensor in trainer.learner.child.named_weights())
    return KEPT_CHECKPOINTS * CHECKPOINT_BYTES * trainer.num_trained + exported


class WorkDir:
    """The directory beside --out that belongs to one run."""

    def __init__(self, out: Path, ranks: Ranks):
        target = out.resolve()  # as it is written
        self.path = target.with_name(f"{target.name}.heal")
        self.log = self.path / "heal.jsonl"
        self.ranks = ranks

    def claim(self, facts: dict[str, Any], force: bool) -> None:
        """Begin or continue the run that `facts` describe. Raises UserError when another one stands here.

        force: throw another one away.
        """
        record = self.path / "run.json"
        found = self.ranks.from_first(
            lambda: read_json(record, "puzzle heal").get("run", {}) if record.is_file() else facts
        )
        if found != facts and not force:
            changed = sorted(key for key in {*found, *facts} if found.get(key) != facts.get(key))
            raise UserError(
                f"{self.path} holds an unfinished run with another {', '.join(changed)}: give the same options "
                "to continue it, remove it, or pass `force` to begin anew"
            )
        if self.ranks.is_first:
            if found != facts:
                shutil.rmtree(self.path)
            write_json(record, {"run": facts})
        self.ranks.wait()

    def check_disk(self, trainer: Trainer) -> None:
        """Raise UserError where checkpoints and child will not fit, before anything is trained."""
        check_room(self.path, disk_bytes(trainer), f"checkpoints in {self.path} and the healed child need")

    def newest(self) -> int:
        """The step of the newest whole checkpoint, 0 when there is none."""
        names = self.ranks.from_first(lambda: [path.name for path in self.path.glob("step-*")])
        return max((int(found[1]) for name in names if (found := re.fullmatch(r"step-(\d+)", name))), default=0)

    def _directory(self, step: int) -> Path:
        return self.path / f"step-{step:08}"

    def save(self, trainer: Trainer, step: int) -> None:
        """Write the state after `step` steps, then remove older ones. Every rank takes part."""
        import torch.distributed.checkpoint as dcp  # takes seconds: not for verbs that save nothing

        final = self._directory(step)
        temporary = final.with_name(f"{final.name}.tmp")
        if self.ranks.is_first and temporary.exists():
            shutil.rmtree(temporary)
        self.ranks.wait()
        try:
            with writing(self.path), _quiet(), _plain_errors(self.path):
                dcp.save({**trainer.state(), **self._random()}, checkpoint_id=temporary, no_dist=self.ranks.world == 1)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self.ranks.wait()
        if self.ranks.is_first:
            with writing(self.path):
                if final.exists():
                    shutil.rmtree(final)
                os.rename(temporary, final)
            for path in self.path.glob("step-*"):
                if path != final:
                    shutil.rmtree(path, ignore_errors=True)
        self.ranks.wait()

    def load(self, trainer: Trainer, step: int) -> None:
        """Continue from `save`, bit for bit. Raises UserError when the checkpoint cannot be read."""
        import torch.distributed.checkpoint as dcp

        directory = self._directory(step)
        random = self._random()
        try:
            with _quiet():
                known = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
                kept = {name: tensor for name, tensor in random.items() if name in known}
                dcp.load({**trainer.state(), **kept}, checkpoint_id=directory, no_dist=self.ranks.world == 1)
        except Exception as error:  # the reader raises many kinds
            raise UserError(
                f"{directory} cannot be read ({first_line(error)}): remove {self.path} to begin anew"
            ) from error
        torch.set_rng_state(random[f"random.{self.ranks.rank}"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(random[f"random.cuda.{self.ranks.rank}"])

    def _random(self) -> dict[str, Tensor]:
        """States of the random generators of this rank."""
        found = {f"random.{self.ranks.rank}": torch.get_rng_state()}
        if torch.cuda.is_available():
            found[f"random.cuda.{self.ranks.rank}"] = torch.cuda.get_rng_state()
        return found

    def remove(self) -> None:
        self.ranks.wait()
        if self.ranks.is_first:
            shutil.rmtree(self.path, ignore_errors=True)
        self.ranks.wait()


@contextlib.contextmanager
def _plain_errors(path: Path):
    """The error of the file system in place of the checkpoint library's collection of what every rank met."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        met: list[BaseException | None] = [cause for cause, _ in error.failures.values()]
        for cause in met:
            while cause is not None:  # torch's own error hides the one that it came from
                if isinstance(cause, OSError):
                    raise cause from error
                cause = cause.__cause__ or cause.__context__
        raise UserError(f"cannot write {path} ({met[0]}): choose another place") from error


@contextlib.contextmanager
def _quiet():
    """Without the checkpoint library's remarks about running in a single process."""
    logger = logging.getLogger("torch.distributed.checkpoint")
    level = logger.level
    with warnings.catch_warnings(action="ignore"):
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
