"""What `puzzle heal` was asked for: weights of the losses, stages, learning rate, and the checks on all of them."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from puzzle.base.errors import UserError
from puzzle.base.units import check_positive, check_seed, parse_count
from puzzle.blocklib.distill import Recipe
from puzzle.data.mixture import Stage

DTYPES = ("auto", "bf16", "fp32")
PARALLEL = ("auto", "replicas", "shards")


@dataclass(frozen=True, kw_only=True, slots=True)
class HealOptions:
    """One healing. batch_size: sequences of the first stage a step, over all ranks; later stages keep its tokens a step.
    accumulate: micro-batches of a step. tokens: to train on, rounded up to whole steps; `stages` ("8k:100M,64k:20M")
    replaces seq_len and tokens. max_skipped: steps in a row with a non-finite gradient that end the run.
    memory_limit: of the device, beyond which the teacher is streamed. teacher_logits: a directory for what the teacher says of every
    token, its top_k words, from which the child then learns without it; reverse_kl: the share of KL(child‖teacher). align_tokens: the
    teacher has another tokenizer, and is compared where both come to the same token; on_policy: the share of steps on what the child itself
    writes. parallel: of several processes, "replicas" of the child in each, "shards" of it, or "auto": replicas where they fit. old_lr: of what a
    grown child had before, as a share of lr; 0: it stays to the bit. save_every, eval_every: in steps; 0: only at the end (and, for
    evaluation, at the start)."""

    child: str
    out: Path
    teacher: str | None = None
    data: list[str] = field(default_factory=list)
    blend: Path | None = None
    text_field: str = "text"
    allow_repeats: bool = False
    kl_weight: float = 1.0
    cosine_weight: float = 1.0
    lm_weight: float = 0.0
    temperature: float = 1.0
    reverse_kl: float = 0.0
    align_tokens: bool = False
    on_policy: float = 0.0
    teacher_logits: Path | None = None
    top_k: int = 32
    tokens: int = 10_000_000
    stages: str | None = None
    seq_len: int = 1024
    batch_size: int = 32
    accumulate: int = 1
    lr: float = 3e-4
    old_lr: float = 1.0
    warm_up: float = 0.05  # of all steps
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    max_skipped: int = 5
    train_embeddings: bool = False
    recompute: bool = False
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    teacher_device: str | None = None
    memory_limit: int | None = None
    cuda_graph: bool = True
    parallel: str = "auto"
    save_every: int = 500
    eval_every: int = 100
    validation_sequences: int = 64
    force: bool = False
    tensorboard: Path | None = None
    wandb: str | None = None

    def check(self) -> None:
        """Raise UserError for values out of range or options that contradict each other."""
        check_positive(self, "tokens", "lr", "temperature", "clip_norm", "top_k")
        check_positive(self, "batch_size", "accumulate", "validation_sequences", "memory_limit")
        check_seed(self.seed)
        if self.seq_len < 2:
            raise UserError(f"`seq_len` {self.seq_len}: must be at least 2, a token and the next one")
        for name in ("kl_weight", "cosine_weight", "lm_weight", "weight_decay", "save_every", "eval_every"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UserError(f"`{name}` {value:g}: must not be negative")
        shares = {
            "warm_up": "the share of all steps",
            "reverse_kl": "the share of KL(child‖teacher)",
            "old_lr": "of what a grown child had before, as a share of `lr`",
            "on_policy": "the share of steps on the child's own text",
        }
        for name, what in shares.items():
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"`{name}` {getattr(self, name):g}: {what}, between 0 and 1")
        if not 0.01 <= self.temperature <= 100:
            raise UserError(
                f"`temperature` {self.temperature:g}: of 0.01 to 100, beyond which every distribution is alike"
            )
        if self.train_embeddings and self.old_lr == 0:
            raise UserError("`train_embeddings` with `old_lr` 0, which keeps all that is old: leave one of them out")
        if self.kl_weight == self.cosine_weight == self.lm_weight == 0:
            raise UserError("`kl_weight` 0 `cosine_weight` 0 `lm_weight` 0: nothing to learn from; set one above 0")
        idle: dict[str, tuple[str, ...]] = (
            {"`kl_weight` 0": ("temperature", "reverse_kl")} if self.kl_weight == 0 else {}
        )
        idle |= {"no `teacher_logits`": ("top_k",)} if self.teacher_logits is None else {}
        for told, names in idle.items():
            for name in names:
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise UserError(f"`{name}` {getattr(self, name):g} is not used with {told}: leave it out")
        if self.teacher_logits is not None and (self.cosine_weight > 0 or self.kl_weight == 0):
            raise UserError(
                "`teacher_logits` holds no hidden states to compare: pass `cosine_weight` 0, `kl_weight` above 0"
            )
        if self.align_tokens and self.cosine_weight > 0:
            raise UserError(
                "`align_tokens` compares words, and hidden states are of other tokens: pass `cosine_weight` 0"
            )
        for name, weight in {"align_tokens": self.kl_weight, "on_policy": self.kl_weight + self.cosine_weight}.items():
            if getattr(self, name) and not weight:
                raise UserError(f"`{name}` compares with a teacher: set `kl_weight` above 0, or leave it out")
            if getattr(self, name) and self.teacher_logits is not None:
                raise UserError(
                    f"`{name}` asks the teacher while the child learns, `teacher_logits` before: leave one out"
                )
        if self.on_policy and self.align_tokens:
            raise UserError(
                "`on_policy` with `align_tokens`: a child's own text is no document to read anew; leave one out"
            )
        if self.on_policy and self.lm_weight > 0:
            raise UserError(
                "`on_policy` with `lm_weight`: the child would take its own words for right; pass `lm_weight` 0"
            )
        if self.needs_teacher and self.teacher is None and self.teacher_logits is None:
            raise UserError(
                "no `teacher`: give the parent, or learn from the text alone with `kl_weight` 0 `cosine_weight` 0 "
                "`lm_weight` 1"
            )
        if self.dtype not in DTYPES:
            raise UserError(f"`dtype` {self.dtype}: use {', '.join(DTYPES)}")
        if self.parallel not in PARALLEL:
            raise UserError(f"`parallel` {self.parallel}: use {', '.join(PARALLEL)}")
        if self.blend is not None and self.data:
            raise UserError(f"`blend` {self.blend} and `data` together: list the data as a source of the blend")

    @property
    def needs_teacher(self) -> bool:
        return self.kl_weight > 0 or self.cosine_weight > 0

    def plan_stages(self) -> list[Stage]:
        """Raises UserError for stages that cannot be read."""
        pairs = [(self.seq_len, self.tokens)] if self.stages is None else parse_stages(self.stages)
        per_step = self.batch_size * pairs[0][0]
        found = []
        for seq_len, tokens in pairs:
            rows = max(1, per_step // seq_len)
            found.append(Stage(seq_len=seq_len, batch_size=rows, num_steps=-(-tokens // (rows * seq_len))))
        return found

    def recipe(self, stages: list[Stage]) -> Recipe:
        """Learning rate, clipping and decay over all stages together."""
        return Recipe(
            num_steps=sum(stage.num_steps for stage in stages),
            batch_size=stages[0].batch_size,
            seq_len=stages[0].seq_len,
            lr=self.lr,
            warm_up=self.warm_up,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
        )

    def trained_with(self, stages: list[Stage], dtype: str) -> dict[str, Any]:
        """What the healed weights depend on, JSON-ready; device, log and checkpoints stay out."""
        losses = ("kl_weight", "cosine_weight", "lm_weight", "temperature")
        steps = ("accumulate", "lr", "warm_up", "weight_decay", "clip_norm", "train_embeddings", "seed")
        kept = {name: getattr(self, name) for name in (*losses, *steps)}
        kept |= {"reverse_kl": self.reverse_kl} if self.reverse_kl else {}
        kept |= {"old_lr": self.old_lr} if self.old_lr != 1 else {}
        kept |= {name: value for name in ("align_tokens", "on_policy") if (value := getattr(self, name))}
        kept |= {"top_k": self.top_k} if self.teacher_logits is not None else {}
        return {**kept, "dtype": dtype, "stages": [asdict(stage) for stage in stages]}


def parse_stages(text: str) -> list[tuple[int, int]]:
    """'8k:100M,64k:20M' -> [(8192, 100000000), (65536, 20000000)]: sequence length (k = 1024) and tokens of each stage.

    Raises UserError for anything else.
    """
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*([kK]?)\s*:\s*(\S+)\s*", part)
        seq_len = int(match[1]) * (1024 if match[2] else 1) if match else 0
        if match is None or seq_len < 2:
            raise UserError(f"`stages` {text}: '{part}' is no stage; write LENGTH:TOKENS, such as 8k:100M,64k:20M")
        found.append((seq_len, parse_count("stages", match[3])))
    return found
