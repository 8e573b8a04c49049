"""What choosing by measured divergence buys: how well sums of scores rank near-optimal children, and true KL at equal predicted speed.

Protocol: a scored library and the costs of one GPU. At every speed-up, the additive MIP; the best of N finalists; the best with
interactions fitted from these and from parts of them (`pairs`); the best after new scores around the MIP's child (`rescored`); and
the same around the best of finalists and pairs (`all`). All of them meet the same limit. KL(parent‖child) is measured on the text that
chooses, and on as much other held-out text (`kl_other`), which no choice has seen; `children` and `seconds` are what a method measures
beyond the MIP, kept results of the methods before it among them for `all`.
Then children near the optimum: the MIP on scores times exp(σz), z normal, σ in turn 0.1, 0.2, 0.4, those whose sum of scores is within
25 % of the optimum. `spearman` of their KL and the sum of scores, and `spearman_pairs` with the prediction of interactions that
were fitted without them, from what the methods have measured; `spearman_rescored` with the KL of the MIP's child and what new scores around it
say of every other replacement. The medians of KL over these three are `ratio`, `predicted` and `rescored`. Without --rounds there are
neither new scores nor the methods that take them.

    python benchmarks/quality/bench_selection.py LIBRARY --gpu h100 --data DATA --out benchmarks/results/selection.csv

One call takes at most --minutes and says what is left: the same command goes on. Rehearsal on a CPU (minutes):

    puzzle build-library examples/parent --data /usr/lib/python3.11 --out lib --attention kv2,kv1,none --ffn 0.5,0.25,none \\
        --tokens 16384 --seq-len 256 --lr 3e-3 --score-sequences 16 && puzzle profile lib --gpu cpu --batches 16,64
    python benchmarks/quality/bench_selection.py lib --gpu cpu --data /usr/lib/python3.11 --out selection.csv \\
        --input-len 128 --output-len 128 --sequences 4 --speeds 1.25,1.5 --children 10 --finalists 6 --rounds 1
"""

from __future__ import annotations

import csv
import datetime
import math
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import click

from puzzle.base.device import name_of
from puzzle.base.errors import UserError
from puzzle.base.workload import Workload
from puzzle.blocklib.variant import PARENT
from puzzle.choose.goal import GoalOptions
from puzzle.choose.interactions import Layers, Terms, fit_interactions, predicted
from puzzle.choose.options import SolveOptions
from puzzle.choose.precision import Precisions
from puzzle.choose.problem import Selection, select
from puzzle.choose.refine import Candidate, Refiner, changed
from puzzle.library.children import Children
from puzzle.library.manifest import Library
from puzzle.library.score import ScoreOptions
from puzzle.library.screen import spearman
from puzzle.solver.solve import solve

METHODS = ("mip", "finalists", "pairs", "rescored", "all")
SIGMAS = (0.1, 0.2, 0.4)
NEAR = 1.25  # times the optimum
FIELDS = ("kind", "library", "speed", "method", "children", "seconds", "sum_of_scores", "predicted", "kl", "kl_stderr", "kl_other",
          "speedup", "ratio", "rescored", "spearman", "spearman_pairs", "spearman_rescored", "device", "date")  # fmt: skip


