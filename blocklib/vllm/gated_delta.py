"""Gated DeltaNet in vLLM, by the layer of its Qwen3.5. Letters: T tokens, H hidden_size."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace

from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import QwenGatedDeltaNetAttention
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from puzzle.blocklib.gated_delta import GatedDelta
from puzzle.blocklib.vllm.place import Place

# Of the rows of our in_proj, in order: the matrix of vLLM's that has them, and their place in it.
ROWS = (("qkvz", 3), ("qkvz", 0), ("qkvz", 1), ("qkvz", 2), ("ba", 0), ("ba", 1))


class VllmDelta(QwenGatedDeltaNetAttention):
    """vLLM's layer with its own state cache, of this layer's sizes."""

    def __init__(self, sub_block: GatedDelta, place: Place):
        for name in ("num_key_heads", "num_value_heads"):
            place.check_divides(getattr(sub_block, name), name)
        sizes = SimpleNamespace(
            hidden_size=sub_block.hidden_size,
            hidden_act="silu",
            rms_norm_eps=sub_block.norm_eps,
            linear_num_key_heads=sub_block.num_key_heads,
            linear_key_head_dim=sub_block.key_dim,
            linear_num_value_heads=sub_block.num_value_heads,
            linear_value_head_dim=sub_block.value_dim,
            linear_conv_kernel_dim=sub_block.conv_width,
        )
        super().__init__(sizes, get_current_vllm_config(), prefix=place.prefix, gqa_interleaved_layout=False)
        self.rows = sub_block.parts()["in_proj"]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """By name inside this module; the names of vLLM's own that were loaded."""
        own, found = dict(self.named_parameters()), set()
        for name, tensor in weights:
            if name == "in_proj.weight":
                for (matrix, place), rows in zip(ROWS, tensor.split(self.rows), strict=True):
                    found.add(f"in_proj_{matrix}.weight")
                    parameter = own[f"in_proj_{matrix}.weight"]
                    parameter.weight_loader(parameter, rows, place)
            else:
                found.add(name)
                getattr(own[name], "weight_loader", default_weight_loader)(own[name], tensor)
        return found

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)
