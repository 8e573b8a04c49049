"""Measured divergence of whole children of a library, kept: none is measured twice on the same text and blocks.

LIB/children/KEY.json   {"children": {name: {"layers": {"3": {"attention": "kv2"}}, "blocks": hash, "kl", "kl_stderr", …}}}; KEY: of
                        parent, text and kind of device
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from puzzle.base.console import progress, say
from puzzle.base.device import compute_dtype, pick_device
from puzzle.base.errors import UserError
from puzzle.base.files import content_hash, read_json, write_json
from puzzle.base.lock import holding
from puzzle.base.units import layer_name
from puzzle.blocklib.variant import PARENT
from puzzle.data.files import list_files
from puzzle.data.packing import TokenData
from puzzle.library.assemble import open_parent
from puzzle.library.manifest import Library, Replacement, score_name
from puzzle.library.passes import ChildPath, Passes, path_of
from puzzle.library.plan import scoring
from puzzle.library.score import ScoreOptions, held_out
from puzzle.library.store import BlockStore
from puzzle.runtime.residency import Memory, Residency, plan_residency

AT_ONCE = 16  # children of a pass where the parent is whole on the device
MADE_BY = "puzzle solve --finalists"
Layers = Sequence[Replacement]  # of one child: {slot: variant} of every layer


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """layers: {slot: variant} of those that are not the parent's; kl, kl_stderr: nats per token, to the parent."""

    layers: Mapping[int, Replacement]
    kl: float
    kl_stderr: float


