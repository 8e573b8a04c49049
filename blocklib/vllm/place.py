"""What a sub-block's face in vLLM is told of the model around it, and the norms that all kinds share.

A face is a module with `forward(positions [T], x [T, H]) -> [T, H]`: what stands between the norms, for T tokens of any sequences.
Its tensors have the names of the checkpoint, except that vLLM keeps q, k, v in `qkv_proj` and gate, up in `gate_up_proj`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

from puzzle.blocklib.sub_block import Normed


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """prefix: the name of the module, "model.layers.3.mlp"; matrix: what a single matrix in it is called. ropes: rotary embeddings by
    name. num_ranks: of tensor parallel."""

    prefix: str
    matrix: str
    quant_config: Any
    cache_config: Any
    ropes: Mapping[str, nn.Module]
    num_ranks: int

    def layer(self, name: str) -> dict[str, Any]:
        """The arguments that every layer of vLLM takes."""
        return {"quant_config": self.quant_config, "prefix": f"{self.prefix}.{name}"}

    def check_divides(self, count: int, what: str) -> None:
        """Raise ValueError where `count` of something cannot be shared by all ranks."""
        if count % self.num_ranks:
            raise ValueError(
                f"{self.prefix}: {what} {count} does not divide by tensor_parallel_size {self.num_ranks}: serve the child with fewer "
                f"ranks, or give `puzzle` variants whose {what} divide"
            )


def rms_norm(size: int, sub_block: Normed) -> nn.Module:
    """vLLM's norm with the sub-block's epsilon; with `norm_offset` the scale is 1 + weight."""
    return (GemmaRMSNorm if sub_block.norm_offset else RMSNorm)(size, eps=sub_block.norm_eps)
