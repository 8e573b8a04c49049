"""Replace-one-block scores: what each variant alone costs in an otherwise intact parent.

A parent that does not fit the device is read layer by layer, once a pass, and a pass takes as many variants as memory has room for
their streams (`puzzle.library.passes`). Where the parent is whole on the device a pass takes the variants of one layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puzzle.base.console import progress, say
from puzzle.base.device import compute_dtype, pick_device
from puzzle.base.errors import UserError
from puzzle.base.files import content_hash, write_json
from puzzle.base.ranks import Ranks, held_by_all, running_ranks
from puzzle.base.units import check_positive
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.none import NoOp
from puzzle.blocklib.variant import PARENT
from puzzle.data.packing import TokenData, load_tokens
from puzzle.library.assemble import open_parent, read_part
from puzzle.library.manifest import FP8_CACHE, FP8_WEIGHTS, Library, Replacement, score_name
from puzzle.library.passes import ChildPath, Parts, Passes, path_of
from puzzle.library.plan import Spaces, scoring, scoring_costs, screening, trained
from puzzle.library.results import Results, Todo, share
from puzzle.library.screen import AT_ONCE, SEQUENCES, compared, estimates, worst
from puzzle.library.store import BlockStore
from puzzle.parents.opened import HfModel
from puzzle.parents.structure import Structure
from puzzle.runtime.residency import Memory, Residency, plan_residency
from puzzle.runtime.stream import Layered, Room


class Scorer:
    """Scores blocks of one library against its parent on held-out sequences [S, T]."""

    def __init__(
        self, library: Library, parent: HfModel, sequences: Tensor, device: torch.device, plan: Residency, todo: Todo
    ):
        self.library, self.plan, self.todo = library, plan, todo
        self.passes = Passes(library, parent, sequences, device, plan)

    def run(self, results: Results) -> None:
        """Score all of `todo`, pass by pass."""
        groups = list(self._groups())
        places = {self._path(*one): one for group in groups for one in group}
        with progress("score", len(places)) as bar:
            for measured in self.passes.run([[self._path(*one) for one in group] for group in groups], bar):
                for path, result in measured:
                    layer, replacement = places[path]
                    name = score_name(replacement)
                    if not math.isfinite(result["kl"]):
                        raise UserError(
                            f"layer {layer} {name} makes the model's output NaN: its training diverged; delete "
                            f"{BlockStore(self.library.root).layer(layer)} and run `puzzle build-library` again with a smaller --lr"
                        )
                    results.put(layer, name, result)

    def _path(self, layer: int, replacement: Replacement) -> ChildPath:
        return path_of({layer: replacement}, self.library.num_layers)

    def _groups(self) -> Iterator[list[tuple[int, Replacement]]]:
        """(layer, replacement) of each pass, layer by layer; of one layer where the parent is whole."""
        every = [(layer, one) for layer, wanted in sorted(self.todo.items()) for one in wanted]
        groups = [every] if self.plan.streamed else [[(n, one) for one in self.todo[n]] for n in sorted(self.todo)]
        for group in groups:
            for begin in range(0, len(group), self.plan.together):
                yield group[begin : begin + self.plan.together]


@dataclass(kw_only=True, slots=True)
class ScoreOptions:
    """sequences: held-out ones, of seq_len tokens (None: as in training), batch_size at a time, more of a narrow model on a GPU, or as many as
    memory_limit (None: the device) lets; joint: also every combination of a layer's slots; fp8: also what fp8 costs the parent's own sub-blocks;
    sub_block_screen: the share of all blocks, those with the worst estimate, that are left out."""

    sequences: int = 64
    seq_len: int | None = None
    batch_size: int = 8
    joint: bool = False
    fp8: bool = False
    sub_block_screen: float | None = None
    memory_limit: int | None = None
    text_field: str = "text"
    device: str = "auto"

    def __post_init__(self) -> None:
        check_positive(self, "sequences", "seq_len", "batch_size", "memory_limit")
        if self.sub_block_screen is not None and not 0 <= self.sub_block_screen < 1:
            raise UserError(
                f"`sub_block_screen` {self.sub_block_screen:g}: the share of all blocks to leave out, at least 0 and below 1"
            )


def wanted(structure: Structure, spaces: Spaces, joint: bool, fp8: bool) -> Todo:
    """Every variant alone and, for joint scores, one of every slot together; and the parent's own in fp8, of every layer."""
    found: Todo = {}
    for layer, offered in spaces.items():
        names = {slot: [n for n in space if n != PARENT] for slot, space in offered.items()}
        alone: list[Replacement] = [{slot: name} for slot, some in names.items() for name in some]
        together = [dict(zip(names, choice, strict=True)) for choice in product(*names.values())]
        found[layer] = [*alone, *together] if joint and len(names) > 1 else alone
    for layer, own in enumerate(structure.layers if fp8 else ()):
        weights = [{slot: FP8_WEIGHTS} for slot, sub_block in own.items() if not isinstance(sub_block, NoOp)]
        caches = [{slot: FP8_CACHE} for slot, sub_block in own.items() if isinstance(sub_block, Gqa)]
        found[layer] = [*found.get(layer, ()), *weights, *caches]
    return found


