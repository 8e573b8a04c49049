"""Everything of a recipe that can be wrong is said before anything is built: hours later it would cost them."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from puzzle.base.device import check_gpu
from puzzle.base.errors import UserError
from puzzle.base.files import check_room, check_writable
from puzzle.base.ranks import running_ranks
from puzzle.base.units import bytes_text, parse_layers
from puzzle.base.workload import Workload
from puzzle.blocklib.gqa import Gqa
from puzzle.choose.goal import BY_OPTION, Goal, check_steps
from puzzle.data.mixture import Stage
from puzzle.data.packing import load_tokens
from puzzle.export.child import Child, no_tensors
from puzzle.export.engines import ANY_DECILM_READER, STOCK, ExportOptions, engine_named, reads_fp8
from puzzle.export.refuse import refuse
from puzzle.export.sources import child_of_checkpoint
from puzzle.fuse.matrix import read_dependency
from puzzle.heal.prepare import open_models
from puzzle.heal.run import read_data
from puzzle.heal.settings import HealOptions
from puzzle.library.build import Builder, BuildOptions
from puzzle.measure.continuations import encode
from puzzle.parents.opened import HfModel, open_model
from puzzle.parents.structure import Structure
from puzzle.profile.all_reduce import find_all_reduces
from puzzle.profile.cost_table import PACKAGED, find_costs
from puzzle.profile.grid import Grid
from puzzle.profile.profile import check_precision
from puzzle.run.recipe import Recipe, naming


def check_road(recipe: Recipe, build: BuildOptions, heal: HealOptions | None, out: Path) -> Builder:
    """Raises UserError, with the recipe's key, for the first thing that some stage would refuse. Reads the parent's
    configuration and the first texts; writes nothing. Returns the build, planned.

    heal: with the parent as the child that there is not yet.
    """
    check_run_directory(out)
    with naming("goal", "workload"):
        goal = recipe.goal.goal(may_be_empty=bool(recipe.solve.also))
    with naming("solve"):
        recipe.solve.check()
    if recipe.solve.precisions and (recipe.profile.precision is not None or recipe.fuse is not None):
        told = "fuse" if recipe.profile.precision is None else "profile.precision"
        raise UserError(f"{told} is not used with solve.precision: leave it out")
    with naming("profile"):
        if is_measured(recipe):
            for precision in profiled(recipe):
                check_precision(recipe.profile.gpu, precision)
            if recipe.profile.gpu != "cpu":
                check_gpu(recipe.profile.gpu)
    if recipe.fuse is not None:
        with naming("fuse"):
            recipe.fuse.check()
            if recipe.fuse.runs == "solved" and not recipe.solve.fusion:
                raise UserError("`runs` solved: nothing is solved for fusion; set `fusion` true, or leave it out")
    if heal is not None:
        with naming("heal"):
            heal.check()
    opened = open_model(recipe.parent)
    with naming("build"):
        builder = Builder(opened, build)
        builder.plan()
    with naming("goal", "workload", "solve", "profile"):
        check_goal(recipe, goal, opened.structure)
    if is_measured(recipe):
        with naming("profile"):
            check_grid(recipe)
    _check_exports(recipe.export, builder, "fp8" in recipe.solve.precisions)
    _check_data(recipe, heal, opened)
    return builder


def check_steps_cut(recipe: Recipe) -> None:
    """Raise UserError for steps that do not lead to the goal, or for what does not go with them."""
    if not recipe.steps:
        return
    if recipe.heal is None:
        raise UserError(
            "steps: the last child has no heal: add that section, with the tokens that it is to be healed on"
        )
    for name in ("fusion", "precision"):
        if getattr(recipe.solve, name):
            raise UserError(
                f"solve.{name} does not go with steps, whose children are neither fused nor quantised: leave one of them out"
            )
    roads = list(recipe.roads.values())
    for number, (one, after) in enumerate(pairwise(roads), 1):
        mine, later = (road.goal.read().limits for road in (one, after))
        for name in mine.keys() & later.keys():
            here, there = mine[name], later[name]
            cut = (there.value - here.value) * (1 if BY_OPTION[name].larger else -1)
            if here.relative == there.relative and cut < 0:
                raise UserError(
                    f"steps.{number}.goal.{name} {here} asks for more than what comes after it, {there}: steps cut gradually"
                )


def check_run_directory(out: Path) -> None:
    """Raise UserError for a directory that holds something and no run: stages replace what they find."""
    check_writable(out)
    if out.is_dir() and any(out.iterdir()) and not (out / "stages.json").is_file():
        raise UserError(f"`out` {out} is not empty and holds no run (no stages.json): choose another directory")


def is_measured(recipe: Recipe) -> bool:
    """Whether costs are measured here; those of a serving engine come from its fitted model."""
    return recipe.solve.engine == "puzzle"


def profiled(recipe: Recipe) -> tuple[str | None, ...]:
    """The precisions that are measured; None is the device's usual one."""
    return recipe.solve.precisions or (recipe.profile.precision,)


