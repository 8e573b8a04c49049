"""A model that several ranks share says what one says: shares add up, KV heads repeat, the vocabulary is put together."""

from __future__ import annotations

from dataclasses import replace
from threading import Barrier, Thread

import pytest
import torch

from puzzle.base.ranks import Ranks
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.linear import Linear
from puzzle.blocklib.none import NO_OP
from puzzle.blocklib.plain.part import loaded
from puzzle.blocklib.sub_block import parse_key
from puzzle.parents.known import known_structure
from puzzle.runtime.fast import FastRuntime
from puzzle.runtime.model import Block, CausalModel, load_model
from puzzle.runtime.parallel import own_rows
from tiny_parents import write_tiny_parent

SIZES = {"hidden_size": 48, "head_dim": 8, "num_attention_heads": 8, "intermediate_size": 56, "vocab_size": 397}


class Threads(Ranks):
    """Ranks that are threads of this process."""

    def sum(self, x):
        self.said[self.rank] = x.clone()
        self.barrier.wait()
        x.copy_(sum(self.said))
        self.barrier.wait()
        return x


def together(world: int, work) -> list:
    """What `work` gives of each rank."""
    barrier, said, found = Barrier(world), [None] * world, [None] * world
    kind = type("Shared", (Threads,), {"barrier": barrier, "said": said})

    def run(rank: int) -> None:
        try:
            found[rank] = work(kind(rank=rank, world=world, device=torch.device("cpu")))
        except BaseException:
            barrier.abort()
            raise

    threads = [Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None not in found
    return found


def said_by(model: CausalModel, ranks: Ranks | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens [B, 4], and the logits of this rank's words at a prompt's end and after three steps [4, B, V]."""
    runtime, logits = FastRuntime(model, 2, 24, ranks=ranks), []
    best = runtime._best

    def kept(found, rows=slice(None)):
        logits.append(found)
        return best(found, rows)

    runtime._best = kept
    prompts = torch.randint(0, 384, (2, 17), generator=torch.Generator().manual_seed(1))
    return runtime.generate(prompts, 4), torch.stack(logits)


def check(whole, shares, vocab: int) -> None:
    for tokens, _ in shares:
        assert torch.equal(tokens, whole[0])
    put_together = torch.cat([logits for _, logits in shares], dim=-1)[..., :vocab]
    torch.testing.assert_close(put_together, whole[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "world"),
    [
        ("llama tied, with biases", 2),
        ("qwen3", 4),
        ("gemma3", 2),
        ("granite", 8),
        ("phi3", 2),
        ("smollm3", 2),
        ("gpt_oss", 4),
    ],
)
def test_ranks_say_what_one_says(name, world, tmp_path):
    """Biases and norms after count once; two KV heads are divided, or repeated; 397 words are padded to 448."""
    path = write_tiny_parent(name, tmp_path, **SIZES)
    found = together(world, lambda ranks: said_by(load_model(path, ranks=ranks), ranks))
    check(said_by(load_model(path), None), found, 397)


def test_every_kind_of_sub_block_has_its_share(mixed):
    def work(ranks):
        structure = mixed.structure.share(ranks.world)
        blocks = [
            Block(
                {
                    slot: loaded(
                        structure.layers[i][slot], part.sub_block.cut(dict(part.named_parameters()), ranks.rank, 2)
                    )
                    for slot, part in block.parts().items()
                }
            )
            for i, block in enumerate(mixed.blocks)
        ]
        table = own_rows(ranks, mixed.embedding.weight.data, structure.vocab_size)
        return said_by(CausalModel(structure, table, blocks, mixed.norm.weight.data, None).eval(), ranks)

    check(said_by(mixed, None), together(2, work), mixed.structure.vocab_size)


CODE = """
import sys, torch
from puzzle.runtime.fast import FastRuntime
from puzzle.runtime.model import load_model
from puzzle.runtime.parallel import joined
torch.set_num_threads(1)
source, out = sys.argv[1:]
with joined(2, "cpu") as (ranks, device), torch.inference_mode():
    runtime = FastRuntime(load_model(source, ranks=ranks), 2, 24, ranks=ranks)
    seen, best = [], runtime._best
    runtime._best = lambda logits, rows: seen.append(logits) or best(logits, rows)
    tokens = runtime.generate(torch.arange(34).view(2, 17), 4)
    torch.save((tokens, torch.stack(seen)), f"{out}/{ranks.rank}.pt")
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build of torch has no gloo")
def test_two_processes_over_gloo_say_what_one_says(child, torchrun, tmp_path):
    for code, _, errors in torchrun(2, "-c", CODE, child, tmp_path):
        assert code == 0, errors
    runtime, seen = FastRuntime(load_model(child), 2, 24), []
    best = runtime._best
    runtime._best = lambda logits, rows: seen.append(logits) or best(logits, rows)
    tokens = runtime.generate(torch.arange(34).view(2, 17), 4)
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert all(torch.equal(found, tokens) for found, _ in shares)
    whole = torch.cat([logits for _, logits in shares], dim=-1)
    torch.testing.assert_close(whole[..., :384], torch.stack(seen), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("kv", [1, 2, 4, 8, 16])
def test_sizes_of_a_share(tp, kv):
    """By brute force: each query head with the KV head that it shared before, each channel and row on one rank."""
    whole = Gqa(hidden_size=64, num_attention_heads=16, num_key_value_heads=kv, head_dim=2)
    share = whole.share(tp)
    assert share.num_attention_heads * tp == 16
    assert share.num_key_value_heads == max(1, kv // tp)
    heads = {
        name: torch.arange(count).repeat_interleave(2)[:, None].expand(-1, 64)
        for name, count in (("q_proj.weight", 16), ("k_proj.weight", kv), ("v_proj.weight", kv))
    }
    heads |= {"o_proj.weight": heads["q_proj.weight"].T, "norm.weight": torch.ones(64)}
    seen = []
    for rank in range(tp):
        cut = whole.cut(heads, rank, tp)
        assert {name: tuple(t.shape) for name, t in cut.items()} == share.tensors()
        queries, keys = cut["q_proj.weight"][::2, 0], cut["k_proj.weight"][::2, 0]
        for at, query in enumerate(queries.tolist()):
            assert keys[at // (len(queries) // len(keys))] == query // (16 // kv)
        assert torch.equal(cut["o_proj.weight"][0, ::2], queries)
        seen += queries.tolist()
    assert seen == list(range(16))
    assert share.state().per_token == 2 * max(1, kv // tp) * 2


def test_shares_of_the_others():
    assert parse_key("swiglu h64 f96").share(4) == parse_key("swiglu h64 f24")
    assert Linear(hidden_size=64).share(4) == parse_key("linear h64 columns16")
    assert Linear(hidden_size=64, rank=24).share(4) == parse_key("linear h64 rank6")
    assert NO_OP.share(8) == NO_OP
    structure = known_structure("llama-3.1-405b")
    assert structure.share(8) == known_structure("llama-3.1-405b-tp8")
    assert structure.share(1) is structure
    assert replace(structure, vocab_size=100).share(2).vocab_size == 64  # padded to 128


@pytest.mark.parametrize(
    ("key", "tp", "words"),
    [
        ("gqa h64 q9 kv3 d8", 2, "`tp` 2: num_attention_heads 9 does not divide by it"),
        ("gqa h64 q12 kv3 d8", 2, "`tp` 2: num_key_value_heads 3 does not divide by it"),
        ("gqa h64 q12 kv6 d8", 4, "`tp` 4: num_key_value_heads 6 does not divide by it"),
        ("gqa h64 q12 kv4 d8 qk_norm=all", 2, "`tp` 2: a norm over all heads together"),
        ("swiglu h64 f30", 4, "`tp` 4: intermediate_size 30 does not divide by it"),
        ("linear h36", 8, "`tp` 8: hidden_size 36 does not divide by it"),
        ("linear h64 rank12", 8, "`tp` 8: rank 12 does not divide by it"),
    ],
)
def test_what_has_no_share_is_refused(key, tp, words):
    from puzzle.base.errors import UserError

    with pytest.raises(UserError, match=words):
        parse_key(key).share(tp)
    assert not parse_key(key).can_share(tp)
