"""Gated DeltaNet (arXiv 2412.06464): a state that forgets, and in which a key's value is replaced rather than added to.

z, qkv, b, a = in_proj(n);  q, k, v = silu(conv(qkv));  q, k = q / ‖q‖, k / ‖k‖;  β = sigmoid(b)
state = exp(-exp(A_log) · softplus(a + dt_bias)) · state;  state = state + k ⊗ β (v - state k)
y = state q / √K;  out_proj(norm(y) · silu(z))

As the layers `linear_attention` of Qwen3-Next and Qwen3.5 in transformers. Letters: H hidden_size, M num_key_heads, K key_dim, N
num_value_heads, V value_dim, I = N · V inner channels, W conv_width. Value heads share key heads as query heads share KV heads.
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
class GatedDelta(Recurrent):
    """gate: whether y is multiplied with silu(z). norm_eps: of the norm of each head's y too."""

    kind: ClassVar[str] = "gated_delta"
    plain: ClassVar[str | None] = "puzzle.blocklib.plain.gated_delta:DeltaMixer"
    in_training: ClassVar[str | None] = "puzzle.blocklib.fast.gated_delta:DeltaInTraining"
    on_kernels: ClassVar[str | None] = "puzzle.blocklib.fast.gated_delta:FastDelta"
    on_vllm: ClassVar[str | None] = "puzzle.blocklib.vllm.gated_delta:VllmDelta"

    read_input: ClassVar[tuple[str, ...]] = ("in_proj.weight",)

    num_key_heads: int = size("kheads")
    key_dim: int = size("k")
    num_value_heads: int = size("vheads")
    value_dim: int = size("v")
    conv_width: int = size("conv", default=4)
    chunk_size: int = size("chunk", default=64)
    gate: bool = size("gate", default=True)
    state_dtype: str = size("state_dtype", default="float32", choices=tuple(STATE_BYTES))

    def __post_init__(self) -> None:
        """Raises UserError too for value heads that key heads do not share."""
        SubBlock.__post_init__(self)
        if self.num_value_heads % self.num_key_heads:
            raise UserError(
                f"sub-block of kind '{self.kind}': {self.num_value_heads} value heads do not share {self.num_key_heads} key heads "
                "evenly: give a multiple"
            )

    @property
    def inner_size(self) -> int:
        return self.num_value_heads * self.value_dim

    @property
    def keys_size(self) -> int:
        """M · K"""
        return self.num_key_heads * self.key_dim

    @property
    def conv_channels(self) -> int:
        """What the convolution reads: q, k and v."""
        return 2 * self.keys_size + self.inner_size

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """[N, K, V]"""
        return self.num_value_heads, self.key_dim, self.value_dim

    def parts(self) -> dict[str, tuple[int, ...]]:
        keys, inner, heads = self.keys_size, self.inner_size, self.num_value_heads
        convolved = (keys, keys, inner)
        return {
            "in_proj": (*((inner,) if self.gate else ()), *convolved, heads, heads),
            "conv1d": convolved,
            "dt_bias": (heads,),
            "A_log": (heads,),
            "out_proj": (inner,),
        }

    def inner_tensors(self) -> dict[str, tuple[int, ...]]:
        return {
            "in_proj.weight": (sum(self.parts()["in_proj"]), self.hidden_size),
            "conv1d.weight": (self.conv_channels, 1, self.conv_width),
            "dt_bias": (self.num_value_heads,),
            "A_log": (self.num_value_heads,),
            "gate_norm.weight": (self.value_dim,),
            "out_proj.weight": (self.hidden_size, self.inner_size),
        }

    def mixing_flops(self, context: float) -> float:
        """What the state gives for k and q, and its update; and within a chunk, two kinds of scores, the solution and the values."""
        chunk = min(context, self.chunk_size)
        return 6 * self.inner_size * self.key_dim + 2 * chunk * (self.keys_size + self.inner_size)

    def share(self, tp: int) -> GatedDelta:
        """Whole key heads with the value heads that share them, as vLLM."""
        keys, values = (divided(getattr(self, name), tp, name) for name in ("num_key_heads", "num_value_heads"))
        return replace(self, num_key_heads=keys, num_value_heads=values)

    @property
    def lacks_in_vllm(self) -> str | None:
        return None if self.gate else "face in vLLM without a gate"

    @property
    def widest(self) -> int:
        """Three times what in_proj gives: what follows it is in float32, with q and k of every value head."""
        return 3 * (2 * self.num_value_heads * (self.key_dim + self.value_dim + 1))

    def symbol(self, parent: SubBlock) -> str:
        return "█" if self == parent else "g"

    def words(self, parent: SubBlock) -> str:
        return (
            f"Gated DeltaNet, {self.num_value_heads} heads of {self.key_dim}x{self.value_dim}"
            f"{'' if self.gate else ' without a gate'}"
        )

    # -- in place of attention -------------------------------------------------------------------------------

    @classmethod
    def stand_in(cls, parent: SubBlock, name: str) -> Variant | None:
        """`gdn`: a key and a value head for every query head of the attention, as wide. `gdn-MxK-NxV`: M key heads of K channels, N value
        heads of V. Either with `-nogate`. Nothing by default."""
        if not isinstance(parent, Gqa) or not name.startswith("gdn"):
            return None
        if (found := re.fullmatch(r"gdn(?:-(\d+)x(\d+)-(\d+)x(\d+))?(-nogate)?", name)) is None:
            raise UserError(
                f"attention variant '{name}': write Gated DeltaNet as gdn, with the attention's query heads, or as gdn-MxK-NxV: M key "
                "heads of K channels, N value heads of V; either with -nogate"
            )
        heads = (parent.num_attention_heads, parent.head_dim)
        keys, key_dim, values, value_dim = map(int, found.groups()[:4]) if found[1] else heads * 2
        if not keys * key_dim * values * value_dim or values % keys:
            raise UserError(f"attention variant '{name}': sizes are at least 1, and N is a multiple of M")
        made = cls(
            **parent.norm_fields(),
            num_key_heads=keys,
            key_dim=key_dim,
            num_value_heads=values,
            value_dim=value_dim,
            gate=found[5] is None,
        )
        return Variant(name=name, sub_block=made, initialise=lambda block: _from_attention(block, made))


