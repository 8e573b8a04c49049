"""The mixture of experts of `modeling_puzzle.py`: a router picks some of many small FFNs for every token, and adds up what they give.

Letters: N tokens, E hidden_size, X num_experts, K num_experts_per_tok, F moe_intermediate_size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

ALPHA, LIMIT = 1.702, 7.0  # of swiglu_oai


def gated(act: str, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) · up, or the clamped SwiGLU of gpt-oss."""
    if act != "swiglu_oai":
        return ACT2FN[act](gate) * up
    gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
    return (up + 1) * (gate * (ALPHA * gate).sigmoid())


class PuzzleRouter(nn.Module):
    """x [N, E] -> (experts [N, K], their weights [N, K] in float32). Softmax over all experts, or sigmoid of each with a bias that
    chooses alone and groups of experts, of which the best are looked at, by the sum of their two best scores."""

    def __init__(self, config: Any):
        super().__init__()
        if config.router not in ("softmax", "sigmoid"):
            raise ValueError(f"router '{config.router}' is not understood: softmax and sigmoid are")
        self.config, size = config, (config.num_experts, config.hidden_size)
        self.weight = nn.Parameter(nn.init.normal_(torch.empty(size), std=0.02))
        self.bias = nn.Parameter(torch.zeros(size[0])) if config.moe_bias else None
        if config.correction_bias:
            self.e_score_correction_bias = nn.Parameter(torch.zeros(size[0]), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        config, soft = self.config, self.config.router == "softmax"
        if soft:
            scores = F.linear(x, self.weight, self.bias).softmax(-1, dtype=torch.float32)
        else:
            bias = None if self.bias is None else self.bias.float()
            scores = F.linear(x.float(), self.weight.float(), bias).sigmoid()
        choice = scores + self.e_score_correction_bias if config.correction_bias else scores
        if config.n_group > 1:
            grouped = choice.unflatten(-1, (config.n_group, -1))
            best = grouped.topk(2, dim=-1)[0].sum(-1).topk(config.topk_group, dim=-1)[1]
            outside = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, False)
            choice = grouped.masked_fill(outside[..., None], -torch.inf).flatten(-2)
        chosen = choice.topk(config.num_experts_per_tok, dim=-1)[1]
        weights = scores.gather(1, chosen)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + (0 if soft else 1e-20))
        return chosen, weights * config.routed_scaling_factor


class PuzzleExperts(nn.Module):
    """All experts, stacked: gate_proj and up_proj [X, F, E], down_proj [X, E, F]; without a gate where the activation is relu2, and with
    `moe_bias` a bias of each. With moe_latent_size, that stands for E here."""

    gate_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor

    def __init__(self, config: Any):
        super().__init__()
        count, width = config.num_experts, config.moe_intermediate_size
        size = config.moe_latent_size or config.hidden_size
        self.act, self.gated = config.hidden_act, config.hidden_act != "relu2"
        for name in ("gate_proj", "up_proj", "down_proj")[not self.gated :]:
            shape = (count, size, width) if name == "down_proj" else (count, width, size)
            setattr(self, name, nn.Parameter(nn.init.normal_(torch.empty(shape), std=0.02)))
            setattr(self, f"{name}_bias", nn.Parameter(torch.zeros(shape[:2])) if config.moe_bias else None)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [N, E], chosen and weights [N, K] -> [N, E]"""
        out, own = torch.zeros_like(x), {name: p.unbind() for name, p in self.named_parameters(recurse=False)}

        def product(rows: Tensor, name: str, expert: int) -> Tensor:
            return F.linear(rows, own[name][expert], own[f"{name}_bias"][expert] if f"{name}_bias" in own else None)

        for expert in chosen.unique().tolist():
            token, place = (chosen == expert).nonzero(as_tuple=True)
            rows = x[token]
            up = product(rows, "up_proj", expert)
            inner = gated(self.act, product(rows, "gate_proj", expert), up) if self.gated else ACT2FN[self.act](up)
            given = product(inner, "down_proj", expert) * weights[token, place, None].to(x.dtype)
            out.index_add_(0, token, given.to(out.dtype))
        return out


class PuzzleExpert(nn.Module):
    """One of `width` channels. [N, E] -> [N, E]"""

    def __init__(self, config: Any, width: int, size: int | None = None):
        super().__init__()
        size = size or config.hidden_size
        self.act, self.gated = ACT2FN[config.hidden_act], config.hidden_act != "relu2"
        if self.gated:
            self.gate_proj = nn.Linear(size, width, bias=False)
        self.up_proj = nn.Linear(size, width, bias=False)
        self.down_proj = nn.Linear(width, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        return self.down_proj(self.act(self.gate_proj(x)) * up if self.gated else self.act(up))


class PuzzleMoE(nn.Module):
    """[B, T, E] -> [B, T, E]"""

    def __init__(self, config: Any):
        super().__init__()
        self.gate, self.experts = PuzzleRouter(config), PuzzleExperts(config)
        size, latent, shared = config.hidden_size, config.moe_latent_size, config.shared_expert_intermediate_size
        self.fc1_latent_proj = nn.Linear(size, latent, bias=False) if latent else nn.Identity()
        self.fc2_latent_proj = nn.Linear(latent, size, bias=False) if latent else nn.Identity()
        self.shared_expert = PuzzleExpert(config, shared) if shared else None
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if config.shared_expert_gate else None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        out = self.fc2_latent_proj(self.experts(self.fc1_latent_proj(flat), *self.gate(flat)))
        if self.shared_expert is not None:
            shared = self.shared_expert(flat)
            out = out + (
                shared if self.shared_expert_gate is None else self.shared_expert_gate(flat).sigmoid() * shared
            )
        return out.view(x.shape)
