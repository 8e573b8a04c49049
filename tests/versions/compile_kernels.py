"""Every Triton kernel compiled for a GPU of compute capability 9.0, on a machine without one: nothing runs.

    python tests/versions/compile_kernels.py        last line: JSON {"compiled": [kernels], "failed": {kernel: error}}

The interpreter, under which tests/kernels runs on a CPU, knows nothing of what a compiler refuses: Triton 3.4 interprets every
kernel and compiles none that waits for the one before (`gdc_wait`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from puzzle.kernels import overlap
from puzzle.kernels.adamw import Rule, Weight, adamw
from puzzle.kernels.block_loss import block_loss, energy, output_gradient
from puzzle.kernels.decode_attention import decode_attention
from puzzle.kernels.gated import gated_silu
from puzzle.kernels.grouped import Tile, choose_tile, grouped_linear
from puzzle.kernels.linear_kl import Chunks, Fused, linear_kl
from puzzle.kernels.rmsnorm import rms_norm
from puzzle.kernels.rope import rope
from puzzle.kernels.rope_kv import rope_kv
from puzzle.kernels.routing import combine, route
from puzzle.kernels.skinny import Config, skinny_linear
from puzzle.kernels.swiglu import rows_to_fp8, silu_mul, silu_mul_to_fp8

COMPILED: set[str] = set()
FAILED: dict[str, str] = {}
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


class Hopper:
    """As much of a driver as a compilation asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def compile_only() -> None:
    """Calls of kernels compile and do not launch; the dispatch takes tensors on the CPU for ones that kernels serve."""
    driver.set_active(Hopper())
    run = JITFunction.run

    def compiled(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        name = f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"
        try:
            run(self, *args, grid=grid, warmup=True, **options)
            COMPILED.add(name)
        except Exception as error:  # whatever a compiler raises is the answer
            while error.__cause__ is not None:
                error = error.__cause__  # type: ignore[assignment]
            FAILED[name] = (
                f"{type(error).__name__}: {[line for line in str(error).splitlines() if line.strip(' ^')][-1]}"
            )

    JITFunction.run = compiled
    overlap._capable = lambda device: True  # kernels wait for each other as on Hopper
    os.environ["TRITON_INTERPRET"] = "1"  # to the dispatch: kernels serve the CPU too; they are compiled as imported


def norms_and_caches(cache_dtype: torch.dtype) -> None:
    x = torch.randn(6, 128).to(BF16)
    rms_norm(x, x.clone(), torch.ones(128), 1e-6)
    q, k, v = (torch.randn(6, heads, 64).to(BF16) for heads in (8, 2, 2))
    cache, table = torch.zeros(6, 2, 2, 16, 64, dtype=cache_dtype), torch.arange(6).int().view(6, 1)
    rope_kv(q, k, v, torch.ones(16, 64), torch.ones(16, 64), torch.zeros(6).int(), cache, table)
    decode_attention(q, cache, table, torch.ones(6).int(), max_context=16, splits=2)


def products(dtype: torch.dtype) -> None:
    x, scale = torch.randn(5, 128).to(BF16), None if dtype == BF16 else torch.ones(96)
    for config in (Config(block_n=32, block_k=64, num_warps=4, num_stages=2), Config(32, 64, 4, 2, split_k=2)):
        for gated in (False, True):
            skinny_linear(x, torch.randn(96, 128).to(dtype), config, scale=scale, gated=gated)
    silu_mul(x)
    rows_to_fp8(x)
    silu_mul_to_fp8(x)


def experts(tile: Tile) -> None:
    x, weight, place = torch.randn(6, 128).to(BF16), torch.randn(3, 96, 128).to(BF16), torch.arange(6)
    for activation in (None, "relu2", "silu", "gelu_tanh"):
        gate = weight if activation in ("silu", "gelu_tanh") else None
        options = {"gate": gate, "activation": activation, "tile": tile}
        grouped_linear(x, weight, torch.tensor([1, 1, 6]), place=place, **options)
        grouped_linear(x, weight, torch.tensor([1, 1, 6]), **options)


def routing(num: int) -> None:
    logits, bias = torch.randn(num, 128).to(BF16), torch.zeros(128)
    route(logits, 8, normalise=True)
    route(logits, 8)
    found = route(logits.float(), 6, sigmoid=True, bias=bias, normalise=True, scale=2.5)
    route(logits.float(), 6, sigmoid=True, bias=bias, num_groups=8, num_topk_groups=4)
    given = torch.randn(6 * num, 128).to(BF16)
    for beside in ((), (given[:num],), (given[:num], given[:num, :1])):
        combine(given, found.back, found.weights, *beside)


def losses(config: Any) -> None:
    parent, weight = torch.randn(70, 64).to(BF16), torch.randn(300, 64).to(BF16)
    child = torch.randn(70, 64).to(BF16).requires_grad_()
    linear_kl(parent, child, weight, targets=torch.zeros(70).long(), config=config).kl.sum().backward()
    output_gradient(child.detach(), parent, energy(parent))
    block_loss(child.detach(), parent)


def training(dtype: torch.dtype) -> None:
    x, table = torch.randn(1, 6, 8, 64).to(dtype).transpose(1, 2).requires_grad_(), torch.ones(6, 64)
    rope(x, table, table).sum().backward()
    gated_silu(x, x).sum().backward()
    first, norm = (
        Weight(value=v, mean=v.clone(), square=v.clone(), copy=c, scaled=c is not None)
        for v, c in ((torch.ones(96, 128), torch.ones(96, 128).to(dtype)), (torch.ones(128), None))
    )
    rule = Rule(lr=torch.ones(()), beta1=0.9, beta2=0.95, weight_decay=0.0, clip_norm=1.0)
    adamw([first], [first.value.to(dtype)], norm, 0.0, torch.zeros(()), rule)


def main() -> None:
    torch.manual_seed(0)
    compile_only()
    calls: list[tuple[Callable[[Any], None], Any]] = [
        *((norms_and_caches, dtype) for dtype in (BF16, FP8)),
        *((products, dtype) for dtype in (BF16, FP8)),
        *((training, dtype) for dtype in (BF16, torch.float32)),
        *((experts, choose_tile(rows, 1)) for rows in (16, 32, 64, 128)),
        *((routing, num) for num in (1, 2, 16, 17)),
        *((losses, config) for config in (Chunks(tokens=64, words=128), Fused(num_stages=3))),
    ]
    for call, argument in calls:
        call(argument)
    print(json.dumps({"compiled": sorted(COMPILED - set(FAILED)), "failed": FAILED}))


if __name__ == "__main__":
    main()
