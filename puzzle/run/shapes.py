"""`puzzle run --dry-run` of a parent by the name of its known shapes, where there is no checkpoint: GPU-hours, memory and disk of
every stage, all of them computed.

Time is FLOPs over MFU times the GPU's bf16 FLOPs by its datasheet, on one GPU; more of them share it at best evenly. Memory of the
build is that of one layer with all its variants, which no two GPUs share. Scores, fusion and evaluation pass over text as on one GPU, whole
or layer by layer, with HOST bytes beside it; only healing is sharded. A child counts as its parent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from puzzle.base.device import PLANNED
from puzzle.base.errors import UserError
from puzzle.base.machine import gpu_facts
from puzzle.blocklib.variant import search_spaces
from puzzle.library.plan import plan_build, trained, training_flops
from puzzle.parents.known import STRUCTURES, known_structure
from puzzle.run.check import check_goal, check_grid, check_steps_cut, is_measured
from puzzle.run.plan import Road, Row, disk_of, joined
from puzzle.run.recipe import Recipe, naming
from puzzle.runtime.residency import Memory

MFU = 0.5634  # benchmarks/lib/scale_page.py writes it, from benchmarks/results/build_8b_steps.csv
BYTES = 2  # of a weight, computing and stored: bf16
UNLIMITED = 2**62
HOST = 250 * 10**9  # bytes of host memory that a GPU has: an eighth of a node's 2 TB


def is_shapes(parent: str) -> bool:
    """Whether a recipe's parent is a name of known shapes and no checkpoint."""
    return parent in STRUCTURES and not Path(parent).exists()


def check_weights(recipe: Recipe) -> None:
    """Raise UserError for a parent that a dry run alone can do with."""
    if is_shapes(recipe.parent):
        raise UserError(
            f"parent {recipe.parent} is the name of known shapes, which `dry_run` alone can do with: put the checkpoint beside the "
            "recipe under this name, or write its path"
        )


def plan_shapes(recipe: Recipe) -> dict[str, Any]:
    """{"shapes", "gpu", "mfu", "activation_bytes", "card_bytes", "host_bytes", "stages": {name: Row with "gpu_hours" and "gpus"}}.

    gpus: the least that run it, None: no number does, or nothing runs there. activation_bytes: what the build keeps in host memory
    between one layer and the next; card_bytes, host_bytes: what a GPU has, and what is beside it. Raises UserError for what can be
    seen to be wrong without a checkpoint.
    """
    check_steps_cut(recipe)
    return joined({name: _plan_one(one) for name, one in recipe.roads.items()})


def _plan_one(recipe: Recipe) -> dict[str, Any]:
    """Of a recipe without steps."""
    structure, card = known_structure(recipe.parent), gpu_facts(recipe.profile.gpu.split("-")[0])
    with naming("goal", "workload", "solve", "profile"):
        recipe.solve.check()
        check_goal(recipe, recipe.goal.goal(may_be_empty=bool(recipe.solve.also)), structure)
    if is_measured(recipe):
        with naming("profile"):
            check_grid(recipe)
    layers, asked = dict(enumerate(structure.layers)), recipe.build.recipe()
    spaces = search_spaces(layers, {"attention": recipe.build.attention, "ffn": recipe.build.ffn})
    one = plan_build(
        structure.with_layers(structure.layers[:1]), {0: spaces[0]}, asked,
        memory_bytes=UNLIMITED, compute_bytes=BYTES, stored_bytes=BYTES, on_host=False, group_size=1,
        nested=recipe.build.nested,
    )  # fmt: skip
    later = sum(sub_block.num_parameters for index in list(spaces)[1:] for sub_block in trained(spaces[index], False))
    rate, tokens = MFU * card.bf16_flops, asked.num_steps * asked.batch_size * asked.seq_len
    flops = tokens * sum(
        training_flops(layers[i], space, asked.seq_len, recipe.build.nested) for i, space in spaces.items()
    )
    build: Row = {"seconds": flops / rate, "memory_bytes": one.peak_memory_bytes}
    disk = disk_of(recipe, structure, BYTES, one.disk_bytes + BYTES * later)

    def memory(limit: int | None) -> Memory:
        return Memory(device=int(PLANNED * min(card.memory_bytes, limit or UNLIMITED)), host=int(PLANNED * HOST))

    road = Road(recipe, structure, spaces, BYTES, rate, memory)
    stages = road.stages(build, None if recipe.heal is None else road.healing(recipe.heal), disk)
    if "profile" in stages:
        stages["profile"]["memory_bytes"] = card.memory_bytes  # caches are cut from all that is free
    for row in stages.values():
        seconds, taken = row["seconds"], row["memory_bytes"]
        row["gpu_hours"] = None if seconds is None else seconds / 3600
        row["gpus"] = None if taken is None else -(-int(taken) // card.memory_bytes)
    if one.peak_memory_bytes > card.memory_bytes:
        stages["build-library"]["gpus"] = None
    kept = 0 if len(spaces) == 1 else tokens * structure.hidden_size * BYTES
    sizes = {"activation_bytes": kept, "card_bytes": card.memory_bytes, "host_bytes": HOST}
    return {"shapes": recipe.parent, "gpu": card.name, "mfu": MFU, **sizes, "stages": stages}
