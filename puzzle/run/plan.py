"""What the stages of a road will take: time, memory and disk of each, for --dry-run. All of it is predicted.

Time is that of a few timed steps of the build (`library.estimate`), and of the others by their FLOPs at that rate; the healing's
is timed on the parent, since there is no child yet. Sizes of a child are those of its parent, than which none is larger.
Where the parent is the name of known shapes, nothing can be timed: all is computed (`run.shapes`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from puzzle.heal.plan import CHECKPOINT_BYTES, KEPT_CHECKPOINTS, plan_heal
from puzzle.heal.settings import HealOptions
from puzzle.heal.stored import bytes_per_token
from puzzle.library.build import Builder
from puzzle.library.estimate import plan_of
from puzzle.library.plan import Spaces, forward_flops, scoring, screening, trained
from puzzle.library.score import ScoreOptions, wanted
from puzzle.library.screen import AT_ONCE, SEQUENCES
from puzzle.parents.structure import Structure
from puzzle.profile.profile import SECONDS_PER_POINT, Subject, count_points
from puzzle.run.check import grid_of, is_measured, profiled
from puzzle.run.recipe import Recipe
from puzzle.runtime.residency import Memory, plan_residency

EXPORT_BYTES = {
    "float32": (4, 4),
    "bfloat16": (2, 2),
    "float16": (2, 2),
    "fp8": (1, 2),
}  # of a parameter in a layer, and outside
Row = dict[str, float | int | None]  # of a stage: "seconds", "memory_bytes", "disk_bytes"; None: next to nothing


def disk_of(recipe: Recipe, structure: Structure, size: int, library: int) -> dict[str, int]:
    """Bytes that each stage leaves or holds for a while. size: bytes of a stored weight; library: of the built one."""
    checkpoint = structure.num_parameters * size
    found = {"build-library": library, "child": checkpoint}
    if recipe.fuse is not None:
        found["fuse"] = checkpoint
    if recipe.heal is not None:
        states = KEPT_CHECKPOINTS * CHECKPOINT_BYTES * structure.num_parameters
        found["heal"] = checkpoint + states
        if recipe.heal.teacher_logits is not None:
            tokens = sum(stage.num_tokens for stage in recipe.heal.plan_stages())
            found["heal"] += tokens * bytes_per_token(recipe.heal.top_k, structure.vocab_size)
        if recipe.solve.precisions:
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
    memory = Memory.of(builder.device, recipe.score.memory_limit)
    size = builder.dtype.itemsize
    stages = stages_of(recipe, builder.structure, builder.spaces, size, rate, own, healing, disk, memory)
    return {"build": build, "stages": stages}


def stages_of(
    recipe: Recipe,
    structure: Structure,
    spaces: Spaces,
    itemsize: int,
    rate: float | None,
    build: Row,
    heal: Row | None,
    disk: Mapping[str, int],
    memory: Memory,
) -> dict[str, Row]:
    """Every stage in its order. itemsize: bytes of a weight that computes; rate: FLOPs per second, None: none known; build, heal:
    their seconds and memory; disk: as `disk_of`; memory: that scores may fill."""
    weights, score, held_out = structure.num_parameters * itemsize, recipe.score, recipe.evaluate

    def seconds(flops: float) -> float | None:
        return None if rate is None else round(flops / rate, 1)

    def forward(seq_len: int) -> float:
        """FLOPs per token of the whole parent."""
        layers = sum(forward_flops(sub_block, seq_len) for _, _, sub_block in structure)
        return layers + 2 * structure.vocab_size * structure.hidden_size

    length = score.seq_len or recipe.build.seq_len
    flops, scored = scores_of(score, structure, spaces, length, itemsize, memory, forward(length))
    stages: dict[str, Row] = {
        "build-library": build | {"disk_bytes": disk["build-library"]},
        "score": _row(seconds(flops), scored),
    }
    if is_measured(recipe):
        grid = grid_of(recipe)
        offered = dict.fromkeys(
            (s, b) for slots in spaces.values() for s, space in slots.items() for b in space.values()
        )
        own = dict.fromkeys((slot, sub_block) for _, slot, sub_block in structure)
        subject = Subject(name="parent", structure=structure.timed(), offered=tuple(own | offered)).share(
            recipe.solve.tp
        )
        each = grid.seconds if recipe.profile.gpu == "cpu" else SECONDS_PER_POINT
        own_share = subject.structure
        cached = sum(b.state().per_token for _, _, b in own_share) * grid.capacity * max(grid.batches)
        stages["profile"] = _row(
            round(count_points(subject, grid) * grid.rounds * each * len(profiled(recipe)), 1),
            (own_share.num_parameters + cached) * itemsize,
        )
    stages |= {"solve": _row(None, None), "child": _row(None, None, disk["child"])}
    if recipe.fuse is not None:
        tokens = recipe.fuse.sequences * recipe.fuse.seq_len
        flops = tokens * forward(recipe.fuse.seq_len) * structure.num_layers / 2
        stages["fuse"] = _row(seconds(flops), weights, disk["fuse"])
    if heal is not None:
        stages["heal"] = heal | {"disk_bytes": disk["heal"]}
    stages |= {name: _row(None, None, disk[name]) for name in disk if name.startswith("export ")}
    flops = 3 * held_out.sequences * held_out.seq_len * forward(held_out.seq_len)
    stages["evaluate"] = _row(seconds(flops), 2 * weights)
    return stages


def scores_of(
    score: ScoreOptions,
    structure: Structure,
    spaces: Spaces,
    seq_len: int,
    itemsize: int,
    memory: Memory,
    whole: float,
) -> tuple[float, int]:
    """FLOPs, and bytes of the device, of scores and of the screen before them, if any. Which blocks that leaves out is not known: all are
    as likely. whole: FLOPs per token of one pass of the parent."""
    replaced, count = wanted(structure, spaces, score.joint, score.fp8), structure.num_layers
    every = {index: spaces.get(index, {}) for index in replaced}
    shape = {"seq_len": seq_len, "compute_bytes": itemsize}
    passing = scoring(structure, replaced, every, sequences=score.sequences, **shape)
    taken = plan_residency("scoring", passing, memory, score.batch_size).device_bytes
    flops, kept = 0.0, 1.0
    if score.sub_block_screen is not None:
        offered, few = [b for space in spaces.values() for b in trained(space, False)], min(SEQUENCES, score.sequences)
        passing = screening(structure, spaces, sequences=few, **shape)
        taken = max(taken, plan_residency("screening", passing, memory, AT_ONCE).device_bytes)
        # forward, backward with another forward on the way, and every variant on its own input
        flops += few * seq_len * (3 * whole + sum(forward_flops(b, seq_len) for b in offered))
        kept -= int(score.sub_block_screen * len(offered)) / max(len(offered), 1)
    passes = 1.0
    for index, some in replaced.items():
        blocks = (sum(name in every[index].get(slot, {}) for slot, name in one.items()) for one in some)
        passes += (count - index) / count * sum(kept**number for number in blocks)
    return flops + passes * score.sequences * seq_len * whole, taken


def _row(seconds: float | None, memory: int | None, disk: int | None = None) -> Row:
    return {"seconds": seconds, "memory_bytes": memory, "disk_bytes": disk}
