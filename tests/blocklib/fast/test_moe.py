"""The mixture on our kernels, as a CUDA graph, against the plain module: what only a GPU shows."""

from __future__ import annotations

import pytest
import torch

from puzzle.blocklib.fast import moe as fast_moe
from puzzle.blocklib.fast.batch import make_fast, new_batch
from puzzle.blocklib.plain.part import loaded
from puzzle.blocklib.sub_block import parse_key
from puzzle.kernels import grouped
from puzzle.kernels.timer import Graph

KEYS = {
    "softmax": "moe h128 e128 k8 f64 norm_topk",
    "softmax, shared": "moe h128 e60 k4 f64 shared64 shared_gate",
    "sigmoid": "moe h128 e128 k6 f64 act=relu2 router=sigmoid correction_bias shared64 scaling=2.5 norm_topk",
    "gpt-oss": "moe h128 e32 k4 f64 act=swiglu_oai bias norm_topk",
    "latent": "moe h128 e512 k22 f64 act=relu2 router=sigmoid correction_bias shared64 latent32 norm_topk",
    "groups": "moe h128 e256 k8 f64 router=sigmoid correction_bias groups8 topk_groups4 shared64 norm_topk",
}


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("bounds", [None, (0.0, 1e9)], ids=["torch's products", "ours"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KEYS)
def test_a_graph_of_it_is_the_plain_one(name, dtype, bounds, monkeypatch):
    """Graphs of few rows and of many, whose tokens change between replays."""
    monkeypatch.setattr(grouped, "FASTER", bounds)
    monkeypatch.setattr(fast_moe, "MAX_ROWS", 512)
    monkeypatch.setattr(fast_moe, "measured", lambda x: True)  # float32, and any card
    torch.manual_seed(0)
    sub_block, device = parse_key(KEYS[name]), torch.device("cuda")
    weights = {n: torch.randn(s, device=device) * s[-1] ** -0.5 for n, s in sub_block.tensors().items()}
    part = loaded(sub_block, {n: t if n in sub_block.exact else t.to(dtype) for n, t in weights.items()})
    wide = loaded(sub_block, {n: t.to(t.dtype if n in sub_block.exact else dtype).float() for n, t in weights.items()})
    for num in (1, 3, 16, 64, 65, 512, 513):
        batch = new_batch(num, 64, {}, device)
        fast, x = make_fast(part, batch), torch.zeros(num, 128, device=device, dtype=dtype)
        found: list[torch.Tensor] = []
        graph = Graph(lambda f=fast, x=x, b=batch, found=found: found.append(f.decode((x, None), b)[0]), device)
        for _ in range(2):
            x.copy_(torch.randn(num, 128, device=device))
            graph.replay()
            want = wide(x.float()[None], {})[0]
            error = (found[-1].float() - want).norm(dim=-1) / want.norm(dim=-1)
            assert error.isfinite().all()
            if dtype == torch.float32:
                assert error.median().item() < 1e-5
            elif num > 16:  # where two experts are nearly as good, a token may have the other one
                assert error.median().item() < 3e-2
