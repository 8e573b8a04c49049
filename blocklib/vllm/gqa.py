"""Softmax attention in vLLM. Letters: T tokens, H hidden_size, N num_attention_heads, K num_key_value_heads, D head_dim."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.utils import set_weight_attrs

from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.vllm.place import Place, rms_norm


class SharedRMSNorm(nn.Module):
    """RMS norm over all heads together, of which this rank has `size` channels; ranks / parts of them have the same ones."""

    def __init__(self, size: int, sub_block: Gqa, num_ranks: int, num_parts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.offset, self.num_ranks = sub_block.norm_eps, int(sub_block.norm_offset), num_ranks
        self.part = get_tensor_model_parallel_rank() * num_parts // num_ranks
        set_weight_attrs(self.weight, {"weight_loader": self.load})

    def load(self, weight: nn.Parameter, whole: Tensor) -> None:
        weight.data.copy_(whole.narrow(0, self.part * len(weight), len(weight)))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        square = tensor_model_parallel_all_reduce(wide.pow(2).mean(-1, keepdim=True)) / self.num_ranks
        return (wide * torch.rsqrt(square + self.eps) * (self.offset + self.weight.float())).to(x.dtype)


def own_heads(sinks: nn.Parameter, whole: Tensor) -> None:
    """Load those of this rank's query heads."""
    sinks.data.copy_(whole.narrow(0, get_tensor_model_parallel_rank() * len(sinks), len(sinks)))


class VllmAttention(nn.Module):
    """Grouped-query softmax attention over vLLM's cache, with a window of its own, and sinks; K below the number of ranks is repeated."""

    def __init__(self, sub_block: Gqa, place: Place):
        super().__init__()
        heads, kv_heads = sub_block.num_attention_heads, sub_block.num_key_value_heads
        dim, ranks = sub_block.head_dim, place.num_ranks
        place.check_divides(heads, "num_attention_heads")
        if max(kv_heads, ranks) % min(kv_heads, ranks):
            place.check_divides(kv_heads, "num_key_value_heads")
        own, own_kv = heads // ranks, max(1, kv_heads // ranks)
        self.sizes, self.head_dim = [own * dim, own_kv * dim, own_kv * dim], dim
        self.qkv_proj = QKVParallelLinear(
            sub_block.hidden_size, dim, heads, kv_heads, bias=sub_block.qkv_bias, **place.layer("qkv_proj")
        )
        self.o_proj = RowParallelLinear(
            heads * dim, sub_block.hidden_size, bias=sub_block.o_bias, **place.layer("o_proj")
        )
        self.normed, self.by_head = sub_block.qk_norm is not None, sub_block.qk_norm == "head"
        for name, size, parts in (("q_norm", self.sizes[0], ranks), ("k_norm", self.sizes[1], min(kv_heads, ranks))):
            if self.by_head or (self.normed and ranks == 1):
                self.add_module(name, rms_norm(dim if self.by_head else size, sub_block))
            elif self.normed:
                self.add_module(name, SharedRMSNorm(size, sub_block, ranks, parts))
        self.sinks = None
        if sub_block.sinks:
            self.sinks = nn.Parameter(torch.empty(own), requires_grad=False)
            set_weight_attrs(self.sinks, {"weight_loader": own_heads})
        self.rotary_emb = None if sub_block.rope is None else place.ropes[sub_block.rope]
        self.attn = Attention(
            own,
            dim,
            dim**-0.5 if sub_block.scale is None else sub_block.scale,
            num_kv_heads=own_kv,
            cache_config=place.cache_config,
            per_layer_sliding_window=sub_block.window,
            **place.layer("attn"),
            **({} if self.sinks is None else {"sinks": self.sinks}),
        )

    def norm(self, x: Tensor, name: str) -> Tensor:
        """Of each head, or of all together. [T, heads · D] -> [T, heads · D]"""
        norm = getattr(self, name)
        return norm(x.unflatten(-1, (-1, self.head_dim))).flatten(-2) if self.by_head else norm(x.contiguous())

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(x)
        q, k, v = qkv.split(self.sizes, dim=-1)
        if self.normed:
            q, k = self.norm(q, "q_norm"), self.norm(k, "k_norm")
        if self.rotary_emb is not None:
            q, k = self.rotary_emb(positions, q, k)
        out, _ = self.o_proj(self.attn(q, k, v))
        return out