def _heads(weight: Tensor, have: int, dim: int, count: int, own_dim: int) -> Tensor | None:
    """Of `have` heads of `dim` rows as many as `count`: repeated, or the mean of neighbours; None where sizes do not go together."""
    from puzzle.blocklib.initialize import merge_kv_heads

    if dim != own_dim or max(have, count) % min(have, count):
        return None
    if count < have:
        return merge_kv_heads(weight, have, count)
    return weight.unflatten(0, (have, dim)).repeat_interleave(count // have, dim=0).flatten(0, 1)


def _from_attention(block: ParentBlock, made: GatedDelta) -> dict[str, Tensor]:
    """q, k, v and o of the attention, heads repeated or averaged, where their dimension is the same; else random of their size.

    The convolution begins as the token itself. β is 1/2 for every token and decay that of its head, from 0.999 to 0.9 (log-uniform, with A
    1, as Mamba-2 begins): linear attention that forgets slowly. z begins at 0: nothing is added until z has learned,
    and a random z would open and close what was copied. Without a gate the norm begins at a quarter of the size of the attention's values,
    which are averages there.
    """
    import torch

    own, weights = block.sub_block, {n: t.float() for n, t in block.weights.items()}
    assert isinstance(own, Gqa)
    found = {n: t for n, t in weights.items() if n in ("norm.weight", "post_norm.weight")}

    def rows(name: str, have: int, count: int, dim: int) -> Tensor:
        weight = weights[f"{name}.weight"]
        copied = _heads(weight, have, own.head_dim, count, dim)
        return torch.randn(count * dim, made.hidden_size).to(weight) * weight.std() if copied is None else copied

    queries, kv = own.num_attention_heads, own.num_key_value_heads
    v, heads = weights["v_proj.weight"], made.num_value_heads
    device = v.device
    parts = [
        torch.zeros(made.inner_size if made.gate else 0, made.hidden_size, device=device),
        rows("q_proj", queries, made.num_key_heads, made.key_dim),
        rows("k_proj", kv, made.num_key_heads, made.key_dim),
        rows("v_proj", kv, heads, made.value_dim),
        torch.zeros(2 * heads, made.hidden_size, device=device),
    ]
    taps = torch.zeros(made.conv_channels, 1, made.conv_width, device=device)
    taps[:, :, -1] = 1
    o = weights["o_proj.weight"]
    out = _heads(o.T, queries, own.head_dim, heads, made.value_dim)  # what heads gave together, their mean gives alone
    out = torch.randn(made.inner_size, made.hidden_size).to(o) * o.std() if out is None else out * (queries / heads)
    spread = float(v.square().sum(1).mean().sqrt()) * (1 if made.gate else 0.25)  # of what comes normed
    steps = torch.empty(heads, device=device).uniform_(math.log(0.001), math.log(0.1)).exp()
    return found | {
        "in_proj.weight": torch.cat(parts),
        "conv1d.weight": taps,
        "dt_bias": steps + torch.log(-torch.expm1(-steps)),
        "A_log": torch.zeros(heads, device=device),
        "gate_norm.weight": torch.full((made.value_dim,), spread, device=device),
        "out_proj.weight": out.T.contiguous(),
    }
