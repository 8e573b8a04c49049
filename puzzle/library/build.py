"""Build a block library: the parent runs once, layer group by layer group, and every variant trains beside it.

A group's layers and variants are on the device together. The residual streams that enter the group come from the
embedding (first group) or from host memory, where the group before left its outputs, so the parent runs once in
total whatever the number of groups. Several processes take consecutive groups and hand the streams on, a step behind each
other: nothing is computed twice, and a variant sees the same batches wherever it is trained. A snapshot every minute lets a
killed run continue where it was, bit for bit.

Letters: B batch, T tokens, H hidden_size.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from puzzle.base.console import Bar, progress, say
from puzzle.base.device import compute_dtype, held_memory, pick_device, wait_for
from puzzle.base.errors import UserError
from puzzle.base.files import check_writable, content_hash, wait_for_files
from puzzle.base.ranks import Ranks, held_by_all, running_ranks
from puzzle.base.replay import Replayed
from puzzle.base.units import check_positive, check_seed, parse_layers
from puzzle.blocklib.distill import Recipe, Shown, VariantTrainer, autocast
from puzzle.blocklib.ffn import SURGEON
from puzzle.blocklib.moments import Moments
from puzzle.blocklib.plain.part import Part, Ropes, loaded, moved, moving
from puzzle.blocklib.sub_block import ParentBlock, Variant
from puzzle.blocklib.variant import bundles, made_of, search_spaces
from puzzle.data.packing import TokenData, load_tokens
from puzzle.library.coupled import Coupled
from puzzle.library.describe import origin_facts, write_library
from puzzle.library.plan import BuildPlan, plan_build
from puzzle.library.snapshot import Snapshots
from puzzle.library.store import BlockStore
from puzzle.library.streams import ResidualStreams, Split
from puzzle.parents.opened import HfModel, open_model
from puzzle.runtime.model import embed
from puzzle.runtime.residency import widest

SNAPSHOT_SECONDS = 60.0

Parts = dict[tuple[int, str], Part]  # the parent's sub-blocks by (layer, slot), in the order of the residual stream
Trainers = dict[tuple[int, str], list[VariantTrainer]]  # by (layer, slot)
BlockKey = tuple[int, str, str]  # (layer, slot, variant)

SURGEON_TOKENS = 4  # a channel, from which on its Hessian pays (docs/lessons.md)


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildOptions:
    """What `puzzle build-library` was asked for. tokens: to train on, rounded up to whole steps; 0 leaves the blocks as
    initialised. origin: where the parent is a healed child, the model that it was made of: names of variants, costs and goals are of that.
    inputs_from: an architecture whose blocks learn again on what the child gives (`coupled`), in `mix` of every batch.
    nested: narrower FFNs of a layer are trained as the first channels of one. attention, ffn: what to offer in the slots of that name; None: what each place takes by default. Raises
    UserError for a number out of range."""

    data: list[str]
    out: Path
    origin: str | None = None
    inputs_from: Path | None = None
    mix: float = 0.5
    attention: str | None = None
    ffn: str | None = None
    layers: str | None = None
    tokens: int = 1_000_000
    seq_len: int = 1024
    batch_size: int = 8
    lr: float = 3e-3
    text_field: str = "text"
    seed: int = 0
    calibration_sequences: int = 64
    validation_sequences: int = 16
    nested: bool = False
    group_size: int | None = None
    memory_limit: int | None = None
    device: str = "auto"
    snapshot_seconds: float = SNAPSHOT_SECONDS

    def __post_init__(self) -> None:
        check_positive(self, "seq_len", "batch_size", "lr", "calibration_sequences", "validation_sequences")
        check_positive(self, "group_size", "memory_limit")
        if not 0 < self.mix <= 1:
            raise UserError(f"`mix` {self.mix:g}: the child's share of a batch, above 0 and at most 1")
        check_seed(self.seed)
        if self.tokens < 0:
            raise UserError(f"`tokens` {self.tokens}: must be 0 or more")

    def recipe(self) -> Recipe:
        return Recipe(
            num_steps=-(-self.tokens // (self.batch_size * self.seq_len)),
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            lr=self.lr,
            calibration_sequences=self.calibration_sequences,
            validation_sequences=self.validation_sequences,
        )


def check_library_directory(out: Path) -> None:
    """Raise UserError for a directory that cannot be written, or holds files and no library. Directories may be there before: costs, or a
    sliced parent of the library's own."""
    check_writable(out)
    if out.is_dir() and not (out / "library.json").is_file():
        foreign = sorted(path.name for path in out.iterdir() if path.is_file() and not path.name.startswith("."))
        if foreign:
            raise UserError(
                f"`out` {out} holds {foreign[0]} and no library (no library.json): choose another directory"
            )


