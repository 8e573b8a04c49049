"""Choosing by measured divergence: near-optimal children, terms between replacements, and new scores around the best so far.

The sum of scores ranks children well over all, and less well near the optimum. So several near-optimal children that differ are
measured (finalists); from what was measured, interactions are fitted and the solver is asked again (pairs); and around the best child
every replacement is scored anew, which the solver takes within a growing number of layers that may change (rounds).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from puzzle.base.console import progress, say
from puzzle.base.files import finite, replacing, write_json
from puzzle.blocklib.variant import PARENT
from puzzle.choose.context import Around
from puzzle.choose.interactions import PARTS, Fit, Layers, fit_interactions, sample
from puzzle.choose.options import SolveOptions
from puzzle.choose.problem import Selection
from puzzle.choose.solve import architecture, choose, chosen
from puzzle.library.children import Children
from puzzle.library.manifest import Library, Replacement
from puzzle.measure.architecture import FINALISTS, Architecture, write_architecture
from puzzle.solver.diverse import diverse_over
from puzzle.solver.solution import Solution, certified
from puzzle.solver.solve import solve

# Sizes that finalists come from: with interactions a problem takes a second, and there are hundreds of sizes.
BATCHES = 3
FIELDS = ("method", "batch", "sum_of_scores", "kl", "kl_stderr", "speedup", "changed", "layers")


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One measured child. method: "mip", "finalist", "pairs" or "round 1". changed: layers that differ from the first one's."""

    method: str
    solved: Architecture
    kl: float
    kl_stderr: float
    changed: int

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "batch": self.solved.predicted.batch,
            "sum_of_scores": self.solved.objective,
            "kl": self.kl,
            "kl_stderr": self.kl_stderr,
            "speedup": self.solved.speedup,
            "changed": self.changed,
            "layers": self.solved.variants,
        }