class Children:
    """Of one library on one held-out text, which is read when the first child is measured. Raises UserError where parent or text do
    not fit, before anything is measured."""

    def __init__(self, library: Library, data: Sequence[str], options: ScoreOptions, parent: str | None = None):
        if not data:
            raise UserError("`data` is missing: say on which text children are measured, such as --data corpus")
        self.library, self.options, self.data = library, options, list(data)
        for place in self.data:
            list_files(place)
        self.parent, self.device = open_parent(library, parent), pick_device(options.device)
        self._hashes: dict[tuple[int, str, str], str] = {}

    @cached_property
    def tokens(self) -> TokenData:
        """Of the text."""
        return held_out(self.library, self.parent, self.data, self.options)

    @cached_property
    def path(self) -> Path:
        """Where its measurements are kept."""
        key = content_hash([self.library.fingerprint, self.tokens.hash, self.device.type])
        return self.library.root / "children" / f"{key[:16]}.json"

    @cached_property
    def known(self) -> dict[str, dict[str, Any]]:
        """By name, what has been measured."""
        return self._kept()

    def _kept(self) -> dict[str, dict[str, Any]]:
        """What this or another process has left, of blocks that are as they were. A broken file counts as none."""
        try:
            kept = read_json(self.path, MADE_BY)["children"] if self.path.is_file() else {}
            same = {name: one for name, one in kept.items() if one["blocks"] == self._blocks(_read(one["layers"]))}
            for one in same.values():
                one["kl_stderr"] = math.inf if one["kl_stderr"] is None else one["kl_stderr"]  # of a single sequence
                assert math.isfinite(one["kl"])
                assert one["kl_stderr"] >= 0
        except (UserError, AssertionError, AttributeError, KeyError, TypeError, ValueError):
            return {}
        return same

    def measurements(self) -> list[Measurement]:
        """Of all that were ever measured, with the blocks that are there now."""
        return [
            Measurement(layers=_read(one["layers"]), kl=one["kl"], kl_stderr=one["kl_stderr"])
            for one in self.known.values()
        ]

    def measure(self, children: Sequence[Layers]) -> list[Measurement]:
        """In the order of `children`; what is known is not measured again. Those that begin like the first are fastest."""
        wanted = {_name(self._changed(child)): self._changed(child) for child in children}
        if not wanted.keys() <= self.known.keys():
            with holding(self.library.root):
                self.known |= self._kept()
                missing = {name: layers for name, layers in wanted.items() if name not in self.known}
                if missing:
                    self._measure(missing, self._changed(children[0]))
        return [
            Measurement(layers=wanted[name], kl=self.known[name]["kl"], kl_stderr=self.known[name]["kl_stderr"])
            for name in map(_name, map(self._changed, children))
        ]

    def _changed(self, child: Layers) -> dict[int, Replacement]:
        changed = ({s: name for s, name in layer.items() if name != PARENT} for layer in child)
        return {n: layer for n, layer in enumerate(changed) if layer}

    def _measure(self, missing: Mapping[str, Mapping[int, Replacement]], first: Mapping[int, Replacement]) -> None:
        count = self.library.num_layers
        paths = {path_of(layers, count): name for name, layers in missing.items()}
        like, plan = path_of(first, count), self.plan(len(paths))
        say(f"measuring {len(paths)} children, the parent {plan.told(len(paths))}")
        passes = Passes(self.library, self.parent, self.tokens.validation, self.device, plan)
        with progress("children", len(paths)) as bar:
            for measured in passes.run(list(_groups(paths, like, plan.together)), bar):
                finite = [(path, result) for path, result in measured if math.isfinite(result["kl"])]
                for path, result in finite:
                    layers = missing[paths[path]]
                    told = {str(n): dict(layer) for n, layer in layers.items()}
                    self.known[paths[path]] = {"layers": told, "blocks": self._blocks(layers), **result}
                write_json(self.path, {"children": self.known})
                for path, _ in measured:
                    if paths[path] not in self.known:
                        raise UserError(
                            f"child {paths[path]} has no finite output: one of its blocks diverged in training; delete it and run "
                            "`puzzle build-library` again with a smaller --lr"
                        )

    def plan(self, count: int) -> Residency:
        """How the parent and `count` children go over the text."""
        sequences, length = self.tokens.validation.shape
        size, structure = compute_dtype(self.device).itemsize, self.parent.structure
        layers = {n: [dict.fromkeys(self.library.spaces[n], PARENT)] for n in self.library.layers}
        shape = {"sequences": sequences, "seq_len": length, "compute_bytes": size}
        passing = replace(
            scoring(structure, layers, self.library.spaces, **shape), wanted=count, at_once=min(count, AT_ONCE), ahead=0
        )
        memory = Memory.of(self.device, self.options.memory_limit)
        batch_size = passing.batch(self.options.batch_size, memory)
        return plan_residency("measuring children on", passing, memory, batch_size)

    def _blocks(self, layers: Mapping[int, Replacement]) -> str:
        """The hash of what a child's blocks hold; "" where one is not there any more."""
        store, found = BlockStore(self.library.root), []
        for layer, replaced in layers.items():
            for slot, name in replaced.items():
                place = layer, slot, name
                if place not in self._hashes:
                    there = store.record_path(*place).is_file()
                    self._hashes[place] = store.record(*place)["sha256"] if there else ""
                found.append(self._hashes[place])
        return content_hash(found) if all(found) else ""


def _groups(paths: Mapping[ChildPath, str], like: ChildPath, together: int) -> Iterator[list[ChildPath]]:
    """Passes: first those that leave the path `like` early, so that each pass goes on from where the one before left it."""

    def key(path: ChildPath) -> tuple[int, ChildPath]:
        return next((n for n, (a, b) in enumerate(zip(path, like, strict=True)) if a != b), len(path)), path

    ordered = sorted(paths, key=key)
    for begin in range(0, len(ordered), together):
        yield ordered[begin : begin + together]


def _name(layers: Mapping[int, Replacement]) -> str:
    """Of a child: what is not the parent's."""
    return " ".join(f"{layer_name(n)}:{score_name(layer)}" for n, layer in layers.items()) or PARENT


def _read(layers: Mapping[str, Replacement]) -> dict[int, Replacement]:
    return {int(n): layer for n, layer in layers.items()}
