"""Mamba-2 in vLLM. Letters: T tokens, H hidden_size."""

from __future__ import annotations

from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2

from puzzle.blocklib.mamba2 import Mamba2
from puzzle.blocklib.vllm.place import Place


class VllmMamba(MambaMixer2):
    """vLLM's mixer with its own state cache, of this layer's sizes."""

    def __init__(self, sub_block: Mamba2, place: Place):
        place.check_divides(sub_block.num_heads, "num_heads")
        if sub_block.num_groups != 1:
            place.check_divides(sub_block.num_groups, "num_groups")
        super().__init__(
            hidden_size=sub_block.hidden_size,
            ssm_state_size=sub_block.state_size,
            conv_kernel_size=sub_block.conv_width,
            intermediate_size=sub_block.inner_size,
            use_conv_bias=sub_block.conv_bias,
            use_bias=sub_block.bias,
            n_groups=sub_block.num_groups,
            num_heads=sub_block.num_heads,
            head_dim=sub_block.head_dim,
            rms_norm_eps=sub_block.norm_eps,
            activation="silu",
            model_config=get_current_vllm_config().model_config,
            cache_config=place.cache_config,
            quant_config=place.quant_config,
            prefix=place.prefix,
        )

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)
