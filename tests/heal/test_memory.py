"""What a healing is promised to take holds what is alive at its peak: counted, tensor by tensor."""

from __future__ import annotations

import gc
import json
import shutil
import weakref

import pytest
import torch

from live_memory import LiveMemory
from puzzle.base.ranks import start_ranks
from puzzle.blocklib.plain.part import blank, learning
from puzzle.blocklib.sub_block import parse_key
from puzzle.heal.memory import heal_bytes, plan_memory, saved_bytes
from puzzle.heal.prepare import build_trainer, open_models
from puzzle.heal.settings import HealOptions

MOST = 1.4  # of what is alive
SIZES = {"batch_size": 4, "accumulate": 2, "validation_sequences": 2}


@pytest.fixture(scope="module")
def models(deep, make_child, tmp_path_factory):
    """(child, parent) of twelve layers, made for 1024 tokens."""
    out = tmp_path_factory.mktemp("long")
    shutil.copytree(deep, out / "parent")
    config = json.loads((out / "parent" / "config.json").read_text(encoding="utf-8"))
    text = json.dumps(config | {"max_position_embeddings": 1024})
    (out / "parent" / "config.json").write_text(text, encoding="utf-8")
    return str(make_child(out / "parent", out / "child")), str(out / "parent")


class Unmultiplied(LiveMemory):
    """Products have their shapes and are zero: sizes do not depend on values, and in bf16 a CPU takes minutes for them."""

    def run(self, func, *args, **kwargs):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            a, b = args
            return a.new_zeros(*a.shape[:-1], b.shape[-1])
        return super().run(func, *args, **kwargs)


def counted(options: HealOptions) -> tuple[int, int]:
    """(promised, alive at the peak) of steps and an evaluation."""
    stages, ranks = options.plan_stages(), start_ranks("cpu")
    models = open_models(options, stages, ranks)
    gc.collect()
    generator = torch.Generator().manual_seed(0)
    shape, words = (2, options.batch_size, options.seq_len), models.child.structure.vocab_size
    with Unmultiplied() as memory:
        trainer = build_trainer(options, stages, models, ranks)
        trainer.begin_stage(options.seq_len)
        batch = torch.randint(words, shape, generator=generator)
        for step in range(2):
            trainer.step(batch, step)
        trainer.evaluate(batch, max(1, options.batch_size // options.accumulate))
    return heal_bytes(options, stages, models, ranks, streamed=False, sharded=False), memory.peak


@pytest.mark.parametrize("seq_len", [128, 512])
@pytest.mark.parametrize("more", [
    {"recompute": True}, {"recompute": False}, {"dtype": "fp32", "recompute": True}, {"dtype": "fp32"}, {"train_embeddings": True},
    {"cosine_weight": 0.0, "recompute": True},
], ids=str)  # fmt: skip
def test_promise_holds_what_is_counted(models, tmp_path, seq_len, more):
    child, teacher = models
    more = {"dtype": "bf16", "tokens": 8 * seq_len, "seq_len": seq_len} | more
    promised, alive = counted(HealOptions(child=child, teacher=teacher, out=tmp_path, **SIZES, **more))
    assert alive <= promised <= MOST * alive


def test_what_the_teacher_showed_goes_before_it_shows_more(models, tmp_path):
    """In steps and in evaluations: its streams are there once."""
    child, teacher = models
    options = HealOptions(child=child, teacher=teacher, out=tmp_path, seq_len=32, tokens=256, **SIZES)
    stages, ranks = options.plan_stages(), start_ranks("cpu")
    trainer = build_trainer(options, stages, open_models(options, stages, ranks), ranks)
    trainer.begin_stage(32)
    shown: list[weakref.ref] = []
    there: list[bool] = []
    trainer.teacher.register_forward_pre_hook(lambda *_: there.extend(ref() is not None for ref in shown))
    trainer.teacher.register_forward_hook(lambda module, given, found: shown.append(weakref.ref(found.hidden[0])))
    batch = torch.randint(384, (2, 4, 32), generator=torch.Generator().manual_seed(0))
    trainer.step(batch, 0)
    trainer.evaluate(batch, 2)
    assert len(shown) == 4
    assert there
    assert not any(there)


def test_a_trainer_of_before_goes_before_the_next_is_planned(models, tmp_path):
    """A trainer refers to itself; what is free is asked when nothing holds it any more."""
    child, teacher = models
    options = HealOptions(child=child, teacher=teacher, out=tmp_path, seq_len=32, tokens=256, recompute=True, **SIZES)
    stages, ranks = options.plan_stages(), start_ranks("cpu")
    opened = open_models(options, stages, ranks)
    before = weakref.ref(build_trainer(options, stages, opened, ranks))
    plan_memory(options, stages, opened, ranks)
    assert before() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("key", [
    "gqa h64 q4 kv2 d16", "gqa h64 q4 kv2 d16 qk_norm=head norm=both norm_offset", "gqa h64 q4 kv2 d16 window128",
    "gqa h64 q4 kv1 d16 window300 sinks", "swiglu h64 f176", "swiglu h64 f176 act=gelu_tanh norm=both norm_offset", "relu2 h64 f176",
    "linear h64", "moe h64 e8 k2 f48", "moe h64 e16 k4 f32 shared64 router=sigmoid norm_topk", "mamba2 h64 heads8 d16 groups1 state16",
    "gated_delta h64 kheads2 k16 vheads4 v16",
])  # fmt: skip
def test_what_a_sub_block_keeps(key, dtype):
    """A forward pass leaves no more for the backward pass than `saved_bytes` says."""
    sub_block, tokens = parse_key(key), 1024
    part = learning(blank(sub_block, "cpu"))
    for parameter in part.parameters():
        parameter.data.normal_(std=0.05)
    ropes = {"default": (torch.ones(tokens, 16, dtype=dtype),) * 2}
    stream = torch.zeros(1, tokens, 64, dtype=dtype, requires_grad=True)
    with (
        LiveMemory() as memory,
        torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32, cache_enabled=False),
    ):
        out = part(stream, ropes)
        kept = memory.now - out.untyped_storage().nbytes()
    assert 0 < kept <= saved_bytes({"slot": sub_block}, tokens, tokens, dtype.itemsize)
