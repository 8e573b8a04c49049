"""Programmatic dependent launch: a kernel may begin while the one before it ends (sm_90 and newer).

Every kernel of a decode step calls `follow` first: it lets the next kernel start, and waits until the one before has
finished and its results can be seen. What a kernel does before that call may touch nothing but weights. In a chain of short
kernels this hides launches, and lets a product bring its weights to the L2 while a norm before it still runs.
"""

from __future__ import annotations

from functools import cache

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the twins serve
    triton = None  # type: ignore[assignment]


@cache
def _capable(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def launch_options(device: torch.device) -> dict[str, bool]:
    """Keyword arguments of a launch: PDL, and what makes Triton launch it so."""
    return {"PDL": True, "launch_pdl": True} if _capable(device) else {"PDL": False}


if triton is not None:

    @triton.jit
    def follow(PDL: tl.constexpr):
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
