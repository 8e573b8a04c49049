"""The whole road as one resumable call: `puzzle run RECIPE.yaml --out RUN`.

RUN/library, RUN/solution/architecture.json, RUN/child and, last, RUN/result.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from puzzle.base.console import console
from puzzle.base.errors import UserError
from puzzle.base.files import check_writable, content_hash, read_json, write_json
from puzzle.base.machine import cpu_name
from puzzle.base.units import seconds_text
from puzzle.base.workload import Workload
from puzzle.choose.goal import goal_of
from puzzle.choose.solve import open_costs, solve_library
from puzzle.export.write import export_child
from puzzle.library.build import BuildOptions, build_library
from puzzle.library.manifest import Library
from puzzle.library.score import score_library
from puzzle.measure.evaluate import evaluate
from puzzle.profile.cpu import Grid, profile_library
from puzzle.run.recipe import Recipe

Show = Callable[[dict[str, Any], Library], None]


class Run:
    """One run directory. Every stage skips what is complete, so running again continues where it was."""

    def __init__(self, recipe: Recipe, out: Path, show: Show = lambda solved, library: None):
        """show: what is done with the solution as soon as it is known."""
        self.recipe, self.out, self.show = recipe, out, show
        self.goal = goal_of(recipe.goal.throughput, recipe.goal.latency, recipe.goal.memory, recipe.goal.params)
        self.work = Workload(input_len=recipe.workload.input_len, output_len=recipe.workload.output_len)
        self.seconds: dict[str, float] = {}
        if not recipe.data:
            raise UserError("no data: add 'data:' to the recipe or pass --data")
        check_writable(out)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        console.rule(f"[bold]{name}", align="left")
        begin = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - begin, 1)

    def run(self) -> dict[str, Any]:
        """All stages; returns result.json's content."""
        recipe, library = self.recipe, self.out / "library"
        with self._stage("build-library"):
            build_library(recipe.parent, self.build_options())
        with self._stage("score"):
            score_library(
                library,
                recipe.data,
                num_sequences=recipe.score.sequences,
                joint=recipe.score.joint,
                text_field=recipe.text_field,
                device=recipe.device,
            )
        with self._stage("profile"):
            self._profile(library)
        with self._stage("solve"):
            opened = Library.open(library)
            solved = solve_library(opened, open_costs(opened, recipe.profile.gpu, None), self.work, self.goal)
            write_json(self.out / "solution" / "architecture.json", solved)
            self.show(solved, opened)
        with self._stage("export"):
            export_child(library, self.out / "solution", self.out / "child", force=True)
        with self._stage("evaluate"):
            measured = evaluate(
                Library.open(library).parent_source(),
                str(self.out / "child"),
                recipe.data,
                num_sequences=recipe.evaluate.sequences,
                seq_len=recipe.build.seq_len,
                work=self.work,
                text_field=recipe.text_field,
                device="cpu" if recipe.profile.gpu == "cpu" else recipe.device,
                repeats=recipe.evaluate.repeats,
            )
        result = self._result(solved, measured)
        write_json(self.out / "result.json", result)
        return result

    def build_options(self) -> BuildOptions:
        section = asdict(self.recipe.build)
        section["tokens"] = int(section["tokens"])
        return BuildOptions(
            data=self.recipe.data,
            out=self.out / "library",
            text_field=self.recipe.text_field,
            device=self.recipe.device,
            **section,
        )

    def _profile(self, library: Path) -> None:
        """Profile the workload's own lengths, unless this machine has done so for this very library."""
        section, work = self.recipe.profile, self.work
        grid = Grid(
            batches=tuple(section.batches),
            prefill=(work.input_len,),
            decode=tuple(sorted({work.input_len, work.input_len + max(0, work.output_len - 2)})),
        )
        opened = Library.open(library)
        key = content_hash([asdict(grid), opened.facts["variants"], opened.facts["parent"], section.gpu, cpu_name()])
        mark = library / "costs" / section.gpu / "profile.json"
        if mark.is_file() and read_json(mark, "puzzle profile").get("key") == key:
            console.print("already profiled on this machine")
            return
        profile_library(library, gpu=section.gpu, grid=grid)
        write_json(mark, {"key": key})

    def _result(self, solved: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
        names = ("tokens_per_second", "memory_bytes", "kv_bytes_per_token")
        parent, child = measured["parent"], measured["child"]
        return {
            "requested": {**solved["goal"], **solved["workload"]},
            "predicted": {"speedup": solved["predicted"]["speedup"], **{n: solved["predicted"][n] for n in names}},
            "measured": {"speedup": measured["speedup"], **{n: child[n] for n in names}},
            "parent": {
                "loss": parent["loss"],
                "predicted_tokens_per_second": solved["parent_predicted"]["tokens_per_second"],
                **{n: parent[n] for n in (*names, "num_parameters", "batch")},
            },
            "child": {
                "loss": child["loss"],
                "kl": child["kl"],
                "kl_stderr": child["kl_stderr"],
                "sum_of_scores": solved["objective"],
                "top1_agreement": child["top1_agreement"],
                **{n: child[n] for n in ("num_parameters", "batch")},
            },
            "device": cpu_name() if measured["device"] == "cpu" else measured["device"],
            "seconds": self.seconds,
        }


def run_recipe(recipe: Recipe, out: Path, show: Show) -> dict[str, Any]:
    begin = time.monotonic()
    result = Run(recipe, out, show).run()
    console.print(f"done in {seconds_text(time.monotonic() - begin)}: {out / 'result.json'}")
    return result
