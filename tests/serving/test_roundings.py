"""A mixture in bf16: another rounding of it is equal, another mixture is not."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from puzzle.blocklib.plain.moe import Experts, Router
from puzzle.serving.batch import ROUNDINGS, Batch, compare_batch, plan_batches
from puzzle.serving.reference import find_export, load_reference
from puzzle.serving.roundings import MOVED, round_to, rounded_otherwise
from tiny_children import write_tiny_child

SOFTMAX, SIGMOID, GATELESS, DENSE = "qwen3_moe", "sigmoid experts", "nemotron-h, experts", "kv-heads"


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """By name, for vLLM on a GPU."""
    directory = tmp_path_factory.mktemp("exports")
    return {n: find_export(write_tiny_child(n, directory / n)) for n in (SOFTMAX, SIGMOID, GATELESS, DENSE)}


@torch.no_grad()
def answers(model, prompts, count, top):
    """As an engine in bf16 gives them."""
    rows = []
    for prompt in prompts:
        ids, own = list(prompt), []
        for _ in range(count):
            own.append(model(torch.tensor([ids]))[0, -1].float().log_softmax(-1))
            ids.append(int(own[-1].argmax()))
        rows.append(torch.stack(own))
    rows = torch.stack(rows)
    likeliest = rows.topk(top, dim=-1)
    found = {"after": rows[:, 0], "texts": rows.argmax(-1), "words": likeliest.indices, "during": likeliest.values}
    return {"dtype": "bfloat16", **{name: tensor.numpy() for name, tensor in found.items()}}


@pytest.fixture(autouse=True)
def products_in_float32(monkeypatch):
    """Of bf16, rounded once: several times as fast where a CPU has none."""
    linear = F.linear

    def fast(x, weight, bias=None):
        return linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    monkeypatch.setattr(F, "linear", fast)


def judged(export, change=None, seed=0):
    """The verdict on an engine that is our own forward in bf16 with another rounding, after `change` to its model."""
    asked = plan_batches(export)["cpu"]
    long = asked["prompts"][3]
    prompts = [long[at : at + 17 + at // 8] for at in range(0, 180, 18)]
    engine = round_to(load_reference(export), torch.bfloat16)
    if change is not None:
        change(engine)
    with rounded_otherwise(engine, 1000 + seed):
        found = answers(engine, prompts, 3, asked["top"])
    return compare_batch(load_reference(export), prompts, found, 1e-3, torch.device("cpu"))


def of_routers(**fields):
    """A change of what every router believes; a value may be a function of the right one."""

    def change(model):
        for module in model.modules():
            if isinstance(module, Router):
                own = module.sub_block
                new = {name: value(getattr(own, name)) if callable(value) else value for name, value in fields.items()}
                module.sub_block = replace(own, **new)

    return change


def one_expert(model):
    """The first mixture's first expert gives 1.5 times as much."""
    experts = next(module for module in model.modules() if isinstance(module, Experts))
    experts.down_proj[0] *= 1.5


def nothing_but_nan(model):
    model.norm.weight *= math.nan


@pytest.mark.parametrize(("name", "seed"), [(SOFTMAX, 0), (SOFTMAX, 1), (SIGMOID, 0), (GATELESS, 0)])
def test_another_rounding_of_a_mixture(name, seed, exports):
    batch = judged(exports[name], seed=seed)
    assert batch.equal, batch.verdict
    assert batch.plain_runs == ROUNDINGS == 8
    assert "at most 1.2 times plain, the largest of 8 roundings; " in batch.verdict


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (SOFTMAX, of_routers(norm_topk_prob=False)),
        (SOFTMAX, of_routers(num_experts_per_tok=lambda k: k + 1)),
        (SOFTMAX, of_routers(routed_scaling_factor=1.1)),
        (SOFTMAX, one_expert),
        (SIGMOID, of_routers(correction_bias=False)),
        (SIGMOID, of_routers(routed_scaling_factor=2.25)),
        (SIGMOID, of_routers(num_groups=1, num_topk_groups=1)),
        (GATELESS, of_routers(num_experts_per_tok=lambda k: max(1, k - 1))),
        (SIGMOID, nothing_but_nan),
    ],
)
def test_another_mixture(name, change, exports):
    batch = judged(exports[name], change)
    assert not batch.equal, batch.verdict


def test_a_dense_child_runs_once(exports):
    batch = judged(exports[DENSE])
    assert batch.equal, batch.verdict
    assert batch.plain_runs == 1
    assert "roundings" not in batch.verdict


@pytest.mark.parametrize(
    ("after", "plain", "equal"),
    [
        (0.11, 0.1, True),
        (0.13, 0.1, False),
        (math.inf, 0.1, False),
        (0.1, math.inf, False),
        (math.inf, math.inf, False),
    ],
)
def test_what_is_not_finite_is_never_right(after, plain, equal):
    """In ours either: against a plain forward that overflows nothing can be held."""
    batch = Batch(
        dtype="bfloat16", num_prompts=1, shortest=1, longest=1, after=after, during=0.1, plain_after=plain, plain_during=0.1,
        plain_runs=8, tolerance=1.2, same_texts=1,
    )  # fmt: skip
    assert batch.equal == equal


def test_a_move_is_of_one_unit_in_the_last_place(exports):
    """Of a third of what a sub-block adds; by its seed, and no longer than it is asked for."""
    model = round_to(load_reference(exports[DENSE]), torch.bfloat16)
    part = model.blocks[0].attention
    x = model.embed(torch.arange(300)[None])
    right = part(x, model.ropes(300))
    found = []
    for seed in (1, 1, 2):
        with rounded_otherwise(model, seed):
            found.append(part(x, model.ropes(300)))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    units = found[0].view(torch.int16).int() - right.view(torch.int16).int()
    assert units.abs().max() == 1
    assert (units != 0).float().mean().item() == pytest.approx(MOVED, rel=0.05)
    assert abs(units.float().mean().item()) < 0.005
    assert torch.equal(part(x, model.ropes(300)), right)


def test_what_is_exact_stays_so(exports):
    """A correction bias that was rounded would choose other experts than any engine."""
    right = load_reference(exports[SIGMOID])
    rounded = round_to(load_reference(exports[SIGMOID]), torch.bfloat16)
    for (name, before), (_, now) in zip(right.named_parameters(), rounded.named_parameters(), strict=True):
        exact = name.endswith("e_score_correction_bias")
        assert now.dtype == (torch.float32 if exact else torch.bfloat16)
        assert not exact or torch.equal(now, before)
