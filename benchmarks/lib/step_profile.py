"""Where a training step's time goes, by class of kernel: one eager step under torch's profiler.

A replayed graph knows no operators, and an eager step of large products has the same kernels; so classes are those of an eager step, and
idle is what a replayed step takes beyond their sum.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Events = Sequence[dict[str, Any]]  # of a Chrome trace
CLASSES = ("gemm forward", "gemm dgrad", "gemm wgrad", "attention", "optimiser", "elementwise", "copy")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_mm")
BACKWARD = "autograd::engine::evaluate_function"
PATTERNS = (  # the first that is in the kernel's name
    ("attention", ("flash", "fmha", "sdpa", "attention")),
    ("optimiser", ("sums_kernel", "clip_kernel", "update_kernel", "adam", "multi_tensor", "lpnorm")),
    ("gemm", ("gemm", "nvjet", "cutlass", "xmma", "splitk", "cublas", "wgmma")),
)


def kernel_class(name: str) -> str:
    """Of a kernel by its name; all products are "gemm"."""
    low = name.lower()
    return next((cls for cls, parts in PATTERNS if any(part in low for part in parts)), "elementwise")


def product_kinds(events: Events, num_tokens: int) -> dict[int, str]:
    """{operator's external id: forward, dgrad or wgrad}. A product that sums over tokens gives the gradient of a weight; one inside
    autograd's engine that of an activation."""
    operators = [e for e in events if e.get("cat") == "cpu_op"]
    backward = [e for e in operators if e["name"].startswith(BACKWARD)]
    kinds = {}
    for event in (e for e in operators if e["name"] in PRODUCTS):
        dims = [d for d in event["args"].get("Input Dims", []) if isinstance(d, list) and len(d) >= 2]
        left = dims[-2] if len(dims) >= 2 else [0]
        inside = any(b["tid"] == event["tid"] and b["ts"] <= event["ts"] < b["ts"] + b["dur"] for b in backward)
        kinds[event["args"]["External id"]] = "wgrad" if left[-1] == num_tokens else "dgrad" if inside else "forward"
    return kinds


def seconds_by_class(events: Events, num_tokens: int) -> dict[str, float]:
    """{class: seconds} of all kernels, and {"kernels": their number}."""
    kinds, found = product_kinds(events, num_tokens), dict.fromkeys(CLASSES, 0.0)
    count = 0
    for event in events:
        if event.get("cat") in ("gpu_memcpy", "gpu_memset"):
            found["copy"] += event["dur"] / 1e6
        elif event.get("cat") == "kernel":
            count += 1
            cls = kernel_class(event["name"])
            if cls == "gemm":
                cls = f"gemm {kinds.get(event['args'].get('External id'), 'forward')}"
            found[cls] += event["dur"] / 1e6
    return {**found, "kernels": count}


def longest_kernels(events: Events, most: int = 25) -> list[tuple[str, int, float]]:
    """(name, calls, seconds) of those that take most."""
    found: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            found.setdefault(event["name"][:110], []).append(event["dur"] / 1e6)
    rows = [(name, len(times), sum(times)) for name, times in found.items()]
    return sorted(rows, key=lambda row: -row[2])[:most]


def traced(step: Callable[[], object]) -> Events:
    """The trace of one call, the device's work included."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with tempfile.TemporaryDirectory() as work:
        with profile(activities=activities, record_shapes=True) as found:
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        path = Path(work) / "trace.json"
        found.export_chrome_trace(str(path))
        return json.loads(path.read_text(errors="replace"))["traceEvents"]
