"""Training in TRL that goes on, when it is typed again, from the newest checkpoint that is whole: on a CPU with the bits of a run that was left alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click

from puzzle.base.files import json_text, write_text


def newest(part: Path, processes: int) -> str | None:
    """The last checkpoint that was written to its end: random states of all processes, then trainer_state.json."""
    found = []
    for state in part.glob("checkpoint-*/trainer_state.json"):
        try:
            step = json.loads(state.read_text(encoding="utf-8"))["global_step"]
        except (ValueError, KeyError):
            continue
        if len(list(state.parent.glob("rng_state*.pth"))) == processes:
            found.append((step, str(state.parent)))
    return max(found, default=(0, None))[1]


def train(trainer: Any, part: Path, record: str, asked: dict[str, Any]) -> Path:
    """Train to the end and save what was learned. Returns that directory, `part`/whole.

    part: where the trainer writes its checkpoints, of a run that was asked for the same. asked: kept in the file `record` of both.
    """
    first, whole = trainer.is_world_process_zero(), part / "whole"
    begun = newest(part, trainer.accelerator.num_processes)
    trainer.accelerator.wait_for_everyone()
    if first:
        part.mkdir(parents=True, exist_ok=True)
        write_text(part / record, json_text(asked) + "\n")
        for path in part.glob("checkpoint-*"):
            if str(path) == begun:
                click.echo(f"going on from {begun}")
            else:
                shutil.rmtree(path)  # killed while it was written
    trainer.accelerator.wait_for_everyone()
    trainer.train(resume_from_checkpoint=begun)
    if hasattr(trainer.model, "merge_and_unload"):  # adapters
        trainer.model = trainer.model.merge_and_unload()
    trainer.save_model(str(whole))
    if first:
        trainer.state.save_to_json(str(whole / "trainer_state.json"))  # losses and rewards of every step
        shutil.copy(part / record, whole)
    return whole
