"""The mixture of experts on a GPU: between our fused norms, products of experts by our kernel where it is faster, else the plain module's."""

from __future__ import annotations

from torch import Tensor

from puzzle.blocklib.fast.batch import Batch, Fast
from puzzle.blocklib.plain.moe import Experts, SparseMoe, sorted_by_expert
from puzzle.blocklib.sub_block import MissingFace
from puzzle.kernels.grouped import faster, grouped_linear


class FastMoe(Fast):
    """Decode and prefill differ only in the number of rows. Raises MissingFace for weights in fp8."""

    def __init__(self, part: SparseMoe, batch: Batch):
        super().__init__(part, batch)
        if batch.fp8:
            raise MissingFace(part.sub_block.kind, "path on our kernels in fp8")
        self.part = part

    def inner(self, entered: Tensor) -> Tensor:
        return self.part.mixed(entered, run)


def run(experts: Experts, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """As `Experts.forward`, without gradients: rows are gathered and the activation applied within the first product. Our kernel knows
    neither biases nor an activation of gate and up together."""
    count = len(experts.up_proj)
    if experts.biased or experts.activation is None or not faster(chosen.numel(), count):
        return experts(x, chosen, weights)
    order, ends = sorted_by_expert(chosen, count)
    gate = experts.gate_proj if experts.gated else None
    place = order // chosen.shape[1]
    inner = grouped_linear(x, experts.up_proj, ends, place=place, gate=gate, activation=experts.activation_name)
    return experts.summed(grouped_linear(inner, experts.down_proj, ends), order, weights)