class Rows:
    """OUT, written after every row; what is there is not made again."""

    def __init__(self, out: Path, shared: dict[str, Any]):
        self.out, self.shared, self.rows = out, shared, list[dict[str, Any]]()
        if out.is_file():
            with open(out, newline="", encoding="utf-8") as handle:
                self.rows = [row for row in csv.DictReader(handle) if row["library"] == shared["library"]]

    def of(self, kind: str, speed: float) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["kind"] == kind and float(row["speed"]) == speed]

    def add(self, kind: str, speed: float, **values: Any) -> None:
        told = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in values.items()}
        self.rows.append({"kind": kind, "speed": speed, **told, **self.shared})
        print(kind, speed, *told.values(), flush=True)
        with open(self.out, "w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, FIELDS, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)


class Bench:
    def __init__(
        self, library: Library, selections: dict[float, Selection], text: Children, other: Children, rows: Rows
    ):
        self.library, self.selections, self.text, self.other, self.rows = library, selections, text, other, rows
        self._finalists: dict[float, list[Candidate]] = {}  # looking for them takes the solver a minute

    def finalists(self, speed: float, count: int, distance: int) -> Refiner:
        """One that has found them, and nothing else."""
        refiner = Refiner(self.selections[speed], self.text)
        if speed in self._finalists:
            refiner.found.candidates += self._finalists[speed]
        else:
            refiner.finalists(count, distance)
            self._finalists[speed] = list(refiner.found.candidates)
        return refiner

    def methods(self, speed: float, finalists: int, distance: int, rounds: int) -> None:
        """A row of each that has none."""
        selection, begin, before = self.selections[speed], time.monotonic(), len(self.text.known)
        done = {row["method"] for row in self.rows.of("method", speed)}

        def note(method: str, best: Candidate) -> None:
            nonlocal begin, before
            if method not in done:
                spent, count = time.monotonic() - begin, len(self.text.known) - before
                other = self.other.measure([best.solved.variants])[0].kl
                self.rows.add(
                    "method",
                    speed,
                    method=method,
                    children=count,
                    seconds=spent,
                    sum_of_scores=best.solved.objective,
                    kl=best.kl,
                    kl_stderr=best.kl_stderr,
                    kl_other=other,
                    speedup=best.solved.speedup,
                )
            begin, before = time.monotonic(), len(self.text.known)

        if done >= set(METHODS if rounds else METHODS[:3]):
            return
        alone = Refiner(selection, self.text)
        alone.finalists(1, 1)
        mip = alone.found.best
        note("mip", mip)
        several = self.finalists(speed, finalists, distance)
        note("finalists", several.found.best)
        several.pairs(finalists, distance)
        note("pairs", several.found.best)
        if not rounds:
            return
        alone.rounds(rounds)
        note("rescored", alone.found.best)
        several.rounds(rounds)
        note("all", several.found.best)

    def near(self, speed: float, count: int) -> None:
        """`count` children near the optimum."""
        selection = self.selections[speed]
        refiner, chance = Refiner(selection, self.text), random.Random(0)
        refiner.finalists(1, 1)
        first = refiner.found.best.solved
        problem, found = selection.problem(first.predicted.batch), dict[str, list[dict[str, str]]]()
        for number in range(20 * count):
            if len(found) == count:
                break
            factor, sigma = dict[tuple[int, str, str], float](), SIGMAS[number % len(SIGMAS)]
            for n, space in enumerate(self.library.spaces):
                factor |= {
                    (n, slot, name): math.exp(sigma * chance.gauss(0, 1)) for slot in space for name in space[slot]
                }
            layers = tuple(
                replace(
                    layer,
                    variants=tuple(
                        replace(
                            v, score=v.score * math.prod(factor[n, s, c] for s, c in cells[v.name].variants.items())
                        )
                        for v in layer.variants
                    ),
                )
                for n, (layer, cells) in enumerate(zip(problem.layers, selection.cells, strict=True))
            )
            solved = solve(replace(problem, layers=layers))
            total = float(problem.totals(solved.choice)["score"])
            if total <= NEAR * first.objective:
                variants = [dict(cell.variants) for cell in selection.chosen(solved)]
                found.setdefault(str(variants), variants)
        self.children(speed, list(found.values()))

    def children(self, speed: float, found: Sequence[list[dict[str, str]]]) -> None:
        terms, measured = Terms(self.library, self.selections[speed].cells), self.text.measure(found)
        there = {row["method"] for row in self.rows.of("child", speed)}
        for one in (one for one in measured if _told(one.layers) not in there):
            total = sum(cell.score for cell in terms.chosen(one.layers) or ())
            self.rows.add(
                "child", speed, method=_told(one.layers), sum_of_scores=total, kl=one.kl, kl_stderr=one.kl_stderr
            )

    def rank(self, speed: float, refiner: Refiner, rounds: int) -> None:
        """How sums, interactions and new scores order the children of one speed; interactions from what is no such child of any speed."""
        apart = {row["method"] for s in self.selections for row in self.rows.of("child", s)}
        mine = {row["method"] for row in self.rows.of("child", speed)}
        everything = self.text.measurements()
        known = [(one.layers, one.kl) for one in everything if _told(one.layers) not in apart]
        near = [one for one in everything if _told(one.layers) in mine]
        selection = self.selections[speed]
        terms, candidates = Terms(self.library, selection.cells), refiner.found.candidates
        fit = fit_interactions(self.library, selection.cells, known, [changed(one.solved) for one in candidates])
        if isinstance(fit, str):
            raise UserError(f"no interactions are fitted: {fit}")
        sums = [sum(cell.score for cell in terms.chosen(one.layers) or ()) for one in near]
        paired = [predicted(fit.interactions, terms, one.layers) for one in near]
        kls = [one.kl for one in near]
        rescored: dict[str, float] = {}
        if rounds:  # the MIP's child is the first candidate, and what is around it has been measured
            own, marginal = candidates[0].solved.variants, refiner.marginal(candidates[0].solved.variants)
            again = [
                candidates[0].kl
                + sum(
                    marginal[n][slot][name]
                    for n, layer in enumerate(own)
                    for slot, before in layer.items()
                    if (name := one.layers.get(n, {}).get(slot, PARENT)) != before
                )
                for one in near
            ]
            rescored = {
                "rescored": median(k / p for k, p in zip(kls, again, strict=True)),
                "spearman_rescored": _number(spearman(again, kls)),
            }
        self.rows.add(
            "rank",
            speed,
            children=len(near),
            ratio=median(k / s for k, s in zip(kls, sums, strict=True)),
            predicted=median(k / p for k, p in zip(kls, paired, strict=True)),
            spearman=_number(spearman(sums, kls)),
            spearman_pairs=_number(spearman(paired, kls)),
            **rescored,
        )


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _told(layers: Layers) -> str:
    return ";".join(f"{n}:" + "+".join(f"{slot}/{name}" for slot, name in one.items()) for n, one in layers.items())


@click.command()
@click.argument("root", type=click.Path(path_type=Path), metavar="LIBRARY")
@click.option("--gpu", required=True)
@click.option("--shapes", help="Which of several cost tables.")
@click.option("--data", required=True, multiple=True)
@click.option("--parent", help="Where it is now.")
@click.option("--speeds", default="1.25,1.5,2", show_default=True)
@click.option("--input-len", type=int, default=512, show_default=True)
@click.option("--output-len", type=int, default=256, show_default=True)
@click.option("--concurrency", type=int, help="Requests at once. Default: any.")
@click.option("--sequences", type=int, default=64, show_default=True)
@click.option("--children", type=int, default=52, show_default=True, help="Near the optimum, at each speed.")
@click.option("--finalists", type=int, default=16, show_default=True)
@click.option("--min-distance", type=int, default=2, show_default=True)
@click.option("--rounds", type=int, default=3, show_default=True, help="0: no new scores.")
@click.option("--minutes", type=float, default=8.5, show_default=True, help="No stage is begun later than this.")
@click.option("--device", default="auto", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(root: Path, gpu: str, shapes: str | None, data: tuple[str, ...], parent: str | None, speeds: str, input_len: int, output_len: int, concurrency: int | None, sequences: int, children: int, finalists: int, min_distance: int, rounds: int, minutes: float, device: str, out: Path) -> None:  # fmt: skip
    begin, library, work = time.monotonic(), Library.open(root), Workload(input_len=input_len, output_len=output_len)
    asked = SolveOptions()
    costs = asked.costs(library, gpu, shapes)
    assert not isinstance(costs, Precisions)
    selections = {}
    for speed in map(float, speeds.split(",")):
        goal = GoalOptions(throughput=f"{speed:g}x", concurrency=concurrency).goal()  # type: ignore[call-arg]
        selections[speed] = select(library, costs, asked.request(library, gpu, work, goal))
    text = Children(library, data, ScoreOptions(sequences=sequences, device=device), parent)
    other = Children(library, data, ScoreOptions(sequences=2 * sequences, device=device), parent)
    other.tokens = replace(other.tokens, validation=other.tokens.validation[sequences:])
    if not len(other.tokens.validation):
        raise click.ClickException(
            f"--data holds out no more than {sequences} sequences: none is left that no choice has seen"
        )
    shared = {"library": library.name, "device": name_of(text.device), "date": datetime.date.today().isoformat()}
    bench = Bench(library, selections, text, other, Rows(out, shared))

    def late() -> bool:
        if time.monotonic() - begin > 60 * minutes:
            print("out of time: run the same command again, it goes on from here")
            return True
        return False

    for speed in selections:
        if late():
            return
        bench.methods(speed, finalists, min_distance, rounds)
    for speed in selections:
        if late():
            return
        if not bench.rows.of("rank", speed):
            bench.near(speed, children)
    for speed in selections:
        if not bench.rows.of("rank", speed):
            bench.rank(speed, bench.finalists(speed, finalists, min_distance), rounds)
    print("done")


if __name__ == "__main__":
    main()
