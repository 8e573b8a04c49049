"""What the stages of a road will take: time, memory and disk of each, for --dry-run. All of it is predicted.

Time is that of a few timed steps of the build (`library.estimate`), and of the others by their FLOPs at that rate; the healing's
is timed on the parent, since there is no child yet. Sizes of a child are those of its parent, than which none is larger.
Where the parent is the name of known shapes, nothing can be timed: all is computed (`run.shapes`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from puzzle.fuse.stage import dependency_plan
from puzzle.heal.checkpoint import CHECKPOINT_BYTES, KEPT_CHECKPOINTS
from puzzle.heal.memory import MASTER_BYTES
from puzzle.heal.plan import plan_heal
from puzzle.heal.settings import HealOptions
from puzzle.heal.stored_teacher import bytes_per_token
from puzzle.library.build import Builder
from puzzle.library.estimate import plan_of
from puzzle.library.plan import Spaces, forward_flops, scoring, screening, trained
from puzzle.library.score import wanted
from puzzle.library.screen import AT_ONCE, SEQUENCES
from puzzle.measure.evaluate import evaluation_plan
from puzzle.parents.structure import Structure
from puzzle.profile.profile import SECONDS_PER_POINT, Subject, count_points
from puzzle.run.after import After
from puzzle.run.check import grid_of, is_measured, profiled
from puzzle.run.recipe import Recipe, naming
from puzzle.runtime.residency import Memory, Residency, plan_residency

# Of a parameter in a layer, and outside.
EXPORT_BYTES = {"float32": (4, 4), "bfloat16": (2, 2), "float16": (2, 2), "fp8": (1, 2)}
# Of a stage: "tokens", "seconds", "memory_bytes", "disk_bytes"; None: next to nothing. "passes": times that a model is read, layer by layer,
# None: it is whole on the device. "told": whether its seconds are the recipe's word; "sampled": tokens that it draws.
Row = dict[str, Any]


def tokens_of(heal: HealOptions) -> int:
    return sum(stage.num_tokens for stage in heal.plan_stages())


def disk_of(recipe: Recipe, structure: Structure, size: int, library: int) -> dict[str, int]:
    """Bytes that each stage leaves or holds for a while. size: bytes of a stored weight; library: of the built one."""
    checkpoint = structure.num_parameters * size
    found = {"build-library": library, "child": checkpoint}
    if recipe.fuse is not None:
        found["fuse"] = checkpoint
    after = {f"after {name}": one for name, one in recipe.after.items()}
    for name, heal in {"heal": recipe.heal, **{name: one.heal for name, one in after.items()}}.items():
        if heal is not None:
            found[name] = checkpoint + KEPT_CHECKPOINTS * CHECKPOINT_BYTES * structure.num_parameters
            if heal.teacher_logits is not None:
                found[name] += tokens_of(heal) * bytes_per_token(heal.top_k, structure.vocab_size)
        elif name in after and after[name].result is not None:
            found[name] = checkpoint
    if recipe.trains and recipe.solve.precisions:
        found["quantised"] = checkpoint
    for one in recipe.export:
        if not one.is_the_child:
            fixed, each = structure.num_fixed_parameters, EXPORT_BYTES.get(one.dtype or "", (size, size))
            found[f"export {one.name}"] = (structure.num_parameters - fixed) * each[0] + fixed * each[1]
    return found


def plan_road(recipe: Recipe, builder: Builder, heal: HealOptions | None) -> dict[str, Any]:
    """{"build": the plan of the build, "stages": {name: Row}}"""
    build = plan_of(builder)
    predicted = build["predicted"]
    own = {"seconds": predicted["seconds"], "memory_bytes": predicted["peak_memory_bytes"]}
    rate = predicted["flops"] / predicted["seconds"] if predicted["seconds"] else None
    disk = disk_of(recipe, builder.structure, builder.stored_dtype.itemsize, predicted["disk_bytes"])
    healing = None
    if heal is not None:
        taken = plan_heal(heal)["predicted"]
        healing = _row(taken["seconds"], taken["peak_memory_bytes"])
    memory = partial(Memory.of, builder.device)
    road = Road(recipe, builder.structure, builder.spaces, builder.dtype.itemsize, rate, memory)
    return {"build": build, "stages": road.stages(own, healing, disk)}


def joined(plans: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The last plan with the stages of all roads, by the prefix of their names: costs are measured on the first, and evaluated is the
    last child."""
    first, last = next(iter(plans)), list(plans)[-1]
    once = {"profile": first, "evaluate": last}
    every = ((p, name, row) for p, plan in plans.items() for name, row in plan["stages"].items())
    return {**plans[last], "stages": {p + name: row for p, name, row in every if once.get(name, p) == p}}


