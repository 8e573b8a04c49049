"""The gated FFN on our kernels; decode and prefill differ only in the number of rows."""

from __future__ import annotations

from torch import Tensor

from puzzle.blocklib.fast.batch import Batch, Fast, Product
from puzzle.blocklib.plain.swiglu import GatedFfn
from puzzle.kernels.swiglu import Weights, pack_swiglu, swiglu


class FastSwiGLU(Fast):
    """Without biases and with silu one fused product; otherwise three products with the activation between."""

    def __init__(self, part: GatedFfn, batch: Batch):
        super().__init__(part, batch)
        matrices = (part.gate_proj, part.up_proj, part.down_proj)
        self.weights: Weights | None = None
        if part.sub_block.activation == "silu" and not part.sub_block.bias:  # type: ignore[attr-defined]
            self.weights = pack_swiglu(*(m.weight.data for m in matrices), batch.fp8)
        else:
            self.activation = part.activation
            self.products = [Product.of(m, batch.fp8) for m in matrices]

    def inner(self, entered: Tensor) -> Tensor:
        if self.weights is not None:
            return swiglu(entered, self.weights)
        gate, up, down = self.products
        return down(self.activation(gate(entered)) * up(entered))
