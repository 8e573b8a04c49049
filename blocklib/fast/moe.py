"""The mixture of experts on a GPU: between our fused norms, few rows are routed by our kernels, many by the plain module; products of
experts by our kernel where it is faster, else the plain module's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from puzzle.blocklib.fast.batch import Batch, Fast
from puzzle.blocklib.moe import Moe
from puzzle.blocklib.plain.moe import Experts, SparseMoe, sorted_by_expert
from puzzle.blocklib.sub_block import MissingFace
from puzzle.kernels.grouped import faster, grouped_linear, measured
from puzzle.kernels.routing import MAX_ROWS, combine, route
from puzzle.kernels.skinny import skinny_linear
from puzzle.kernels.swiglu import choose_linear


class FastMoe(Fast):
    """Decode and prefill differ only in the number of rows. Raises MissingFace for weights in fp8."""

    def __init__(self, part: SparseMoe, batch: Batch):
        super().__init__(part, batch)
        if batch.fp8:
            raise MissingFace(part.sub_block.kind, "path on our kernels in fp8")
        own = part.sub_block
        assert isinstance(own, Moe)
        self.part, self.num_chosen, self.sigmoid = part, own.num_experts_per_tok, own.router == "sigmoid"
        self.rules: dict[str, Any] = {
            "sigmoid": self.sigmoid,
            "bias": part.gate.e_score_correction_bias.data if own.correction_bias else None,
            "num_groups": own.num_groups,
            "num_topk_groups": own.num_topk_groups,
            "normalise": own.norm_topk_prob,
            "scale": own.routed_scaling_factor,
        }

    def inner(self, entered: Tensor) -> Tensor:
        part = self.part
        if len(entered) > MAX_ROWS or not measured(entered):
            return part.mixed(entered, run)
        routing = route(self.logits(entered), self.num_chosen, **self.rules)
        given = given_by(part.experts, part.read(entered), routing.place, routing.ends)
        if hasattr(part, "fc2_latent_proj") or not hasattr(part, "shared_expert"):
            return part.beside(part.given(combine(given, routing.back, routing.weights)), entered)
        gate = part.shared_expert_gate(entered) if hasattr(part, "shared_expert_gate") else None
        return combine(given, routing.back, routing.weights, part.shared_expert(entered), gate)

    def logits(self, x: Tensor) -> Tensor:
        """Of the router, which rounds those of sigmoids to float32 alone. [N, H] -> [N, E]"""
        gate, dtype = self.part.gate, torch.float32 if self.sigmoid else x.dtype
        config = choose_linear(len(x), *gate.weight.shape, x.dtype)
        if config is None:
            out = F.linear(x.to(dtype), gate.weight.to(dtype))
        else:
            out = skinny_linear(x, gate.weight, config, dtype=dtype)
        return out if gate.bias is None else out + gate.bias


def given_by(experts: Experts, x: Tensor, place: Tensor, ends: Tensor) -> Tensor:
    """What experts give for their rows, without gradients: rows are gathered and the activation applied within the first product. Our
    kernel knows neither biases nor an activation of gate and up together. x [N, H], place [M], ends [E] -> [M, H]"""
    if experts.biased or experts.activation is None or not faster(x, len(place), len(ends)):
        return experts.product("down_proj", experts.channels(x[place], ends), ends)
    gate = experts.gate_proj if experts.gated else None
    inner = grouped_linear(x, experts.up_proj, ends, place=place, gate=gate, activation=experts.activation_name)
    return grouped_linear(inner, experts.down_proj, ends)


def run(experts: Experts, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """As `Experts.forward`."""
    order, ends = sorted_by_expert(chosen, len(experts.up_proj))
    return experts.summed(given_by(experts, x, order // chosen.shape[1], ends), order, weights)
