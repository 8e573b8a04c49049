"""A second pass over the blocks of one child, which learn on what the child's own layers before them give.

In the first pass a block sees the parent's residual stream alone, and what blocks before it leave out meets it only in the child. Here
the child's stream of the same tokens goes beside the parent's: in a share of a batch's rows a block is shown the child's stream, and is
held against what takes it to the parent's stream after this place; in the other rows all is as in the first pass, which keeps it from
leaning on single errors. All blocks learn at once, each from what the others give at that step; no gradient crosses a block.

Letters: R rows of the parent's stream, C of the child's behind them, T tokens, H hidden_size.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puzzle.base.errors import UserError
from puzzle.base.files import content_hash, replacing
from puzzle.blocklib.distill import Shown, VariantTrainer, autocast
from puzzle.blocklib.plain.part import Part, Ropes, moving
from puzzle.blocklib.sub_block import Variant
from puzzle.blocklib.variant import PARENT
from puzzle.library.assemble import architecture_of, library_of, read_part, read_variant
from puzzle.library.manifest import Library, Space, score_of
from puzzle.library.store import BlockStore
from puzzle.measure.architecture import Architecture, read_architecture, write_architecture

Place = tuple[int, str]  # layer and slot
Show = Callable[[VariantTrainer, Shown], list[Tensor]]


SCORED_BEFORE, SCORED = "trained again, sum of the scores of before", "trained again"  # in place of the solver's status


def take_scores(root: Path) -> None:
    """Give the architecture in a library of blocks that learnt again the sum of their own scores. One whose precisions were chosen, which
    have scores beside these, keeps that of before, and says so."""
    library, path = Library.open(root), root / "solution" / "architecture.json"
    solved = read_architecture(path)
    if solved.kv_dtype is None and solved.point is None:
        total = sum(score_of(library.scores(n), solved.variants[n]) for n in library.layers)
        write_architecture(path, replace(solved, status=SCORED, objective=total))


class Coupled:
    """The child at `path` (architecture.json in its library, or beside it). mix: the child's share of a batch. layers: whose blocks
    learn. Raises UserError for a child of another parent than the one of this fingerprint."""

    def __init__(self, path: Path, mix: float, layers: set[int], fingerprint: str, out: Path):
        try:
            self.library, self.mix = Library.open(library_of(path)), mix
        except UserError as error:
            raise UserError(
                f"`inputs_from` {path} lies in no library: put it into that which it was solved from"
            ) from error
        self.solved = architecture_of(path, self.library)
        if self.library.fingerprint != fingerprint:
            raise UserError(f"`inputs_from` {path} is a child of another parent: give that one, or a child of this one")
        if self.library.root.resolve() == out.resolve():
            raise UserError(
                f"`out` {out} is the library of `inputs_from`, whose blocks stay as they are: use another `out`"
            )
        self._store, self._fixed = BlockStore(self.library.root), dict[Place, Part]()
        self.every: dict[int, dict[str, Space]] = {}
        for n, (layer, space) in enumerate(zip(self.solved.variants, self.library.spaces, strict=True)):
            self.every[n] = {s: {PARENT: space[s][PARENT]} | {name: space[s][name]} for s, name in layer.items()}
        self.spaces = {n: self.every[n] for n in sorted(layers)}
        if not any(name != PARENT for n in self.spaces for name in self.solved.variants[n].values()):
            raise UserError(
                f"`inputs_from` {path} has the parent's own sub-blocks in all of these `layers`: none can learn"
            )

    def key(self) -> list[Any]:
        """What trained blocks depend on beside their own recipe."""
        records = [
            self._store.record(n, slot, name)["sha256"]
            for n, layer in enumerate(self.solved.variants)
            for slot, name in layer.items()
            if name != PARENT
        ]
        return [self.mix, content_hash(records), sorted(self.spaces)]

    def variant(self, layer: int, slot: str, name: str) -> Variant:
        """Which starts as it is."""
        sub_block = self.library.spaces[layer][slot][name]
        start = {n: t.float() for n, t in read_variant(self._store, layer, slot, name, sub_block).items()}
        return Variant(name=name, sub_block=sub_block, initialise=lambda block: start)

    def put(self, out: Path) -> None:
        """The blocks that do not learn, and the architecture, into the library of those that do."""
        there = BlockStore(out)
        for n, layer in enumerate(self.solved.variants):
            for slot, name in layer.items():
                if name != PARENT and n not in self.spaces:
                    self._store.read(n, slot, name)  # or an error: they are not what they were
                    for suffix in (".safetensors", ".json"):
                        with replacing(there.path(n, slot, name).with_suffix(suffix)) as temporary:
                            shutil.copyfile(self._store.path(n, slot, name).with_suffix(suffix), temporary)
        write_architecture(out / "solution" / "architecture.json", self._unproven())

    def _unproven(self) -> Architecture:
        """The choice, without what was proven or measured of it with the blocks of before."""
        return replace(
            self.solved, status=SCORED_BEFORE, bound=None, gap=None, measured=None, prices=None, objective_per_batch=None, points=None
        )  # fmt: skip

    def load(self, parts: Mapping[Place, Part], taught: Mapping[Place, Any], like: Tensor) -> None:
        """The blocks that do not learn, into memory beside the parent's `parts`. like: of the device and dtype that computes."""
        self._fixed = {}
        for n, slot in parts:
            name = self.solved.variants[n][slot]
            if name != PARENT and not taught.get((n, slot)):
                sub_block, move = self.library.spaces[n][slot][name], moving(like.device, like.dtype)
                self._fixed[n, slot] = read_part(self._store, n, slot, name, sub_block, move, in_training=True)

    def childs(self, rows: int) -> int:
        """C beside R rows of the parent's stream."""
        return max(1, round(self.mix * rows))

    def doubled(self, x: Tensor) -> Tensor:
        """[R, T, H] -> [R + C, T, H], where both streams are one yet."""
        return torch.cat([x, x[: self.childs(len(x))]])

    def through(self, parts: Mapping[Place, Part], trainers: Mapping[Place, list[VariantTrainer]], ropes: Ropes, both: Tensor, show: Show) -> Tensor:  # fmt: skip
        """Parent and child on their streams [R + C, T, H]; every trainer is shown what enters its sub-block, and what it is to add."""
        rows = next(r for r in range(1, len(both)) if r + self.childs(r) == len(both))
        x, z = both[:rows], both[rows:]
        count = len(z)
        for at, part in parts.items():
            whole = Shown(part, x, ropes)
            if trainers.get(at):
                (trainer,) = trainers[at]
                wanted = torch.cat([x[:count] + whole.target[:count] - z, whole.target[count:]])
                outputs = show(trainer, Shown(part, torch.cat([z, x[count:]]), ropes, wanted))
                z = z + sum(out.detach()[:count].to(z.dtype) for out in outputs)
            else:
                with torch.no_grad(), autocast(z.device):
                    z = z + self._fixed.get(at, part)(z, ropes).to(z.dtype)
            x = x + whole.target
        return torch.cat([x, z])
