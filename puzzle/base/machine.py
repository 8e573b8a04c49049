"""Facts about GPUs and about this machine's free memory. Datasheet figures; measured ones live in cost tables."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from puzzle.base.errors import UserError, nearest


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """memory_bytes: what a model may take. bandwidth in bytes/s; bf16_flops dense, per second. Source: vendor datasheets, but for the
    H100's memory: of its 85.02·10⁹ bytes a process finds 84.47·10⁹ free (torch 2.11, 2026-11-27), less half a GB for libraries."""

    name: str
    memory_bytes: int
    bandwidth: float
    bf16_flops: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="h100", memory_bytes=84 * 10**9, bandwidth=3.35e12, bf16_flops=989e12),
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


def several(device: str, tp: int) -> str:
    """How a promise calls the GPUs that share a model."""
    return device if tp == 1 else f"{tp} x {device}"


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of host memory that a new process can take: without swapping, and within the limits of its container (cgroup
    v1 or v2) and of those around it. root: where /proc and /sys are."""
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2]
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            free = [int(line.split()[1]) * 1024]
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        limit, used, freed = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if controllers
            else ("memory.max", "memory.current", "inactive_file")
        )
        top = root / "sys/fs/cgroup" / controllers
        # What a container cannot see, it has not.
        for group in (top / path.lstrip("/"), *(top / path.lstrip("/")).parents):
            bounds = [*_lines(group / limit), *_lines(group / used)]
            if len(bounds) == 2 and all(value.isdecimal() for value in bounds):  # "max": no limit
                cached = [int(x.split()[1]) for x in _lines(group / "memory.stat") if x.split()[0] == freed]
                free.append(max(0, int(bounds[0]) - int(bounds[1]) + sum(cached)))
    return min(free)


def resident_memory() -> int:
    """Bytes of host memory that this process holds; 0 where the system does not say."""
    return next((int(line.split()[1]) * os.sysconf("SC_PAGE_SIZE") for line in _lines(Path("/proc/self/statm"))), 0)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def cpu_name() -> str:
    """The processor's model name with the cores that this process may use, such as "AMD EPYC, 2 cores"."""
    names = [line.split(":", 1)[1].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    model = (names or [platform.processor() or platform.machine()])[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores"
