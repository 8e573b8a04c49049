"""What vLLM allocates for a sequence: our account of its pages, by hand and against what a started engine says (test_vllm_plugin.py)."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from puzzle.serving.pages import Held, allocated, compare, kept
from puzzle.serving.worker import vllm_pages
from tiny_children import FULL, MAMBA, kv

# In bf16 a token of FULL is 2 · 4 · 32 · 2 = 512 bytes. A state of MAMBA is 768 · 3 · 2 + 8 · 64 · 64 · 4 = 135,680 bytes: pages of 272 tokens
# of FULL, 139,264 bytes, are the smallest of whole 16 tokens that hold one.
STATE, PAGE = 135_680, 139_264
SMALL = replace(MAMBA, num_heads=4)
WINDOW = replace(FULL, window=64)


@pytest.mark.parametrize(
    ("sub_blocks", "num_tokens", "held", "pages"),
    [
        ([FULL, FULL], 100, 2 * 100 * 512, 2 * 112 * 512),
        ([FULL, kv(1)], 100, 100 * 640, 112 * 640),  # one group, whatever the KV heads
        ([FULL, WINDOW], 100, 164 * 512, (7 + 5) * 16 * 512),  # the window in 4 pages, and one more as it moves on
        ([FULL, MAMBA], 100, 100 * 512 + STATE, 2 * PAGE),
        ([FULL, MAMBA], 300, 300 * 512 + STATE, 3 * PAGE),
        ([FULL, MAMBA, MAMBA, FULL], 300, 600 * 512 + 2 * STATE, (2 + 1) * 2 * PAGE),  # groups of two layers
        ([FULL, MAMBA, MAMBA, MAMBA], 300, 300 * 512 + 3 * STATE, (2 + 3) * PAGE),
        ([FULL, FULL, FULL, MAMBA, MAMBA], 300, 900 * 512 + 2 * STATE, (2 * 2 + 1) * 2 * PAGE),  # the last group is not full
        ([kv(2), FULL, MAMBA], 300, 300 * 768 + STATE, (1 + 2 + 1) * PAGE),  # pages of 544 tokens of kv(2)
        ([FULL, MAMBA, SMALL], 300, 300 * 512 + STATE + SMALL.state().fixed_bytes("bf16"), (2 + 1 + 1) * PAGE),
        ([], 300, 0, 0),
    ],
)  # fmt: skip
def test_bytes_of_a_sequence(sub_blocks, num_tokens, held, pages):
    assert kept(sub_blocks, "bf16", num_tokens) == held
    assert allocated(sub_blocks, "bf16", num_tokens, 16) == pages


def test_what_an_engine_says():
    """Of groups as vLLM holds them: two layers of attention in one, a state beside."""
    attends = SimpleNamespace(block_size=272, real_page_size_bytes=PAGE, sliding_window=None)
    states = SimpleNamespace(shapes=((768, 3), (8, 64, 64)), dtypes=(torch.bfloat16, torch.float32))
    groups = [SimpleNamespace(kv_cache_spec=one) for one in (attends, states)]
    specs = {"a": attends, "b": attends, "c": states, "d": states}
    apart = [SimpleNamespace(size=9 * PAGE, shared_by=["a", "c"]), SimpleNamespace(size=9 * PAGE, shared_by=["b", "d"])]
    together = [SimpleNamespace(size=18 * PAGE, layers=["a", "b"]), SimpleNamespace(size=18 * PAGE, layers=["c", "d"])]
    for tensors in (apart, together):  # vLLM 0.26, 0.32
        config = SimpleNamespace(num_blocks=9, kv_cache_groups=groups, kv_cache_tensors=tensors)
        scheduler = SimpleNamespace(kv_cache_config=config)
        core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=scheduler))
        engine = SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core), collective_rpc=lambda name: [specs])
        told = vllm_pages(engine, on_cpu=False)
        held = compare([FULL, MAMBA, MAMBA, FULL], told, "bf16", 300)
        size = 600 * 512 + 2 * STATE
        assert held == Held(num_tokens=300, ours=size, theirs=size, pages=6 * PAGE, their_pages=6 * PAGE)
        assert held.equal
        assert held.verdict == f"{size:,} bytes of 300 tokens in {6 * PAGE:,} of pages"
        other = compare([FULL, MAMBA, FULL], told, "bf16", 300)
        assert not other.equal
        assert "WE SAY 442,880 in" in other.verdict
