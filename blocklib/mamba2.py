"""Mamba-2 (arXiv 2405.21060): a recurrence over a state that does not grow, after a short convolution, before a gated norm.

z, x, B, C, dt = in_proj(n);  x, B, C = silu(conv(x, B, C));  dt = softplus(dt + dt_bias)
state = exp(-exp(A_log) · dt) · state + dt · x ⊗ B;  y = state · C + D · x;  out_proj(norm(y · silu(z)))

Letters: H hidden_size, N num_heads, D head_dim (D alone in a formula: the skip), G num_groups of heads that share B and C, S
state_size, I = N · D inner channels, W conv_width.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from puzzle.base.errors import UserError
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.recurrent import STATE_BYTES, Recurrent
from puzzle.blocklib.sub_block import ParentBlock, SubBlock, Variant, divided, register, size

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class Mamba2(Recurrent):
    """norm_eps: of the gated norm too, which norms each group of I / G channels by itself."""

    kind: ClassVar[str] = "mamba2"
    plain: ClassVar[str | None] = "puzzle.blocklib.plain.mamba2:Mixer"
    on_kernels: ClassVar[str | None] = "puzzle.blocklib.fast.recurrent:FastRecurrent"
    on_vllm: ClassVar[str | None] = "puzzle.blocklib.vllm.mamba2:VllmMamba"

    read_input: ClassVar[tuple[str, ...]] = ("in_proj.weight",)
    added_once: ClassVar[tuple[str, ...]] = ("out_proj.bias",)

    num_heads: int = size("heads", config="mamba_num_heads")
    head_dim: int = size("d", config="mamba_head_dim")
    num_groups: int = size("groups", config="mamba_n_groups")
    state_size: int = size("state", config="ssm_state_size")
    conv_width: int = size("conv", default=4)
    chunk_size: int = size("chunk", default=128)
    conv_bias: bool = size("conv_bias", default=True)
    bias: bool = size("bias", default=False)
    state_dtype: str = size("state_dtype", default="float32", choices=tuple(STATE_BYTES))

    @property
    def inner_size(self) -> int:
        """I"""
        return self.num_heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        """What the convolution reads: x, B and C."""
        return self.inner_size + 2 * self.num_groups * self.state_size

    def inner_tensors(self) -> dict[str, tuple[int, ...]]:
        hidden, inner, convolved = self.hidden_size, self.inner_size, self.conv_channels
        rows = inner + convolved + self.num_heads
        shapes: dict[str, tuple[int, ...]] = {
            "in_proj.weight": (rows, hidden),
            "conv1d.weight": (convolved, 1, self.conv_width),
            "dt_bias": (self.num_heads,),
            "A_log": (self.num_heads,),
            "D": (self.num_heads,),
            "gate_norm.weight": (inner,),
            "out_proj.weight": (hidden, inner),
        }
        shapes |= {"conv1d.bias": (convolved,)} if self.conv_bias else {}
        return shapes | ({"in_proj.bias": (rows,), "out_proj.bias": (hidden,)} if self.bias else {})

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """[N, D, S]"""
        return self.num_heads, self.head_dim, self.state_size

    def parts(self) -> dict[str, tuple[int, ...]]:
        inner, shared, heads = self.inner_size, self.num_groups * self.state_size, self.num_heads
        by_head = dict.fromkeys(("dt_bias", "A_log", "D"), (heads,))
        rows = {"in_proj": (inner, inner, shared, shared, heads), "conv1d": (inner, shared, shared)}
        return rows | by_head | {"gate_norm": (inner,), "out_proj": (inner,)}

    def mixing_flops(self, context: float) -> float:
        """The state's decay, update and product with C; and within a chunk, scores and values."""
        chunk = min(context, self.chunk_size)
        return 6 * self.inner_size * self.state_size + chunk * (self.num_groups * self.state_size + self.inner_size)

    def share(self, tp: int) -> Mamba2:
        """Whole groups of heads, as vLLM: B, C and the gated norm are of a group."""
        heads, groups = divided(self.num_heads, tp, "num_heads"), divided(self.num_groups, tp, "num_groups")
        return replace(self, num_heads=heads, num_groups=groups)

    @property
    def widest(self) -> int:
        """Three times what in_proj gives: what follows it is in float32, and there is more of it."""
        return 3 * (self.inner_size + self.conv_channels + self.num_heads)

    def symbol(self, parent: SubBlock) -> str:
        return "█" if self == parent else "m"

    def words(self, parent: SubBlock) -> str:
        return f"Mamba-2, {self.num_heads} heads of {self.head_dim}"

    def check_groups(self) -> None:
        """Raise UserError for heads that its groups do not share."""
        if self.num_heads % self.num_groups:
            raise UserError(
                f"Mamba-2 of {self.num_heads} heads in {self.num_groups} groups: the heads must divide by the groups"
            )

    # -- in place of another Mamba-2, or of attention --------------------------------------------------------

    @classmethod
    def stand_ins(cls, parent: SubBlock) -> list[str]:
        """Three quarters, half and a quarter of the heads, of as many in every group. In place of attention: nothing by default."""
        if not isinstance(parent, Mamba2):
            return []
        each = parent.num_heads // parent.num_groups
        kept = dict.fromkeys(each * quarters // 4 for quarters in (3, 2, 1))
        return [f"heads{count * parent.num_groups}" for count in kept if 0 < count < each]

    @classmethod
    def stand_in(cls, parent: SubBlock, name: str) -> Variant | None:
        """`headsN`: the N heads that contribute most, as many of each group. `dimD`: of every head its D channels that contribute most;
        `headsN-dimD`: both.
        `mamba2-NxD-gG-sS`, in place of attention: N heads of D channels, G groups, a state of S, and random weights."""
        if isinstance(parent, Mamba2) and (found := re.fullmatch(r"heads(\d+)(?:-dim(\d+))?|dim(\d+)", name)):
            heads, dim = int(found[1] or parent.num_heads), int(found[2] or found[3] or parent.head_dim)
            if not 0 < heads <= parent.num_heads or heads % parent.num_groups:
                raise UserError(
                    f"Mamba-2 variant '{name}': heads are cut alike in every group: give a multiple of "
                    f"{parent.num_groups} and at most {parent.num_heads}"
                )
            if not 0 < dim <= parent.head_dim:
                raise UserError(f"Mamba-2 variant '{name}': a head has from 1 to {parent.head_dim} channels here")
            return _cut(name, replace(parent, num_heads=heads, head_dim=dim))
        if not isinstance(parent, Gqa) or not name.startswith("mamba2"):
            return None
        if (found := re.fullmatch(r"mamba2-(\d+)x(\d+)-g(\d+)-s(\d+)", name)) is None:
            raise UserError(
                f"attention variant '{name}': write Mamba-2 as mamba2-NxD-gG-sS: N heads of D channels in G groups, a state of S; "
                "with the parent's own Mamba-2 sizes, where it has any"
            )
        heads, dim, groups, state = map(int, found.groups())
        if not heads * dim * groups * state:
            raise UserError(f"attention variant '{name}': sizes of Mamba-2 are at least 1")
        made = cls(**parent.norm_fields(), num_heads=heads, head_dim=dim, num_groups=groups, state_size=state)
        made.check_groups()
        return Variant(name=name, sub_block=made, initialise=lambda block: _random(block, made))


def _cut(name: str, kept: Mamba2) -> Variant:
    def initialise(block: ParentBlock) -> dict[str, Tensor]:
        import torch

        from puzzle.blocklib.initialize import contributions

        full, weights = block.sub_block, {n: t.float() for n, t in block.weights.items()}
        assert isinstance(full, Mamba2)
        if kept == full:
            return weights
        of = contributions(block.weights["out_proj.weight"], block.calibrated("a smaller Mamba-2")).cpu()
        by_head = of.view(full.num_groups, -1, full.head_dim).sum(-1)  # [G, N / G]
        best = by_head.topk(kept.num_heads // kept.num_groups, dim=1).indices.sort(dim=1).values
        heads = (best + by_head.shape[1] * torch.arange(full.num_groups)[:, None]).flatten()
        dims = of.view(full.num_heads, -1)[heads].topk(kept.head_dim, dim=1).indices.sort(dim=1).values
        inner = (heads[:, None] * full.head_dim + dims).flatten()
        shared = torch.arange(full.conv_channels - full.inner_size)  # of B and C, all of which stay
        convolved = torch.cat((inner, full.inner_size + shared))
        rows = torch.cat((inner, full.inner_size + convolved, full.inner_size + full.conv_channels + heads))
        of_name = {"in_proj": rows, "conv1d": convolved, "gate_norm": inner} | dict.fromkeys(
            ("dt_bias", "A_log", "D"), heads
        )
        for n in weights:
            index = of_name.get(n.partition(".")[0])
            if index is not None:
                weights[n] = weights[n][index.to(weights[n].device)]
        weights["out_proj.weight"] = weights["out_proj.weight"][:, inner.to(weights["out_proj.weight"].device)]
        return weights

    return Variant(name=name, sub_block=kept, initialise=initialise)


def _random(block: ParentBlock, made: Mamba2) -> dict[str, Tensor]:
    """As Mamba-2 begins its own training: A from 1 to 16, dt from 0.001 to 0.1 (log-uniform), D 1; the last matrix as large as the
    attention's, so that what it adds is of that size."""
    import torch

    norms = {n: t.float() for n, t in block.weights.items() if n in ("norm.weight", "post_norm.weight")}
    found = {name: torch.randn(shape) / math.sqrt(shape[-1]) for name, shape in made.inner_tensors().items()}
    found |= {name: torch.zeros_like(t) for name, t in found.items() if name.endswith(".bias")}
    found["A_log"] = torch.empty(made.num_heads).uniform_(1, 16).log()
    steps = torch.empty(made.num_heads).uniform_(math.log(0.001), math.log(0.1)).exp()
    found |= {"dt_bias": steps + torch.log(-torch.expm1(-steps)), "D": torch.ones(made.num_heads)}
    found["gate_norm.weight"] = torch.ones(made.inner_size)
    found["out_proj.weight"] = (
        torch.randn(made.hidden_size, made.inner_size) * block.weights["o_proj.weight"].float().std().cpu()
    )
    return norms | found
