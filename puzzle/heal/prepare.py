"""From two checkpoints to a trainer: what matches what, what learns, what is shared, how it is split over the ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from puzzle.base.device import compute_dtype, pick_device
from puzzle.base.errors import UserError
from puzzle.base.ranks import Ranks
from puzzle.blocklib.plain.part import learning
from puzzle.data.blend import read_blend
from puzzle.data.documents import Source
from puzzle.data.mixture import Stage
from puzzle.data.tokenizer import same_tokenizer
from puzzle.heal.aligned_teacher import AlignedTeacher
from puzzle.heal.loss import Learner, Teacher, Weights
from puzzle.heal.on_policy import check_sampling
from puzzle.heal.parallel import shard
from puzzle.heal.settings import HealOptions
from puzzle.heal.stored_teacher import StoredTeacher
from puzzle.heal.streamed_teacher import StreamedTeacher
from puzzle.heal.train import Trainer
from puzzle.parents.grown import FILE, new_tensors
from puzzle.parents.opened import HfModel, open_model
from puzzle.runtime.model import CausalModel, load_model


@dataclass(frozen=True, kw_only=True, slots=True)
class Models:
    """The two checkpoints, opened; pairs: (child layer, teacher layer) whose outputs should agree. new: names of the child's tensors that
    learn as fast as `lr` says while all others are slower or stay; None: all learn alike."""

    child: HfModel
    teacher: HfModel | None
    pairs: list[tuple[int, int]]
    dtype: torch.dtype
    teacher_device: torch.device
    new: frozenset[str] | None = None


def open_models(options: HealOptions, stages: list[Stage], ranks: Ranks) -> Models:
    """Open and check child and teacher. Raises UserError when they do not fit each other or the options."""
    chosen = options.teacher_device
    teacher_device = pick_device(chosen, "teacher_device") if chosen else ranks.device
    if teacher_device != ranks.device and ranks.world > 1:
        raise UserError(
            f"`teacher_device` {chosen} with {ranks.world} processes: there the teacher is split over the same devices as the "
            "child; leave it out"
        )
    child = open_model(options.child)
    new = None if options.old_lr == 1 else _new_of(child, options)
    teacher = open_model(options.teacher) if options.teacher is not None and options.needs_teacher else None
    _check_stages(options, stages, child, teacher, ranks.world)
    pairs: list[tuple[int, int]] = []
    if options.on_policy:
        check_sampling(child.structure, stages, options.on_policy)
    if teacher is not None:
        if not options.align_tokens:
            _same_tokenizer(options, child, teacher)
        try:
            pairs = matching_layers(child, teacher)
        except UserError:
            if options.cosine_weight > 0:
                raise
    given = {"bf16": torch.bfloat16, "fp32": torch.float32}
    dtype = given[options.dtype] if options.dtype in given else compute_dtype(ranks.device)
    return Models(child=child, teacher=teacher, pairs=pairs, dtype=dtype, teacher_device=teacher_device, new=new)


def _check_stages(
    options: HealOptions, stages: list[Stage], child: HfModel, teacher: HfModel | None, world: int
) -> None:
    """Raise UserError for sequences that a model is not made for, and for steps that do not split."""
    for stage in stages:
        if stage.seq_len > child.structure.max_length:
            raise UserError(
                f"sequences of {stage.seq_len} tokens: {options.child} is made for at most {child.structure.max_length}; use a "
                "smaller `seq_len`, or raise max_position_embeddings (and scale RoPE) in its config.json"
            )
        parts = options.accumulate * world
        if stage.batch_size % parts:
            raise UserError(
                f"{stage.batch_size} sequences of {stage.seq_len} tokens a step cannot be split into {parts} parts "
                f"(`accumulate` {options.accumulate}, {world} processes): choose another `batch_size`"
            )
        if teacher is not None and stage.seq_len > teacher.structure.max_length and not options.align_tokens:
            raise UserError(
                f"sequences of {stage.seq_len} tokens: `teacher` {options.teacher} is made for at most {teacher.structure.max_length}; use a "
                "smaller `seq_len`, or learn from long text alone with `lm_weight` 1 `kl_weight` 0 `cosine_weight` 0"
            )


def _new_of(child: HfModel, options: HealOptions) -> frozenset[str]:
    """What grow.json names. Raises UserError where there is none, or the child is another one."""
    found = new_tensors(child.directory)
    if not found:
        raise UserError(
            f"`old_lr` {options.old_lr:g}: {options.child} has no {FILE}, which says what `puzzle grow` added: grow it, or leave it out"
        )
    if missing := sorted(found - set(child.shapes())):
        raise UserError(f"{child.directory / FILE} names {missing[0]}, which the checkpoint has not: grow it again")
    return found


def _same_tokenizer(options: HealOptions, child: HfModel, teacher: HfModel) -> None:
    if not same_tokenizer(child.directory, teacher.directory):
        raise UserError(
            f"`teacher` {options.teacher} has another tokenizer than {options.child}: logits of different words cannot be "
            "compared; pass `align_tokens` with `cosine_weight` 0, or let it write completions and learn from those with `lm_weight` 1 "
            "`kl_weight` 0 `cosine_weight` 0"
        )


def matching_layers(child: HfModel, teacher: HfModel) -> list[tuple[int, int]]:
    """(child layer, teacher layer) pairs: by `layer_origins` in the child's config, else one to one.

    layer_origins: for each child layer the last parent layer that it stands for. Raises UserError when neither works.
    """
    if child.structure.hidden_size != teacher.structure.hidden_size:
        raise UserError(
            f"{teacher.source} has hidden size {teacher.structure.hidden_size}, {child.source} {child.structure.hidden_size}: "
            "hidden states cannot be compared; pass `cosine_weight` 0"
        )
    count, num_taught = child.structure.num_layers, teacher.structure.num_layers
    origins = child.config.get("layer_origins")
    if origins is None and count != num_taught:
        raise UserError(
            f"{child.source} has {count} layers, {teacher.source} {num_taught}, and no layer_origins in its config.json says "
            "which match: pass `cosine_weight` 0"
        )
    if origins is None:
        return [(index, index) for index in range(count)]
    known = isinstance(origins, list) and all(isinstance(o, int) and 0 <= o < num_taught for o in origins)
    if not known or len(origins) != count or sorted(set(origins)) != origins:
        raise UserError(
            f"{child.source}: layer_origins {origins} must rise, one layer of {teacher.source} (0 to {num_taught - 1}) for "
            f"each of the {count} layers; or pass `cosine_weight` 0"
        )
    return list(enumerate(origins))


def blended(options: HealOptions) -> list[Source]:
    """Of the blend's file. Raises UserError for one that the options do not go with."""
    assert options.blend is not None
    sources = read_blend(options.blend)
    for source in sources:
        if options.align_tokens and source.messages is not None:
            raise UserError(
                f"`align_tokens`: source '{source.name}' has chats, which each model reads through a template of its own; let the teacher "
                "write the answers, and learn from those with `lm_weight` 1 `kl_weight` 0 `cosine_weight` 0"
            )
        if options.on_policy and source.loss == "assistant":
            raise UserError(
                f"`on_policy` goes on from any place of a row, and of source '{source.name}' the assistant's tokens alone count: use "
                "`loss: all`, or leave `on_policy` out"
            )
    return sources


