"""FSDP2: parameters split over the ranks.

Shards follow PyTorch's fully_shard (https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from puzzle.base.ranks import Ranks


def shard(
    root: nn.Module, blocks: Iterable[nn.Module], kept: set[nn.Parameter], ranks: Ranks, dtype: torch.dtype
) -> None:
    """Split the parameters of every block, and what else `root` owns, over the ranks; those in `kept`, and those that no gradient
    reaches (a router's correction bias, which is never rounded), stay as they are.

    dtype: of the parameters while they are gathered; gradients are summed in float32.
    """
    if ranks.world == 1:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    lower = dtype if dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(
        param_dtype=lower, reduce_dtype=torch.float32 if lower else None, cast_forward_inputs=False
    )
    fixed = {getattr(module, name) for module in root.modules() for name in getattr(module, "fixed", ())}
    mesh = dist.device_mesh.init_device_mesh(ranks.device.type, (ranks.world,))
    for block in blocks:
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=fixed)
    fully_shard(root, mesh=mesh, mp_policy=policy, ignored_params=kept | fixed)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; any other tensor itself."""
    with torch.no_grad():
        return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def like_sharded(part: Tensor, model: Tensor) -> Tensor:
    """`part`, this rank's part of a tensor sharded as `model` is, as such a tensor; shares memory."""
    from torch.distributed.tensor import DTensor

    if not isinstance(model, DTensor):
        return part
    return DTensor.from_local(
        part, model.device_mesh, model.placements, run_check=False, shape=model.shape, stride=model.stride()
    )


def whole(tensor: Tensor) -> Tensor:
    """All parts put together; every rank must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