def held_out(library: Library, parent: HfModel, data: list[str], options: ScoreOptions) -> TokenData:
    """The text that blocks, and children of them, are measured on. Raises UserError for sequences beyond the parent's context."""
    seq_len, longest = options.seq_len or library.facts["data"]["seq_len"], parent.structure.max_length
    if seq_len > longest:
        raise UserError(f"`seq_len` {seq_len} is longer than the parent's context of {longest}: use at most {longest}")
    return load_tokens(
        data,
        parent.directory,
        seq_len=seq_len,
        num_train=1,
        num_validation=options.sequences,
        text_field=options.text_field,
        seed=library.facts["seed"],
    )


class Scoring:
    """What is there to score, and what it takes. ranks: the processes that score together, each its share; None: this one. Raises
    UserError for a library, parent or text that do not fit, before anything is measured or written."""

    def __init__(
        self, root: Path, data: list[str], options: ScoreOptions, parent: str | None, ranks: Ranks | None = None
    ):
        self.ranks = ranks = ranks or Ranks(device=pick_device(options.device))
        self.library = library = Library.open(root)
        self.options, self.parent = options, open_parent(library, parent)
        self.device = ranks.device
        self.tokens: TokenData = ranks.from_first(lambda: held_out(library, self.parent, data, options))
        spaces = {layer: library.spaces[layer] for layer in library.layers}
        every, layers = wanted(library.structure, spaces, options.joint, options.fp8), range(library.num_layers)
        self.results = Results(root, every, layers, self._key, ranks)

    def _key(self, layer: int) -> str:
        """What the scores of a layer depend on."""
        store = BlockStore(self.library.root)
        hashes = {
            slot: {name: store.record(layer, slot, name)["sha256"] for name in space if name != PARENT}
            for slot, space in self.library.spaces[layer].items()
        }
        return content_hash([self.library.fingerprint, self.tokens.hash, hashes, self.device.type])

    @property
    def memory(self) -> Memory:
        """Free now, in every process."""
        return Memory.of(self.device, self.options.memory_limit, self.ranks)

    def missing(self) -> Todo:
        """What has no score yet, and was not screened out."""
        return self.results.missing(self.options.sub_block_screen is not None)

    def mine(self, todo: Todo) -> Todo:
        """This process's share."""
        return share(todo, scoring_costs(self.parent.structure), self.ranks)

    def plan(self, todo: Todo) -> Residency:
        count, length = self.tokens.validation.shape
        size = compute_dtype(self.device).itemsize
        shape = {"sequences": count, "seq_len": length, "compute_bytes": size}
        passing = scoring(self.parent.structure, todo, self.library.spaces, **shape)
        memory = self.memory
        return plan_residency("scoring", passing, memory, passing.batch(self.options.batch_size, memory))

    def screen(self) -> None:
        """Estimate what has no estimate yet, in the first process, and mark the worst; what has a score already keeps it."""
        if self.options.sub_block_screen is None:
            return
        lacking, memory, layers = self.lacking(), self.memory, self.results.layers
        self.mark(self.ranks.from_first(lambda: self._estimates(lacking, memory) if lacking else {}))
        for layer in self.library.layers:
            self.results.keep(layer)
        count = sum(len(layers[n].screened) for n in self.library.layers)
        say(f"{count} of {self.num_blocks} blocks are screened out: they get no score, and `solve` cannot choose them")

    def mark(self, new: dict[int, dict[str, float]]) -> None:
        """The worst of all by estimates, `new` ones beside those that are there; in memory alone."""
        layers = self.results.layers
        for layer, found in new.items():
            layers[layer].estimates = found
        dropped = worst({n: layers[n].estimates for n in self.library.layers}, self.options.sub_block_screen or 0)
        for n in self.library.layers:
            layers[n].screened = {name for layer, name in dropped if layer == n and name not in layers[n].scores}

    @property
    def num_blocks(self) -> int:
        return sum(len(trained(self.library.spaces[layer], False)) for layer in self.library.layers)

    def lacking(self) -> list[int]:
        """Layers with a variant that was never estimated."""
        spaces, layers = self.library.spaces, self.results.layers
        return [
            n
            for n in self.library.layers
            if any(
                f"{s}/{v}" not in layers[n].estimates for s, space in spaces[n].items() for v in space if v != PARENT
            )
        ]

    def screen_plan(self, lacking: list[int], memory: Memory) -> Residency:
        ids, size = self.tokens.validation[:SEQUENCES], compute_dtype(self.device).itemsize
        shape = {"sequences": len(ids), "seq_len": ids.shape[1], "compute_bytes": size}
        passing = screening(self.parent.structure, {n: self.library.spaces[n] for n in lacking}, **shape)
        return plan_residency("screening", passing, memory, AT_ONCE)

    def _estimates(self, lacking: list[int], memory: Memory) -> dict[int, dict[str, float]]:
        """Of all variants of these layers."""
        ids, plan = self.tokens.validation[:SEQUENCES], self.screen_plan(lacking, memory)
        say(f"screening on {ids.numel():,} tokens, the parent {plan.told()}")
        model = Layered(self.parent, self.device, compute_dtype(self.device), streamed=plan.streamed)
        store = BlockStore(self.library.root)

        def read(layer: int) -> dict[str, Parts]:
            found: dict[str, Parts] = {}
            for slot, space in self.library.spaces[layer].items():
                for name, sub_block in space.items():
                    if name != PARENT:
                        part = read_part(store, layer, slot, name, sub_block, model.reader.move)
                        found.setdefault(slot, {})[name] = part
            return found

        batches = [one.long().to(self.device) for one in ids.split(plan.batch_size)]
        return estimates(model, batches, Room(self.device, plan.on_device), lacking, read)

    def compare(self) -> None:
        """Say and keep how well the estimates order what was scored."""
        if self.options.sub_block_screen is None:
            return
        found, count = compared({n: self.results.layers[n] for n in self.library.layers})
        told = "cannot be told" if found is None else f"{found:.3f}"
        say(f"Spearman of estimates and scores over {count} blocks: {told}")
        facts = {"spearman": found, "num_compared": count, "fraction": self.options.sub_block_screen}
        write_json(
            self.library.root / "scores" / "screen.json",
            facts | {"num_sequences": min(SEQUENCES, len(self.tokens.validation))},
        )

    def run(self) -> None:
        """Score this process's share of what is missing, and put together what all found. The library is held."""
        self.results.read()  # again: another run may have scored until now
        self.results.remove_others()
        self.screen()
        todo = self.missing()
        mine = self.mine(todo)
        if todo:
            plan, count = self.plan(todo), sum(map(len, mine.values()))
            told = f"{count} of {sum(map(len, todo.values()))}" if self.ranks.world > 1 else str(count)
            say(f"scoring {told} variants, the parent {plan.told(count)}")
            if mine:
                Scorer(self.library, self.parent, self.tokens.validation, self.device, plan, mine).run(self.results)
        else:
            say("all are scored already")
        self.results.close()
        if self.ranks.is_first:
            self.compare()


