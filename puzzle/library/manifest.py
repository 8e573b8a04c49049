"""library.json: what a block library holds, readable without torch.

{"schema": 2, "parent": {"source", "name", "fingerprint", …, of a sliced one "point"}, "structure": {… "layers": [{"attention": key, "ffn": key}, …]},
 "data": {…}, "recipe": {…}, "seed": 0, "stored_dtype": "bfloat16",
 "layers": {"0": {"attention": {"kv2": key, "none": "none"}, "ffn": {"0.5": key, …}}, …}, "origin": {"name", "structure"}}

origin: only where the parent is a healed child: the model that it was made of, which names, costs and goals are of. A key is a sub-block's text form (`puzzle.blocklib.sub_block`). Layers that are not named keep the parent's sub-blocks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from puzzle.base.errors import UserError
from puzzle.base.files import read_any, read_json
from puzzle.base.units import layer_name
from puzzle.blocklib.sub_block import SubBlock, parse_key
from puzzle.blocklib.variant import PARENT
from puzzle.parents.point import Point
from puzzle.parents.structure import Structure

SCHEMA = 2  # of library.json
# The parent's own sub-block, as scores/LNN.json calls it.
FP8_WEIGHTS, FP8_CACHE = (f"{PARENT}@fp8", f"{PARENT}@fp8-cache")
Space = dict[str, SubBlock]  # what may stand in one place, by variant, the parent's own first
Replacement = Mapping[str, str]  # {slot: variant}: what stands in for the parent in one layer


def scores_path(root: Path, layer: int) -> Path:
    return root / "scores" / f"{layer_name(layer)}.json"


def score_name(replacement: Replacement) -> str:
    """What scores/LNN.json calls it: "attention/kv2", or "attention/kv2+ffn/0.5" for both together."""
    return "+".join(f"{slot}/{variant}" for slot, variant in replacement.items())


def score_of(scores: Mapping[str, Mapping[str, float]], variants: Replacement) -> float:
    """What one layer's choice of variants costs: its joint score where that was measured, else the sum of its parts. scores: of the layer,
    as `Library.scores`. Raises KeyError with the name of what has none."""
    replaced = {slot: name for slot, name in variants.items() if name != PARENT}
    joint = scores.get(score_name(replaced))
    return (
        joint["kl"]
        if joint is not None
        else sum((scores[score_name({s: n})]["kl"] for s, n in replaced.items()), start=0.0)
    )


@dataclass(frozen=True, slots=True)
class Library:
    """One library directory, its library.json already read. structure: the parent's. spaces: per layer and slot. origin: of the model that
    costs and goals are held against, the parent but where that is a healed child of another one."""

    root: Path
    facts: dict[str, Any]
    structure: Structure
    spaces: tuple[dict[str, Space], ...]
    origin: Structure

    @classmethod
    def open(cls, root: Path) -> Library:
        """Raises UserError when `root` is no library, or holds a sub-block that is not understood."""
        if root.is_file():
            raise UserError(f"library {root} is a file: give the directory that `puzzle build-library` made")
        if not root.is_dir():
            raise UserError(f"library {root} does not exist: make it with `puzzle build-library PARENT --out {root}`")
        path = root / "library.json"
        facts = read_any(path, "puzzle build-library")
        if facts.get("schema") != SCHEMA:
            raise UserError(
                f"{path} has schema {facts.get('schema')!r}, this version reads {SCHEMA}: run the `puzzle build-library` that made it again; it keeps "
                "all blocks, measures the scores again and writes this file anew"
            )
        try:
            structure = Structure.from_json(facts["structure"])
            first = facts.get("origin")
            origin = structure if first is None else Structure.from_json(first["structure"])
            for name in ("source", "name", "fingerprint"):
                if not isinstance(facts["parent"][name], str):
                    raise TypeError(f"parent.{name} is {facts['parent'][name]!r}")
            trained = [facts["layers"].get(str(index), {}) for index in range(structure.num_layers)]
            spaces = tuple(
                {
                    slot: {PARENT: own} | {name: parse_key(key) for name, key in slots.get(slot, {}).items()}
                    for slot, own in layer.items()
                }
                for layer, slots in zip(structure.layers, trained, strict=True)
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(
                f"{path} is broken ({error}): run `puzzle build-library` again, it keeps all blocks"
            ) from error
        return cls(root, facts, structure, spaces, origin)

    @property
    def num_layers(self) -> int:
        return self.structure.num_layers

    @property
    def layers(self) -> list[int]:
        """The layers that have alternatives; the others keep the parent's sub-blocks."""
        return sorted(int(layer) for layer, slots in self.facts["layers"].items() if any(slots.values()))

    @property
    def name(self) -> str:
        """Of the parent, or of its origin."""
        return (self.facts.get("origin") or self.facts["parent"])["name"]

    @property
    def fingerprint(self) -> str:
        """Of the parent's checkpoint."""
        return self.facts["parent"]["fingerprint"]

    @property
    def point(self) -> Point | None:
        """What its parent was sliced to; None of a whole one. Raises UserError where library.json is broken there."""
        found = self.facts["parent"].get("point")
        try:
            return None if found is None else Point(**found)
        except TypeError as error:
            raise UserError(
                f"{self.root}/library.json is broken ({error}): run `puzzle build-library` again"
            ) from error

    def sub_blocks(self) -> list[SubBlock]:
        """All that a child of this library can be made of, each once, the parent's first."""
        return list(dict.fromkeys(b for space in self.spaces for names in space.values() for b in names.values()))

    def shareable(self, tp: int) -> tuple[Library, list[str]]:
        """This library without the variants that `tp` ranks cannot share, and the names of these. Raises UserError where they cannot
        share the parent."""
        self.origin.share(tp)
        return self.where(lambda sub_block: sub_block.can_share(tp))

    def where(self, kept: Callable[[SubBlock], bool]) -> tuple[Library, list[str]]:
        """This library without the variants whose sub-block is not `kept`, and the names of these."""
        spaces = tuple(
            {slot: {n: b for n, b in names.items() if n == PARENT or kept(b)} for slot, names in space.items()}
            for space in self.spaces
        )
        left_out = {
            score_name({slot: name})
            for space, kept in zip(self.spaces, spaces, strict=True)
            for slot, names in space.items()
            for name in names.keys() - kept[slot].keys()
        }
        return replace(self, spaces=spaces), sorted(left_out)

    def scores(self, layer: int) -> dict[str, dict[str, float]]:
        """{`score_name`: {"kl", "kl_stderr", "lm_loss", "top1_agreement", "num_tokens"}} of one layer.

        Raises UserError when the layer has not been scored, or for a file that holds no scores.
        """
        path = scores_path(self.root, layer)
        found: dict[str, dict[str, float]] = read_json(path, f"puzzle score {self.root}").get("scores", {})
        if not isinstance(found, dict):
            raise UserError(f"{path} is broken (scores are {found!r}): remove it, and run `puzzle score {self.root}`")
        for name, row in found.items():
            kl = row.get("kl") if isinstance(row, dict) else None
            if (
                not isinstance(kl, int | float) or isinstance(kl, bool) or not -0.01 <= kl <= sys.float_info.max
            ):  # what rounding makes of 0 is near it
                raise UserError(
                    f"{path} is broken ({name} has kl = {kl!r}): remove it, and run `puzzle score {self.root}`"
                )
        return found

    def screened(self, layer: int) -> frozenset[str]:
        """Names that `puzzle score --sub-block-screen` left without a score, as hopeless."""
        path = scores_path(self.root, layer)
        found = read_json(path, f"puzzle score {self.root}").get("screened", []) if path.is_file() else []
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise UserError(
                f"{path} is broken (what was screened out is {found!r}): remove it, and run `puzzle score {self.root}`"
            )
        return frozenset(found)

    def parent_source(self, override: str | None = None) -> str:
        """Where the parent is: as given by --parent, or as recorded (a hub id, or a path relative to the library)."""
        if override is not None:
            return override
        recorded = self.facts["parent"]
        if recorded["relative"]:
            path = Path(os.path.normpath(self.root.absolute() / recorded["source"]))
            if not path.is_dir():
                raise UserError(f"the library's parent is not at {path} any more: pass `parent` with its directory")
            return str(path)
        return recorded["source"]
