"""Block-local distillation (BLD): train variants of one sub-block on the parent's own activations.

Decoupled, as in Puzzle (arXiv 2411.19146, section 3): a variant sees the parent's hidden state and is held against the
parent's own sub-block, so variants never see each other and no gradient crosses a block. Letters: B batch, T tokens, H hidden_size.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from puzzle.base.units import layer_name
from puzzle.blocklib.plain.part import Ropes, blank
from puzzle.blocklib.sub_block import ParentBlock, Variant
from puzzle.kernels.block_loss import block_loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a variant is trained. num_steps batches of batch_size sequences of seq_len tokens."""

    num_steps: int
    batch_size: int
    seq_len: int
    lr: float
    warm_up: float = 0.05  # of num_steps
    final_lr: float = 0.05  # of lr
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    calibration_sequences: int = 64
    validation_sequences: int = 16

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then a cosine down to final_lr · lr."""
        warm = max(1, round(self.warm_up * self.num_steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        progress = (step - warm) / max(1, self.num_steps - warm)
        return self.lr * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """bf16 matrix products on a GPU, float32 on the CPU (where runs are bit-reproducible)."""
    if device.type == "cuda":  # no weight cache: inside a CUDA graph it would keep stale copies
        return torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False)
    return contextlib.nullcontext()


class VariantTrainer:
    """One variant of one sub-block: its module, its optimiser, its losses."""

    def __init__(
        self,
        layer: int,
        slot: str,
        variant: Variant,
        block: ParentBlock,
        recipe: Recipe,
        device: torch.device,
        lr: Tensor,
    ):
        """block: the parent's, which the variant starts from. lr: the learning rate of the coming step, a scalar tensor on
        `device` that all trainers share."""
        self.slot, self.variant, self.recipe = slot, variant, recipe
        self.key = f"{layer_name(layer)}/{slot}/{variant.name}"
        seed = int.from_bytes(hashlib.sha256(self.key.encode()).digest()[:8], "big") >> 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # of (layer, variant) alone, for variants that draw random weights
            weights = variant.initialise(block)
        self.module = blank(variant.sub_block, device).float()
        self.module.load_state_dict(weights)
        self.module.train()
        parameters = list(self.module.parameters())
        self.optimizer = None
        if parameters:
            self.optimizer = torch.optim.AdamW(
                parameters,
                lr=lr,
                betas=(recipe.beta1, recipe.beta2),
                weight_decay=recipe.weight_decay,
                fused=True,
                capturable=device.type == "cuda",
            )
        self._start = {name: p.detach().to("cpu", copy=True) for name, p in self.module.named_parameters()}
        self.loss_before = math.nan
        self.loss_after = math.nan
        self._validation: list[Tensor] = []

    def step(self, x: Tensor, target: Tensor, ropes: Ropes) -> None:
        """One optimiser step on x [B, T, H] -> target [B, T, H]. A step with a non-finite gradient is left out.

        Never waits for the device, so that a CUDA graph can hold it.
        """
        if self.optimizer is None:
            return
        with autocast(x.device):
            out = self.module(x, ropes)
        block_loss(out, target).backward()
        parameters = list(self.module.parameters())
        keep = torch.isfinite(nn.utils.clip_grad_norm_(parameters, self.recipe.clip_norm))
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad = torch.where(keep, parameter.grad, torch.zeros_like(parameter.grad))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def validate(self, x: Tensor, target: Tensor, ropes: Ropes) -> None:
        """Add one validation batch; `validated()` gives the mean and starts over."""
        with autocast(x.device):
            out = self.module(x, ropes)
        self._validation.append(block_loss(out, target))

    def validated(self) -> float:
        mean = torch.stack(self._validation).double().mean().item()
        self._validation = []
        return mean

    @property
    def improved(self) -> bool:
        """False when training left the variant worse on held-out text than it started (or NaN)."""
        return self.loss_after <= self.loss_before

    def best(self) -> dict[str, Tensor]:
        """The trained weights, or the initial ones where training did not improve on them."""
        return {n: p.detach() for n, p in self.module.named_parameters()} if self.improved else self._start

    def state(self) -> dict[str, Tensor]:
        """Weights and optimiser moments by name, for a snapshot."""
        tensors = {f"{self.key}|{n}": p.detach() for n, p in self.module.named_parameters()}
        if self.optimizer is not None:
            for name, parameter in self.module.named_parameters():
                for slot, value in self.optimizer.state[parameter].items():
                    tensors[f"{self.key}|{name}|{slot}"] = value
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what `state` gave, bit for bit."""
        for name, parameter in self.module.named_parameters():
            parameter.data.copy_(tensors[f"{self.key}|{name}"])
            assert self.optimizer is not None
            self.optimizer.state[parameter] = {
                slot: tensors[f"{self.key}|{name}|{slot}"].to(parameter.device).clone()
                for slot in ("step", "exp_avg", "exp_avg_sq")
            }
