"""The whole road as one resumable call: `puzzle run RECIPE.yaml --out RUN`.

RUN/library, RUN/solution/architecture.json, RUN/child and, where the recipe asks for them, RUN/fused, RUN/healed,
RUN/after/NAME and RUN/exports/NAME; RUN/recipe.json, what was asked for, RUN/stages.json, what is done, and last RUN/result.json. Everything is checked before
anything is built. A recipe with steps has RUN/step-N/ before, as far as a healed child, which the next library is built of
(`build-library --origin`).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from puzzle.base.console import console, say
from puzzle.base.errors import UserError
from puzzle.base.files import file_hash, read_json, write_json
from puzzle.base.lock import holding
from puzzle.base.machine import cpu_name
from puzzle.base.units import parse_bytes, seconds_text
from puzzle.choose.precision import Precisions
from puzzle.choose.problem import select
from puzzle.choose.refine import solve_measured
from puzzle.choose.solve import solve_library
from puzzle.export.write import export, open_source
from puzzle.fuse.verb import fuse_verb
from puzzle.heal.run import heal
from puzzle.heal.settings import HealOptions
from puzzle.library.build import Builder, BuildOptions, build_library
from puzzle.library.children import Children
from puzzle.library.manifest import Library, scores_path
from puzzle.library.score import score_library
from puzzle.measure.architecture import Architecture, read_architecture, write_architecture
from puzzle.measure.evaluate import Evaluation, evaluate
from puzzle.parents.opened import open_model
from puzzle.profile.parts import shared_name
from puzzle.profile.profile import profile, subject_of
from puzzle.run.check import check_disk, check_heal, check_road, check_steps_cut, grid_of, is_measured, profiled
from puzzle.run.key import key_of
from puzzle.run.plan import disk_of, joined, plan_road
from puzzle.run.recipe import Recipe, naming, stage_of
from puzzle.run.shapes import check_weights

Show = Callable[[Architecture], None]


class Run:
    """One run directory. Every stage skips what is complete, so running again continues where it was."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        show: Show = lambda solved: None,
        before: Run | None = None,
        *,
        run_commands: bool = False,
    ):
        """show: what is done with the solution as soon as it is known. before: whose healed child the library is built of, in place of the
        parent. run_commands: that those of the recipe may be run, which can be anything."""
        self.recipe, self.out, self.show, self.run_commands = recipe, out, show, run_commands
        self.steps: dict[str, Run] = {}  # by what is put before the names of their stages
        for name, one in recipe.roads.items():
            if name:
                before = self.steps[name] = Run(one, out / name.strip().replace(" ", "-"), show, before)
        self.before = before
        check_weights(recipe)
        if not recipe.data:
            raise UserError("no data: add 'data:' to the recipe or pass `data`")
        # Options of several stages.
        self.shared: dict[str, Any] = {"text_field": recipe.text_field, "device": recipe.device}
        self.library = out / "library"
        self.marks: dict[
            str, dict[str, Any]
        ] = {}  # of stages: the "key" of what they begin from; "seconds" once they are done, and "made", when that was
        self.gone: list[str] = []  # stages of this recipe; another one may have had more

    def check(self) -> dict[str, Builder]:
        """The build of every road, planned. Raises UserError for all that can be known to be wrong beforehand."""
        check_steps_cut(self.recipe)
        disk: dict[str, int] = {}
        found: dict[str, Builder] = {}
        for name, one in self.roads.items():
            made = one._made()
            if made is not None and ("origin" in made.facts) != (one.before is not None):
                raise UserError(
                    f"{one.library} was built by a recipe with{'out' * (one.before is not None)} steps before it: give this recipe another "
                    "`out`, and nothing of that one is lost"
                )
            with _told(name):  # no child is there yet: the parent stands for all of them
                build = replace(one.build_options(), origin=None)
                found[name] = builder = check_road(one.recipe, build, one.heal_options(one.recipe.parent), one.out)
            for stage, after in one.recipe.after.items():
                with stage_of(stage):
                    if after.heal is None:
                        names = list(one.recipe.after)
                        after.check_there(one.recipe.here, names[: names.index(stage)])
                    else:
                        check_heal(one._filled_in(after.heal, one.recipe.parent, one.out / "after" / stage))
            size, library = builder.stored_dtype.itemsize, builder.plan().disk_bytes
            disk |= {name + k: v for k, v in disk_of(one.recipe, builder.structure, size, library).items()}
        check_disk(self.out, disk)
        return found

    def plan(self) -> dict[str, Any]:
        """As `plan_road`, after the check."""
        builders = self.check()
        roads = self.roads.items()
        return joined({n: plan_road(one.recipe, builders[n], one.heal_options(one.recipe.parent)) for n, one in roads})

    @property
    def roads(self) -> dict[str, Run]:
        """The steps and this one, by what is put before the names of their stages."""
        return self.steps | {"": self}

    def build_options(self) -> BuildOptions:
        origin = None if self.before is None else self.recipe.parent
        return replace(self.recipe.build, data=self.recipe.data, out=self.library, origin=origin, **self.shared)

    def heal_options(self, child: str) -> HealOptions | None:
        return None if self.recipe.heal is None else self._filled_in(self.recipe.heal, child, self.out / "healed")

    def _filled_in(self, asked: HealOptions, child: str, out: Path) -> HealOptions:
        data = self.recipe.data if asked.blend is None else []
        teacher = asked.teacher or (self.recipe.parent if asked.needs_teacher else None)
        return replace(asked, child=child, teacher=teacher, data=data, out=out, **self.shared)

    def _stage(self, name: str, key: str, done: Path | None, work: Callable[[], Any], *sections: str) -> None:
        """Do `work`, unless its file or directory `done` is there and was made from the same `key`; None: it knows by itself.
        What was made from another one is removed first. sections: of the recipe, whose options it takes."""
        console.rule(f"[bold]{name}", align="left")
        self.gone.append(name)
        mark = self.marks.get(name, {})
        if done is not None:
            if mark.get("key") == key and "seconds" in mark and done.exists():
                say("done already")
                return
            if mark and mark["key"] != key:
                for old in (done, done.with_name(f"{done.name}.heal")):
                    shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        same, begin = mark.get("key") == key, time.monotonic()
        self._mark(name, {"key": key} | (mark if same else {}))
        with naming(*sections):
            work()
        spent = round(time.monotonic() - begin, 1)
        seconds = max(spent, mark.get("seconds", 0.0)) if same and done is None else spent
        self._mark(name, {"key": key, "seconds": seconds, "made": time.time_ns()})

    def _mark(self, name: str, mark: dict[str, Any]) -> None:
        self.marks[name] = mark
        write_json(self.out / "stages.json", {"stages": self.marks})

    def run(self) -> dict[str, Any]:
        """All stages; returns result.json's content."""
        begin = time.monotonic()
        if not self.run_commands and (told := [n for n, one in self.recipe.after.items() if one.command is not None]):
            raise UserError(
                f"after.{told[0]}.command runs a program that the recipe names: pass `run_commands` where you trust it ("
                f"{self.recipe.after[told[0]].command})"
            )
        self.check()
        self._begin()
        for name, step in self.steps.items():
            console.rule(f"[bold]{name.strip()}")
            step._begin()
            with _told(name):
                step.child()
        result = self._finish(*self.child())
        say(f"done in {seconds_text(time.monotonic() - begin)}: {self.out / 'result.json'}")
        return result

    def _begin(self) -> None:
        """What is in the directory from now on is ours."""
        path = self.out / "stages.json"
        self.marks = read_json(path, "puzzle run").get("stages", []) if path.is_file() else {}
        if not (isinstance(self.marks, dict) and all(isinstance(m, dict) and "key" in m for m in self.marks.values())):
            raise UserError(
                f"{path} does not say what is done, as `puzzle run` wrote it: restore it, or choose another `out`"
            )
        write_json(path, {"stages": self.marks})
        write_json(self.out / "recipe.json", json.loads(json.dumps(asdict(self.recipe), default=str, allow_nan=False)))

    def child(self) -> tuple[Architecture, Path, str]:
        """The stages up to the last child on disk; with the key of what it comes from."""
        recipe, library, out = self.recipe, self.library, self.out
        precisions = recipe.solve.precisions
        score = replace(recipe.scoring, **self.shared)
        build = self.build_options()
        parent = recipe.parent
        if self.before is not None:
            parent, made = str(self.before.out / "healed"), self._made()
            if made is not None and made.fingerprint != open_model(parent).checkpoint.fingerprint():
                shutil.rmtree(library)  # of another child: a step before has changed
        options = key_of(build, score)
        with holding(library):
            self._stage("build-library", options, None, lambda: build_library(parent, build), "build")
            self._stage("score", options, None, lambda: score_library(library, recipe.data, score), "score")
        if is_measured(recipe) and self.before is not None:  # of the same sub-blocks, and some more
            shutil.copytree(self.before.library / "costs", library / "costs", dirs_exist_ok=True)
        elif is_measured(recipe):
            tp = recipe.solve.tp
            opened = recipe.solve.shared(Library.open(library), recipe.profile.gpu)
            grid, gpu = grid_of(recipe), recipe.profile.gpu
            facts = [opened.facts[name] for name in ("layers", "structure", "parent")]
            for precision in profiled(recipe):
                key = key_of(grid, *facts, gpu, precision, cpu_name(), tp)
                costs = library / "costs" / gpu
                measure = partial(
                    profile, subject_of(opened).share(tp), gpu=gpu, out=costs, grid=grid, precision=precision
                )
                name = f"profile {precision}" if precisions else "profile"
                table = costs / f"{self._costs_name(opened, precision)}.csv"
                self._stage(name, key, table, measure, "profile", "workload")
        solved = self._solve()
        self.show(solved)
        child, key = out / "child", key_of(file_hash(out / "solution" / "architecture.json"))
        source = open_source(library, out / "solution")
        said = self._as_solved(solved)
        if solved.kv_dtype is not None and recipe.trains:  # nothing is rounded before it is healed
            said = {"dtype": source.child.dtype_name}
        self._stage("child", key, child, partial(export, source, child, force=True, **said))
        if recipe.fuse is not None:
            child, key = self._fuse(child, key)
        healing = self.heal_options(str(child))
        if healing is not None:
            key = key_of(key, healing)
            self._stage("heal", key, healing.out, lambda: heal(healing), "heal")
            child = healing.out
        child, key = self._after(child, key)
        if recipe.trains and solved.kv_dtype is not None:
            last, child = child, out / "quantised"
            again = partial(export, open_source(last), child, force=True, **self._as_solved(solved))
            self._stage("quantised", key, child, again)
        return solved, child, key

    def _after(self, child: Path, key: str) -> tuple[Path, str]:
        """The recipe's own stages, each of the child that the one before it left; what one was made from is all that was done before."""
        for name, one in self.recipe.after.items():
            out = self.out / "after" / name
            with stage_of(name):
                if one.heal is not None:
                    healing = self._filled_in(one.heal, str(child), out)
                    key = key_of(key, healing)
                    self._stage(f"after {name}", key, out, partial(heal, healing))
                    child = out
                    continue
                key = key_of(key, one)
                places = {
                    "child": child,
                    "out": out,
                    "parent": self.recipe.parent,
                    "here": self.recipe.here,
                    "run": self.out,
                }
                self._stage(f"after {name}", key, out, partial(one.run, {n: str(p) for n, p in places.items()}))
                if (
                    made := self.marks[f"after {name}"].get("made")
                ) is not None:  # done again, it may give something else
                    key = key_of(key, made)
                child = child if one.result is None else out / one.result
        return child, key

    def _made(self) -> Library | None:
        """The library of an earlier call."""
        return Library.open(self.library) if (self.library / "library.json").is_file() else None

    def _finish(self, solved: Architecture, child: Path, key: str) -> dict[str, Any]:
        """Exports, evaluation, result.json."""
        recipe, out = self.recipe, self.out
        exports = {one.name: child if one.is_the_child else out / "exports" / one.name for one in recipe.export}
        for one in recipe.export:
            if one.is_the_child:
                continue
            said = {n: getattr(one, n) for n in ("format", "engine", "dtype", "kv_dtype", "licence")}
            if one.dtype is None and one.kv_dtype is None:
                said |= self._as_solved(solved)
            if one.kv_dtype is not None:
                said |= {"data": recipe.data, "text_field": recipe.text_field, "device": recipe.device}
            size, target = parse_bytes(one.max_shard), exports[one.name]

            def write(
                source: Path = child, target: Path = target, size: int = size, said: dict[str, Any] = said
            ) -> None:
                export(open_source(source), target, max_shard_bytes=size, force=True, **said)

            self._stage(f"export {one.name}", key_of(key, said, size), target, write, "export")
        measured: list[Evaluation] = []
        self._stage("evaluate", key, None, lambda: measured.append(self._evaluate(child)), "evaluate", "workload")
        result = self._result(solved, measured[0], {name: str(path.relative_to(out)) for name, path in exports.items()})
        write_json(out / "result.json", result)
        return result

    def _costs_name(self, library: Library, precision: str | None) -> str:
        return shared_name(f"{library.name}-fp8" if precision == "fp8" else library.name, self.recipe.solve.tp)

    def _as_solved(self, solved: Architecture) -> dict[str, Any]:
        """What an export has to be told beside, where the cache is to be in fp8: the text that its scales come from."""
        if solved.kv_dtype != "fp8":
            return {}
        shared = {"text_field": self.recipe.text_field, "device": self.recipe.device}
        return {"kv_dtype": "fp8", "data": self.recipe.data, **shared}

    def _solve(self) -> Architecture:
        recipe = self.recipe
        library = recipe.solve.shared(Library.open(self.library), recipe.profile.gpu)
        gpu, asked, target = recipe.profile.gpu, recipe.solve, self.out / "solution" / "architecture.json"
        with naming("goal", "solve", "workload", "profile"):
            usual = None if asked.precisions else recipe.profile.precision
            name = asked.shapes or (self._costs_name(library, usual) if is_measured(recipe) else None)
            costs = asked.costs(library, gpu, name)
            goal = recipe.goal.goal(may_be_empty=bool(asked.also))
            request = asked.request(library, gpu, recipe.workload, goal)
        scores = [file_hash(scores_path(self.library, layer)) for layer in library.layers]
        facts = [
            file_hash(self.library / "library.json"),
            scores,
            costs.hash,
            str(goal),
            asked,
            str(recipe.workload),
        ]

        text = replace(recipe.score, **self.shared)
        if asked.measures:
            facts += [{"data": recipe.data}, text]

        def solve() -> None:
            if asked.measures:
                assert not isinstance(costs, Precisions)
                children = Children(library, recipe.data, text)
                solve_measured(select(library, costs, request), asked, children).write(target.parent)
            else:
                write_architecture(target, solve_library(library, costs, request))

        earlier = []
        for path in (target, self.out / "child" / "architecture.json"):
            with suppress(UserError):
                earlier.append(read_architecture(path))
        self._stage("solve", key_of(*facts, gpu), target, solve, "goal", "solve", "workload", "profile")
        solved = read_architecture(target)
        for one in earlier:  # the same but for the seconds that solving took: what was made of it stays
            if one != solved == replace(one, seconds=solved.seconds):
                write_architecture(target, one)
                return one
        return solved

    def _fuse(self, child: Path, key: str) -> tuple[Path, str]:
        assert self.recipe.fuse is not None
        fused, wanted = self.out / "fused", self.recipe.fuse
        wanted = replace(wanted, data=tuple(self.recipe.data), out=fused, force=True, **self.shared)
        key = key_of(key, wanted)
        self._stage("fuse", key, fused, lambda: fuse_verb(child, wanted), "fuse")
        return fused, key

    def _evaluate(self, child: Path) -> Evaluation:
        """On the device that was profiled; the speed of a serving engine, or of several GPUs, is not this process's to measure."""
        recipe = self.recipe
        device = recipe.device if not is_measured(recipe) else "cpu" if recipe.profile.gpu == "cpu" else "cuda"
        options = replace(recipe.evaluate, **self.shared | {"device": device})
        work = recipe.workload if is_measured(recipe) and recipe.solve.tp == 1 else None
        return evaluate(recipe.parent, str(child), recipe.data, options, work=work)

    def _result(self, solved: Architecture, measured: Evaluation, exports: dict[str, str]) -> dict[str, Any]:
        parent, child = measured.parent, measured.child
        slow, fast = parent.speed, child.speed
        result: dict[str, Any] = {
            "requested": {**solved.goal, **asdict(solved.workload)},
            "predicted": {
                "speedup": solved.speedup,
                "tokens_per_second": solved.predicted.tokens_per_second,
                "memory_bytes": solved.predicted.memory_bytes,
                "kv_bytes_per_token": solved.predicted.kv_bytes_per_token,
            },
            "measured": {
                "speedup": measured.speedup,
                "tokens_per_second": None if fast is None else fast.tokens_per_second,
                "memory_bytes": None if fast is None else fast.memory_bytes,
                "kv_bytes_per_token": child.kv_bytes_per_token,
            },
            "parent": {
                "loss": parent.loss,
                "predicted_tokens_per_second": solved.parent_predicted.tokens_per_second,
                "tokens_per_second": None if slow is None else slow.tokens_per_second,
                "memory_bytes": None if slow is None else slow.memory_bytes,
                "kv_bytes_per_token": parent.kv_bytes_per_token,
                "num_parameters": parent.num_parameters,
                "batch": solved.parent_predicted.batch if slow is None else slow.batch,
            },
            "child": {
                "loss": child.loss,
                "kl": child.kl,
                "kl_stderr": child.kl_stderr,
                "sum_of_scores": solved.objective,
                "top1_agreement": child.top1_agreement,
                "num_parameters": child.num_parameters,
                "batch": solved.predicted.batch if fast is None else fast.batch,
            },
            "exports": exports,
            "device": cpu_name() if measured.device == "cpu" else measured.device,
            "precision": measured.precision,
            "seconds": {n + name: run.marks[name]["seconds"] for n, run in self.roads.items() for name in run.gone},
        }
        if measured.continuations is not None:
            result["continuations"] = measured.continuations
        if self.recipe.heal is not None:
            result["healed"] = self._healed()
        if self.recipe.after:
            result["after"] = {name: str(Path("after", name)) for name in self.recipe.after}
        if self.steps:
            result["steps"] = [step._on_the_way() for step in self.steps.values()]
        return result

    def _healed(self) -> dict[str, Any]:
        record = read_json(self.out / "healed" / "heal.json", "puzzle run")
        return {name: record[name] for name in ("before", "after", "num_tokens", "seconds")}

    def _on_the_way(self) -> dict[str, Any]:
        """What result.json says of a step: goals and speed-ups are held against the parent, scores are of the step's own library."""
        solved = read_architecture(self.out / "solution" / "architecture.json")
        told = {"goal": solved.goal, "speedup": solved.speedup, "memory_bytes": solved.predicted.memory_bytes}
        return told | {"sum_of_scores": solved.objective, "healed": self._healed()}


@contextmanager
def _told(step: str) -> Iterator[None]:
    """Errors inside say which step it was."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{step.strip()}: {error}" if step else str(error)) from error
