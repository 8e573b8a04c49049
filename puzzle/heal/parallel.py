"""One process or many: who this process is, sums over all of them, and FSDP2 sharding.

Shards follow PyTorch's fully_shard (https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from puzzle.base.console import console
from puzzle.base.device import pick_device
from puzzle.base.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """rank of world processes on `device`; mesh: None when there is only one."""

    rank: int
    world: int
    device: torch.device
    mesh: Any = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()


def start_ranks(device: str) -> Ranks:
    """This process as `torchrun` describes it in the environment, or alone. Raises UserError for a missing device."""
    world, on = int(os.environ.get("WORLD_SIZE", "1")), pick_device(device)
    if world == 1:
        return Ranks(rank=0, world=1, device=on)
    if on.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local} has no GPU of its own ({torch.cuda.device_count()} here): start fewer")
        on = torch.device("cuda", local)
        torch.cuda.set_device(on)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on.type == "cuda" else "gloo")
    console.quiet = dist.get_rank() > 0
    mesh = dist.device_mesh.init_device_mesh(on.type, (world,))
    return Ranks(rank=dist.get_rank(), world=world, device=on, mesh=mesh)


@contextmanager
def running_ranks(device: str) -> Iterator[Ranks]:
    """`start_ranks`; the processes part at the end."""
    ranks = start_ranks(device)
    try:
        yield ranks
    finally:
        if ranks.world > 1:
            dist.destroy_process_group()


def shard(
    root: nn.Module, blocks: Iterable[nn.Module], kept: set[nn.Parameter], ranks: Ranks, dtype: torch.dtype
) -> None:
    """Split the parameters of every block, and what else `root` owns, over the ranks; those in `kept` stay as they are.

    dtype: of the parameters while they are gathered; gradients are summed in float32.
    """
    if ranks.world == 1:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    lower = dtype if dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(
        param_dtype=lower, reduce_dtype=torch.float32 if lower else None, cast_forward_inputs=False
    )
    for block in blocks:
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=ranks.mesh, mp_policy=policy)
    fully_shard(root, mesh=ranks.mesh, mp_policy=policy, ignored_params=kept)


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