class Builder:
    """One library build: plan first (`plan`), then `run`. ranks: the processes that build it together; None: this one."""

    def __init__(self, parent: HfModel, options: BuildOptions, ranks: Ranks | None = None):
        check_library_directory(options.out)
        self.parent, self.options = parent, options
        self.ranks = ranks or Ranks(device=pick_device(options.device))
        self.structure = parent.structure
        self.recipe = options.recipe()
        self.device = self.ranks.device
        self.dtype = compute_dtype(self.device)
        count = self.structure.num_layers
        chosen = range(count) if options.layers is None else parse_layers("layers", options.layers, count)
        self.origin = None if options.origin is None else open_origin(options.origin, parent)
        self.origins = (self.origin or parent).structure.layers
        layers, origins = ({n: some[n] for n in chosen} for some in (self.structure.layers, self.origins))
        self.spaces = search_spaces(layers, {"attention": options.attention, "ffn": options.ffn}, origins)
        self.coupled: Coupled | None = None
        if options.inputs_from is not None:
            self.coupled = Coupled(
                options.inputs_from, options.mix, {*chosen}, parent.checkpoint.fingerprint(), options.out
            )
            self.spaces = self.coupled.spaces
            if self.ranks.world > 1:
                raise UserError(
                    f"`inputs_from` with {self.ranks.world} processes: both streams pass through one; start it without torchrun"
                )
        self.store = BlockStore(options.out)
        self.stored_dtype = parent.final_norm().dtype
        self.train_seconds = 0.0  # wall time of the training steps so far
        if options.seq_len > self.structure.max_length:
            raise UserError(
                f"`seq_len` {options.seq_len} is longer than the parent's context of {self.structure.max_length}: "
                f"use at most {self.structure.max_length}"
            )
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # Triton launches on the current one
        if self.device.type == "cuda" and options.memory_limit:
            total = torch.cuda.mem_get_info(self.device)[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, options.memory_limit / total), self.device)

    def plan(self) -> BuildPlan:
        found = plan_build(
            self.structure,
            self.spaces,
            self.recipe if self.coupled is None else replace(self.recipe, batch_size=self.rows),
            memory_bytes=self.ranks.memory(self.options.memory_limit),
            compute_bytes=self.dtype.itemsize,
            stored_bytes=self.stored_dtype.itemsize,
            on_host=self.device.type == "cpu",
            held_bytes=held_memory(self.device),
            group_size=self.options.group_size,
            world=self.ranks.world,
            nested=self.options.nested,
        )
        if self.coupled is None:
            return found
        if len(found.groups) > 1:
            raise UserError(
                f"`inputs_from`: the child's blocks learn at once, and need {len(found.groups)} groups within this memory: use a smaller "
                "`batch_size`, fewer `layers`, or a larger `memory_limit`"
            )
        return replace(found, num_tokens=self.recipe.num_steps * self.recipe.batch_size * self.recipe.seq_len)

    @property
    def rows(self) -> int:
        """Of a batch that passes through, the child's too."""
        return self.recipe.batch_size + (0 if self.coupled is None else self.coupled.childs(self.recipe.batch_size))

    def load_data(self) -> TokenData:
        recipe = self.recipe
        return load_tokens(
            self.options.data,
            self.parent.directory,
            seq_len=recipe.seq_len,
            num_train=self.num_batches * recipe.batch_size,
            num_validation=recipe.validation_sequences,
            text_field=self.options.text_field,
            seed=self.options.seed,
        )

    def run(self, data: TokenData) -> None:
        """Train what is missing. Finished blocks of the same content key are kept as they are."""
        out, ranks = self.options.out, self.ranks
        if ranks.is_first:
            offered = self.spaces if self.coupled is None else self.coupled.every
            first = None if self.origin is None else origin_facts(self.origin)
            if self.coupled is not None:
                first = self.coupled.library.facts.get("origin")
            write_library(out, self.parent, data, self.recipe, self.options.seed, offered, first)
        if self.coupled is not None:
            self.coupled.put(out)
        self._keys = self._content_keys(data)
        ends = [group[-1] + 1 for group in self.plan().groups]
        # Gaps too: the parent passes through all layers.
        groups = [tuple(range(*ends)) for ends in pairwise([0, *ends])]
        absent = ranks.from_first(self._missing)
        self._snapshots = Snapshots(
            out / ".work", content_hash(list(self._keys.values())), self.options.snapshot_seconds, ranks
        )
        if not absent:
            self._snapshots.remove()  # of a run that was killed after its last block
            say(f"library {out} is complete: nothing to train")
            return
        tokens = self.recipe.calibration_sequences * self.recipe.seq_len
        reads = [widest(self.structure.layers[layer]) for layer, _, name in absent if name.endswith(SURGEON)]
        if self.coupled is None and tokens < SURGEON_TOKENS * max(reads, default=0):
            say(
                f"{tokens:,} calibration tokens for {max(reads):,} channels: {SURGEON} starts worse than without it on fewer than about "
                f"{SURGEON_TOKENS} a channel"
            )
        last = max(index for index, group in enumerate(groups) if any(k[0] in group for k in absent))
        rounds = [groups[i : min(i + ranks.world, last + 1)] for i in range(0, last + 1, ranks.world)]
        if len(rounds[0]) < ranks.world:
            say(f"{ranks.world} processes, and layers for {len(rounds[0])}: a layer trains in one process")
        self._data = data
        self._embedding = self.parent.embedding().to(self.device, self.dtype)
        self._streams = ResidualStreams(self._embed, self._like)
        chain = list(range(ranks.world))
        with progress("distil", self.num_batches * len(rounds)) as bar:
            for number, of_round in enumerate(rounds):
                place = chain.index(ranks.rank)
                group = of_round[place] if place < len(of_round) else ()
                before = chain[place - 1] if group and place else None
                after = chain[place + 1] if place + 1 < len(of_round) else None
                go_on = number + 1 < len(rounds)
                self._streams.connect(before, after, keep=go_on)
                self._run_group(group, [k for k in absent if any(k[0] in g for g in of_round)], bar, go_on)
                chain.reverse()  # the last of the chain has kept the streams that enter the next round
                gc.collect()  # an optimiser refers to itself: without this its states outlive the group
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
        self._snapshots.remove()
        wait_for_files([self.store.record_path(*key) for key in absent])
        say(f"trained {len(absent)} blocks into {out}")

    # -- one group -------------------------------------------------------------------------------------------

    def _run_group(self, group: tuple[int, ...], missing: list[BlockKey], bar: Bar, go_on: bool) -> None:
        """This process's group; () where there are fewer groups than processes. missing: blocks of all processes' groups, which go
        through the same steps together. go_on: whether further groups follow."""
        length = self.recipe.seq_len
        ropes = self.structure.rope_tables(length, self.device)
        self._lr = torch.zeros((), device=self.device)
        parts, trainers = self._prepare_group(group, missing, ropes)
        by_layer = {i: [t for place, of in trainers.items() if place[0] == i for t in of] for i, _ in trainers}
        done = self._snapshots.load(by_layer)
        if done == 0 and group:
            self._validate(parts, trainers, ropes, 0)
        forward = Replayed(lambda x: self.through(parts, {}, ropes, x))
        training = Replayed(lambda x: self.through(parts, trainers, ropes, x))
        begin, looks = time.monotonic(), self.recipe.looks[:-1]
        for step in range(self.num_batches):
            train = done <= step < self.recipe.num_steps and bool(missing)
            if group and (train or go_on):
                self._lr.fill_(self.recipe.lr_at(step))
                x = (training if train else forward)(self._streams.get("train", step))
                self._streams.put("train", step, x)
                if train and step + 1 in looks:
                    self._validate(parts, trainers, ropes, looks.index(step + 1))
            bar.advance()
            if train and step + 1 < self.recipe.num_steps:
                self._snapshots.after(step + 1, by_layer)
        wait_for(self.device)
        self.train_seconds += time.monotonic() - begin
        if group:
            self._validate(parts, trainers, ropes, -1)
            self._streams.finish()
        self.ranks.wait()  # nobody writes for a run of which a process is gone
        self._write_blocks(trainers)

    def _prepare_group(self, group: tuple[int, ...], missing: list[BlockKey], ropes: Ropes) -> tuple[Parts, Trainers]:
        """The parent's modules of the group's layers, and a trainer for every missing block."""
        parts: Parts = {}
        blocks: dict[tuple[int, str], ParentBlock] = {}
        for index in group:
            for slot in self.structure.layers[index]:
                block = blocks[index, slot] = self.parent.block(index, slot)
                block.weights = moved(block.sub_block, block.weights, moving(self.device, self.dtype))
                parts[index, slot] = loaded(block.sub_block, block.weights, in_training=True)
        streams = [self._streams.get("train", step) for step in range(self.num_calibration if group and missing else 0)]
        for step, x in enumerate(streams if self._streams.sends else []):
            self._streams.put("train", step, self.through(parts, {}, ropes, x))  # others calibrate while this one does
        trainers: Trainers = {}
        mine = {key for key in missing if key[0] in group}
        for (index, slot), block in blocks.items() if mine else ():
            part = parts[index, slot]
            with torch.no_grad(), autocast(self.device):
                if streams:
                    block.statistics = part.calibrate(streams)
                    block.moments = cache(partial(self._moments, part, streams, ropes))
            shared = (block, self.recipe, self.device, self._lr)
            try:
                trainers[index, slot] = [
                    VariantTrainer(index, slot, [self.variant(index, slot, name) for name in names], *shared)
                    for names in bundles(self.spaces.get(index, {}).get(slot, {}), self.options.nested)
                    if (index, slot, names[0]) in mine
                ]
            except torch.linalg.LinAlgError as error:  # sums of squares with λ break for nothing else
                raise self._not_finite(index, slot) from error
            block.statistics = block.moments = None
            with torch.no_grad(), autocast(self.device):
                for step, x in enumerate(streams):  # one set of them is there at a time
                    streams[step] = x + part(x, ropes)
        if self.coupled is not None:
            self.coupled.load(parts, trainers, self._embedding)
        return parts, trainers

    def _moments(self, part: Part, streams: list[Tensor], ropes: Ropes) -> Moments:
        """For the variants that start from them."""
        with autocast(self.device):
            return part.moments(streams, ropes)

    def _not_finite(self, layer: int, slot: str) -> UserError:
        return UserError(
            f"layer {layer} {slot} of {self.parent.checkpoint.directory}: what enters it or what it gives is not finite on this text, in "
            f"{str(self.dtype).removeprefix('torch.')}: the weights there or before are broken"
        )

    def through(
        self,
        parts: Parts,
        trainers: Trainers,
        ropes: Ropes,
        x: Tensor,
        show: Callable[[VariantTrainer, Shown], list[Tensor]] = VariantTrainer.step,
    ) -> Tensor:
        """The parent on x; every trainer is shown what enters its sub-block and what the parent adds there. [B, T, H] each"""
        if self.coupled is not None:
            return self.coupled.through(parts, trainers, ropes, x, show)
        for place, part in parts.items():
            shown = Shown(part, x, ropes)
            for trainer in trainers.get(place, ()):
                show(trainer, shown)
            x = x + shown.target
        return x

    def _validate(self, parts: Parts, trainers: Trainers, ropes: Ropes, look: int) -> None:
        """Show every trainer the held-out sequences, and hand their residual streams on. look: which of the recipe's; after -1, the
        last one, they do not pass again."""
        for batch in range(-(-len(self._data.validation) // self.recipe.batch_size)):
            x = self.through(parts, trainers, ropes, self._streams.get("validation", batch), VariantTrainer.validate)
            self._streams.put("validation", batch, x, last=look == -1)
        for place, trainer in ((place, one) for place, of_place in trainers.items() for one in of_place):
            trainer.losses[look] = found = trainer.validated()
            if look == 0 and found.isnan().any():  # before anything is trained
                raise self._not_finite(*place)

    @property
    def num_calibration(self) -> int:
        """Batches that initialise the variants: the first ones of the training data."""
        return 0 if self.coupled is not None else -(-self.recipe.calibration_sequences // self.recipe.batch_size)

    @property
    def num_batches(self) -> int:
        """Training batches that pass through the parent."""
        return max(self.recipe.num_steps, self.num_calibration)

    def variant(self, index: int, slot: str, name: str) -> Variant:
        """What stands in for the parent, by its name in the space."""
        if self.coupled is not None:
            return self.coupled.variant(index, slot, name)
        found = made_of(self.structure.layers[index][slot], self.origins[index][slot], name, slot)
        assert found is not None, "what the space offers can be made"
        return found

    # -- small parts -----------------------------------------------------------------------------------------

    def _embed(self, split: Split, step: int) -> Tensor:
        size = self.recipe.batch_size
        if split == "train":
            ids = self._data.train_batch(step, size)
        else:
            ids = self._data.validation[step * size : (step + 1) * size].long()
        x = embed(ids.to(self.device), self._embedding, self.structure.embedding_scale)
        return x if self.coupled is None else self.coupled.doubled(x)

    def _like(self, split: Split, step: int) -> Tensor:
        """An empty batch of the residual stream. [B, T, H]"""
        size = self.recipe.batch_size
        rows = size if split == "train" else min(size, len(self._data.validation) - step * size)
        shape = (rows, self.recipe.seq_len, self.structure.hidden_size)
        return torch.empty(shape, device=self.device, dtype=self.dtype)

    def _content_keys(self, data: TokenData) -> dict[BlockKey, str]:
        """Of every block to train: what its bytes depend on, the others of a nest too."""
        fingerprint = self.parent.checkpoint.fingerprint()
        common = [fingerprint, asdict(self.recipe), data.hash, self.device.type]
        common += [] if self.origin is None else [self.origin.structure.to_json()]
        common += [] if self.coupled is None else self.coupled.key()

        def key(layer: int, slot: str, name: str, together: tuple[str, ...]) -> str:
            edition = 0 if self.coupled is not None else self.variant(layer, slot, name).edition
            own = ([list(together)] if len(together) > 1 else []) + ([{"edition": edition}] if edition else [])
            return content_hash([layer, slot, name, *common, *own])

        return {
            (layer, slot, name): key(layer, slot, name, names)
            for layer, slots in self.spaces.items()
            for slot, space in slots.items()
            for names in bundles(space, self.options.nested)
            for name in names
        }

    def _missing(self) -> list[BlockKey]:
        """Blocks that are not there yet; of a nest, or of blocks that learn from each other, all or none."""
        found: list[BlockKey] = []
        for layer, slots in self.spaces.items():
            for slot, space in slots.items():
                for names in bundles(space, self.options.nested):
                    keys = [(layer, slot, name) for name in names]
                    found += [] if all(self.store.has(*key, self._keys[key]) for key in keys) else keys
        return [*self._keys] if found and self.coupled is not None else found

    def _write_blocks(self, trainers: Trainers) -> None:
        shown = [step * self.recipe.batch_size * self.recipe.seq_len for step in self.recipe.looks]
        tokens = shown[-1]
        for (index, slot), of_place in trainers.items():
            for found in (found for trainer in of_place for found in trainer.trained()):
                name, sub_block = found.variant.name, found.variant.sub_block
                tensors = {n: t if n in sub_block.exact else t.to(self.stored_dtype) for n, t in found.tensors.items()}
                record = {
                    "status": ("trained" if found.improved else "kept as initialised") if tensors else "empty",
                    "key": self._keys[index, slot, name],
                    "num_tokens": tokens if tensors else 0,
                    "validation_loss_before": found.losses[0],
                    "validation_loss_after": found.losses[-1],
                    **found.facts,
                }
                if tensors:
                    record["validation_curve"] = {"num_tokens": shown, "losses": found.losses}
                spec = {"layer": index, "slot": slot, "variant": name, "sub_block": sub_block.key()}
                self.store.write(index, slot, name, tensors, spec, record)


def open_origin(source: str, child: HfModel) -> HfModel:
    """The model that `child` was made of. Raises UserError where it has another structure around the layers, or other layers."""
    origin = open_model(source)
    if [*map(list, origin.structure.layers)] != [*map(list, child.structure.layers)] or (
        origin.structure.with_layers(child.structure.layers) != child.structure
    ):
        raise UserError(
            f"`origin` {source}: {child.source} has other layers, or another embedding, head or RoPE: give the model that it is a child of, "
            "layer for layer"
        )
    return origin


def build_library(source: str, options: BuildOptions) -> Path:
    """Build or complete the library at `options.out`, together with the other processes if `torchrun` started several. Raises
    UserError for bad input before writing anything, and while another process builds or scores there."""
    with running_ranks(options.device) as ranks, held_by_all(options.out, ranks):
        parent = open_model(source)
        builder = Builder(parent, options, ranks)
        ranks.agree(parent.checkpoint.fingerprint, f"parent {source}", seconds=0)
        ranks.from_first(parent.check)
        builder.plan()
        data = ranks.from_first(builder.load_data)
        say(
            f"{len(data.train)} training and {len(data.validation)} validation sequences of {options.seq_len} tokens "
            f"from {data.num_documents} documents"
        )
        builder.run(data)
    return options.out
