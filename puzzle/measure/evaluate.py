"""Parent and child side by side, all measured: divergence on held-out text, and speed, bytes and cache as run here."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from puzzle.base.console import say
from puzzle.base.device import compute_dtype, name_of, short_name
from puzzle.base.errors import UserError
from puzzle.base.ranks import Ranks, running_ranks
from puzzle.base.units import FIXED_BYTES, PRECISION_BYTES, bytes_text, check_positive
from puzzle.base.workload import Workload
from puzzle.data.packing import TokenData, load_tokens
from puzzle.data.tokenizer import same_tokenizer
from puzzle.measure.continuations import continuations, encode
from puzzle.measure.measurable import Measurable, measure_speeds, of_checkpoint
from puzzle.measure.serve import Served
from puzzle.parents.structure import Structure
from puzzle.runtime.divergence import compare_layered
from puzzle.runtime.interface import Fp8
from puzzle.runtime.model import Weights
from puzzle.runtime.open import pick_precision
from puzzle.runtime.residency import Memory, Passing, Residency, plan_residency
from puzzle.runtime.stream import Layered

AT_ONCE = 8  # sequences


@dataclass(kw_only=True, slots=True)
class EvaluateOptions:
    """sequences: held-out ones, of seq_len tokens. repeats: of the speed measurement. prompts: that both models continue.
    memory_limit: within which they run; models that do not fit are streamed."""

    sequences: int = 64
    seq_len: int = 1024
    repeats: int = 3
    prompts: tuple[str, ...] = ()
    memory_limit: int | None = None
    text_field: str = "text"
    device: str = "auto"

    def __post_init__(self) -> None:
        check_positive(self, "sequences", "seq_len", "repeats", "memory_limit")
        for name in ("sequences", "seq_len"):
            if getattr(self, name) < 2:
                raise UserError(f"`{name}` 1: an error of the mean and a next token take 2 at least")
        for prompt in self.prompts:
            if not prompt.strip():
                raise UserError(f"`prompts` has an empty one ({prompt!r}): write how a text begins")


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """One model. identity: as `Measurable` has it. kl, kl_stderr, top1_agreement: of its parent; None for the parent itself. kl_of_sequences: of
    each held-out sequence, so that two children on the same text can be compared in pairs. speed: None where not measured."""

    loss: float
    num_parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    state_bytes: int = 0
    kl: float | None = None
    kl_stderr: float | None = None
    kl_of_sequences: list[float] | None = None
    top1_agreement: float | None = None
    speed: Served | None = None
    identity: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        apart = ("speed", "identity")
        value = {name: item for name, item in asdict(self).items() if item is not None and name not in apart}
        return self.identity | value | (asdict(self.speed) if self.speed is not None else {})


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Every number is measured. device: "cpu", or a GPU's name. precision: of the speed. speedup, workload: None where speed was not measured.
    continuations: as `continuations.continuations` has them; None without prompts."""

    device: str
    precision: str
    num_tokens: int
    parent: Evaluated
    child: Evaluated
    speedup: float | None = None
    workload: Workload | None = None
    continuations: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        value = asdict(self) | {"parent": self.parent.to_json(), "child": self.child.to_json()}
        return {name: item for name, item in value.items() if item is not None}


def evaluate(
    parent: str | Measurable,
    child: str | Measurable,
    data: list[str] | TokenData,
    options: EvaluateOptions | None = None,
    *,
    work: Workload | None = None,
    batches: tuple[int, int] | None = None,
) -> Evaluation:
    """parent, child: checkpoints, or opened already. data: texts, or their held-out tokens where these were read before. work: what speed is measured on (None: not measured). batches: of parent and child; None takes those that the
    child's architecture.json names. Speed is measured in the precision that the child was priced in, where this device
    has a runtime for it; divergence in float32 on a CPU, in bf16 on a GPU. Of several processes under torchrun each takes a share of
    the sequences, and the first alone measures speed. Raises UserError for models that do not belong together.
    """
    options = options or EvaluateOptions()
    with running_ranks(options.device) as ranks:
        found = _evaluate(_opened(parent, child, data, options, ranks), options, work, batches, ranks)
        return ranks.from_first(lambda: found)


