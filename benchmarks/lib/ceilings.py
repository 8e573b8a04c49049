"""What a device reaches at most (bytes read or copied, FLOPs of a square product), and what a row of measurements must carry."""

from __future__ import annotations

import datetime

import torch

from puzzle.kernels.timer import time_calls


def copy_bandwidth(device: torch.device | str = "cuda", num_bytes: int = 2**31, seconds: float = 0.1) -> float:
    """Bytes per second of a device-to-device copy of num_bytes, counting bytes read and bytes written."""
    source = torch.randint(256, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / time_calls([lambda: target.copy_(source)], seconds=seconds, device=device).p50


def read_bandwidth(device: torch.device | str = "cuda", num_bytes: int = 2**32, seconds: float = 0.1) -> float:
    """Bytes per second of a float32 sum over num_bytes."""
    source = torch.randn(num_bytes // 4, device=device)
    return num_bytes / time_calls([lambda: source.sum()], seconds=seconds, device=device).p50


def matmul_rate(
    dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cuda", size: int = 8192, seconds: float = 0.2
) -> float:
    """FLOP per second of a square product of random matrices; float8_e4m3fn goes through torch._scaled_mm."""
    left, right = (torch.randn(size, size, device=device) for _ in range(2))
    if dtype == torch.float8_e4m3fn:
        a, b = left.to(dtype), right.to(dtype).t()
        one = torch.ones((), device=device)

        def call() -> torch.Tensor:
            return torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
    else:
        a, b = left.to(dtype), right.to(dtype)

        def call() -> torch.Tensor:
            return a @ b

    return 2 * size**3 / time_calls([call], seconds=seconds, device=device).p50


def environment(device: torch.device | str | None = None) -> dict[str, str]:
    """What a row of measurements must carry: device, versions of torch, CUDA and triton, and the date (UTC)."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = ""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "triton": version,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