def build_trainer(
    options: HealOptions,
    stages: list[Stage],
    models: Models,
    ranks: Ranks,
    *,
    sharded: bool = False,
    ahead: int | None = None,
    tutor: StoredTeacher | AlignedTeacher | None = None,
) -> Trainer:
    """Both models in memory, and a trainer around them. sharded: split over the ranks, else in each of them. ahead: tokens that a
    streamed teacher, which every rank reads, looks at in one pass; None: it is whole. tutor: what teaches by step, with
    the teacher or in place of one."""
    device = ranks.device
    child = load_model(models.child, device=device, dtype=torch.float32, in_training=device.type == "cuda")
    learning(child).train()
    old: set[str] = set() if models.new is None else _old_parameters(child, models)
    if options.old_lr == 0:
        for parameter in map(child.get_parameter, old):
            parameter.requires_grad_(False)
            if parameter.ndim > 1 and not sharded:  # as the residual stream; shards are of one dtype
                parameter.data = parameter.data.to(models.dtype)
    teacher = None if models.teacher is None else build_teacher(models, [layer for _, layer in models.pairs], ahead)
    if not options.train_embeddings:
        _freeze(child, None if teacher is None else teacher.model, models.dtype)
    head = None
    if teacher is not None and (options.train_embeddings or not _same(child.head_weight, teacher.model.head_weight)):
        head = teacher.model.head_weight.detach().to(device)
    learner = Learner(
        child, models.pairs, head, models.dtype, train_head=options.train_embeddings, recompute=options.recompute
    )
    if sharded:
        if teacher is not None and ahead is None:
            shard(teacher, teacher.model.blocks, _frozen_ends(teacher.model), ranks, models.dtype)
        shard(learner, child.blocks, set() if options.train_embeddings else _frozen_ends(child), ranks, models.dtype)
    if isinstance(tutor, AlignedTeacher) and teacher is not None:
        tutor.taught_by(teacher, device)
        teacher = None
    weights = Weights(
        kl=options.kl_weight,
        cosine=options.cosine_weight,
        lm=options.lm_weight,
        temperature=options.temperature,
        reverse=options.reverse_kl,
    )
    return Trainer(
        learner,
        teacher,
        options.recipe(stages),
        weights,
        ranks,
        accumulate=options.accumulate,
        cuda_graph=options.cuda_graph,
        sharded=sharded,
        tutor=tutor,
        old=old,
        old_lr=options.old_lr,
    )


