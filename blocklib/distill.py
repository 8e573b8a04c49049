"""Block-local distillation (BLD): train variants of one sub-block on the parent's own activations.

Decoupled, as in Puzzle (arXiv 2411.19146, section 3): a variant sees the parent's hidden state and is held against the
parent's own sub-block, so variants never see each other and no gradient crosses a block. Nested variants (Matryoshka, arXiv 2310.07707),
each the first channels of the next, share the weights of the widest and its cost; their losses are added up.
Letters: B batch, T tokens, H hidden_size, V variants trained together.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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


class Trained(NamedTuple):
    """loss_before, loss_after: on held-out text. facts: what the kept module does beside, there (`Part.watched`)."""

    variant: Variant
    tensors: dict[str, Tensor]
    improved: bool
    loss_before: float
    loss_after: float
    facts: dict[str, Any]


class VariantTrainer:
    """One variant of one sub-block, or nested ones: their module, its optimiser, their losses [V]."""

    def __init__(
        self,
        layer: int,
        slot: str,
        variants: Sequence[Variant],
        block: ParentBlock,
        recipe: Recipe,
        device: torch.device,
        lr: Tensor,
    ):
        """variants: each begins the next (`SubBlock.begins`). block: the parent's, which they start from. lr: the learning rate of the
        coming step, a scalar tensor on `device` that all trainers share."""
        self.slot, self.variants, self.recipe = slot, tuple(variants), recipe
        self.sub_blocks, widest = [v.sub_block for v in variants], variants[-1]
        self.key = f"{layer_name(layer)}/{slot}/{'+'.join(v.name for v in variants)}"
        seed = int.from_bytes(hashlib.sha256(self.key.encode()).digest()[:8], "big") >> 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # of (layer, variant) alone, for variants that draw random weights
            weights = widest.initialise(block)
        self.module = blank(widest.sub_block, device).float()
        self.module.load_state_dict(weights)
        self.module.train()
        parameters = self._learning()
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
        self.loss_before = self.loss_after = torch.full((len(variants),), math.nan, dtype=torch.float64)
        self._validation: list[Tensor] = []
        self._facts: list[dict[str, Any]] = []  # at the start, and at the end

    def step(self, x: Tensor, target: Tensor, ropes: Ropes) -> None:
        """One optimiser step on x [B, T, H] -> target [B, T, H]. A step with a non-finite gradient is left out.

        Never waits for the device, so that a CUDA graph can hold it.
        """
        if self.optimizer is None:
            return
        self._losses(x, target, ropes).sum().backward()
        parameters = self._learning()
        keep = torch.isfinite(nn.utils.clip_grad_norm_(parameters, self.recipe.clip_norm))
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad = torch.where(keep, parameter.grad, torch.zeros_like(parameter.grad))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _learning(self) -> list[nn.Parameter]:
        """All parameters but those that no gradient reaches (a router's correction bias)."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def _losses(self, x: Tensor, target: Tensor, ropes: Ropes) -> Tensor:
        """[V]"""
        with autocast(x.device):
            outputs = self.module.prefixes(x, ropes, self.sub_blocks)
        return torch.stack([block_loss(out, target) for out in outputs])

    @torch.no_grad()
    def validate(self, x: Tensor, target: Tensor, ropes: Ropes) -> None:
        """Add one validation batch; `validated()` gives the means and starts over."""
        self._validation.append(self._losses(x, target, ropes))
        self.module.watch(x)

    def validated(self) -> Tensor:
        """[V], float64 on the CPU"""
        self._facts = [*self._facts[:1], self.module.watched()]
        mean = torch.stack(self._validation).double().mean(dim=0).cpu()
        self._validation = []
        return mean

    def trained(self) -> list[Trained]:
        """Of every variant: the trained weights, or the initial ones where training left it worse on held-out text than it started
        (or NaN)."""
        now, found = {n: p.detach() for n, p in self.module.named_parameters()}, []
        for variant, before, after in zip(
            self.variants, self.loss_before.tolist(), self.loss_after.tolist(), strict=True
        ):
            improved = after <= before
            tensors = self.module.beginning(now if improved else self._start, variant.sub_block)
            found.append(Trained(variant, tensors, improved, before, after, self._facts[-1 if improved else 0]))
        return found

    def state(self) -> dict[str, Tensor]:
        """Weights and optimiser moments by name, for a snapshot."""
        tensors = {f"{self.key}|{n}": p.detach() for n, p in self.module.named_parameters()}
        tensors[f"{self.key}|facts"] = torch.tensor(
            list(json.dumps(self._facts[:1], allow_nan=False).encode()), dtype=torch.uint8
        )
        if self.optimizer is not None:
            for name, parameter in self.module.named_parameters():
                for slot, value in self.optimizer.state.get(parameter, {}).items():
                    tensors[f"{self.key}|{name}|{slot}"] = value
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what `state` gave, bit for bit."""
        told = tensors.get(f"{self.key}|facts")  # snapshots of earlier versions have none
        self._facts = [{}] if told is None else json.loads(bytes(told.tolist()))
        for name, parameter in self.module.named_parameters():
            parameter.data.copy_(tensors[f"{self.key}|{name}"])
            if self.optimizer is None or not parameter.requires_grad:
                continue
            self.optimizer.state[parameter] = {
                slot: tensors[f"{self.key}|{name}|{slot}"].to(parameter.device).clone()
                for slot in ("step", "exp_avg", "exp_avg_sq")
            }
