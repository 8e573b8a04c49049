"""Stored teacher logits, `--teacher-logits DIR`: the teacher runs once over all that will be trained on, and what it says of every token waits on disk.

    DIR/teacher.json                        what it depends on: a healing with other text, order or lengths is refused by name
    DIR/stage0-00000000.safetensors         words [R, K], logs [R, K] (float16) and rest [R] of some steps, in the order of training
    DIR/held-out.safetensors                of the held-out rows, at temperature 1, with the teacher's own loss

Files are renamed into place when they are whole: after a kill -9 the same command writes those that are missing.
Letters: R tokens, K words kept, T tokens of a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from puzzle.base.errors import UserError
from puzzle.base.files import content_hash, replacing
from puzzle.data.mixture import Stage
from puzzle.heal.top_k import TopK
from puzzle.parents.checkpoint import read_header

SHARD_BYTES = 2**26
HELD_OUT, RECORD = "held-out.safetensors", "teacher.json"
NAMES = ("words", "logs", "rest")


def bytes_per_token(top_k: int, words: int) -> int:
    """Of K numbers of words (two bytes each where the vocabulary allows), K log-probabilities and the rest's."""
    return top_k * ((2 if words <= 2**16 else 4) + 2) + 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """Some steps of a stage."""

    path: Path
    stage: int
    steps: range


class StoredTeacher:
    """In place of a teacher what it has written, by step: a directory of stored logits, which `claim` has found to be of this run. facts: teacher.json's."""

    def __init__(self, directory: Path, stages: list[Stage], facts: dict[str, Any], device: torch.device):
        self.directory, self.stages, self.facts, self.device = directory, stages, facts, device
        self.key, self.top_k = content_hash(facts), int(facts["top_k"])
        self._sound: set[Path] = set()
        self.shards = [
            Shard(path=directory / f"stage{n}-{first:08}.safetensors", stage=n, steps=steps)
            for n, stage in enumerate(stages)
            for first, steps in _cut(stage, bytes_per_token(self.top_k, facts["words"]))
        ]

    @property
    def missing(self) -> list[Path]:
        """What is not there, or is not whole, or is another run's."""
        return [path for path in (*(s.path for s in self.shards), self.directory / HELD_OUT) if not self._whole(path)]

    def _whole(self, path: Path) -> bool:
        try:
            return path.is_file() and read_header(path).get("__metadata__", {}).get("run") == self.key
        except UserError:
            return False

    def write(self, path: Path, told: TopK, **more: str) -> None:
        """One shard, renamed into place when it is whole. more: for its header."""
        number = torch.uint16 if self.facts["words"] <= 2**16 else torch.int32
        tensors = {"words": told.words.to(number), "logs": told.logs.half(), "rest": told.rest.float()}
        tensors = {n: t.cpu().contiguous() for n, t in tensors.items()}
        with replacing(path) as temporary:
            save_file(tensors, temporary, {"run": self.key, "sha256": _hash(tensors), **more})

    def lessons(self, stage: int, steps: range, rows: slice, parts: int) -> Iterator[TopK]:
        """Of the rows of these steps, in `parts` micro-batches each."""
        length, size = self.stages[stage].seq_len, self.stages[stage].batch_size
        for shard in (s for s in self.shards if s.stage == stage and s.steps.stop > steps.start):
            with self._opened(shard.path) as handle:
                for step in shard.steps:
                    if step < steps.start:
                        continue
                    first = (step - shard.steps.start) * size
                    each = (rows.stop - rows.start) // parts
                    for row in range(first + rows.start, first + rows.stop, each):
                        yield self._read(handle, row * length, (row + each) * length)

    def held_out(self, rows: slice, seq_len: int) -> TopK:
        with self._opened(self.directory / HELD_OUT) as handle:
            return self._read(handle, rows.start * seq_len, rows.stop * seq_len)

    def told(self, kl: float) -> dict[str, float]:
        """For an evaluation, from the mean over held-out tokens."""
        return {"kl_top": kl, "teacher_loss": float(read_header(self.directory / HELD_OUT)["__metadata__"]["loss"])}

    def _opened(self, path: Path) -> Any:
        """Raises UserError, the first time, for numbers that are not those written; files of before have no hash of them."""
        handle = safe_open(path, framework="pt")
        if path not in self._sound:
            wanted = handle.metadata().get("sha256")
            if wanted is not None and wanted != _hash({name: handle.get_tensor(name) for name in NAMES}):
                raise UserError(
                    f"{path} was changed after it was written: remove it, and pass `teacher`, which writes it again"
                )
            self._sound.add(path)
        return handle

    def _read(self, handle: Any, begin: int, end: int) -> TopK:
        """Made to sum to 1, which rounding to float16 has moved."""
        words, logs, rest = (handle.get_slice(name)[begin:end] for name in NAMES)
        words, logs, rest = words.int().to(self.device), logs.to(self.device).float(), rest.to(self.device)
        total = torch.logaddexp(logs.logsumexp(-1), rest)
        return TopK(words=words.long(), logs=logs - total[:, None], rest=rest - total)


def _hash(tensors: Mapping[str, Tensor]) -> str:
    """Of the bytes of these, by name."""
    digest = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _cut(stage: Stage, each: int) -> Iterator[tuple[int, range]]:
    count = max(1, SHARD_BYTES // (each * stage.tokens_per_step))
    for first in range(0, stage.num_steps, count):
        yield first, range(first, min(first + count, stage.num_steps))
