"""Read a checkpoint larger than the memory: no tensor's pages stay mapped after it, no check doubles it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from puzzle.base.errors import UserError
from puzzle.parents.checkpoint import Checkpoint

CHUNK = 2**24  # elements looked at together: `isfinite` needs several copies of what it looks at


class StreamingCheckpoint(Checkpoint):
    """A checkpoint that opens its file anew for every tensor.

    A file kept open stays mapped, and each page that was read counts as resident until the file is closed: a pass over
    a 16 GB checkpoint would end with 16 GB resident.
    """

    def tensor(self, name: str) -> Tensor:
        """One tensor on the CPU. Raises UserError when it is missing, unreadable, or holds NaN or infinity."""
        path = self._path(name)
        try:
            with safe_open(path, framework="pt") as handle:
                value = handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error}): download the checkpoint again") from error
        if value.is_floating_point():
            bad = sum(int((~torch.isfinite(part)).sum()) for part in value.flatten().split(CHUNK))
            if bad:
                raise UserError(f"weight {name} in {path} has {bad} NaN or infinite values: the checkpoint is damaged")
        return value

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor, without reading it. Raises UserError when it is missing."""
        path = self._path(name)
        try:
            with safe_open(path, framework="pt") as handle:
                part = handle.get_slice(name)
                return part[:1].dtype if part.get_shape() else handle.get_tensor(name).dtype
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error}): download the checkpoint again") from error

    def _path(self, name: str) -> Path:
        if name not in self.names:
            raise UserError(f"{self.directory} lacks the weight {name}: download or export the checkpoint again")
        return self._files[name]
