"""Kernels on the GPU where there is one, otherwise on the CPU under Triton's interpreter.

The interpreter must be asked for before a function is decorated with `triton.jit`, so the kernels are imported here, and
Triton's own functions (sum, max ...), which another library may have imported before, are decorated again. Only the tests
in this folder then dispatch to the kernels: elsewhere the plain-PyTorch twins are the right choice on a CPU.

The interpreter (3.4 to 3.9) truncates to bf16, drops the carry when it rounds to fp8, and multiplies bf16 matrices as
integers; here it converts through torch instead, which rounds as the GPU does. What it compares keeps the operands' type, so
that one truth value spread over a block becomes integers, and a mask with it: 3.9 refuses such masks. Here it stays bool.
Until 3.6 it reads loop bounds in a way that NumPy 2.4 refuses.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

KERNELS = Path(__file__).parents[2] / "kernels"


def interpret_kernels() -> None:
    """Import every kernel, and what Triton's language defines in Triton itself, for the interpreter."""
    import triton
    from triton.language import standard
    from triton.runtime.jit import JITFunction

    for name, function in list(vars(standard).items()):
        if isinstance(function, JITFunction):
            again = triton.jit(function.fn)
            for module in (standard, triton.language):
                if hasattr(module, name):
                    setattr(module, name, again)
    names = [f"puzzle.kernels.{path.stem}" for path in sorted(KERNELS.glob("*.py"))]
    for name in names:  # all of them first: one imports another
        sys.modules.pop(name, None)
    for name in names:
        importlib.import_module(name)


def round_as_the_gpu_does() -> None:
    """Conversions between float types through torch, to the nearest, ties to even; products of bf16 in float32."""
    import triton.language as tl
    from triton.runtime import interpreter

    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8e4nv": torch.float8_e4m3fn}

    def convert(data: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: object) -> np.ndarray:
        bits = torch.from_numpy(np.ascontiguousarray(data).view(f"int{source.primitive_bitwidth}").copy())
        out = bits.view(types[source.name]).to(types[target.name])
        width = target.primitive_bitwidth
        return out.view(getattr(torch, f"int{width}")).numpy().view(f"uint{width}").reshape(data.shape)

    product = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *settings):
        wide = [
            interpreter.TensorHandle(convert(x.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32)
            if x.dtype.scalar == tl.bfloat16
            else x
            for x in (a, b)
        ]
        return product(self, *wide, d, *settings)

    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = create_dot


def spread_truth_as_bool() -> None:
    """`block_mask & (slot >= 0)`: the comparison's handle says int64, its data bool; the data are right."""
    import triton.language as tl
    from triton.runtime import interpreter

    spread = interpreter.InterpreterBuilder.create_splat

    def create_splat(self, block, scalar):
        truth = scalar.data.dtype == np.bool_
        return spread(self, block, interpreter.TensorHandle(scalar.data, tl.int1) if truth else scalar)

    interpreter.InterpreterBuilder.create_splat = create_splat


def read_bounds_from_arrays_of_one() -> None:
    """`tl.range(first, last)`: a scalar's data are an array [1]."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor, *scope):
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patch


if not torch.cuda.is_available():
    round_as_the_gpu_does()
    spread_truth_as_bool()
    read_bounds_from_arrays_of_one()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        interpret_kernels()


@pytest.fixture(autouse=True)
def interpreter(monkeypatch, gpu):
    """Kernels, not twins, also on the CPU; the same random numbers in every run."""
    torch.manual_seed(0)
    if not gpu:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def device(gpu) -> torch.device:
    return torch.device("cuda" if gpu else "cpu")


@pytest.fixture
def relative_error():
    """‖out - reference‖ / ‖reference‖ in float64; NaN (an element that was never written) stays NaN and fails."""

    def measure(out: torch.Tensor, reference: torch.Tensor) -> float:
        out, reference = out.double().cpu(), reference.double().cpu()
        return ((out - reference).norm() / reference.norm().clamp(min=1e-12)).item()

    return measure
