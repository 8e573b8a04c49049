"""Which replacements a process scores, and how what all of them found becomes scores/LNN.json.

LIB/scores/L07.json         {"key", "scores"}: what the first process writes when all are done
LIB/scores/L07.rank3.json   the same, of one process of several, written as it goes and taken over by the next run if all died
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from puzzle.base.files import read_json, write_json
from puzzle.base.ranks import Ranks
from puzzle.base.units import layer_name
from puzzle.library.manifest import Replacement, score_name, scores_path

Scores = dict[str, dict[str, float]]  # by `score_name`


def share(
    todo: Mapping[int, Sequence[Replacement]], costs: Mapping[int, float], ranks: Ranks
) -> dict[int, list[Replacement]]:
    """What this process scores: a stretch of layers, the first and last of which it may share with others. todo: by layer, the same in
    every process; costs: of one replacement in each layer."""
    every = [(layer, one) for layer in sorted(todo) for one in todo[layer]]
    ends = list(accumulate(costs[layer] for layer, _ in every))
    mine: dict[int, list[Replacement]] = {}
    for (layer, one), end in zip(every, ends, strict=True):
        if int((end - costs[layer] / 2) / ends[-1] * ranks.world) == ranks.rank:
            mine.setdefault(layer, []).append(one)
    return mine


class Results:
    """The scores of one library. wanted: the replacements in every layer, in the order that the files have. key: what the scores
    of a layer depend on. What other data or blocks gave is removed, of all `layers`: it does not add up with what comes."""

    def __init__(
        self,
        root: Path,
        wanted: Mapping[int, Sequence[Replacement]],
        layers: Sequence[int],
        key: Callable[[int], str],
        ranks: Ranks,
    ):
        self.root, self.wanted, self.ranks = root, wanted, ranks
        self.keys = ranks.agree(lambda: {layer: key(layer) for layer in layers}, f"library {root}")
        self.found: dict[int, Scores] = ranks.from_first(lambda: {layer: self._read(layer) for layer in layers})
        self._mine: dict[int, Scores] = {layer: {} for layer in wanted}

    def missing(self) -> dict[int, list[Replacement]]:
        """What is wanted and not there."""
        return {
            layer: [one for one in every if score_name(one) not in self.found[layer]]
            for layer, every in self.wanted.items()
        }

    def add(self, layer: int, scores: Scores) -> None:
        """Keep what this process found in a layer, should the run end early."""
        self._mine[layer] |= scores
        if self.ranks.world == 1:
            self._write(layer, [self._mine])
        else:
            self._put(self._part(layer, self.ranks.rank), layer, self._mine[layer])

    def close(self) -> None:
        """Put together what all processes found."""
        everyone = self.ranks.gather(self._mine)
        for layer in self.wanted if self.ranks.is_first else ():
            self._write(layer, everyone)
        self.ranks.wait()

    def _write(self, layer: int, everyone: list[dict[int, Scores]]) -> None:
        """The layer's file, in one order, whoever found what: as it was, then as wanted."""
        found = self.found[layer]
        for mine in everyone:
            found |= mine[layer]
        before = self._of(scores_path(self.root, layer), layer)
        names = dict.fromkeys([*before, *map(score_name, self.wanted[layer]), *found])
        self._put(scores_path(self.root, layer), layer, {name: found[name] for name in names if name in found})
        for path in self._parts(layer):
            path.unlink(missing_ok=True)

    def _put(self, path: Path, layer: int, found: Scores) -> None:
        write_json(path, {"key": self.keys[layer], "scores": found})

    def _read(self, layer: int) -> Scores:
        """Of this key: the layer's file, and what processes of a run that died have left."""
        found: Scores = {}
        for path in (scores_path(self.root, layer), *self._parts(layer)):
            there = self._of(path, layer)
            if not there:
                path.unlink(missing_ok=True)
            found |= there
        return found

    def _of(self, path: Path, layer: int) -> Scores:
        if not path.is_file():
            return {}
        file = read_json(path, "puzzle score")
        return file["scores"] if file.get("key") == self.keys[layer] else {}

    def _part(self, layer: int, rank: int) -> Path:
        return scores_path(self.root, layer).with_name(f"{layer_name(layer)}.rank{rank}.json")

    def _parts(self, layer: int) -> list[Path]:
        return sorted(scores_path(self.root, layer).parent.glob(f"{layer_name(layer)}.rank*.json"))
