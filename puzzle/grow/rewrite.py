"""A dense FFN as a mixture of experts that starts as the same function: the FFN for every token, and new experts that add nothing yet.

    y = FFN(n) + Σ_k σ(r_k · n) · D_k act(G_k n) ⊙ (U_k n),  over the K experts with the largest r_k · n

D_k = 0 at first: the logits are the same, and the gradient of D_k is not 0. G_k and U_k are channels of the FFN, features that are trained
already; r_k is random, which alone tells the experts apart at first. A sigmoid leaves a token with as little of the new as the router
learns to, where a softmax whose weights add up to 1 must always give all of one.
Letters: H hidden_size, F channels of the FFN, N new experts, K of a token, W channels of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from puzzle.base.errors import UserError
from puzzle.base.units import check_positive, check_seed
from puzzle.blocklib.ffn import Ffn
from puzzle.blocklib.moe import Moe
from puzzle.blocklib.none import NoOp
from puzzle.blocklib.sub_block import SubBlock
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.export.child import Child, ChildLayer, Read, Tensors
from puzzle.parents.names import hf_name

NEW = ("gate.", "experts.")  # how names of new tensors begin, inside a grown sub-block


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """experts: new ones of a layer; top_k: of a token; width: channels of each, None: as many as the FFN has."""

    experts: int
    top_k: int = 1
    width: int | None = None
    seed: int = 0

    def check(self) -> None:
        """Raise UserError for numbers that no layer could be grown by."""
        check_positive(self, "experts", "top_k", "width")
        check_seed(self.seed)
        if self.top_k > self.experts:
            raise UserError(f"`top_k` {self.top_k}: a token cannot have more than `experts` {self.experts}")

    def grown(self, ffn: SubBlock, index: int) -> Moe:
        """What stands in place of a layer's FFN. Raises UserError, naming the layer, where that cannot be."""
        if why := _obstacle(ffn):
            raise UserError(f"layer {index} cannot grow: it has {why}")
        assert isinstance(ffn, Ffn)
        width = self.width or ffn.intermediate_size
        if width > ffn.intermediate_size:
            raise UserError(
                f"`width` {width}: new experts start as channels of the FFN, and layer {index} has {ffn.intermediate_size}"
            )
        return Moe(
            **ffn.norm_fields(),
            num_experts=self.experts,
            num_experts_per_tok=self.top_k,
            moe_intermediate_size=width,
            shared_intermediate_size=ffn.intermediate_size,
            activation=ffn.activation if isinstance(ffn, SwiGLU) else "relu2",
            router="sigmoid",
            correction_bias=True,  # zeros: readers of sigmoid routers count on one
        )


def _obstacle(ffn: SubBlock) -> str:
    """Why a sub-block cannot be grown; "" where it can."""
    if isinstance(ffn, NoOp):
        return "no FFN"
    if isinstance(ffn, Moe):
        return "a mixture of experts already"
    if not isinstance(ffn, Ffn):
        return f"an FFN of kind '{ffn.kind}', which has no channels"
    return "an FFN with biases, which experts have no place for" if ffn.bias else ""


def growable(child: Child) -> list[int]:
    """The layers that can be grown. Raises UserError where there is none."""
    found = [index for index, layer in enumerate(child.layers) if not _obstacle(layer.ffn)]
    if not found:
        why = ", ".join(dict.fromkeys(_obstacle(layer.ffn) for layer in child.layers))
        raise UserError(f"{child.name} has no FFN that can be grown: its layers have {why}")
    return found


def grow_child(child: Child, growth: Growth, layers: list[int]) -> Child:
    """The child with these layers grown. Nothing is read before a grown layer is. Raises UserError as `Growth.grown` does."""
    found = list(child.layers)
    for index in layers:
        moe = growth.grown(found[index].ffn, index)
        found[index] = found[index].put("ffn", moe, _grown(found[index], moe, growth.seed, index))
    usual = child.around.with_layers([found[index].slots for index in layers]).usual["ffn"]
    return replace(child, layers=tuple(found), base={**child.base, "ffn": usual})


def _grown(layer: ChildLayer, moe: Moe, seed: int, index: int) -> Read:
    """Reads the FFN and gives the mixture's tensors, in its dtypes."""

    def tensors() -> Tensors:
        own = layer.read("ffn")
        random = torch.Generator().manual_seed((seed * 2**20 + index) % 2**63)
        up, count, width = own["up_proj.weight"], moe.num_experts, moe.moe_intermediate_size
        norms = {name: tensor for name, tensor in own.items() if name in ("norm.weight", "post_norm.weight")}
        # r · n has a standard deviation of about 1 where x / rms(x) has one of 1 in every channel
        scale = norms["norm.weight"].float() + moe.norm_offset if moe.norm_before else torch.ones(moe.hidden_size)
        router = torch.randn(count, moe.hidden_size, generator=random) / scale.norm()
        drawn = torch.randperm(len(up), generator=random).repeat(-(-count * width // len(up)))
        channels = drawn[: count * width].view(count, width).sort(dim=-1).values  # [N, W], none twice in an expert
        found = norms | {
            "gate.weight": router.to(up.dtype),
            "gate.e_score_correction_bias": torch.zeros(count),
            "experts.down_proj": up.new_zeros(count, moe.hidden_size, width),
        }
        for name in moe.matrices:
            found[f"shared_expert.{name}.weight"] = own[f"{name}.weight"]
            if name != "down_proj":
                found[f"experts.{name}"] = own[f"{name}.weight"][channels]
        return found

    return tensors


def new_names(child: Child, layers: list[int]) -> list[str]:
    """Of the tensors that growing added to these layers, as the checkpoint has them."""
    mixtures = [(index, child.layers[index].ffn) for index in layers]
    return [
        hf_name(index, "ffn", moe, name) for index, moe in mixtures for name in moe.tensors() if name.startswith(NEW)
    ]
