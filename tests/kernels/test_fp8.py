"""fp8 and back: against every one of its numbers in float64, at sizes that fill no block."""

import pytest
import torch

from puzzle.kernels.fp8 import FP8_MAX, from_fp8, to_fp8

ALL = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
NUMBERS = ALL.double()[torch.isfinite(ALL.float())].unique()


def rows(shape, dtype, seed=0):
    """Of magnitudes from 1e-4 to 1e4, one row of zeros, one with a single value."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x * torch.logspace(-4, 4, shape[0], dtype=torch.float64)[:, None]
    x[0] = 0
    x[-1, 1:] = 0
    return x.to(dtype)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (37, 129), (1025, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_nearest_number_of_fp8(shape, dtype):
    x = rows(shape, dtype)
    values, scale = to_fp8(x)
    assert (values.dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, torch.float32, (shape[0],))
    assert scale[0] == 1
    largest = x.double().abs().amax(dim=1)[1:]
    assert ((scale[1:].double() * FP8_MAX / largest - 1).abs() < 1e-6).all()
    wanted = (x.double() / scale.double()[:, None]).clamp(-FP8_MAX, FP8_MAX)
    nearest = (NUMBERS - wanted[..., None]).abs().amin(dim=-1) if x.numel() < 10_000 else None
    if nearest is not None:
        assert ((values.double() - wanted).abs() <= nearest * (1 + 1e-4) + 1e-9).all()
    back = from_fp8(values, scale[:, None])
    assert back.dtype == torch.float32
    assert ((back.double() - x.double()).abs() <= (x.double().abs() / 16).maximum(scale.double()[:, None] / 1024)).all()


def test_what_came_from_fp8_goes_back_the_same():
    values, scale = to_fp8(rows((65, 33), torch.float32))
    again, same = to_fp8(from_fp8(values, scale[:, None]))
    assert ((scale / same - 1).abs() < 2**-23).all()
    assert torch.equal(values.view(torch.uint8), again.view(torch.uint8))


@pytest.mark.parametrize("block", [(1, 1), (4, 8), (128, 128), (3, 1000)])
@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (129, 257), (1030, 3)])
def test_scales_of_blocks(block, shape):
    """Block by block in float64; and of a stretch of rows alone."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    scale = torch.rand([-(-n // b) for n, b in zip(shape, block, strict=True)]) + 0.1
    wanted = weight.double()
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            at = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            wanted[at] *= scale[i, j].double()
    assert torch.equal(from_fp8(weight, scale, block), wanted.float())
    first = shape[0] // 2
    assert torch.equal(from_fp8(weight[first:], scale, block, first), wanted[first:].float())