def _evaluate(
    opened: _Opened, options: EvaluateOptions, work: Workload | None, batches: tuple[int, int] | None, ranks: Ranks
) -> Evaluation:
    parent, child, on, tokens, plan = opened.parent, opened.child, opened.device, opened.tokens, opened.plan
    say(f"measuring divergence on {tokens.validation.numel():,} held-out tokens, both models {plan.told()}")
    whole, cut = (Layered(w, on, compute_dtype(on), streamed=plan.streamed, forward=True) for w in opened.weights)
    against = compare_layered(whole, cut, tokens.validation, plan, ranks)
    for model, figure in ((parent, "parent_loss"), (child, "lm_loss"), (child, "kl")):
        if not math.isfinite(against[figure]):
            raise UserError(
                f"{model.name} gives logits that are no numbers (NaN or infinity) on the held-out text: look at its weights, or make it again"
            )
    said = None
    if options.prompts and ranks.is_first and whole.model is not None and cut.model is not None:
        said = continuations({"parent": whole.model, "child": cut.model}, options.prompts, opened.tokenizer)
    elif options.prompts:
        say("no continuations: they take both models whole on the device")
    del whole, cut  # the runtimes want their memory
    work = work if ranks.is_first else None
    if work is not None and opened.too_large is not None:
        say(f"no speed: {opened.too_large}")
        work = None
    precision = pick_precision(on, None if child.solved is None else child.solved.costs["precision"])
    speeds = {} if work is None else _speeds(parent, child, work, batches, on, precision, options.repeats)
    fp8 = child.fp8(on)
    sizes: list[dict[str, Any]] = [_sizes(parent.structure, precision), _sizes(child.structure, precision, fp8)]
    fast, slow = speeds.get("child"), speeds.get("parent")
    return Evaluation(
        device=short_name(on),
        precision=precision if fp8 is None or child.solved is None else child.solved.precision,
        num_tokens=int(against["num_tokens"]),
        parent=Evaluated(loss=against["parent_loss"], speed=slow, **sizes[0], identity=parent.identity()),
        child=Evaluated(
            loss=against["lm_loss"],
            kl=against["kl"],
            kl_stderr=against["kl_stderr"],
            kl_of_sequences=against["kl_of_sequences"],
            top1_agreement=against["top1_agreement"],
            speed=fast,
            **sizes[1],
            identity=child.identity(),
        ),
        speedup=fast.tokens_per_second / slow.tokens_per_second if fast and slow else None,
        workload=work,
        continuations=said,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Opened:
    """Both models, the text, and how they go over it. too_large: why their speed cannot be measured, if it cannot."""

    parent: Measurable
    child: Measurable
    weights: tuple[Weights, Weights]
    tokenizer: Path
    device: torch.device
    tokens: TokenData
    plan: Residency
    too_large: str | None


def _opened(
    parent: str | Measurable,
    child: str | Measurable,
    data: list[str] | TokenData,
    options: EvaluateOptions,
    ranks: Ranks,
) -> _Opened:
    on = ranks.device
    parent = of_checkpoint(parent) if isinstance(parent, str) else parent
    child = of_checkpoint(child) if isinstance(child, str) else child
    theirs, ours = parent.structure.vocab_size, child.structure.vocab_size
    if theirs != ours:
        raise UserError(
            f"{parent.name} has {theirs} tokens, {child.name} {ours}: a child shares its parent's tokenizer"
        )
    wide, narrow = parent.structure.hidden_size, child.structure.hidden_size
    if wide < narrow:
        raise UserError(
            f"{parent.name} has hidden_size {wide}, {child.name} {narrow}: no child of it, and their logits are not compared"
        )
    if parent.tokenizer is None:
        raise UserError(f"{parent.name} has no tokenizer: give a checkpoint")
    if child.tokenizer is not None and not same_tokenizer(parent.tokenizer, child.tokenizer):
        raise UserError(
            f"{child.name} has another tokenizer than {parent.name}: logits of different words cannot be compared"
        )
    directory, longest = parent.tokenizer, parent.structure.max_length

    def read() -> TokenData:
        if isinstance(data, TokenData):
            return data
        if options.seq_len > longest:
            say(f"sequences of {longest} tokens, the context of {parent.name}, and not of {options.seq_len}")
        return load_tokens(
            data,
            directory,
            seq_len=min(options.seq_len, longest),
            num_train=1,
            num_validation=options.sequences,
            text_field=options.text_field,
        )

    tokens = ranks.from_first(read)
    tokens.check_error_of_mean()
    if options.prompts:  # wrong ones are refused before anything is measured
        encode(options.prompts, parent.tokenizer, parent.structure)
    if parent.source is None or child.source is None:
        raise UserError(f"{parent.name} and {child.name}: random weights have no divergence; give checkpoints")
    (count, length), each = tokens.validation.shape, compute_dtype(on).itemsize
    models = [parent.structure, child.structure]
    memory = Memory.of(on, options.memory_limit, ranks)
    largest = max((parent, child), key=lambda one: one.structure.num_parameters)
    size, too_large = largest.structure.num_parameters * each, None
    if size > memory.device:
        too_large = f"{largest.name} ({bytes_text(size)}) does not fit whole into the {bytes_text(memory.device)} of this device"
    return _Opened(
        parent=parent,
        child=child,
        weights=(parent.source, child.source),
        tokenizer=parent.tokenizer,
        device=on,
        tokens=tokens,
        plan=evaluation_plan(models, count, length, each, memory),
        too_large=too_large,
    )


def evaluation_plan(
    models: list[Structure], sequences: int, seq_len: int, compute_bytes: int, memory: Memory
) -> Residency:
    """How parent and child go over the text, side by side. Raises UserError where they cannot."""
    passing = Passing(models=models, sequences=sequences, seq_len=seq_len, compute_bytes=compute_bytes, spare=2)
    return plan_residency("evaluating", passing, memory, AT_ONCE)


def plan_evaluation(
    parent: str, child: str | Measurable, data: list[str], options: EvaluateOptions | None = None
) -> dict[str, Any]:
    """What `evaluate` would do, for --dry-run: how both models go over the text, and why not their speed, if not."""
    options = options or EvaluateOptions()
    with running_ranks(options.device) as ranks:
        opened = _opened(parent, child, data, options, ranks)
        processes = ranks.world
    facts = {"device": str(opened.device), "processes": processes, "num_tokens": opened.tokens.validation.numel()}
    return facts | {"plan": opened.plan.to_json(), "no_speed": opened.too_large}


def _sizes(structure: Structure, precision: str, fp8: Fp8 | None = None) -> dict[str, int]:
    """Bytes as the runtime holds them in this precision, but for what is in fp8, and as `solve` predicts them."""
    cache = precision if fp8 is None else "fp8" if fp8.cache else "bf16"
    weights, per_token, fixed = structure.num_fixed_parameters * FIXED_BYTES[precision], 0, 0
    for layer, slot, sub_block in structure:
        own = precision if fp8 is None else "fp8" if (layer, slot) in fp8.weights else "bf16"
        weights += sub_block.num_parameters * PRECISION_BYTES[own]
        per_token += sub_block.state().per_token
        fixed += sub_block.state().fixed_bytes(cache)
    return {
        "num_parameters": structure.num_parameters,
        "weight_bytes": weights,
        "kv_bytes_per_token": per_token * PRECISION_BYTES[cache],
        "state_bytes": fixed,
    }


def _speeds(
    parent: Measurable,
    child: Measurable,
    work: Workload,
    batches: tuple[int, int] | None,
    device: torch.device,
    precision: str,
    repeats: int,
) -> dict[str, Served]:
    """Of both, each at its batch."""
    solved, expected = child.solved, None
    at = batches or ((solved.parent_predicted.batch, solved.predicted.batch) if solved else (1, 1))
    say(f"measuring speed: {work.input_len} tokens in, {work.output_len} out, batch {at[0]} and {at[1]}")
    if solved and batches is None and solved.workload == work:
        priced = (solved.costs["device"], solved.costs["precision"])
        expected = solved.parent_predicted.tokens_per_second if priced == (name_of(device), precision) else None
    both = {"parent": (parent, at[0]), "child": (child, at[1])}
    return measure_speeds(both, work, device, precision, repeats, expected)
