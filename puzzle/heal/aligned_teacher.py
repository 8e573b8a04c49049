"""A teacher with another tokenizer (`heal --align-tokens`): it reads the same text in its own tokens, and is compared with the child where both
come to the same next one (`puzzle/data/align.py`, `puzzle/heal/aligned_loss.py`); at other tokens the text itself teaches.

Letters: B rows, T tokens of a row, R = B·T, C words that both know.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from puzzle.base.console import say
from puzzle.base.errors import UserError
from puzzle.data.align import Aligner
from puzzle.data.mixture import IGNORE, HealData, Piece
from puzzle.heal.aligned_loss import Aligned
from puzzle.heal.loss import Teacher
from puzzle.parents.opened import HfModel

ROUND = 64  # tokens that a row of the teacher's is filled up to
Row = tuple[np.ndarray, np.ndarray]  # as of `Aligner.row`


class AlignedTeacher:
    """What the teacher shows of the rows of a run, by step. held_out: of the rows of `HealData.validation`."""

    def __init__(self, child: HfModel, teacher: HfModel, data: HealData | None = None):
        """data: None to be timed alone. Raises UserError for tokenizers that cannot be compared, and where no held-out token is the same in both."""
        sizes = (child.structure.vocab_size, teacher.structure.vocab_size)
        self.aligner = Aligner(child.directory, teacher.directory, sizes)
        self.longest = teacher.structure.max_length
        if data is None:
            return
        self.data, length = data, data.validation.shape[2]
        self.rows = [self.aligner.row(pieces, length, self.longest) for pieces in data.held_out]
        counted = (data.validation[1] != IGNORE).numpy()
        self.share = float((np.stack([before for _, before in self.rows])[counted] >= 0).mean())
        say(
            f"{teacher.source} is compared at {self.share:.1%} of the held-out tokens, over {self.aligner.words.shape[1]:,} words that "
            f"both know, of {sizes[0]:,} and {sizes[1]:,}; at the others the text teaches"
        )
        if not self.share:
            raise UserError(
                f"`teacher` {teacher.source} comes to the same token nowhere in the held-out text: let it write texts, and learn from "
                "those with `lm_weight` 1 `kl_weight` 0 `cosine_weight` 0"
            )

    @property
    def facts(self) -> dict[str, Any]:
        """For the record."""
        return {"tokens": round(self.share, 6), "words": self.aligner.words.shape[1]}

    def taught_by(self, teacher: Teacher, device: torch.device) -> None:
        """device: the child's."""
        self.teacher, self.device, self.head = teacher, device, teacher.model.head_weight.detach().to(device)
        self.words = torch.from_numpy(self.aligner.words).to(device)

    def lessons(self, stage: int, steps: range, rows: slice, parts: int) -> Iterator[Aligned]:
        """Of the rows of these steps, in `parts` micro-batches each."""
        length, each = self.data.mixture.stages[stage].seq_len, (rows.stop - rows.start) // parts
        for step in steps:
            pieces = self.data.mixture.documents(stage, step, rows)
            for at in range(0, len(pieces), each):
                yield self.show([self._row(one, length) for one in pieces[at : at + each]])

    def _row(self, pieces: list[Piece], length: int) -> Row:
        return self.aligner.row(pieces, length, self.longest)

    def held_out(self, rows: slice, seq_len: int) -> Aligned:
        """Of these held-out rows."""
        return self.show(self.rows[rows])

    def told(self, kl: float) -> dict[str, float]:
        """For an evaluation, from the mean over the held-out tokens that are compared."""
        return {"kl_aligned": kl}

    @torch.no_grad()
    def show(self, rows: list[Row]) -> Aligned:
        """What the teacher shows of B rows, filled up at their ends, which changes nothing before: R = B·T tokens."""
        longest = min(self.longest, -(-max(1, *(len(ids) for ids, _ in rows)) // ROUND) * ROUND)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        for row, (own, _) in enumerate(rows):
            ids[row, : len(own)] = torch.from_numpy(own)
        before = torch.from_numpy(np.stack([before for _, before in rows]))  # [B, T]
        places = (before.clamp(min=0) + longest * torch.arange(len(rows))[:, None]).flatten().to(self.device)
        on = self.teacher.model.embedding.weight.device
        normed = self.teacher(ids.to(on), self.teacher.model.ropes(longest), False).normed.to(self.device)
        there = (before >= 0).flatten().to(self.device)
        return Aligned(normed=normed[places], there=there, head=self.head, words=self.words)
