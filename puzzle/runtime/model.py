"""A whole causal model in memory: embedding, layers of any sub-blocks, final norm, LM head.

One class serves the parent, the child, every "one block replaced" model in between, and a model with random weights, whose
times are the same. Letters: B batch, T tokens, H hidden_size, V vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puzzle.base.ranks import Ranks
from puzzle.blocklib.plain.part import Move, Part, RMSNorm, Ropes, blank, loaded, moved, moving
from puzzle.blocklib.sub_block import SubBlock
from puzzle.parents.names import EMBEDDING, FINAL_NORM, HEAD, hf_name
from puzzle.parents.opened import open_model
from puzzle.parents.structure import Structure
from puzzle.runtime.parallel import own_rows


class Block(nn.Module):
    """The sub-blocks of one layer by slot, in the order of the residual stream. [B, T, H] -> [B, T, H]"""

    def __init__(self, parts: Mapping[str, Part]):
        super().__init__()
        self.slots = tuple(parts)
        for slot, part in parts.items():
            self.add_module(slot, part)

    def parts(self) -> dict[str, Part]:
        """By slot."""
        return {slot: getattr(self, slot) for slot in self.slots}

    def forward(self, x: Tensor, ropes: Ropes) -> Tensor:
        for slot in self.slots:
            x = getattr(self, slot).add(x, ropes)
        return x


class CausalModel(nn.Module):
    """structure: what stands around the layers, and their RoPEs; the layers themselves are `blocks`. Tied heads share the
    embedding's tensor."""

    def __init__(
        self, structure: Structure, embedding: Tensor, blocks: list[Block], final_norm: Tensor, head: Tensor | None
    ):
        super().__init__()
        self.structure = structure
        self.embedding = nn.Embedding.from_pretrained(embedding, freeze=False)
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(structure.hidden_size, structure.norm_eps, structure.norm_offset)
        self.norm.weight = nn.Parameter(final_norm)
        self.head = nn.Parameter(head) if head is not None else None

    @property
    def head_weight(self) -> Tensor:
        """[V, H]"""
        return self.embedding.weight if self.head is None else self.head

    def parts(self) -> Iterator[tuple[int, str, Part]]:
        """(layer, slot, module), from the embedding to the head."""
        for index, block in enumerate(self.blocks):
            for slot, part in block.parts().items():  # type: ignore[operator]
                yield index, slot, part

    def ropes(self, length: int) -> Ropes:
        """Tables of sequences of `length` tokens, on the model's device."""
        device = self.embedding.weight.device
        return self.structure.rope_tables(length, device)

    def embed(self, ids: Tensor) -> Tensor:
        """The stream before the first layer. ids [B, T] -> [B, T, H]"""
        return embed(ids, self.embedding.weight, self.structure.embedding_scale)

    def hidden(self, ids: Tensor) -> Tensor:
        """Residual stream after the last block, before the final norm. ids [B, T] -> [B, T, H]"""
        ropes = self.ropes(ids.shape[1])
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, ropes)
        return x

    def final(self, hidden: Tensor) -> Tensor:
        """What the head multiplies: the logits are `head_weight` times it. [..., H] -> [..., H]"""
        normed = self.norm(hidden)
        return normed if self.structure.logits_divisor == 1 else normed / self.structure.logits_divisor

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V]"""
        return F.linear(self.final(hidden), self.head_weight)

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits(self.hidden(ids))

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, tensor) of every weight, layer by layer; a tied head is left out."""
        yield EMBEDDING, self.embedding.weight
        for index, slot, part in self.parts():
            for name, tensor in part.state_dict().items():
                yield hf_name(index, slot, part.sub_block, name), tensor
        yield FINAL_NORM, self.norm.weight
        if self.head is not None:
            yield HEAD, self.head

    @property
    def weight_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for _, t in self.named_weights())


def embed(ids: Tensor, weight: Tensor, scale: float) -> Tensor:
    """Rows of an embedding, times its scale, which is rounded to the weights' dtype first, as Gemma does. [..., H]"""
    x = F.embedding(ids, weight)
    return x if scale == 1 else x * torch.tensor(scale).to(weight.dtype).item()


class Weights(Protocol):
    """Where a model is read from, a sub-block at a time: a checkpoint, or a child of a library. Tensors come on the CPU, in the
    dtype they are stored in."""

    @property
    def structure(self) -> Structure: ...

    def weights(self, layer: int, slot: str) -> dict[str, Tensor]:
        """{name inside the sub-block: tensor}"""
        ...

    def embedding(self) -> Tensor: ...

    def final_norm(self) -> Tensor: ...

    def lm_head(self) -> Tensor:
        """[V, H]; the embedding when tied"""
        ...


def read_block(
    source: Weights, layer: int, move: Move, ranks: Ranks | None = None, *, in_training: bool = False
) -> Block:
    """One layer, whole or this rank's share. in_training: of the modules whose passes over memory are few on a GPU."""
    parts = {}
    for slot, sub_block in source.structure.layers[layer].items():
        weights = source.weights(layer, slot)
        if ranks is not None:
            weights, sub_block = sub_block.cut(weights, ranks.rank, ranks.world), sub_block.shared(ranks.world)
        parts[slot] = loaded(sub_block, moved(sub_block, weights, move), in_training)
    return Block(parts)


def load_model(
    source: str | Path | Weights,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    ranks: Ranks | None = None,
    in_training: bool = False,
) -> CausalModel:
    """A parent or a child on `device`, whole or this rank's share, its layers as `read_block` has them. Raises UserError as `open_model` does."""
    opened = open_model(source) if isinstance(source, str | Path) else source
    structure = opened.structure if ranks is None else opened.structure.share(ranks.world)

    def words(table: Tensor) -> Tensor:
        return (table if ranks is None else own_rows(ranks, table, structure.vocab_size)).to(device, dtype)

    move = moving(device, dtype)
    blocks = [read_block(opened, n, move, ranks, in_training=in_training) for n in range(structure.num_layers)]
    model = CausalModel(
        structure,
        words(opened.embedding()),
        blocks,
        opened.final_norm().to(device, dtype),
        None if structure.tied else words(opened.lm_head()),
    )
    return model.requires_grad_(False).eval()


def random_part(sub_block: SubBlock, device: torch.device | str, dtype: torch.dtype) -> Part:
    """With random weights of the usual size; norms are one. What squared ReLUs have in common adds nothing: else all tokens would grow
    alike, and have fewer experts between them than a trained router gives."""
    part = blank(sub_block).to(dtype).to_empty(device=device).requires_grad_(False)
    for name, parameter in part.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
            continue
        parameter.normal_(std=1 / math.sqrt(parameter.shape[-1]))
        if "down_proj" in name:
            parameter.sub_(parameter.mean(-1, keepdim=True))
    return part


def random_model(structure: Structure, device: torch.device | str, dtype: torch.dtype) -> CausalModel:
    """A model of this structure with random weights: it takes the time and the memory of any other."""
    hidden = structure.hidden_size
    embedding = torch.empty(structure.vocab_size, hidden, device=device, dtype=dtype).normal_()
    head = None if structure.tied else torch.empty_like(embedding).normal_(std=1 / math.sqrt(hidden))
    blocks = [Block({s: random_part(b, device, dtype) for s, b in layer.items()}) for layer in structure.layers]
    model = CausalModel(structure, embedding, blocks, torch.ones(hidden, device=device, dtype=dtype), head)
    return model.requires_grad_(False).eval()
