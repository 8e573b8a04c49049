"""Which replacements a process scores, and the files that hold what was found: written after every score, so that a killed run loses
little, and put together by the first process.

LIB/scores/L07.json         {"key": content, "scores": {name: {"kl", …}}, "estimates": {name: nats per token}, "screened": [names]}; the
                            last two only where variants were screened (`puzzle.library.screen`)
LIB/scores/L07.rank3.json   {"key", "scores"} of one process of several, taken over by the next run if all died

What was measured on other data or blocks is removed before anything is measured: it does not add up with what comes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from puzzle.base.errors import UserError
from puzzle.base.files import read_json, write_json
from puzzle.base.ranks import Ranks
from puzzle.base.units import layer_name
from puzzle.library.manifest import Replacement, score_name, scores_path

Scores = dict[str, dict[str, float]]  # by `score_name`
Todo = dict[int, list[Replacement]]  # per layer, in order


def share(todo: Mapping[int, Sequence[Replacement]], costs: Mapping[int, float], ranks: Ranks) -> Todo:
    """What this process scores: a stretch of layers, the first and last of which it may share with others. todo: by layer, the same in
    every process; costs: of one replacement in each layer."""
    every = [(layer, one) for layer in sorted(todo) for one in todo[layer]]
    ends = list(accumulate(costs[layer] for layer, _ in every))
    mine: Todo = {}
    for (layer, one), end in zip(every, ends, strict=True):
        if int((end - costs[layer] / 2) / ends[-1] * ranks.world) == ranks.rank:
            mine.setdefault(layer, []).append(one)
    return mine


@dataclass(slots=True)
class LayerScores:
    """scores: by name; estimates: of the screen; screened: names that it dropped, which have no score."""

    scores: Scores = field(default_factory=dict)
    estimates: dict[str, float] = field(default_factory=dict)
    screened: set[str] = field(default_factory=set)


class Results:
    """The scores of one library. wanted: the replacements in every layer, in the order that the files have. key: what the scores
    of a layer depend on, of all `layers`. The first process alone reads and writes the layers' files, for all."""

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
        self.read()

    def read(self) -> None:
        """What is there already, that processes of a run that died have left too."""
        self.layers = self.ranks.from_first(lambda: {layer: self._read(layer) for layer in self.keys})
        self._mine: dict[int, Scores] = {layer: {} for layer in self.keys}

    def remove_others(self) -> None:
        """Of other data or blocks, in all layers, wherever the run is stopped after this."""
        if self.ranks.is_first:
            there = [(path, n) for n in self.keys for path in (self._path(n), *self._parts(n)) if path.is_file()]
            stale = [path for path, layer in there if not self._of(path, layer)]
            for path in (*stale, *([self.root / "scores" / "screen.json"] if stale else [])):
                path.unlink(missing_ok=True)
        self.ranks.wait()

    def missing(self, screening: bool) -> Todo:
        """What is wanted and not there. screening: but for what was screened out."""
        found: Todo = {}
        for layer, every in self.wanted.items():
            there = self.layers[layer]
            out = there.screened if screening else set()
            left = [
                one
                for one in every
                if score_name(one) not in there.scores and not out & {score_name({s: n}) for s, n in one.items()}
            ]
            found |= {layer: left} if left else {}
        return found

    def keep(self, layer: int) -> None:
        """Write a layer's file: estimates and what they drop are the same in every process."""
        if self.ranks.is_first:
            self._write(layer)

    def put(self, layer: int, name: str, score: dict[str, float]) -> None:
        """Keep a score that this process found, should the run end early."""
        self._mine[layer][name] = score
        if self.ranks.world == 1:
            self._add(layer, self._mine[layer])
            self._write(layer)
        else:
            path = self._path(layer).with_name(f"{layer_name(layer)}.rank{self.ranks.rank}.json")
            write_json(path, {"key": self.keys[layer], "scores": self._mine[layer]})

    def close(self) -> None:
        """Put together what all processes found, and what others have left."""
        everyone = self.ranks.gather(self._mine)
        for layer in self.keys:
            for mine in everyone:
                self._add(layer, mine[layer])
            if self.ranks.is_first and (any(mine[layer] for mine in everyone) or self._parts(layer)):
                self._write(layer)
        self.ranks.wait()

    def _add(self, layer: int, scores: Scores) -> None:
        self.layers[layer].scores |= scores
        self.layers[layer].screened -= scores.keys()

    def _write(self, layer: int) -> None:
        """The layer's file, in one order, whoever found what: as it was, then as wanted. Of the other processes' nothing is left."""
        found, before = self.layers[layer], self._of(self._path(layer), layer).get("scores", {})
        names = dict.fromkeys([*before, *map(score_name, self.wanted.get(layer, ())), *found.scores])
        more = {"estimates": found.estimates, "screened": sorted(found.screened)} if found.estimates else {}
        scores = {name: found.scores[name] for name in names if name in found.scores}
        write_json(self._path(layer), {"key": self.keys[layer], "scores": scores, **more})
        for path in self._parts(layer):
            path.unlink(missing_ok=True)

    def _read(self, layer: int) -> LayerScores:
        """Of this key."""
        file = self._of(self._path(layer), layer)
        found = LayerScores(file.get("scores", {}), file.get("estimates", {}), set(file.get("screened", ())))
        for path in self._parts(layer):
            found.scores |= self._of(path, layer).get("scores", {})
        found.screened -= found.scores.keys()
        return found

    def _of(self, path: Path, layer: int) -> dict[str, Any]:
        """{} of another key, of no file or of a broken one, which is measured anew."""
        try:
            file = read_json(path, "puzzle score") if path.is_file() else {}
        except UserError:
            return {}
        return file if file.get("key") == self.keys[layer] else {}

    def _path(self, layer: int) -> Path:
        return scores_path(self.root, layer)

    def _parts(self, layer: int) -> list[Path]:
        return sorted(self._path(layer).parent.glob(f"{layer_name(layer)}.rank*.json"))
