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
from torch import Tensor

from puzzle.base.device import compute_dtype
from puzzle.base.units import layer_name
from puzzle.blocklib.masters import Masters
from puzzle.blocklib.plain.part import Part, Ropes, blank
from puzzle.blocklib.sub_block import ParentBlock, Variant
from puzzle.kernels.adamw import Rule
from puzzle.kernels.block_loss import block_loss, energy, output_gradient
from puzzle.kernels.rmsnorm import rms_norm


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

    @property
    def looks(self) -> tuple[int, ...]:
        """After how many steps held-out losses are measured: none, all, and up to eight numbers between, as far as that takes no more
        than about a thirtieth of the training."""
        most = self.num_steps * self.batch_size // (10 * self.validation_sequences)
        parts = 1 + max(0, min(8, most, self.num_steps - 1))
        return tuple(round(self.num_steps * n / parts) for n in range(parts + 1))

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
    """losses: on held-out text, at `Recipe.looks`. facts: what the kept module does beside, there (`Part.watched`)."""

    variant: Variant
    tensors: dict[str, Tensor]
    improved: bool
    losses: list[float]
    facts: dict[str, Any]


RULE = ("beta1", "beta2", "weight_decay", "clip_norm")  # what AdamW takes of a recipe


class Shown:
    """What a sub-block of the parent shows its variants in a step: x [B, T, H], which enters it, and target [B, T, H], what it adds."""

    def __init__(self, part: Part, x: Tensor, ropes: Ropes, target: Tensor | None = None):
        """target: what is to be added in place of what the parent's `part` adds."""
        self.x, self.ropes = x, ropes
        with torch.no_grad(), autocast(x.device):
            self.target = part(x, ropes).to(x.dtype) if target is None else target
        self._normed: dict[float, Tensor] = {}
        self._energy: Tensor | None = None

    def normed(self, eps: float) -> Tensor:
        """x / rms(x), once for all variants."""
        if eps not in self._normed:
            self._normed[eps] = rms_norm(self.x, None, None, eps)[0]
        return self._normed[eps]

    @property
    def energy(self) -> Tensor:
        """Σ target², once for all variants."""
        if self._energy is None:
            self._energy = energy(self.target)
        return self._energy


class VariantTrainer:
    """One variant of one sub-block, or nested ones: their module, its masters, their losses [looks, V] as far as they were measured."""

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
        self.slot, self.variants = slot, tuple(variants)
        self.sub_blocks, widest = [v.sub_block for v in variants], variants[-1]
        self.key = f"{layer_name(layer)}/{slot}/{'+'.join(v.name for v in variants)}"
        seed = int.from_bytes(hashlib.sha256(self.key.encode()).digest()[:8], "big") >> 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # of (layer, variant) alone, for variants that draw random weights
            weights = widest.initialise(block)
        self.module = blank(widest.sub_block, in_training=True).train()
        rule = Rule(lr=lr, **{name: getattr(recipe, name) for name in RULE})
        self.masters = Masters(self.module, weights, compute_dtype(device), device, rule)
        self._start = {name: p.to("cpu", copy=True) for name, p in self.masters.values().items()}
        self.losses = torch.full((len(recipe.looks), len(variants)), math.nan, dtype=torch.float64)
        self._validation: list[Tensor] = []
        self._facts: list[dict[str, Any]] = []  # at the start, and at the end

    def step(self, shown: Shown) -> list[Tensor]:
        """One optimiser step, and what the variants gave before it, [B, T, H] each. A step with a non-finite gradient is left out.

        Never waits for the device, so that a CUDA graph can hold it.
        """
        if not self.masters.parameters:
            return []
        outputs = self._outputs(shown)
        grads = [output_gradient(out.detach(), shown.target, shown.energy) for out in outputs]
        self.masters.step(torch.autograd.grad(outputs, self.masters.parameters, grads, materialize_grads=True))
        return outputs

    def _outputs(self, shown: Shown) -> list[Tensor]:
        """[B, T, H] of every variant"""
        with autocast(shown.x.device):
            eps = self.masters.eps
            entered = self.module.enter(shown.x) if eps is None else shown.normed(eps)
            return self.module.prefixes(entered, shown.ropes, self.sub_blocks)

    @torch.no_grad()
    def validate(self, shown: Shown) -> list[Tensor]:
        """Add one validation batch; `validated()` gives the means and starts over. Returns what the variants gave."""
        outputs = self._outputs(shown)
        self._validation.append(torch.stack([block_loss(out, shown.target) for out in outputs]))
        with autocast(shown.x.device):
            self.module.watch(shown.x)
        return outputs

    def validated(self) -> Tensor:
        """[V], float64 on the CPU"""
        self._facts = [*self._facts[:1], self.module.watched()]
        mean = torch.stack(self._validation).double().mean(dim=0).cpu()
        self._validation = []
        return mean

    def trained(self) -> list[Trained]:
        """Of every variant: the trained weights, or the initial ones where training left it worse on held-out text than it started
        (or NaN)."""
        now, found = self.masters.values(), []
        for variant, losses in zip(self.variants, self.losses.T.tolist(), strict=True):
            improved = losses[-1] <= losses[0]
            tensors = self.module.beginning(now if improved else self._start, variant.sub_block)
            found.append(Trained(variant, tensors, improved, losses, self._facts[-1 if improved else 0]))
        return found

    def state(self) -> dict[str, Tensor]:
        """Weights and optimiser moments by name, for a snapshot."""
        told = list(json.dumps(self._facts[:1], allow_nan=False).encode())
        found = self.masters.state() | {"facts": torch.tensor(told, dtype=torch.uint8)}
        return {f"{self.key}|{name}": tensor for name, tensor in found.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what `state` gave, bit for bit."""
        told = tensors.get(f"{self.key}|facts")  # snapshots of earlier versions have none
        self._facts = [{}] if told is None else json.loads(bytes(told.tolist()))
        self.masters.load_state({name: tensors[f"{self.key}|{name}"] for name in self.masters.state()})