@dataclass(frozen=True, slots=True)
class Road:
    """What the stages of a recipe do. itemsize: bytes of a weight that computes; rate: FLOPs per second, None: none known; memory: what
    is there for models that pass over text, within a stage's limit."""

    recipe: Recipe
    structure: Structure
    spaces: Spaces
    itemsize: int
    rate: float | None
    memory: Callable[[int | None], Memory]

    def stages(self, build: Row, heal: Row | None, disk: dict[str, int]) -> dict[str, Row]:
        """Every stage in its order. build, heal: their seconds and memory; disk: as `disk_of`."""
        recipe = self.recipe
        asked = recipe.build.recipe()
        trained_on = asked.num_steps * asked.batch_size * asked.seq_len
        stages = {"build-library": build | {"disk_bytes": disk["build-library"], "tokens": trained_on}}
        with naming("score"):
            stages["score"] = self.score()
        if is_measured(recipe):
            stages["profile"] = self.profile()
        stages |= {"solve": self.solve(stages["score"]), "child": _row(None, None, disk["child"])}
        if recipe.fuse is not None:
            with naming("fuse"):
                stages["fuse"] = self.fuse(disk["fuse"])
        if heal is not None:
            assert recipe.heal is not None
            stages["heal"] = heal | {"disk_bytes": disk["heal"], "tokens": tokens_of(recipe.heal)}
        for name, one in recipe.after.items():
            row = self.command(one) if one.heal is None else self.healing(one.heal)
            stages[f"after {name}"] = row | {"disk_bytes": disk.get(f"after {name}")}
        stages |= {name: _row(None, None, disk[name]) for name in disk if name.startswith("export ")}
        with naming("evaluate"):
            stages["evaluate"] = self.evaluate()
        return {name: {"tokens": None} | row for name, row in stages.items()}

    def healing(self, options: HealOptions) -> Row:
        """A pass of the teacher, if there is one, and of the child, as large as the parent, forward and backward."""
        taught = int(options.needs_teacher)
        flops = sum(s.num_tokens * (3 + taught) * self.forward(s.seq_len) for s in options.plan_stages())
        memory = (MASTER_BYTES + taught * self.itemsize) * self.structure.num_parameters
        return _row(self.seconds(flops), memory) | {"tokens": tokens_of(options)}

    def command(self, one: After) -> Row:
        """What its section says of it. A token that is sampled counts as one that is read, of which it is at least as slow."""
        passes = 3 * one.trains + one.reads + one.samples
        seconds = self.seconds(passes * self.forward(one.seq_len)) if passes else None
        if one.gpu_hours is not None:
            seconds = one.gpu_hours * 3600
        memory = int(one.bytes_per_parameter * self.structure.num_parameters) if one.trains else None
        told = one.gpu_hours is not None
        return _row(seconds, memory) | {
            "tokens": int(one.trains) or None,
            "told": told,
            "sampled": int(one.samples) or None,
        }

    def seconds(self, flops: float) -> float | None:
        return None if self.rate is None else round(flops / self.rate, 1)

    def forward(self, seq_len: int) -> float:
        """FLOPs per token of the whole parent."""
        layers = sum(forward_flops(sub_block, seq_len) for _, _, sub_block in self.structure)
        return layers + 2 * self.structure.vocab_size * self.structure.hidden_size

    def score(self) -> Row:
        """With the screen before it, if any. Which blocks that leaves out is not known: all are as likely."""
        score, structure, spaces = self.recipe.scoring, self.structure, self.spaces
        seq_len, count = score.seq_len or self.recipe.build.seq_len, structure.num_layers
        memory = self.memory(score.memory_limit)
        replaced, whole = wanted(structure, spaces, score.joint, score.fp8), self.forward(seq_len)
        every = {index: spaces.get(index, {}) for index in replaced}
        shape = {"seq_len": seq_len, "compute_bytes": self.itemsize}
        passing = scoring(structure, replaced, every, sequences=score.sequences, **shape)
        plan = plan_residency("scoring", passing, memory, passing.batch(score.batch_size, memory))
        taken, flops, kept = plan.device_bytes, 0.0, 1.0
        if score.sub_block_screen is not None:
            offered = [b for space in spaces.values() for b in trained(space, False)]
            few = min(SEQUENCES, score.sequences)
            screened = screening(structure, spaces, sequences=few, **shape)
            taken = max(taken, plan_residency("screening", screened, memory, AT_ONCE).device_bytes)
            # forward, backward with another forward on the way, and every variant on its own input
            flops += few * seq_len * (3 * whole + sum(forward_flops(b, seq_len) for b in offered))
            kept -= int(score.sub_block_screen * len(offered)) / max(len(offered), 1)
        passes = 1.0
        for index, some in replaced.items():
            blocks = (sum(name in every[index].get(slot, {}) for slot, name in one.items()) for one in some)
            passes += (count - index) / count * sum(kept**number for number in blocks)
        flops += passes * score.sequences * seq_len * whole
        return self._passed(flops, plan, passing.wanted) | {"memory_bytes": taken}

    def profile(self) -> Row:
        grid, options = grid_of(self.recipe), self.recipe.profile
        offered = dict.fromkeys(
            (s, b) for slots in self.spaces.values() for s, space in slots.items() for b in space.values()
        )
        own = dict.fromkeys((slot, sub_block) for _, slot, sub_block in self.structure)
        whole = Subject(name="parent", structure=self.structure.timed(), offered=tuple(own | offered))
        subject = whole.share(self.recipe.solve.tp)
        each = grid.seconds if options.gpu == "cpu" else SECONDS_PER_POINT
        seconds = count_points(subject, grid) * grid.rounds * each * len(profiled(self.recipe))
        precision = "float32" if self.itemsize == 4 else "bf16"
        cached = max(grid.batches) * sum(b.state().num_bytes(grid.capacity, precision) for _, _, b in subject.structure)
        return _row(round(seconds, 1), subject.structure.num_parameters * self.itemsize + cached)

    def solve(self, scored: Row) -> Row:
        """A round scores as many replacements again; children that are measured go over the same text."""
        solve, score = self.recipe.solve, self.recipe.scoring
        if not solve.measures:
            return _row(None, None)
        seq_len = score.seq_len or self.recipe.build.seq_len
        children = (solve.finalists or 1) * (2 if solve.pairs else 1)
        measured = self.seconds(children * score.sequences * seq_len * self.forward(seq_len))
        if measured is None:
            return _row(None, scored["memory_bytes"])
        return _row(round((solve.rounds or 0) * scored["seconds"] + measured, 1), scored["memory_bytes"])

    def fuse(self, disk: int) -> Row:
        assert self.recipe.fuse is not None
        sequences, seq_len = self.recipe.fuse.sequences, self.recipe.fuse.seq_len
        memory, count = self.memory(self.recipe.fuse.memory_limit), self.structure.num_layers
        plan = dependency_plan(self.structure, count, sequences, seq_len, self.itemsize, memory)
        flops = sequences * seq_len * self.forward(seq_len) * count / 2
        return self._passed(flops, plan, count) | {"disk_bytes": disk}

    def evaluate(self) -> Row:
        sequences, seq_len = self.recipe.evaluate.sequences, self.recipe.evaluate.seq_len
        memory = self.memory(self.recipe.evaluate.memory_limit)
        plan = evaluation_plan([self.structure] * 2, sequences, seq_len, self.itemsize, memory)
        return self._passed(3 * sequences * seq_len * self.forward(seq_len), plan)

    def _passed(self, flops: float, plan: Residency, wanted: int = 1) -> Row:
        """wanted: streams beside the parent's."""
        passes = -(-wanted // max(plan.together, 1)) if plan.streamed else None
        return _row(self.seconds(flops), plan.device_bytes) | {"passes": passes}


def _row(seconds: float | None, memory: int | None, disk: int | None = None) -> Row:
    return {"seconds": seconds, "memory_bytes": memory, "disk_bytes": disk}