def score_library(
    root: Path, data: list[str], options: ScoreOptions | None = None, *, parent: str | None = None
) -> Path:
    """Score every block of the library on held-out documents, together with the other processes if `torchrun` started several.
    Returns the directory of the scores."""
    options = options or ScoreOptions()
    with running_ranks(options.device) as ranks:
        work = Scoring(root, data, options, parent, ranks)
        with held_by_all(root, ranks):
            work.run()
    return root / "scores"


def plan_scores(
    root: Path, data: list[str], options: ScoreOptions | None = None, *, parent: str | None = None
) -> dict[str, Any]:
    """What `score_library` would do, for --dry-run; writes nothing. Passes are the first process's. Which blocks a screen will leave
    out is not known before, only how many at most: what has a score keeps it."""
    options = options or ScoreOptions()
    with running_ranks(options.device) as ranks:
        work = Scoring(root, data, options, parent, ranks)
        facts = {"device": str(work.device), "processes": ranks.world, "num_tokens": work.tokens.validation.numel()}
        lacking = [] if options.sub_block_screen is None else work.lacking()
        if lacking:
            facts["screened_out_at_most"] = int((options.sub_block_screen or 0) * work.num_blocks)
            facts["screen"] = work.screen_plan(lacking, work.memory).to_json()
        elif options.sub_block_screen is not None:
            work.mark({})  # all is estimated: which it leaves out is known
        todo = work.results.missing(options.sub_block_screen is not None and not lacking)
        count, own = (sum(map(len, some.values())) for some in (todo, work.mine(todo)))
        return facts | {"missing": count, "plan": work.plan(todo).to_json(own) if count else None}