@dataclass(kw_only=True, slots=True)
class Refined:
    """Every candidate in the order of measurement; fit: of interactions, where they were asked for."""

    candidates: list[Candidate] = field(default_factory=list)
    fit: Fit | None = None

    @property
    def best(self) -> Candidate:
        return min(self.candidates, key=lambda one: one.kl)

    def to_json(self) -> dict[str, Any]:
        fit = self.fit
        told = None if fit is None else {n: v for n, v in asdict(fit).items() if n != "interactions"}
        if told is not None and fit is not None:
            told |= {name: getattr(fit.interactions, name) for name in ("within", "adjacent", "far")}
        return {
            "best": self.candidates.index(self.best),
            "children": [one.to_json() for one in self.candidates],
            "pairs": told,
        }

    def write(self, out: Path) -> None:
        """OUT/architecture.json, the best one, and OUT/finalists.csv and .json, all."""
        write_architecture(out / "architecture.json", self.best.solved)
        rows, whole = (out / name for name in FINALISTS)
        with replacing(rows) as path, open(path, "w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, FIELDS, lineterminator="\n")
            writer.writeheader()
            for one in self.candidates:
                layers = [" ".join(layer.values()) for layer in one.solved.variants]
                writer.writerow(finite(one.to_json()) | {"layers": ";".join(layers)})
        write_json(whole, self.to_json())


class Refiner:
    """Asks a selection for children, and `children` what they are worth."""

    def __init__(self, selection: Selection, children: Children):
        self.selection, self.children, self.found = selection, children, Refined()
        self._known: set[str] = set()

    def finalists(self, count: int, min_distance: int) -> None:
        """Measure the optimum and near-optimal children that differ, from the best batch sizes."""
        solutions = near_best(self.selection, count, min_distance)
        self._add(["mip", *["finalist"] * (len(solutions) - 1)], solutions)

    def pairs(self, count: int, min_distance: int) -> None:
        """Measure parts of the finalists, fit interactions, and measure what is near the optimum with them. What else the library has
        measured is no part of the fit: the same question has the same answer, whatever was asked before."""
        own, library = [changed(one.solved) for one in self.found.candidates], self.selection.library
        parts = self.children.measure([self._whole(one) for one in sample(own)])
        known = [*zip(own, (one.kl for one in self.found.candidates), strict=True), *((p.layers, p.kl) for p in parts)]
        fit = fit_interactions(library, self.selection.cells, known, own)
        if isinstance(fit, str):
            say(f"no interactions are fitted: {fit}; finalists stand as they are")
            return
        self.found.fit = fit
        request = replace(self.selection.request, interactions=fit.interactions)
        asked = replace(self.selection, request=request, known={})
        batches = sorted({one.solved.predicted.batch for one in self.found.candidates})
        solutions = near_best(asked, count, min_distance, batches)
        self._add(["pairs"] * len(solutions), solutions)

    def rounds(self, count: int) -> None:
        """Score around the best child, take the best of what the solver makes of it, until there is no gain or `count` times."""
        for number in range(1, count + 1):
            before = self.found.best
            solutions = self._around(before.solved)
            self._add([f"round {number}"] * len(solutions), solutions)
            say(f"round {number}: KL {before.kl:.5f} became {self.found.best.kl:.5f} (measured)")
            if self.found.best is before:
                break

    def _around(self, solved: Architecture) -> list[tuple[int, Solution]]:
        """What the solver chooses by marginal scores, when 1, 2, 4, … layers may change."""
        own, marginal = solved.variants, self.marginal(solved.variants)
        found, radius = [], 1
        while radius < 2 * len(own):
            around = Around(layers=own, marginal=marginal, radius=min(radius, len(own)))
            asked = replace(self.selection, request=replace(self.selection.request, around=around), known={})
            batch, solutions = choose(asked)
            if batch is not None:
                found.append((batch, solutions[batch]))
            radius *= 2
        return found

    def marginal(self, own: Sequence[Replacement]) -> list[dict[str, dict[str, float]]]:
        """Per layer and slot, what each other variant in its place adds to the KL of the child `own`, in nats per token."""
        library = self.selection.library
        places = [one for one in choices(library) if one[2] != own[one[0]][one[1]]]
        others = [[*own[:n], {**own[n], slot: name}, *own[n + 1 :]] for n, slot, name in places]
        itself, *measured = self.children.measure([own, *others])
        found: list[dict[str, dict[str, float]]] = [{} for _ in own]
        for (n, slot, name), one in zip(places, measured, strict=True):
            found[n].setdefault(slot, {})[name] = one.kl - itself.kl
        return found

    def _add(self, methods: Sequence[str], solutions: Sequence[tuple[int, Solution]]) -> None:
        """Measure what is new of it. Whatever the solver minimised, an architecture has the library's sum of scores."""
        first, solved = self.found.candidates[0].solved if self.found.candidates else None, list[Architecture]()
        bound = -math.inf if first is None or first.bound is None else first.bound
        for batch, one in solutions:
            proven = first is None and not solved and one.status == "optimal"
            bound = one.bound if first is None and not solved else bound
            told: dict[str, Any] = {"seconds": one.seconds, "solver": one.solver, "proven": proven, "bound": bound}
            solved.append(
                architecture(self.selection, batch, certified(self.selection.problem(batch), one.choice, **told))
            )
        self.keep(methods, solved)

    def scored(self, start: Architecture) -> Architecture:
        """A child that was solved earlier, by the library's scores of now, of which nothing was proven."""
        batch, told = start.predicted.batch, {"seconds": start.seconds, "solver": start.solver, "proven": False}
        named = self.selection.named(start.variants)
        return architecture(self.selection, batch, certified(self.selection.problem(batch), named, **told))

    def keep(self, methods: Sequence[str], several: Sequence[Architecture]) -> None:
        """Measure children that are chosen, each once: of several alike, and of those before, the first stands."""
        new: list[tuple[str, Architecture]] = []
        for method, one in zip(methods, several, strict=True):
            if str(one.variants) not in self._known:
                self._known.add(str(one.variants))
                new.append((method, one))
        measured = self.children.measure([one.variants for _, one in new]) if new else []
        for (method, one), there in zip(new, measured, strict=True):
            first = self.found.candidates[0].solved if self.found.candidates else one
            told = {"kl": there.kl, "kl_stderr": there.kl_stderr, "num_tokens": self.children.tokens.validation.numel()}
            self.found.candidates.append(
                Candidate(
                    method=method,
                    solved=replace(one, measured=told),
                    kl=there.kl,
                    kl_stderr=there.kl_stderr,
                    changed=sum(a != b for a, b in zip(one.variants, first.variants, strict=True)),
                )
            )

    def _whole(self, layers: Layers) -> list[Replacement]:
        spaces = self.selection.library.spaces
        return [{slot: layers.get(n, {}).get(slot, PARENT) for slot in space} for n, space in enumerate(spaces)]


def solve_measured(
    selection: Selection, asked: SolveOptions, children: Children, start: Architecture | None = None
) -> Refined:
    """Finalists, pairs and rounds, as far as they are asked for. start: the child to begin with, in place of finalists. Raises UserError
    where the goal cannot be met, with what can be."""
    refiner = Refiner(selection, children)
    if start is None:
        refiner.finalists(asked.finalists or 1, asked.min_distance)
    else:
        refiner.keep(["start"], [refiner.scored(start)])
    if asked.pairs:
        refiner.pairs(asked.finalists or 1, asked.min_distance)
    refiner.rounds(asked.rounds or 0)
    return refiner.found


def plan_measured(selection: Selection, asked: SolveOptions, children: Children) -> dict[str, Any]:
    """What `solve_measured` would measure at most, for --dry-run; writes nothing. Children that a library has measured already are not
    measured again."""
    library, several = selection.library, asked.finalists or 1
    slots = sum(len(library.spaces[n]) for n in library.layers)
    of_round = len(choices(library)) - slots + (2 * library.num_layers - 1).bit_length()
    parts = PARTS * library.num_layers if asked.pairs else 0
    count = several * (2 if asked.pairs else 1) + parts + (asked.rounds or 0) * of_round
    near_best(selection, 1, asked.min_distance)  # is there one?
    return {
        "device": str(children.device),
        "num_tokens": children.tokens.validation.numel(),
        "children_at_most": count,
        "measured_before": len(children.known),
        "plan": children.plan(max(several, parts, of_round if asked.rounds else 0)).to_json(),
    }


def choices(library: Library) -> list[tuple[int, str, str]]:
    """(layer, slot, variant) of all that the library offers and was not screened out, the parent's too."""
    return [
        (n, slot, name)
        for n in library.layers
        for slot, space in library.spaces[n].items()
        for name in space
        if f"{slot}/{name}" not in library.screened(n)
    ]


def near_best(
    selection: Selection, count: int, min_distance: int, batches: Sequence[int] = ()
) -> list[tuple[int, Solution]]:
    """Up to `count` near-optimal choices, each with its batch size, that differ from each other in `min_distance` layers or more; the
    optimum first. batches: where to look; none: at the best ones. Raises UserError where there is none, or for a distance that there
    cannot be."""
    request, solutions = selection.request, dict[int, Solution]()
    how: dict[str, Any] = {"backend": request.backend, "time_limit": request.time_limit}
    if not batches:
        _, solutions = chosen(selection)
    for batch in batches or selection.batches:
        if batch not in solutions or solutions[batch].status == "cutoff":
            solutions[batch] = solve(selection.problem(batch), **how)
    ranked = sorted((b for b, s in solutions.items() if s.choice), key=lambda b: solutions[b].objective)
    picked = {batch: solutions[batch] for batch in ranked[:BATCHES]}
    problems = {batch: selection.problem(batch) for batch in picked}
    with progress("candidates", count) as bar:
        return diverse_over(problems, picked, count, min_distance, **how, on_found=bar.advance)


def changed(solved: Architecture) -> dict[int, Replacement]:
    """What of a child is not the parent's."""
    every = ({slot: name for slot, name in layer.items() if name != PARENT} for layer in solved.variants)
    return {n: layer for n, layer in enumerate(every) if layer}
