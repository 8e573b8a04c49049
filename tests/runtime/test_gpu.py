"""What only a GPU shows: every family on our kernels, in float32, token for token what the plain runtime says."""

import pytest
import torch

from puzzle.parents.opened import open_model
from puzzle.runtime.fast import FastRuntime
from puzzle.runtime.model import load_model
from puzzle.runtime.plain import PlainRuntime
from tiny_parents import PARENTS, write_tiny_parent

pytestmark = pytest.mark.gpu
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
LONGROPE = {"short_factor": [1.0 + i / 16 for i in range(8)], "long_factor": [1.0 + i for i in range(8)]}
PARTIAL = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32, **LONGROPE}
CHANGED = {
    "llama, longrope": {"rope_parameters": PARTIAL | {name: value * 2 for name, value in LONGROPE.items()}},
    "phi3, partial longrope": {
        "rope_parameters": PARTIAL | {"partial_rotary_factor": 0.5},
        "partial_rotary_factor": 0.5,
    },
}


@pytest.mark.parametrize("name", PARENTS)
def test_every_family(name, tmp_path):
    """One page of prompt and two, with a decode step as a CUDA graph."""
    directory = write_tiny_parent(name, tmp_path, **SIZES | CHANGED.get(name, {}))
    model = load_model(open_model(directory), device="cuda")
    for length, count in ((7, 25), (80, 25)):
        prompts = torch.randint(2, 384, (3, length), generator=torch.Generator().manual_seed(length)).cuda()
        plain, fast = (cls(model, 3, length + count).generate(prompts, count) for cls in (PlainRuntime, FastRuntime))
        same = (fast == plain).float().mean().item()
        assert same > 0.98, f"{same:.1%} of the tokens"  # a near tie may fall either way, once
