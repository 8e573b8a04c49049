"""The whole road as one resumable call: `puzzle run RECIPE.yaml --out RUN`.

RUN/library, RUN/solution/architecture.json, RUN/child and, last, RUN/result.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from puzzle.base.console import console
from puzzle.base.errors import UserError
from puzzle.base.files import check_writable, content_hash, read_json, write_json
from puzzle.base.lock import holding
from puzzle.base.machine import cpu_name
from puzzle.base.units import seconds_text
from puzzle.choose.problem import Request
from puzzle.choose.solve import open_costs, solve_library
from puzzle.export.write import export, open_source
from puzzle.library.build import BuildOptions, build_library
from puzzle.library.manifest import Library
from puzzle.library.score import score_library
from puzzle.measure.architecture import Architecture, write_architecture
from puzzle.measure.evaluate import Evaluation, evaluate
from puzzle.profile.profile import profile, subject_of
from puzzle.run.recipe import Recipe, naming

Show = Callable[[Architecture], None]


class Run:
    """One run directory. Every stage skips what is complete, so running again continues where it was."""

    def __init__(self, recipe: Recipe, out: Path, show: Show = lambda solved: None):
        """show: what is done with the solution as soon as it is known."""
        self.recipe, self.out, self.show = recipe, out, show
        with naming("goal"):
            self.goal = recipe.goal.goal()
        self.work = recipe.workload
        self.shared: dict[str, Any] = {
            "text_field": recipe.text_field,
            "device": recipe.device,
        }  # options of several stages
        self.seconds: dict[str, float] = {}
        if not recipe.data:
            raise UserError("no data: add 'data:' to the recipe or pass `data`")
        check_writable(out)

    @contextmanager
    def _stage(self, name: str, *sections: str) -> Iterator[None]:
        """sections: of the recipe, whose options it takes."""
        console.rule(f"[bold]{name}", align="left")
        begin = time.monotonic()
        with naming(*sections):
            yield
        self.seconds[name] = round(time.monotonic() - begin, 1)

    def run(self) -> dict[str, Any]:
        """All stages; returns result.json's content."""
        recipe, library, begin = self.recipe, self.out / "library", time.monotonic()
        with holding(library):
            with self._stage("build-library", "build"):
                build_library(recipe.parent, self.build_options())
            with self._stage("score", "score"):
                score_library(library, recipe.data, replace(recipe.score, **self.shared))
        with self._stage("profile", "profile", "workload"):
            self._profile(library)
        with self._stage("solve", "goal", "workload", "profile"):
            opened = Library.open(library)
            costs = open_costs(opened, recipe.profile.gpu, None)
            solved = solve_library(opened, costs, Request(work=self.work, goal=self.goal))
            write_architecture(self.out / "solution" / "architecture.json", solved)
            self.show(solved)
        with self._stage("export"):
            export(open_source(library, self.out / "solution"), self.out / "child", force=True)
        with self._stage("evaluate", "evaluate", "workload"):
            device = "cpu" if recipe.profile.gpu == "cpu" else recipe.device  # the one that was profiled
            parent = Library.open(library).parent_source()
            options = replace(recipe.evaluate, **self.shared | {"device": device})
            measured = evaluate(parent, str(self.out / "child"), recipe.data, options, work=self.work)
        result = self._result(solved, measured)
        write_json(self.out / "result.json", result)
        console.print(f"done in {seconds_text(time.monotonic() - begin)}: {self.out / 'result.json'}")
        return result

    def build_options(self) -> BuildOptions:
        return replace(self.recipe.build, data=self.recipe.data, out=self.out / "library", **self.shared)

    def _profile(self, library: Path) -> None:
        """Profile the workload's own lengths, unless this machine has done so for this very library."""
        options, work = self.recipe.profile, self.work
        steps = tuple(sorted({work.input_len, work.input_len + max(0, work.output_len - 2)}))
        grid = replace(options, prefill=options.prefill or (work.input_len,), contexts=options.contexts or steps).grid()
        opened = Library.open(library)
        facts = opened.facts
        key = content_hash(
            [asdict(grid), facts["layers"], facts["structure"], facts["parent"], options.gpu, cpu_name()]
        )
        mark = library / "costs" / options.gpu / "profile.json"
        if mark.is_file() and read_json(mark, "puzzle profile").get("key") == key:
            console.print("already profiled on this machine")
            return
        profile(subject_of(opened), gpu=options.gpu, out=library / "costs" / options.gpu, grid=grid)
        write_json(mark, {"key": key})

    def _result(self, solved: Architecture, measured: Evaluation) -> dict[str, Any]:
        parent, child = measured.parent, measured.child
        slow, fast = parent.speed, child.speed
        assert slow is not None, "speed was asked for"
        assert fast is not None
        return {
            "requested": {**solved.goal, **asdict(solved.workload)},
            "predicted": {
                "speedup": solved.speedup,
                "tokens_per_second": solved.predicted.tokens_per_second,
                "memory_bytes": solved.predicted.memory_bytes,
                "kv_bytes_per_token": solved.predicted.kv_bytes_per_token,
            },
            "measured": {
                "speedup": measured.speedup,
                "tokens_per_second": fast.tokens_per_second,
                "memory_bytes": fast.memory_bytes,
                "kv_bytes_per_token": child.kv_bytes_per_token,
            },
            "parent": {
                "loss": parent.loss,
                "predicted_tokens_per_second": solved.parent_predicted.tokens_per_second,
                "tokens_per_second": slow.tokens_per_second,
                "memory_bytes": slow.memory_bytes,
                "kv_bytes_per_token": parent.kv_bytes_per_token,
                "num_parameters": parent.num_parameters,
                "batch": slow.batch,
            },
            "child": {
                "loss": child.loss,
                "kl": child.kl,
                "kl_stderr": child.kl_stderr,
                "sum_of_scores": solved.objective,
                "top1_agreement": child.top1_agreement,
                "num_parameters": child.num_parameters,
                "batch": fast.batch,
            },
            "device": cpu_name() if measured.device == "cpu" else measured.device,
            "seconds": self.seconds,
        }
