"""The column of the matrix of engines that needs no other environment: the twelve in transformers, in both its formats.

`make test-serving` runs the same children in vLLM, llama.cpp and mlx-lm (benchmarks/serving/serving_matrix.py).
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from puzzle.base.errors import UserError
from puzzle.export.write import export, open_source
from puzzle.runtime.model import load_model

TOLERANCE = 1e-3  # max |Δlogit| / std
NUM_TOKENS = 24


def our_greedy_tokens(model, prompt, count):
    """Without a cache, from the forward that evaluation uses. prompt [T] -> [count]"""
    ids = prompt
    for _ in range(count):
        ids = torch.cat((ids, model(ids[None])[0, -1].argmax()[None]))
    return ids[len(prompt) :]


@pytest.mark.parametrize("format", ["hf", "nemotron-nas"])
def test_transformers_computes_the_child(name, format, tiny, tiny_checkpoint, tmp_path):
    source = tiny_checkpoint(name)
    if (name, format) == ("window", "nemotron-nas"):
        with pytest.raises(UserError, match="layer 1 attention: a reader of nemotron-nas takes no sliding window"):
            export(open_source(source), tmp_path / "child", format=format)
        return
    written = export(open_source(source), tmp_path / "child", format=format)
    theirs = AutoModelForCausalLM.from_pretrained(written.out, trust_remote_code=True, dtype=torch.float32).eval()
    ours = load_model(source)
    ids = torch.randint(2, tiny.VOCAB, (2, 48), generator=torch.Generator().manual_seed(0))
    options = {"do_sample": False, "max_new_tokens": NUM_TOKENS, "eos_token_id": None, "pad_token_id": 1}
    with torch.no_grad():
        wanted = ours(ids)
        assert (theirs(ids).logits - wanted).abs().max() / wanted.std() <= TOLERANCE
        long, short = ids[0], ids[1, -19:]
        padded = torch.stack((long, torch.cat((torch.ones(48 - 19, dtype=torch.long), short))))
        mask = torch.ones_like(padded)
        mask[1, : 48 - 19] = 0
        batch = theirs.generate(padded, attention_mask=mask, **options)[:, 48:]  # with a cache, padded on the left
        for row, prompt in zip(batch, (long, short), strict=True):
            assert torch.equal(row, our_greedy_tokens(ours, prompt, NUM_TOKENS))