def workloads(recipe: Recipe) -> list[Workload]:
    """That of the recipe first, then further ones."""
    return [recipe.workload, *(also.work for also in recipe.solve.others())]


def grid_of(recipe: Recipe) -> Grid:
    """What is profiled: the workloads' own lengths, where the recipe names none."""
    options, works = recipe.profile, workloads(recipe)
    ends = {at for w in works for at in (w.input_len, w.input_len + max(0, w.output_len - 2))}
    prefill = options.prefill or tuple(sorted({w.input_len for w in works}))
    return replace(options, prefill=prefill, contexts=options.contexts or tuple(sorted(ends))).grid()


def check_goal(recipe: Recipe, goal: Goal, structure: Structure) -> None:
    """Raise UserError for a goal or prices that this parent cannot have."""
    asked = recipe.solve
    if asked.tp > 1:
        if recipe.profile.gpu == "cpu":
            raise UserError(f"`tp` {asked.tp}: shares are priced on GPUs, and `gpu` is cpu: leave `tp` out")
        structure.share(asked.tp)
        find_all_reduces(recipe.profile.gpu, asked.tp, [PACKAGED])
    if asked.min_distance > 1 and asked.finalists is None:
        raise UserError(f"`min_distance` {asked.min_distance} is not used without `finalists`: leave it out")
    if asked.min_distance > structure.num_layers:
        raise UserError(f"`min_distance` {asked.min_distance}: the parent has {structure.num_layers} layers")
    check_steps(goal, recipe.workload)
    for work in workloads(recipe):
        work.check_fits(structure.max_length)
    for option, text in (("pinned", goal.pinned), ("alike", goal.alike)):
        if text is not None:
            parse_layers(option, text, structure.num_layers)
    if goal.stages is not None and not 1 <= goal.stages <= structure.num_layers:
        raise UserError(f"`stages` {goal.stages}: the parent has {structure.num_layers} layers")
    attending = sum(any(isinstance(block, Gqa) for block in layer.values()) for layer in structure.layers)
    if goal.keep_attention is not None and goal.keep_attention > attending:
        raise UserError(f"`keep_attention` {goal.keep_attention}: the parent has {attending} layers with attention")
    own = Path(recipe.parent).name
    if asked.shapes not in (None, own, f"{own}-fp8") and is_measured(recipe):
        try:
            find_costs(recipe.profile.gpu, asked.shapes, [PACKAGED])
        except UserError as error:
            raise UserError(
                f"`shapes` {asked.shapes}: the costs that are measured here are called {own}: leave it out"
            ) from error
    if recipe.fuse is not None:
        with naming("fuse"):
            recipe.fuse.check_for(structure)
    if asked.fusion_dependency is not None:
        read_dependency(asked.fusion_dependency, structure.num_layers)


