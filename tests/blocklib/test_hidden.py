"""The hidden axis of every kind: which axes it is, and what is left of tensors."""

from __future__ import annotations

import pytest
import torch

from puzzle.blocklib.hidden import at_hidden, hidden_axes, with_channels
from puzzle.blocklib.sub_block import MissingFace, State, SubBlock, kinds, parse_key

KEYS = (
    "gqa h12 q3 kv1 d4 norm=both qkv_bias o_bias qk_norm=all",
    "swiglu h12 f12 bias norm=after",
    "relu2 h12 f20 bias",
    "moe h12 e12 k2 f12 shared12 shared_gate router=sigmoid correction_bias",
    "mamba2 h12 heads6 d2 groups3 state4 bias",
    "gated_delta h12 kheads2 k3 vheads4 v3",
    "linear h12",
    "linear h12 rank12",
    "linear h12 rank5",
    "none",
)


def test_every_kind_is_here():
    assert {key.split()[0] for key in KEYS} >= {
        name for name, kind in kinds().items() if kind.__module__.startswith("puzzle.")
    }


@pytest.mark.parametrize("key", KEYS)
def test_channels(key):
    """Lengths that equal the hidden size by chance are left alone; the channels are those of each hidden axis."""
    own, channels = parse_key(key), torch.tensor([0, 3, 4, 11])
    weights = {name: torch.randn(shape) for name, shape in own.tensors().items()}
    found = with_channels(own, weights, channels)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == at_hidden(own, 4).tensors()
    for name, axes in hidden_axes(own).items():
        wanted = weights[name]
        for axis in axes:
            wanted = wanted.transpose(0, axis)[channels].transpose(0, axis)
        assert torch.equal(found[name], wanted)
    if own.kind == "swiglu":
        axes = {name: at for name, at in hidden_axes(own).items() if len(own.tensors()[name]) > 1}
        assert axes == {"gate_proj.weight": (1,), "up_proj.weight": (1,), "down_proj.weight": (0,)}


def test_a_kind_without_a_hidden_axis_is_refused_by_name():
    class Odd(SubBlock):
        kind = "odd"

        def tensors(self):
            return {"weight": (4, 4)}

        def state(self):
            return State()

    with pytest.raises(MissingFace, match="kind 'odd' have no hidden axis"):
        at_hidden(Odd(), 8)
