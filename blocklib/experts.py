"""How a smaller mixture of experts, or a dense FFN in its place, starts from the parent's weights.

Letters: H hidden_size, E experts, F channels of an expert, M experts kept, W channels kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from puzzle.blocklib.moments import Statistics
from puzzle.blocklib.sub_block import ParentBlock

ROUTER = ("gate.weight", "gate.bias", "gate.e_score_correction_bias")
WHOLE = ("gate.weight", "gate.bias", "experts.down_proj_bias")  # what has no channels, where experts are merged


@dataclass(kw_only=True, slots=True)
class MoeStatistics(Statistics):
    """With what experts did, summed over the tokens that each was chosen for; `channel_sum` [S] is of the shared expert.

    routed [E]: how many tokens. weight [E]: Σ g, the router's weight. added [E]: Σ g·‖expert's output‖₂. channels [E, F]: Σ g·|x_i|.
    shared_weight []: Σ of what the shared expert is multiplied by, over all tokens; `channel_sum` has it too.
    """

    routed: Tensor
    weight: Tensor
    added: Tensor
    channels: Tensor
    shared_weight: Tensor


def smaller(block: ParentBlock, wanted: Any, how: str) -> dict[str, Tensor]:
    """Fewer experts, by `how` ("experts", "frequent" or "merged"), narrower ones, or a narrower shared one; float32. wanted: a `Moe`."""
    own: Any = block.sub_block
    weights = {name: tensor.float().clone() for name, tensor in block.weights.items()}
    if wanted.moe_intermediate_size < own.moe_intermediate_size:
        narrow(weights, _statistics(block), wanted.moe_intermediate_size)
    if wanted.num_experts < own.num_experts:
        found = _statistics(block)
        score = found.routed if how == "frequent" else saliency(found)
        kept = best_of_groups(score, wanted.num_experts, own.num_groups).to(weights["gate.weight"].device)
        if how == "merged":
            merge(weights, found.routed, kept)
        for name in (*ROUTER, *(n for n in weights if n.startswith("experts."))):
            if name in weights:
                weights[name] = weights[name][kept]
    width = wanted.shared_intermediate_size
    if width is not None and width < (own.shared_intermediate_size or 0):
        found, down = _statistics(block), weights["shared_expert.down_proj.weight"]
        keep = (found.channel_sum.to(down) * down.norm(dim=0)).argsort(descending=True, stable=True)[:width]
        for name in own.matrices:
            full = weights[f"shared_expert.{name}.weight"]
            weights[f"shared_expert.{name}.weight"] = full[:, keep] if name == "down_proj" else full[keep]
    return weights


def saliency(found: MoeStatistics) -> Tensor:
    """The mean over an expert's tokens of the router's weight times the norm of its output (REAP, arXiv 2510.13999). [E]"""
    return found.added / found.routed.clamp(min=1)


def best_of_groups(score: Tensor, count: int, num_groups: int) -> Tensor:
    """The `count` experts with the highest score, as many from each group, in the parent's order. [E] -> [M]"""
    grouped = score.view(num_groups, -1)
    best = grouped.argsort(dim=-1, descending=True, stable=True)[:, : count // num_groups].sort(dim=-1)[0]
    return (best + torch.arange(num_groups, device=score.device)[:, None] * grouped.shape[1]).flatten()


def merge(weights: dict[str, Tensor], frequency: Tensor, kept: Tensor) -> None:
    """Every other expert goes into the kept one whose row in the router is the most like its own: means weighted by frequency, each
    channel with the one of the kept expert that its weights are the most like (fix-dom merging, HC-SMoE, arXiv 2410.08589)."""
    rows = torch.nn.functional.normalize(weights["gate.weight"], dim=-1)
    into = (rows @ rows[kept].T).argmax(-1)
    share = frequency.to(rows) + 1e-6
    names = [n for n in weights if n.startswith("experts.") or n in WHOLE]
    for place, centre in enumerate(kept.tolist()):
        others = [e for e in (into == place).nonzero().flatten().tolist() if e not in set(kept.tolist())]
        total = share[centre] + sum(share[e] for e in others)
        like = _channels(weights, centre)
        sums = {n: weights[n][centre] * share[centre] for n in names}
        for other in others:
            match = (like @ _channels(weights, other).T).argmax(-1)  # of every channel of the kept one
            for n in names:
                full = weights[n][other]
                like_it = full if n in WHOLE else full[:, match] if n.endswith("down_proj") else full[match]
                sums[n] += like_it * share[other]
        for n, value in sums.items():
            weights[n][centre] = value / total


def _channels(weights: dict[str, Tensor], expert: int) -> Tensor:
    """All that an expert's channels are, each of length 1. [F, 2H or 3H]"""
    own = {n: w[expert] for n, w in weights.items() if n.startswith("experts.") and n not in WHOLE}
    sides = [w[:, None] if n.endswith("bias") else w.T if n.endswith("down_proj") else w for n, w in own.items()]
    return torch.nn.functional.normalize(torch.cat(sides, dim=1), dim=-1)


def narrow(weights: dict[str, Tensor], found: MoeStatistics, width: int) -> None:
    """Every expert's most contributing channels, Σ g·|x_i| · ‖W_down[:, i]‖₂, the most contributing first."""
    reach = _reach(weights)
    keep = (found.channels.to(reach) * reach).argsort(dim=-1, descending=True, stable=True)[:, :width]
    for name in [n for n in weights if n.startswith("experts.") and n not in WHOLE]:
        dim = 2 if name.endswith("down_proj") else 1
        index = keep if name.endswith("bias") else keep[:, None, :] if dim == 2 else keep[:, :, None]
        weights[name] = weights[name].gather(
            dim, index.expand(*(-1 if d == dim else s for d, s in enumerate(weights[name].shape)))
        )


def _reach(weights: dict[str, Tensor]) -> Tensor:
    """The length of what each channel adds when it is 1, of latent experts after their second matrix. [E, F]"""
    down, back = weights["experts.down_proj"], weights.get("fc2_latent_proj.weight")
    if back is None:
        return down.norm(dim=1)
    return (down * ((back.T @ back) @ down)).sum(dim=1).clamp(min=0).sqrt()


def as_dense(block: ParentBlock, width: int) -> dict[str, Tensor]:
    """An FFN of the `width` channels of all experts, the shared one among them, that contribute most over all tokens. What a channel
    gives is multiplied by the mean weight that the router gives its expert, over all tokens: those that it was not chosen for count as 0."""
    own: Any = block.sub_block
    found = _statistics(block)
    weights = {name: tensor.float() for name, tensor in block.weights.items()}
    mean = (found.weight / found.num_tokens).to(weights["gate.weight"])
    reach = _reach(weights)
    score, count = (found.channels.to(reach) * reach).flatten(), reach.numel()
    if own.shared_intermediate_size is not None:
        shared = weights["shared_expert.down_proj.weight"]
        score = torch.cat((score, found.channel_sum.to(shared) * shared.norm(dim=0)))
        weights["shared_expert.down_proj.weight"] = shared * (found.shared_weight / found.num_tokens).to(shared)
    weights["experts.down_proj"] = weights["experts.down_proj"] * mean[:, None, None]
    keep = score.argsort(descending=True, stable=True)[:width]
    routed = keep < count
    dense = {n: t for n, t in weights.items() if n in ("norm.weight", "post_norm.weight")}
    for name in own.matrices:
        turned = name == "down_proj"  # a channel is a column there
        side = (weights[f"experts.{name}"].mT if turned else weights[f"experts.{name}"]).flatten(0, 1)[keep[routed]]
        if own.latent_size is not None:
            side = side @ (weights["fc2_latent_proj.weight"].T if turned else weights["fc1_latent_proj.weight"])
        rows = side.new_empty(len(keep), own.hidden_size)
        rows[routed] = side
        if own.shared_intermediate_size is not None:
            shared = weights[f"shared_expert.{name}.weight"]
            rows[~routed] = (shared.T if turned else shared)[keep[~routed] - count]
        dense[f"{name}.weight"] = rows.T.contiguous() if turned else rows
    return dense


def _statistics(block: ParentBlock) -> MoeStatistics:
    found = block.calibrated("a smaller mixture of experts")
    assert isinstance(found, MoeStatistics)
    return found
