from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puzzle.base.finite import all_finite

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@given(
    dtype=st.sampled_from(DTYPES),
    size=st.integers(1, 5000),
    place=st.integers(0, 4999),
    value=st.sampled_from([float("nan"), float("inf"), -float("inf"), 0.0, -60000.0, 5e-324]),
    transposed=st.booleans(),
)
def test_one_value_among_many_is_found_wherever_it_is(
    dtype: torch.dtype, size: int, place: int, value: float, transposed: bool
) -> None:
    values = torch.linspace(-3, 3, 2 * size).to(dtype).reshape(2, size)
    values[place % 2, place % size] = value
    if transposed:
        values = values.T
    assert all_finite(values) is bool(torch.isfinite(values).all())


@pytest.mark.parametrize("values", [torch.empty(0), torch.empty(0, 3), torch.tensor(1.5), torch.tensor([0, 255], dtype=torch.uint8)])  # fmt: skip
def test_values_without_a_fault(values: torch.Tensor) -> None:
    assert all_finite(values)


def test_a_scalar_that_is_none() -> None:
    assert not all_finite(torch.tensor(float("nan")))
