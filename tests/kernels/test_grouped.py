"""grouped_linear against its twin in float64: empty experts, one token, many, odd sizes, gathered rows."""

from __future__ import annotations

import pytest
import torch

from puzzle.kernels import grouped as module
from puzzle.kernels.grouped import Tile, choose_tile, faster, grouped_linear, grouped_linear_reference

SIZES = {  # rows of each expert
    "one token": [0, 0, 1, 0, 0],
    "nothing first and last": [0, 17, 3, 0, 1, 40, 0],
    "one expert": [33],
    "whole tiles": [16, 32, 16, 16],
}
TILES = (Tile(16, 32, 32, 4, 2), Tile(64, 64, 64, 4, 2))


@pytest.mark.parametrize("activation", [None, "relu2", "silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", SIZES)
def test_matches_twin(what, dtype, activation, device, relative_error):
    sizes = torch.tensor(SIZES[what], device=device)
    count, num_rows, (inner, outer) = len(sizes), int(sizes.sum()), (37, 51)
    x = torch.randn(29, inner, device=device).to(dtype)
    place = torch.randint(0, 29, (num_rows,), device=device)
    weight, gate = (torch.randn(2, count, outer, inner, device=device) / inner**0.5).to(dtype)
    gate = gate if activation in ("silu", "gelu_tanh") else None
    wide = [None if t is None else t.double() for t in (x, weight, gate)]
    want = grouped_linear_reference(wide[0], wide[1], sizes.cumsum(0), place, wide[2], activation)
    close = 5e-3 if dtype == torch.bfloat16 else 1e-6
    for tile in TILES:
        out = grouped_linear(x, weight, sizes.cumsum(0), place=place, gate=gate, activation=activation, tile=tile)
        assert out.dtype == dtype
        assert out.shape == (num_rows, outer)
        assert relative_error(out, want) < close
    rows = grouped_linear(x[place], weight, sizes.cumsum(0), gate=gate, activation=activation)
    assert relative_error(rows, want) < close


def test_no_rows_at_all(device):
    out = grouped_linear(
        torch.zeros(0, 8, device=device), torch.zeros(3, 5, 8, device=device), torch.zeros(3, device=device)
    )
    assert out.shape == (0, 5)


def test_what_does_not_fit_and_when_it_runs(monkeypatch):
    x, weight, ends = torch.randn(4, 8), torch.randn(2, 5, 8), torch.tensor([1, 4])
    with pytest.raises(ValueError, match=r"do not fit"):
        grouped_linear(x, weight[:, :, 1:], ends)
    with pytest.raises(ValueError, match=r"activation 'silu' without a gate"):
        grouped_linear(x, weight, ends, activation="silu")
    with pytest.raises(ValueError, match=r"activation 'relu2' with a gate"):
        grouped_linear(x, weight, ends, gate=weight, activation="relu2")
    with pytest.raises(ValueError, match=r"gate \(2, 4, 8\) is not as weight"):
        grouped_linear(x, weight, ends, gate=weight[:, 1:], activation="silu")
    monkeypatch.setattr(module, "FASTER", (2.0, 16.0))
    assert [faster(x, rows, 8) for rows in (8, 16, 128, 129)] == [False, True, True, False]
    assert [choose_tile(8 * rows, 8).block_m for rows in (1, 17, 33, 500)] == [16, 64, 64, 128]
