"""Bytes of the tensors that are alive at once, and which are at the peak, counted by the operators that make them.

Sees every storage that an operator returns, forward and backward, until Python and autograd let go of it; what an operator needs inside itself it does
not see. Works on any device, and on fake tensors.
"""

from __future__ import annotations

import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OURS = ("/puzzle/", "/blocklib/", "/kernels/")


class LiveMemory(TorchDispatchMode):
    """now, peak: in bytes, of what was made inside. where: note lines of code too, which is slow."""

    def __init__(self, where: bool = False):
        super().__init__()
        self.now = self.peak = 0
        self.where = where
        self._alive: dict[int, tuple[int, str]] = {}
        self._at_peak: list[tuple[int, str]] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:  # fmt: skip
        out = self.run(func, *args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor, func)
        if self.now > self.peak:
            self.peak = self.now
            self._at_peak = list(self._alive.values()) if self.where else []
        return out

    def run(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def _note(self, tensor: torch.Tensor, func: Callable[..., Any]) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or size == 0:
            return
        lines = [
            f"{frame.filename.rsplit('/', 2)[-1]}:{frame.lineno}"
            for frame in (traceback.extract_stack() if self.where else ())
            if any(part in frame.filename for part in OURS) and "site-packages" not in frame.filename
        ]
        self._alive[key] = (size, f"{tuple(tensor.shape)} {tensor.dtype} {func} {' < '.join(lines[:-4:-1])}")
        self.now += size
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._alive.pop(key, (0, ""))[0]

    def largest(self, count: int = 20) -> list[tuple[int, str]]:
        """(bytes together, what and where) of what was alive at the peak."""
        total: Counter[str] = Counter()
        for size, what in self._at_peak:
            total[what] += size
        return [(size, what) for what, size in total.most_common(count)]
