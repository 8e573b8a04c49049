"""The mixture of experts in vLLM: its own fused experts, of which each layer may have another number, width and top-k.

Letters: T tokens, H hidden_size, E experts, F channels of an expert.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers import fused_moe
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.platforms import current_platform

from puzzle.blocklib.moe import LATENT, Moe
from puzzle.blocklib.vllm.place import Place

SINCE = getattr(fused_moe, "FusedMoEFactory", None)  # what vLLM 0.32 calls it, and 0.26 FusedMoE
make_experts: Any = SINCE or fused_moe.FusedMoE
NO_GATE = {"activation": "relu2_no_mul", "ckpt_names": ("up_proj", "down_proj", None if SINCE else "")}


class VllmMoe(nn.Module):
    """Routed experts with silu, or with squared ReLUs and no gate (which vLLM has on GPUs alone), and the shared one as an FFN beside them.
    Raises ValueError for what is not served: sigmoids without a correction bias, a softmax with one, other activations, experts that are
    spread over ranks, and quantised ones."""

    fc1_latent_proj: Any
    fc2_latent_proj: Any

    def __init__(self, sub_block: Moe, place: Place):
        super().__init__()
        hidden, shared = sub_block.hidden_size, sub_block.shared_intermediate_size
        place.check_divides(sub_block.moe_intermediate_size, "moe_intermediate_size")
        parallel, soft = get_current_vllm_config().parallel_config, sub_block.router == "softmax"
        for wrong, what in (
            (
                soft == sub_block.correction_bias,
                f"{sub_block.router} router with correction_bias {sub_block.correction_bias}",
            ),
            (sub_block.activation not in ("silu", "relu2"), f"experts with {sub_block.activation}"),
            (
                sub_block.activation == "relu2" and current_platform.is_cpu(),
                "experts with relu2 on a CPU, which vLLM lacks,",
            ),
            (place.quant_config is not None, "quantised experts"),
            (parallel.enable_expert_parallel, "--enable-expert-parallel"),
            (parallel.enable_eplb, "--enable-eplb"),
        ):
            if wrong:
                raise ValueError(f"{place.prefix}: puzzle's plug-in has no {what} for mixtures of experts yet")
        self.scale = sub_block.routed_scaling_factor
        exact: dict[str, Any] = {} if soft else {"out_dtype": torch.float32, "force_fp32_compute": True}  # as its bias
        self.gate = fused_moe.GateLinear(hidden, sub_block.num_experts, prefix=f"{place.prefix}.gate", **exact)
        routing: dict[str, Any] = {}
        if not soft:
            bias = nn.Parameter(torch.empty(sub_block.num_experts, dtype=torch.float32), requires_grad=False)
            self.gate.e_score_correction_bias = bias
            groups = {"num_expert_group": sub_block.num_groups, "topk_group": sub_block.num_topk_groups}
            routing = {"use_grouped_topk": True, "scoring_func": "sigmoid", "e_score_correction_bias": bias, **groups}
        if sub_block.activation == "relu2":
            routing |= NO_GATE
        self.experts = make_experts(
            num_experts=sub_block.num_experts,
            top_k=sub_block.num_experts_per_tok,
            hidden_size=sub_block.expert_size,
            intermediate_size=sub_block.moe_intermediate_size,
            renormalize=sub_block.norm_topk_prob,
            prefix=f"{place.prefix}.experts",
            **routing,
        )
        if (latent := sub_block.latent_size) is not None:
            for name, (rows, columns) in zip(LATENT, ((latent, hidden), (hidden, latent)), strict=True):
                self.add_module(name, ReplicatedLinear(columns, rows, bias=False, **place.layer(name)))
        self.latent = latent is not None
        self.shared_expert: nn.Module | None = None
        self.shared_expert_gate: nn.Module | None = None
        if shared is not None:
            own = replace(place, prefix=f"{place.prefix}.shared_expert")
            self.shared_expert = sub_block.dense(shared).in_vllm(own)
        if sub_block.shared_gate:
            self.shared_expert_gate = ReplicatedLinear(hidden, 1, bias=False, **place.layer("shared_expert_gate"))

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        logits, _ = self.gate(x)
        read = self.fc1_latent_proj(x)[0] if self.latent else x
        out = self.experts(hidden_states=read, router_logits=logits)
        out = self.fc2_latent_proj(out)[0] if self.latent else out
        out = out if self.scale == 1 else out * self.scale
        if self.shared_expert is None:
            return out
        shared = self.shared_expert(positions, x)
        return out + (shared if self.shared_expert_gate is None else self.shared_expert_gate(x)[0].sigmoid() * shared)


def one_by_one(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """A tensor of a child under the names that vLLM loads: stacked experts [E, …] one by one, everything else as it is."""
    head, middle, matrix = name.partition(".experts.")
    if not middle or tensor.ndim != 3:
        return [(name, tensor)]
    return [(f"{head}.experts.{index}.{matrix}.weight", expert) for index, expert in enumerate(tensor)]
