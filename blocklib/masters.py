"""The weights of a module in training: float32 masters with AdamW's moments, and the copies that its products read.

A matrix that reads the normed input x̂ · s (`SubBlock.read_input`) has its copy as W diag(s) and reads x̂, which all variants of a place
share. The module then needs no gradient of its input, a third of the products of a backward pass: that of s comes from the
matrices' own (`kernels/adamw.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from puzzle.blocklib.plain.part import Part
from puzzle.blocklib.sub_block import Normed, SubBlock
from puzzle.kernels.adamw import Rule, Weight, adamw

NORM = "norm.weight"


def folds_norm(sub_block: SubBlock) -> bool:
    """Whether the scale of its norm before goes into the copies."""
    return isinstance(sub_block, Normed) and sub_block.norm_before and bool(sub_block.read_input)


class Masters:
    """Of `module`, whose parameters they become. eps: of the norm whose scale is in the copies, so that the module is given the normed
    input without it; None: the module norms its input itself. parameters: what gradients are needed of."""

    def __init__(
        self, module: Part, weights: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device, rule: Rule
    ):
        """weights: to start from. dtype: of the matrices' copies; vectors are computed with as they are trained."""
        sub_block, self.rule = module.sub_block, rule
        folds = folds_norm(sub_block)
        self.eps = sub_block.norm_eps if folds and isinstance(sub_block, Normed) else None
        self.offset = float(isinstance(sub_block, Normed) and sub_block.norm_offset)
        self.steps = torch.zeros((), device=device)
        self.weights: dict[str, Weight] = {}
        for name in (n for n, _ in module.named_parameters()):
            value = weights[name].to(device, torch.promote_types(dtype, torch.float32), copy=True).contiguous()
            scaled = folds and name in sub_block.read_input
            own = scaled or (value.dim() > 1 and dtype != value.dtype)
            copy = torch.empty_like(value, dtype=dtype) if own else None
            self.weights[name] = Weight(
                value=value, mean=torch.zeros_like(value), square=torch.zeros_like(value), copy=copy, scaled=scaled
            )
        self.norm = self.weights[NORM] if folds else None
        self.refresh()
        copies = {n: w.value if w.copy is None else w.copy for n, w in self.weights.items()}
        module.load_state_dict(copies, assign=True)
        learn = {n: p for n, p in module.named_parameters() if p.requires_grad and not (folds and n == NORM)}
        self.parameters, self._stepped = [*learn.values()], [self.weights[n] for n in learn]

    def refresh(self) -> None:
        """Make the copies anew."""
        for weight in self.weights.values():
            weight.refresh(None if self.norm is None else self.norm.value + self.offset)

    def step(self, grads: Sequence[Tensor]) -> None:
        """One of AdamW. grads: of `parameters`."""
        adamw(self._stepped, grads, self.norm, self.offset, self.steps, self.rule)

    def values(self) -> dict[str, Tensor]:
        """The masters by name."""
        return {name: weight.value for name, weight in self.weights.items()}

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on, by name."""
        found = {"steps": self.steps}
        for name, weight in self.weights.items():
            found |= {name: weight.value, f"{name}|exp_avg": weight.mean, f"{name}|exp_avg_sq": weight.square}
        return found

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `state` gave."""
        for name, tensor in self.state().items():
            tensor.copy_(tensors[name])
        self.refresh()