def check_grid(recipe: Recipe) -> None:
    """The batches and, on a CPU, where nothing is extrapolated, the lengths that will be asked for are measured."""
    grid, options = grid_of(recipe), recipe.profile
    for told, batch in [
        ("goal.concurrency", recipe.goal.concurrency),
        *((f"solve.also {also.name}", also.batch) for also in recipe.solve.others()),
    ]:
        if batch is not None and not min(grid.batches) <= batch <= max(grid.batches):
            raise UserError(
                f"{told}: a batch of {batch} lies outside `batches`, which cover {min(grid.batches)} to "
                f"{max(grid.batches)}: add it there"
            )
    if options.gpu != "cpu":
        return
    for work in workloads(recipe):
        last = work.input_len + max(0, work.output_len - 2)
        for name, least, most in (("prefill", work.input_len, work.input_len), ("contexts", work.input_len, last)):
            given = getattr(options, name)
            if given is not None and not min(given) <= least <= most <= max(given):
                told = ",".join(map(str, given))
                raise UserError(
                    f"`{name}` {told} do not span this workload's {least} to {most}: add them, or leave it out"
                )


def _check_exports(exports: tuple[ExportOptions, ...], builder: Builder, fp8: bool) -> None:
    """What no child of this library could be exported as, and what one of its choices could not. fp8: solve may choose it."""
    whole = child_of_checkpoint(builder.parent)
    for one in exports:
        format, engine = one.picked
        if fp8 and one.dtype is None and (format in STOCK or not reads_fp8(format, engine)):
            raise UserError(
                f"export {one.name}: solve.precision may choose fp8, which {engine or format} does not read: give it a dtype"
            )
        if format == "gguf" and importlib.util.find_spec("gguf") is None:
            raise UserError(f"export {one.name} needs the package gguf: pip install gguf")
        if format == "hf":
            continue
        target = ANY_DECILM_READER if engine is None else engine_named(engine)
        _refused(whole, one, "the parent itself", target, format)
        tried = set()
        for index, slots in builder.spaces.items():
            for slot, space in slots.items():
                for name, sub_block in space.items():
                    if (slot, sub_block) not in tried:
                        tried.add((slot, sub_block))
                        layers = list(whole.layers)
                        layers[index] = layers[index].put(slot, sub_block, no_tensors)
                        told = f"'{name}', which build.{slot} offers"
                        _refused(replace(whole, layers=tuple(layers)), one, told, target, format)


def _refused(child: Child, one: ExportOptions, told: str, target, format: str) -> None:
    try:
        refuse(child, target, format)
    except UserError as error:
        raise UserError(f"export {one.name} cannot take {told}: {error}") from error


def _check_data(recipe: Recipe, heal: HealOptions | None, opened: HfModel) -> None:
    """That there is text, of every source, and enough of it for a sequence of the longest kind."""
    context = opened.structure.max_length
    if (recipe.score.seq_len or 0) > context:
        raise UserError(
            f"score.seq_len {recipe.score.seq_len} is longer than the parent's context of {context}: use at most {context}"
        )
    longest = max(recipe.build.seq_len, recipe.score.seq_len or 0, recipe.evaluate.seq_len)
    load_tokens(
        recipe.data,
        opened.directory,
        seq_len=min(longest, context),
        num_train=1,
        num_validation=1,
        text_field=recipe.text_field,
    )
    if recipe.evaluate.prompts:
        with naming("evaluate"):
            encode(recipe.evaluate.prompts, opened.directory, opened.structure)
    if heal is not None:
        with naming("heal"):
            check_heal(heal)


def check_heal(heal: HealOptions) -> None:
    """Raises UserError for what a healing would refuse: its options, models, and text for one step of each stage."""
    heal.check()
    with running_ranks(heal.device) as ranks:
        stages = heal.plan_stages()
        models = open_models(heal, stages, ranks)
        one_step = [Stage(seq_len=s.seq_len, batch_size=s.batch_size, num_steps=1) for s in stages]
        read_data(replace(heal, validation_sequences=1, allow_repeats=True), one_step, models)


def check_disk(out: Path, needed: dict[str, int]) -> None:
    """Raise UserError where the stages' files do not fit. needed: bytes of each stage, less what is there already."""
    stages = ", ".join(f"{name} {bytes_text(count)}" for name, count in needed.items() if count)
    check_room(out, sum(needed.values()), f"{out} needs", f"{stages}; ")
