"""Snapshots of a group in training: what a killed run needs to continue bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from puzzle.base.files import content_hash, replacing
from puzzle.blocklib.distill import VariantTrainer


def _digest(key: str) -> Tensor:
    return torch.frombuffer(bytearray(bytes.fromhex(content_hash(key))), dtype=torch.uint8)


def save_snapshot(path: Path, trainers: Iterable[VariantTrainer], steps: int, key: str) -> None:
    """Weights, optimiser moments and first losses after `steps` steps. key: identifies the build."""
    tensors = {"steps": torch.tensor(steps), "key": _digest(key)}
    for trainer in trainers:
        tensors |= {name: tensor.cpu() for name, tensor in trainer.state().items()}
        tensors[f"{trainer.key}|loss_before"] = trainer.loss_before
    with replacing(path) as temporary:
        save_file(tensors, temporary)


def load_snapshot(path: Path, trainers: list[VariantTrainer], key: str) -> int:
    """Put every trainer where it was and give the steps done; 0 without a whole snapshot of this very build."""
    if not path.is_file():
        return 0
    try:
        with safe_open(path, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError):
        return 0
    whole = {"key", *(f"{trainer.key}|loss_before" for trainer in trainers)} <= tensors.keys()
    if not whole or not torch.equal(tensors["key"], _digest(key)):
        return 0
    for trainer in trainers:
        trainer.load_state(tensors)
        trainer.loss_before = tensors[f"{trainer.key}|loss_before"]
    return int(tensors["steps"])