def _old_parameters(child: CausalModel, models: Models) -> set[str]:
    """Names of those that growing did not add."""
    assert models.new is not None
    where, found = models.child.family.where, {name for name, _ in child.named_parameters()}
    for layer, slot, sub_block in models.child.structure:
        new = (name for name in sub_block.tensors() if where(layer, slot, sub_block, name).name in models.new)
        found -= {f"blocks.{layer}.{slot}.{name}" for name in new}
    return found


def build_teacher(models: Models, layers: list[int], ahead: int | None) -> Teacher:
    """Frozen, in `models.dtype`. layers: after which it shows hidden states; ahead: as of `build_trainer`."""
    assert models.teacher is not None
    if ahead is not None:
        return StreamedTeacher(models.teacher, layers, models.teacher_device, models.dtype, ahead)
    device = models.teacher_device
    model = load_model(models.teacher, device=device, dtype=models.dtype, in_training=device.type == "cuda")
    return Teacher(model, layers)


def _frozen_ends(model: CausalModel) -> set[nn.Parameter]:
    return {model.embedding.weight} | (set() if model.head is None else {model.head})


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.detach().to(b.device, b.dtype), b)


def _freeze(child: CausalModel, teacher: CausalModel | None, dtype: torch.dtype) -> None:
    """Embedding and head do not learn: in `dtype`, and in the teacher's memory where they are the same."""

    def frozen(mine: nn.Parameter, theirs: nn.Parameter | None) -> nn.Parameter:
        if theirs is not None and theirs.device == mine.device and _same(mine, theirs):
            return theirs
        return nn.Parameter(mine.detach().to(dtype), requires_grad=False)

    child.embedding.weight = frozen(child.embedding.weight, None if teacher is None else teacher.embedding.weight)
    if child.head is not None:
        child.head = frozen(child.head, None if teacher is None else teacher.head)
