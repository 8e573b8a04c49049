"""A whole causal model in memory: embedding, sub-blocks of any variant, final norm, LM head.

One class serves the parent, the child and every "one block replaced" model in between.
Letters: B batch, T tokens, H hidden_size, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puzzle.blocklib.layer import KINDS, Kind, LayerSpec, rope_tables
from puzzle.blocklib.modules import Attention, Linear, NoOp, RMSNorm, Rope, SwiGLU
from puzzle.blocklib.variant import parent_variant
from puzzle.parents.family import HfModel, hf_name, open_model

OWNERS: dict[Kind, str] = {"attention": "attention", "ffn": "mlp"}  # of a sub-block's fields in `per_layer_config`


class Block(nn.Module):
    """x + attention(x), then + ffn of that. [B, T, H] -> [B, T, H]"""

    def __init__(self, attention: nn.Module, ffn: nn.Module):
        super().__init__()
        self.attention, self.ffn = attention, ffn

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        for part in (self.attention, self.ffn):
            if not isinstance(part, NoOp):
                x = x + part(x, rope)
        return x


class CausalModel(nn.Module):
    """Embedding, blocks, final norm, head; tied heads share the embedding's tensor."""

    def __init__(
        self, spec: LayerSpec, embedding: Tensor, blocks: list[Block], final_norm: Tensor, head: Tensor | None
    ):
        super().__init__()
        self.spec = spec
        self.embedding = nn.Embedding.from_pretrained(embedding, freeze=False)
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.norm.weight.data = final_norm
        self.head = nn.Parameter(head) if head is not None else None

    @property
    def head_weight(self) -> Tensor:
        """[V, H]"""
        return self.embedding.weight if self.head is None else self.head

    def rope(self, length: int) -> Rope:
        return rope_tables(self.spec, length, self.embedding.weight.device)

    def hidden(self, ids: Tensor) -> Tensor:
        """Residual stream after the last block, before the final norm. ids [B, T] -> [B, T, H]"""
        rope = self.rope(ids.shape[1])
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, rope)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V]"""
        return F.linear(self.norm(hidden), self.head_weight)

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits(self.hidden(ids))

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, tensor) of every weight, layer by layer; a tied head is left out."""
        yield "model.embed_tokens.weight", self.embedding.weight
        for index, block in enumerate(self.blocks):
            for kind in KINDS:
                for name, tensor in getattr(block, kind).state_dict().items():
                    yield hf_name(index, kind, name), tensor
        yield "model.norm.weight", self.norm.weight
        if self.head is not None:
            yield "lm_head.weight", self.head


def module_from_hf(kind: Kind, entry: dict, spec: LayerSpec) -> nn.Module:
    """An empty module of the shape that one layer's `per_layer_config` entry asks for."""
    owner = OWNERS[kind]
    if owner in entry.get("skip", []):
        return NoOp()
    if owner in entry.get("linear", []):
        return Linear(spec)
    if kind == "attention":
        kv = entry.get("num_key_value_heads", spec.num_key_value_heads)
        return Attention(spec, kv, entry.get("sliding_window", spec.window))
    return SwiGLU(spec, entry.get("intermediate_size", spec.intermediate_size))


def block_from_hf(index: int, entry: dict, spec: LayerSpec, tensor: Callable[[str], Tensor]) -> Block:
    """Layer `index` in the shape of its `per_layer_config` entry. tensor: its weights by Hugging Face name, as they will run."""
    parts = []
    for kind in KINDS:
        with torch.device("meta"):
            module = module_from_hf(kind, entry, spec)
        weights = {name: tensor(hf_name(index, kind, name)) for name in module.state_dict()}
        module.load_state_dict(weights, assign=True)
        parts.append(module)
    return Block(parts[0], parts[1])


def load_model(
    source: str | Path | HfModel, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> CausalModel:
    """A parent or an exported child, whole, on `device`. Raises UserError as `open_model` does."""
    opened = source if isinstance(source, HfModel) else open_model(source)
    entries = {int(i): e for i, e in (opened.config.get("per_layer_config") or {}).items()}
    blocks = [
        block_from_hf(i, entries.get(i, {}), opened.spec, lambda name: opened.checkpoint.tensor(name).to(device, dtype))
        for i in range(opened.num_layers)
    ]
    model = CausalModel(
        opened.spec,
        opened.embedding().to(device, dtype),
        blocks,
        opened.final_norm().to(device, dtype),
        None if opened.tied else opened.lm_head().to(device, dtype),
    )
    return model.requires_grad_(False).eval()


def parent_module(kind: Kind, spec: LayerSpec, weights: dict[str, Tensor]) -> nn.Module:
    """The parent's own sub-block, sharing `weights`."""
    with torch.device("meta"):
        module = parent_variant(kind, spec).empty(spec)
    module.load_state_dict(weights, assign=True)
    return module.requires_grad_(False).eval()
