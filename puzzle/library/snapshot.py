"""Snapshots of layers in training: what a killed run needs to continue bit for bit, with any number of processes.

    LIB/.work/step-00000120/L07.safetensors   weights, moments and losses so far of a layer's trainers, by whoever trains them
    LIB/.work/snapshot.json                   {"key", "step", "layers"}: written when all files of that step are there

The step before is removed after that, so that a process killed at any moment leaves one step that is whole.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from puzzle.base.device import wait_for
from puzzle.base.errors import UserError
from puzzle.base.files import read_json, replacing, write_json
from puzzle.base.ranks import Ranks
from puzzle.base.units import layer_name
from puzzle.blocklib.distill import VariantTrainer

LayerTrainers = Mapping[int, list[VariantTrainer]]  # by layer


class Snapshots:
    """Of the layers that all processes train at a time. key: identifies the build. Every method is called by all processes."""

    def __init__(self, work: Path, key: str, seconds: float, ranks: Ranks):
        self.work, self.key, self.seconds, self.ranks = work, key, seconds, ranks

    def load(self, trainers: LayerTrainers) -> int:
        """Put every trainer where it was and give the steps done; 0 unless a whole snapshot of this build has all of them."""
        step, layers = self.ranks.from_first(self._newest)
        found = self._read(step, trainers) if trainers.keys() <= set(layers) else None
        if not all(self.ranks.gather(step > 0 and found is not None)):
            step = 0
        elif found is not None:
            for trainer in (one for of_layer in trainers.values() for one in of_layer):
                trainer.load_state(found)
                trainer.losses = found[f"{trainer.key}|losses"]
        self._begun = self._saved = step
        self._next, self._saved_at = step + 1, time.monotonic()
        return step

    def after(self, step: int, trainers: LayerTrainers) -> None:
        """Save when it is time. The first process's clock says when, and at which step all ask it again."""
        if step < self._next:
            return
        wait_for(self.ranks.device)
        due, self._next = self.ranks.from_first(lambda: self._look(step))
        if due:
            self._save(step, trainers)
            self._saved, self._saved_at = step, time.monotonic()

    def remove(self) -> None:
        self.ranks.wait()
        if self.ranks.is_first:
            shutil.rmtree(self.work, ignore_errors=True)

    def _look(self, step: int) -> tuple[bool, int]:
        """(whether to save now, the step of the next look)"""
        passed = time.monotonic() - self._saved_at
        due = passed > self.seconds
        left = self.seconds if due else self.seconds - passed
        ahead = int(left * max(1, step - self._saved) / max(passed, 1e-9))
        return due, step + max(1, min(ahead, step - self._begun))  # a pace is believed for as long as it was seen

    def _newest(self) -> tuple[int, list[int]]:
        path = self.work / "snapshot.json"
        if not path.is_file():
            return 0, []
        try:
            found = read_json(path, "puzzle build-library")
            key, step, layers = found["key"], int(found["step"]), list(found["layers"])
        except (UserError, KeyError, TypeError, ValueError):  # broken, or of another version: as if there were none
            return 0, []
        return (step, layers) if key == self.key else (0, [])

    def _save(self, step: int, trainers: LayerTrainers) -> None:
        directory = self._directory(step)
        for layer, of_layer in trainers.items():
            tensors: dict[str, Tensor] = {}
            for trainer in of_layer:
                tensors |= {name: tensor.cpu() for name, tensor in trainer.state().items()}
                tensors[f"{trainer.key}|losses"] = trainer.losses
            with replacing(directory / f"{layer_name(layer)}.safetensors") as temporary:
                save_file(tensors, temporary)
        layers = [layer for of_rank in self.ranks.gather(list(trainers)) for layer in of_rank]
        if self.ranks.is_first:
            write_json(self.work / "snapshot.json", {"key": self.key, "step": step, "layers": layers})
            for path in self.work.glob("step-*"):
                if path != directory:
                    shutil.rmtree(path, ignore_errors=True)

    def _read(self, step: int, trainers: LayerTrainers) -> dict[str, Tensor] | None:
        """Everything of these trainers; None where something is missing or broken."""
        found: dict[str, Tensor] = {}
        for layer, of_layer in trainers.items():
            try:
                with safe_open(self._directory(step) / f"{layer_name(layer)}.safetensors", framework="pt") as handle:
                    found |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
            except (SafetensorError, OSError):
                return None
            if not {n for t in of_layer for n in (f"{t.key}|losses", *t.state())} <= found.keys():
                return None
        return found

    def _directory(self, step: int) -> Path:
        return self.work / f"step-{step:08}"
