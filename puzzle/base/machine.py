"""Facts about GPUs and about this machine's free memory. Datasheet figures; measured ones live in cost tables."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from puzzle.base.errors import UserError, nearest


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """memory_bytes of the card; bandwidth in bytes/s; bf16_flops dense, per second. Source: vendor datasheets."""

    name: str
    memory_bytes: int
    bandwidth: float
    bf16_flops: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="h100", memory_bytes=80 * 10**9, bandwidth=3.35e12, bf16_flops=989e12),
        Gpu(name="h200", memory_bytes=141 * 10**9, bandwidth=4.8e12, bf16_flops=989e12),
        Gpu(name="a100", memory_bytes=80 * 10**9, bandwidth=2.04e12, bf16_flops=312e12),
    )
}


# Two cores of a server in round figures, no limit of anything: `puzzle profile --engine ... --fit` fits shares of these.
CPU = Gpu(name="cpu", memory_bytes=16 * 10**9, bandwidth=4e10, bf16_flops=2e11)


def gpu_facts(name: str) -> Gpu:
    """Of one GPU, or CPU for "cpu". Raises UserError for a name that is not listed."""
    if name == CPU.name:
        return CPU
    if name not in GPUS:
        raise UserError(f"unknown GPU '{name}': {nearest(name, sorted(GPUS))}")
    return GPUS[name]


def available_memory() -> int:
    """Bytes of host memory that a new process can take without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def cpu_name() -> str:
    """The processor's model name with the cores that this process may use, such as "AMD EPYC, 2 cores"."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores"
