"""The mixture of experts in plain PyTorch: the same for training, a prefill and a decode step, since it depends on its rows alone.

Letters: B batch, T tokens, N rows (B·T), H hidden_size, E experts, K experts of a token, F channels of an expert, S of the shared one.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puzzle.blocklib.experts import MoeStatistics
from puzzle.blocklib.moe import Moe
from puzzle.blocklib.plain.part import Part, Ropes
from puzzle.blocklib.plain.swiglu import ACTIVATIONS

ALPHA, LIMIT = 1.702, 7.0  # of swiglu_oai


def relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def swiglu_oai(gate: Tensor, up: Tensor) -> Tensor:
    """Of gpt-oss: both are clamped, the gate on one side alone."""
    gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
    return (up + 1) * (gate * (ALPHA * gate).sigmoid())


class Router(nn.Module):
    """x [N, H] -> (experts [N, K], their weights [N, K] in float32)."""

    bias: Tensor | None
    e_score_correction_bias: Tensor

    def __init__(self, sub_block: Moe):
        super().__init__()
        self.sub_block = sub_block
        self.weight = nn.Parameter(torch.empty(sub_block.num_experts, sub_block.hidden_size))
        self.register_parameter("bias", nn.Parameter(torch.empty(sub_block.num_experts)) if sub_block.bias else None)
        self.fixed = ("e_score_correction_bias",) if sub_block.correction_bias else ()  # it chooses, without a gradient
        for name in self.fixed:
            self.register_parameter(name, nn.Parameter(torch.empty(sub_block.num_experts), requires_grad=False))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.sub_block.router == "softmax":
            scores = F.linear(x, self.weight, self.bias).softmax(-1, dtype=torch.float32)
        else:
            with torch.autocast(x.device.type, enabled=False):
                bias = None if self.bias is None else self.bias.float()
                scores = F.linear(x.float(), self.weight.float(), bias).sigmoid()
        return self.choose(scores)

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """scores [N, E] in float32 -> as `forward`."""
        own, count = self.sub_block, self.sub_block.num_experts_per_tok
        choice = scores + self.e_score_correction_bias if own.correction_bias else scores
        if own.num_groups > 1:
            grouped = choice.detach().unflatten(-1, (own.num_groups, -1))
            best = grouped.topk(2, dim=-1)[0].sum(-1).topk(own.num_topk_groups, dim=-1)[1]
            outside = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, False)
            choice = grouped.masked_fill(outside[..., None], -torch.inf).flatten(-2)
        chosen = choice.topk(count, dim=-1)[1]
        weights = scores.gather(1, chosen)
        if own.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + (0 if own.router == "softmax" else 1e-20))
        return chosen, weights if own.routed_scaling_factor == 1 else weights * own.routed_scaling_factor


class Experts(nn.Module):
    """All experts, stacked. gate_proj, up_proj [E, F, H], down_proj [E, H, F], and the bias of each; with latent experts H is their size,
    here alone."""

    gate_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor

    def __init__(self, sub_block: Moe):
        super().__init__()
        count, hidden, width = sub_block.num_experts, sub_block.expert_size, sub_block.moe_intermediate_size
        known: dict[str, Any] = {"relu2": relu2, "swiglu_oai": None, **ACTIVATIONS}  # None: of gate and up together
        self.activation = known[sub_block.activation]
        self.activation_name, self.biased = sub_block.activation, sub_block.bias
        for name in sub_block.matrices:
            shape = (count, hidden, width) if name == "down_proj" else (count, width, hidden)
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(shape[:2])) if sub_block.bias else None)
        self.gated = "gate_proj" in sub_block.matrices

    def product(self, name: str, rows: Tensor, ends: Tensor) -> Tensor:
        """Every expert's rows times its matrix of this name, with its bias."""
        out, bias = by_expert(rows, getattr(self, name), ends), getattr(self, f"{name}_bias")
        return out if bias is None else out + bias[owners(rows, ends)].to(out.dtype)

    def channels(self, rows: Tensor, ends: Tensor) -> Tensor:
        """What down_proj reads. rows [M, H], those of an expert together, `ends` [E] after its last -> [M, F]"""
        up = self.product("up_proj", rows, ends)
        if not self.gated:
            return self.activation(up)
        gate = self.product("gate_proj", rows, ends)
        return swiglu_oai(gate, up) if self.activation is None else self.activation(gate) * up

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [N, H], chosen and weights [N, K] -> [N, H]. All shapes follow from x's, so that a CUDA graph can hold it."""
        order, ends = sorted_by_expert(chosen, len(self.up_proj))
        given = self.product("down_proj", self.channels(x[order // chosen.shape[1]], ends), ends)
        return self.summed(given, order, weights)

    @staticmethod
    def summed(given: Tensor, order: Tensor, weights: Tensor) -> Tensor:
        """What experts gave, in `order`, back to their tokens [M, H], times the weights [N, K] -> [N, H]"""
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return (given[back].view(*weights.shape, -1) * weights[..., None].to(given.dtype)).sum(1)


def sorted_by_expert(chosen: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Places in chosen.flatten() with those of an expert together [N·K], and where each expert's end [E]."""
    flat = chosen.flatten()
    counts = torch.zeros(num_experts, dtype=torch.long, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
    return flat.argsort(stable=True), counts.cumsum(0)


def by_expert(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Every expert's rows times its matrix. rows [M, I], weight [E, O, I], ends [E] -> [M, O]

    On a GPU in bf16 one grouped product, which needs sizes that are multiples of 8 and never waits; else expert by expert, and in a CUDA
    graph, where nobody can wait for their numbers, every row by every expert.
    """
    kind = rows.device.type
    if torch.is_autocast_enabled(kind):
        rows, weight = rows.to(torch.get_autocast_dtype(kind)), weight.to(torch.get_autocast_dtype(kind))
    aligned = weight.shape[1] % 8 == 0 and weight.shape[2] % 8 == 0
    if rows.is_cuda and rows.dtype == torch.bfloat16 and aligned:
        return torch._grouped_mm(rows, weight.transpose(-2, -1), offs=ends.int())
    if capturing(rows):
        owner = owners(rows, ends)
        out = rows.new_zeros(len(rows), weight.shape[1])
        for index, matrix in enumerate(weight.unbind()):
            out = out + F.linear(rows, matrix).masked_fill((owner != index)[:, None], 0)
        return out
    begins = [0, *ends.tolist()]
    pairs = zip(rows.split([b - a for a, b in pairwise(begins)]), weight.unbind(), strict=True)  # one gradient for all
    return torch.cat([F.linear(some, matrix) for some, matrix in pairs if len(some)])


def owners(rows: Tensor, ends: Tensor) -> Tensor:
    """The expert of every row. [M]"""
    return torch.searchsorted(ends, torch.arange(len(rows), dtype=ends.dtype, device=rows.device), right=True)


def capturing(rows: Tensor) -> bool:
    """Whether a CUDA graph is recorded."""
    return rows.is_cuda and torch.cuda.is_current_stream_capturing()


class SharedExpert(nn.Module):
    """The FFN that every token has. [N, H] -> [N, H]"""

    def __init__(self, sub_block: Moe):
        super().__init__()
        hidden, width = sub_block.hidden_size, sub_block.shared_intermediate_size
        assert width is not None
        self.activation = relu2 if sub_block.activation == "relu2" else ACTIVATIONS[sub_block.activation]
        if sub_block.activation != "relu2":
            self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)
        self.gated = sub_block.activation != "relu2"

    def channels(self, x: Tensor) -> Tensor:
        return self.activation(self.gate_proj(x)) * self.up_proj(x) if self.gated else self.activation(self.up_proj(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.channels(x))


class SparseMoe(Part):
    """Σ_k g_k · expert_k(n) + shared(n) of the normed input n."""

    def __init__(self, sub_block: Moe):
        super().__init__(sub_block)
        self.gate = Router(sub_block)
        self.experts = Experts(sub_block)
        if sub_block.latent_size is not None:
            self.fc1_latent_proj = nn.Linear(sub_block.hidden_size, sub_block.latent_size, bias=False)
            self.fc2_latent_proj = nn.Linear(sub_block.latent_size, sub_block.hidden_size, bias=False)
        if sub_block.shared_intermediate_size is not None:
            self.shared_expert = SharedExpert(sub_block)
        if sub_block.shared_gate:
            self.shared_expert_gate = nn.Linear(sub_block.hidden_size, 1, bias=False)
        self._load: Tensor | None = None
        self.finish()

    def inner(self, entered: Tensor, ropes: Ropes) -> Tensor:
        return self.mixed(entered.flatten(0, -2)).view(entered.shape)

    def read(self, x: Tensor) -> Tensor:
        """What experts read. [N, H] -> [N, H or L]"""
        return self.fc1_latent_proj(x) if hasattr(self, "fc1_latent_proj") else x

    def given(self, out: Tensor) -> Tensor:
        """What becomes of what they give. [M, H or L] -> [M, H]"""
        return self.fc2_latent_proj(out) if hasattr(self, "fc2_latent_proj") else out

    def mixed(self, x: Tensor, run: Callable[..., Tensor] | None = None) -> Tensor:
        """[N, H] -> [N, H]. run: the experts (module, x, chosen, weights), in place of their own forward."""
        routed = (self.read(x), *self.gate(x))
        return self.beside(self.given(self.experts(*routed) if run is None else run(self.experts, *routed)), x)

    def beside(self, out: Tensor, x: Tensor) -> Tensor:
        """With what the shared expert, if there is one, makes of x added. [N, H] -> [N, H]"""
        if not hasattr(self, "shared_expert"):
            return out
        shared = self.shared_expert(x)
        return out + (self.shared_expert_gate(x).sigmoid() * shared if hasattr(self, "shared_expert_gate") else shared)

    @torch.no_grad()
    def watch(self, x: Tensor) -> None:
        counts = sorted_by_expert(self.gate(self.enter(x).flatten(0, -2))[0], len(self.gate.weight))[1].diff(
            prepend=torch.zeros(1, dtype=torch.long, device=x.device)
        )
        self._load = counts if self._load is None else self._load + counts

    def watched(self) -> dict[str, Any]:
        """expert_load: the share of all choices that each expert has, so that 1/E is even."""
        load, self._load = self._load, None
        return {} if load is None else {"expert_load": [round(s, 6) for s in (load / load.sum()).tolist()]}

    @torch.no_grad()
    def calibrate(self, inputs: list[Tensor]) -> MoeStatistics:
        own, device = self.sub_block, inputs[0].device
        assert isinstance(own, Moe)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        count = own.num_experts
        found = MoeStatistics(
            num_tokens=0,
            channel_sum=zeros(own.shared_intermediate_size or 0),
            routed=zeros(count),
            weight=zeros(count),
            added=zeros(count),
            channels=zeros(count, own.moe_intermediate_size),
            shared_weight=zeros(),
        )
        for x in inputs:
            entered = self.enter(x).flatten(0, -2)
            chosen, weights = self.gate(entered)
            order, ends = sorted_by_expert(chosen, count)
            channels = self.experts.channels(self.read(entered)[order // chosen.shape[1]], ends)
            norms = self.given(self.experts.product("down_proj", channels, ends)).double().norm(dim=-1)
            g, expert = weights.flatten()[order].double(), chosen.flatten()[order]
            found.routed.index_add_(0, expert, torch.ones_like(g))
            found.weight.index_add_(0, expert, g)
            found.added.index_add_(0, expert, g * norms)
            found.channels.index_add_(0, expert, g[:, None] * channels.double().abs())
            if own.shared_intermediate_size is not None:
                gate = (
                    self.shared_expert_gate(entered).sigmoid().double()
                    if own.shared_gate
                    else zeros(len(entered), 1) + 1
                )
                found.channel_sum += (gate * self.shared_expert.channels(entered).double().abs()).sum(0)
                found.shared_weight += gate.sum()
            found.num_tokens += len(entered)
        return found
