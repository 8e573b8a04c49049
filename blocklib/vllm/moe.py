"""The mixture of experts in vLLM: its own fused experts, of which each layer may have another number, width and top-k.

Letters: T tokens, H hidden_size, E experts, F channels of an expert.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
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
    Those of gpt-oss, clamped and with biases, too. Raises ValueError for what is not served: sigmoids without a correction bias, a softmax
    with one, other activations, experts that are spread over ranks, and quantised ones."""

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
            (sub_block.activation not in ("silu", "relu2", "swiglu_oai"), f"experts with {sub_block.activation}"),
            (
                sub_block.bias != (sub_block.activation == "swiglu_oai") or (sub_block.bias and not soft),
                f"experts with {sub_block.activation}, {sub_block.router} and bias {sub_block.bias}",
            ),
            (
                sub_block.bias
                and current_platform.is_cpu()
                and sub_block.moe_intermediate_size // place.num_ranks % 32 != 0,
                "clamped experts on a CPU, where vLLM has widths of multiples of 32 alone,",
            ),
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
        self.scale, self.width = sub_block.routed_scaling_factor, sub_block.moe_intermediate_size // place.num_ranks
        exact: dict[str, Any] = {} if soft else {"out_dtype": torch.float32, "force_fp32_compute": True}  # as its bias
        self.gate: nn.Module
        if sub_block.bias:  # of which not every kernel of GateLinear knows
            self.gate = ReplicatedLinear(hidden, sub_block.num_experts, bias=True, **place.layer("gate"))
        else:
            self.gate = fused_moe.GateLinear(hidden, sub_block.num_experts, prefix=f"{place.prefix}.gate", **exact)
        routing: dict[str, Any] = {}
        if not soft:
            bias = nn.Parameter(torch.empty(sub_block.num_experts, dtype=torch.float32), requires_grad=False)
            self.gate.e_score_correction_bias = bias
            groups = {"num_expert_group": sub_block.num_groups, "topk_group": sub_block.num_topk_groups}
            routing = {"use_grouped_topk": True, "scoring_func": "sigmoid", "e_score_correction_bias": bias, **groups}
        if sub_block.activation == "relu2":
            routing |= NO_GATE
        elif sub_block.activation == "swiglu_oai":
            routing |= {"activation": "swigluoai", "has_bias": True}
            self.load_weights = self.load_in_turn
        self.experts = make_experts(
            num_experts=sub_block.num_experts,
            top_k=sub_block.num_experts_per_tok,
            hidden_size=sub_block.expert_size,
            intermediate_size=sub_block.moe_intermediate_size,
            renormalize=sub_block.norm_topk_prob,
            prefix=f"{place.prefix}.experts",
            **routing,
        )
        if sub_block.bias:  # where vLLM makes room for more than is loaded
            for parameter in self.experts.parameters():
                parameter.data.zero_()
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

    def load_in_turn(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Of experts with biases: vLLM's clamped activation wants rows of gate and up in turn (`MoEActivation.SWIGLUOAI`), on every rank those
        of its channels. Names and tensors of `one_by_one`, some of them; returns the names of the parameters that they went to."""
        own, seen, rank = dict(self.named_parameters()), set(), get_tensor_model_parallel_rank()
        experts = {name.rpartition(".")[2]: name for name in own if name.startswith("experts.")}
        for name, tensor in weights:
            owner, _, inside = name.partition(".")
            if owner == "gate":
                own[name].data.copy_(tensor)
                seen.add(name)
                continue
            index, _, matrix = inside.removesuffix(".weight").rpartition(".")  # "7" of a matrix, "" of all biases
            down, bias = matrix.startswith("down_proj"), matrix.endswith("_bias")
            param = experts[f"{'w2' if down else 'w13'}_{'bias' if bias else 'weight'}"]
            into = own[param].data[int(index)] if index else own[param].data
            dim = tensor.ndim - 1 if bias or down else 0
            if down and bias:  # ranks are added up
                tensor = torch.zeros_like(tensor) if rank else tensor
            else:
                tensor = tensor.narrow(dim, rank * self.width, self.width)
            if not down:
                turns = into.narrow(dim, 0, 2 * self.width).unflatten(dim, (-1, 2))
                into = turns.select(dim + 1, int(matrix.startswith("up")))
            into[tuple(slice(0, length) for length in tensor.shape)].copy_(tensor)
            seen.add(param)
        return seen

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
