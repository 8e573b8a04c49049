"""What checkpoints call a sub-block's tensors. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from puzzle.base.errors import UserError
from puzzle.blocklib.sub_block import Normed, SubBlock
from puzzle.parents.mxfp4 import BLOCK

if TYPE_CHECKING:
    from torch import Tensor

MODULES = {"attention": "self_attn", "ffn": "mlp"}  # of a slot
OF_KIND = {"mamba2": "mamba", "gated_delta": "gated_delta"}  # of a kind that is not what its slot usually has
# Of a linear sub-block in a slot; where it is of low rank, of a module with u and v.
MATRICES = {"attention": "linear_attn", "ffn": "linear_mlp"}
NORMS = {  # (placement of the sub-block's norms, slot): names of the norm before and of the one after
    ("before", "attention"): ("input_layernorm", ""),
    ("before", "ffn"): ("post_attention_layernorm", ""),
    ("after", "attention"): ("", "post_attention_layernorm"),
    ("after", "ffn"): ("", "post_feedforward_layernorm"),
    ("both", "attention"): ("input_layernorm", "post_attention_layernorm"),
    ("both", "ffn"): ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
}
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Where:
    """A tensor in a checkpoint: the stored one of that name, or some of its rows, which are counted along `dim`. experts: so many stored
    ones are stacked, whose names have a number where `name` has {}. turn: (first, step) of the rows along `dim` of the stored one, where several
    tensors take turns; transposed: its last two dimensions are exchanged; packed: it is stored in blocks of MXFP4."""

    name: str
    rows: tuple[int, int] | None = None
    dim: int = 0
    experts: int | None = None
    turn: tuple[int, int] | None = None
    transposed: bool = False
    packed: bool = False

    @property
    def names(self) -> list[str]:
        """Of the stored tensors."""
        return [self.name] if self.experts is None else [self.name.format(index) for index in range(self.experts)]

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of each of them, where the tensor has `shape`; of one of which these are rows, as far as they reach."""
        if self.experts is not None:
            return shape[1:]
        shape = (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape
        if self.turn is not None:
            shape = (*shape[: self.dim], shape[self.dim] * self.turn[1], *shape[self.dim + 1 :])
        if self.packed:
            return (*shape[:-1], shape[-1] // BLOCK, BLOCK // 2 + shape[-1] % BLOCK)  # no block holds a remainder
        return shape if self.rows is None else (*shape[: self.dim], self.rows[1], *shape[self.dim + 1 :])

    def taken(self, stored: Tensor) -> Tensor:
        """What of a stored tensor, whose `rows` alone were read, is this one."""
        if self.turn is not None:
            stored = stored[(*[slice(None)] * self.dim, slice(self.turn[0], None, self.turn[1]))]
        return (stored.transpose(-2, -1) if self.transposed else stored).contiguous()

    def put(self, tensor: Tensor) -> Tensor:
        """A tensor as the stored one has it."""
        return tensor.transpose(-2, -1) if self.transposed else tensor


def stored_tensors(parts: Iterable[tuple[Where, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) as checkpoints have the tensors of one sub-block: experts one by one, rows of one joined, those that take turns too."""
    import torch

    joined: dict[str, list[tuple[Where, Tensor]]] = {}
    for where, tensor in parts:
        if where.experts is not None:
            yield from zip(where.names, tensor, strict=True)
        else:
            joined.setdefault(where.name, []).append((where, where.put(tensor)))
    for name, several in joined.items():
        several.sort(key=lambda part: part[0].turn or part[0].rows or (0, 0))
        dim, tensors = several[0][0].dim, [tensor for _, tensor in several]
        if several[0][0].turn is None:
            yield name, tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)
        else:
            yield name, torch.stack(tensors, dim + 1).flatten(dim, dim + 1)


def module_of(slot: str, sub_block: SubBlock) -> str:
    """What the module of a sub-block in this slot is called."""
    return OF_KIND.get(sub_block.kind, MODULES[slot])


def hf_name(layer: int, slot: str, sub_block: SubBlock, name: str) -> str:
    """As in Llama, OLMo-2 and Gemma-3: (3, "ffn", SwiGLU(...), "norm.weight") -> "model.layers.3.post_attention_layernorm.weight".

    Raises UserError for a slot that these families do not have.
    """
    if slot not in MODULES:
        raise UserError(f"layer {layer} {slot}: checkpoints of this family have attention and ffn alone")
    owner, _, rest = name.partition(".")
    placement = sub_block.norm if isinstance(sub_block, Normed) else "before"
    before, after = NORMS[placement, slot]
    module = module_of(slot, sub_block)
    # A recurrent kind's own, inside its module.
    name = name.replace("gate_norm.", "norm.") if owner == "gate_norm" else name
    path = {"norm": before, "post_norm": after, "linear": f"{module}.{MATRICES[slot]}"}.get(owner)
    return f"model.layers.{layer}.{module}.{name}" if path is None else f"model.layers.{layer}.{path}.{rest}"


def plain(layer: int, slot: str, sub_block: SubBlock, name: str) -> Where:
    """Every tensor stored on its own, under `hf_name`."""
    return Where(hf_name(layer, slot, sub_block, name))
