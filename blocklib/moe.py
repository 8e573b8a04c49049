"""The mixture of experts: a router picks K of E small FFNs for every token and adds up what they give (arXiv 1701.06538, 2401.06066).

Letters: H hidden_size, E num_experts, K num_experts_per_tok, F moe_intermediate_size, S shared_intermediate_size, L latent_size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from puzzle.base.errors import UserError
from puzzle.blocklib.ffn import SHADES, Ffn, narrowed
from puzzle.blocklib.relu2 import Relu2
from puzzle.blocklib.sub_block import Normed, ParentBlock, State, SubBlock, Variant, divided, register, size
from puzzle.blocklib.swiglu import SwiGLU

if TYPE_CHECKING:
    from torch import Tensor

MATRICES = ("gate_proj", "up_proj", "down_proj")  # of an expert; one whose activation is relu2 has no gate
LATENT = ("fc1_latent_proj", "fc2_latent_proj")  # to what experts read, and back from what they give
KEEPS = ("experts", "frequent", "merged")  # words of a variant that leave fewer experts
WORDS = (*KEEPS, "topk", "width", "shared", "dense")


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class Moe(Normed):
    """Experts of one width, each down(act(gate(n)) · up(n)) of the normed input n, or down(relu²(up(n))). swiglu_oai: down(g · sigmoid(1.702 g) ·
    (u + 1)) with g = gate(n) up to 7 and u = up(n) from -7 to 7 (gpt-oss). bias: on the router and on all matrices of routed experts.

    router: "softmax" over all experts, or "sigmoid" of each; norm_topk_prob: the weights of a token's experts are divided by their
    sum. correction_bias: added to the router's scores for the choice alone. num_groups: the experts fall into as many groups, of which
    the best num_topk_groups are looked at, by the sum of their two best scores (DeepSeek-V3, arXiv 2412.19437; sigmoid alone).
    shared_intermediate_size: of one more expert that every token has, times sigmoid of a matrix of one row with shared_gate.
    latent_size: experts that are chosen work on fc1(n) of so many channels, and fc2 of their sum is added (Nemotron 3 Super).

    Raises UserError for numbers that do not go together.
    """

    kind: ClassVar[str] = "moe"
    plain: ClassVar[str | None] = "puzzle.blocklib.plain.moe:SparseMoe"
    on_kernels: ClassVar[str | None] = "puzzle.blocklib.fast.moe:FastMoe"
    on_vllm: ClassVar[str | None] = "puzzle.blocklib.vllm.moe:VllmMoe"

    added_once: ClassVar[tuple[str, ...]] = ("experts.down_proj_bias",)
    exact: ClassVar[tuple[str, ...]] = ("gate.e_score_correction_bias",)  # rounded, it would choose other experts
    routes: ClassVar[bool] = True

    num_experts: int = size("e", config="num_experts")
    num_experts_per_tok: int = size("k", config="num_experts_per_tok")
    moe_intermediate_size: int = size("f", config="moe_intermediate_size")
    shared_intermediate_size: int | None = size("shared", config="shared_expert_intermediate_size", default=None)
    shared_gate: bool = size("shared_gate", default=False)
    activation: str = size("act", default="silu", choices=("silu", "gelu_tanh", "relu2", "swiglu_oai"))
    bias: bool = size("bias", default=False)
    router: str = size("router", default="softmax", choices=("softmax", "sigmoid"))
    norm_topk_prob: bool = size("norm_topk", default=False)
    correction_bias: bool = size("correction_bias", default=False)
    num_groups: int = size("groups", default=1)
    num_topk_groups: int = size("topk_groups", default=1)
    routed_scaling_factor: float = size("scaling", default=1.0)
    latent_size: int | None = size("latent", config="moe_latent_size", default=None)

    def __post_init__(self) -> None:
        SubBlock.__post_init__(self)
        experts, groups, chosen = self.num_experts, self.num_groups, self.num_topk_groups
        wrong = None
        if experts % groups or chosen > groups:
            wrong = f"{experts} experts do not fall into {groups} equal groups, {chosen} of which are looked at"
        elif groups > 1 and (self.router != "sigmoid" or experts // groups < 2):
            wrong = f"{groups} groups of experts need router sigmoid and two experts in each"
        elif self.num_experts_per_tok > experts // groups * chosen:
            wrong = f"num_experts_per_tok {self.num_experts_per_tok} is more than the {experts // groups * chosen} to choose from: lower it, or keep more experts"
        elif self.shared_gate and self.shared_intermediate_size is None:
            wrong = "shared_gate without shared_intermediate_size"
        elif self.shared_intermediate_size is not None and (self.bias or self.activation == "swiglu_oai"):
            wrong = "a shared expert beside biases or swiglu_oai is not supported"
        elif self.latent_size is not None and (self.bias or self.activation == "swiglu_oai"):
            wrong = "latent experts with biases or swiglu_oai are not supported"
        if wrong is not None:
            raise UserError(f"sub-block of kind '{self.kind}': {wrong}")

    @property
    def matrices(self) -> tuple[str, ...]:
        """Of an expert."""
        return MATRICES[1:] if self.activation == "relu2" else MATRICES

    @property
    def expert_size(self) -> int:
        """Channels that an expert reads and gives: L, or H."""
        return self.latent_size or self.hidden_size

    def inner_tensors(self) -> dict[str, tuple[int, ...]]:
        """Experts are stacked: `experts.up_proj` [E, F, H or L], `experts.down_proj` [E, H or L, F]."""
        hidden, count, inner, outer = self.hidden_size, self.num_experts, self.moe_intermediate_size, self.expert_size
        shapes: dict[str, tuple[int, ...]] = {"gate.weight": (count, hidden)}
        if self.bias:
            shapes["gate.bias"] = (count,)
        if self.correction_bias:
            shapes["gate.e_score_correction_bias"] = (count,)
        for name in self.matrices:
            shapes[f"experts.{name}"] = (count, outer, inner) if name == "down_proj" else (count, inner, outer)
            if self.bias:
                shapes[f"experts.{name}_bias"] = (count, outer if name == "down_proj" else inner)
        if self.latent_size is not None:
            shapes |= {f"{LATENT[0]}.weight": (outer, hidden), f"{LATENT[1]}.weight": (hidden, outer)}
        if (shared := self.shared_intermediate_size) is not None:
            for name in self.matrices:
                shapes[f"shared_expert.{name}.weight"] = (hidden, shared) if name == "down_proj" else (shared, hidden)
            if self.shared_gate:
                shapes["shared_expert_gate.weight"] = (1, hidden)
        return shapes

    def dense(self, width: int) -> Ffn:
        """An FFN like one of its experts, for all tokens. Raises UserError where no kind is one."""
        if self.bias or self.activation == "swiglu_oai":
            raise UserError("no dense FFN is like experts with biases or swiglu_oai: leave dense= out")
        if self.activation == "relu2":
            return Relu2(**self.norm_fields(), intermediate_size=width)
        return SwiGLU(**self.norm_fields(), intermediate_size=width, activation=self.activation)

    def state(self) -> State:
        return State()

    @property
    def _idle(self) -> int:
        """Elements of the matrices of the experts that a token does not have."""
        each = len(self.matrices) * self.expert_size * self.moe_intermediate_size
        return (self.num_experts - self.num_experts_per_tok) * each

    @property
    def active_width(self) -> int:
        """Channels that a token has, K · F + S."""
        return self.num_experts_per_tok * self.moe_intermediate_size + (self.shared_intermediate_size or 0)

    def active_parameters(self) -> int:
        biases = self.hidden_size + (len(self.matrices) - 1) * self.moe_intermediate_size if self.bias else 0
        return self.num_parameters - self._idle - (self.num_experts - self.num_experts_per_tok) * biases

    def flops(self, rows: int, context: float) -> float:
        return rows * 2 * (self.num_matrix_parameters - self._idle)

    @property
    def widest(self) -> int:
        """What a token is in all its experts together."""
        return max(self.active_width, self.num_experts_per_tok * self.hidden_size, self.num_experts)

    def saved(self, context: int) -> int:
        """Of each of a token's experts what it reads, four of its channels and what it gives; the shared one's, and the router in float32."""
        experts = self.num_experts_per_tok * (2 * self.expert_size + 4 * self.moe_intermediate_size)
        return experts + 4 * (self.shared_intermediate_size or 0) + 2 * self.hidden_size + 8 * self.num_experts

    def timed(self) -> Self:
        return replace(Normed.timed(self), routed_scaling_factor=1.0, norm_topk_prob=False)

    def share(self, tp: int) -> Moe:
        """Every expert is divided by its channels; every rank has the whole router."""
        inner, shared = self.moe_intermediate_size, self.shared_intermediate_size
        return replace(
            self,
            moe_intermediate_size=divided(inner, tp, "moe_intermediate_size"),
            shared_intermediate_size=None if shared is None else divided(shared, tp, "shared_intermediate_size"),
        )

    def symbol(self, parent: SubBlock) -> str:
        """Its share of the parent's parameters; `k` where it is a token's number of experts alone that is smaller."""
        if self == parent:
            return "█"
        share = self.num_parameters / parent.num_parameters
        return "k" if share == 1 else "+" if share > 1 else SHADES[min(len(SHADES) - 2, int(len(SHADES) * share))]

    def words(self, parent: SubBlock) -> str:
        of = f" of {parent.num_experts}" if isinstance(parent, Moe) and parent.num_experts != self.num_experts else ""
        shared = f", shared {self.shared_intermediate_size}" if self.shared_intermediate_size else ""
        return f"{self.num_experts}{of} experts of {self.moe_intermediate_size}, {self.num_experts_per_tok} a token{shared}"

    # -- in place of another mixture -------------------------------------------------------------------------

    @classmethod
    def stand_ins(cls, parent: SubBlock) -> list[str]:
        if not isinstance(parent, Moe):
            return []
        names = ["experts=0.75", "experts=0.5", "width=0.5", "topk=0.5"]
        names += ["shared=0.5"] if parent.shared_intermediate_size else []
        return names if parent.bias or parent.activation == "swiglu_oai" else [*names, "dense=1.0"]

    @classmethod
    def stand_in(cls, parent: SubBlock, name: str) -> Variant | None:
        """`experts=64-topk=4-width=0.5`: what is left of each, as a count, or as a fraction of the parent's where it has a point.

        experts, frequent, merged: so many experts: those that add most, those that most tokens have, or all, the lesser ones merged
        into those that add most. topk: experts of a token. width, shared: channels of an expert, of the shared one. dense: one FFN
        of so many channels for all tokens; a fraction is of the channels that a token has.
        """
        words = name.split("-")
        if not isinstance(parent, Moe) or not all(
            re.match(r"(\w+)=", w) and w.partition("=")[0] in WORDS for w in words
        ):
            return None
        told: dict[str, int | float] = {}
        for word in words:
            key, _, value = word.partition("=")
            told[key] = _number(name, key, value)
        if len(told) < len(words) or len(told.keys() & set(KEEPS)) > 1 or ("dense" in told and len(told) > 1):
            raise UserError(
                f"FFN variant '{name}': one of {', '.join(KEEPS)}, and topk, width and shared once each; dense alone"
            )
        sub_block = _dense(parent, name, told["dense"]) if "dense" in told else _smaller(parent, name, told)
        canonical = "-".join(f"{key}={told[key]}" for key in WORDS if key in told)

        def initialise(block: ParentBlock) -> dict[str, Tensor]:
            from puzzle.blocklib import experts

            if isinstance(sub_block, Ffn):
                return experts.as_dense(block, sub_block.intermediate_size)
            assert isinstance(sub_block, Moe)
            return experts.smaller(block, sub_block, next((key for key in told if key in KEEPS), "experts"))

        return Variant(name=canonical, sub_block=sub_block, initialise=initialise)


def _number(name: str, key: str, text: str) -> int | float:
    """A count, or with a point a fraction. Raises UserError for another text."""
    if re.fullmatch(r"[1-9]\d*", text):
        return int(text)
    if re.fullmatch(r"\d*\.\d{1,4}", text) and float(text) > 0 and (float(text) <= 1 or key == "dense"):
        return float(text)
    raise UserError(
        f"FFN variant '{name}': {key}={text} is neither a count, such as {key}=4, nor a fraction of the parent's, such as {key}=0.5"
    )


def _smaller(parent: Moe, name: str, numbers: Mapping[str, int | float]) -> Moe:
    """Raises UserError for more than the parent has, and for numbers that do not go together."""
    changes: dict[str, Any] = {}
    for key, number in sorted(numbers.items(), key=lambda item: item[0] != "topk"):
        field = {"topk": "num_experts_per_tok", "width": "moe_intermediate_size", "shared": "shared_intermediate_size"}
        own = field.get(key, "num_experts")
        full = getattr(parent, own)
        if full is None:
            raise UserError(f"FFN variant '{name}': the parent has no shared expert")
        if isinstance(number, int):
            wanted = number
        elif key in ("width", "shared"):
            wanted = narrowed(full, number)
        elif key == "topk":
            wanted = max(1, round(full * number))
        else:  # whole groups, and enough to choose from
            step, chosen = parent.num_groups, changes.get("num_experts_per_tok", parent.num_experts_per_tok)
            least = max(-(-chosen // parent.num_topk_groups), 1 if step == 1 else 2) * step
            wanted = max(least, round(full * number / step) * step)
        if wanted > full:
            raise UserError(f"FFN variant '{name}': {key}={wanted} is more than the parent's {full}")
        changes[own] = wanted
    try:
        return replace(parent, **changes)
    except UserError as error:
        raise UserError(f"FFN variant '{name}': {error}") from error


def _dense(parent: Moe, name: str, number: int | float) -> Ffn:
    """The FFN that stands for all experts. Raises UserError for more channels than all have."""
    most = parent.num_experts * parent.moe_intermediate_size + (parent.shared_intermediate_size or 0)
    full = parent.active_width
    width = number if isinstance(number, int) else narrowed(full, number) if number <= 1 else round(full * number)
    if width > most:
        raise UserError(f"FFN variant '{name}': {width} channels are more than the {most} of all experts")
    try:
        return parent.dense(width)
    except UserError as error:
        raise UserError(f"FFN variant '{name}': {error}") from error
