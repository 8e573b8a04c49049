"""The mixture of experts against transformers' own modules, and what its variants start from."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from transformers import AutoConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from puzzle.base.errors import UserError
from puzzle.blocklib import experts
from puzzle.blocklib.distill import Recipe, Shown, VariantTrainer
from puzzle.blocklib.fast import moe as fast_moe
from puzzle.blocklib.fast.batch import make_fast, new_batch
from puzzle.blocklib.moe import Moe
from puzzle.blocklib.plain import moe as plain_moe
from puzzle.blocklib.plain.part import learning, loaded
from puzzle.blocklib.sub_block import ParentBlock, parse_key
from puzzle.blocklib.variant import search_space, search_spaces, variant_of
from puzzle.kernels import grouped

H = 24
KEYS = {
    "softmax": f"moe h{H} e7 k3 f20 norm_topk",
    "softmax, shared": f"moe h{H} e6 k2 f20 shared32 shared_gate",
    "sigmoid": f"moe h{H} e5 k2 f33 act=relu2 router=sigmoid correction_bias shared17 scaling=2.5 norm_topk",
    "gpt-oss": f"moe h{H} e5 k3 f20 act=swiglu_oai bias norm_topk",
    "latent": f"moe h{H} e5 k2 f20 act=relu2 router=sigmoid correction_bias shared18 latent10 norm_topk",
    "groups": f"moe h{H} e12 k3 f32 router=sigmoid correction_bias groups4 topk_groups2",
}


def block_of(key: str) -> ParentBlock:
    sub_block, generator = parse_key(key), torch.Generator().manual_seed(1)
    weights = {n: torch.randn(s, generator=generator) * s[-1] ** -0.5 for n, s in sub_block.tensors().items()}
    weights["norm.weight"] = 1 + 0.1 * weights["norm.weight"]
    block = ParentBlock(sub_block=sub_block, weights=weights)
    part = loaded(sub_block, weights)
    block.statistics, block.moments = part.calibrate([rows(2), rows(3)]), lambda: part.moments([rows(2), rows(3)], {})
    return block


def rows(seed: int) -> torch.Tensor:
    return torch.randn(2, 37, H, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=KEYS)
def block(request) -> ParentBlock:
    return block_of(KEYS[request.param])


def their_nemotron_h(sub_block: Moe, weights: dict) -> torch.nn.Module:
    module = NemotronHMoE(
        AutoConfig.for_model(
            "nemotron_h", hidden_size=H, n_routed_experts=sub_block.num_experts, moe_latent_size=sub_block.latent_size, mlp_hidden_act="relu2",
            num_experts_per_tok=sub_block.num_experts_per_tok, moe_intermediate_size=sub_block.moe_intermediate_size,
            moe_shared_expert_intermediate_size=sub_block.shared_intermediate_size, norm_topk_prob=sub_block.norm_topk_prob,
            n_group=sub_block.num_groups, topk_group=sub_block.num_topk_groups,
            routed_scaling_factor=sub_block.routed_scaling_factor,
        )
    )  # fmt: skip
    names = {n: n.replace("shared_expert.", "shared_experts.") for n in sub_block.inner_tensors()}
    module.load_state_dict({names[n]: weights[n] for n in names})
    return module


def their_qwen2(sub_block: Moe, weights: dict) -> torch.nn.Module:
    module = Qwen2MoeSparseMoeBlock(
        AutoConfig.for_model(
            "qwen2_moe", hidden_size=H, num_experts=sub_block.num_experts, num_experts_per_tok=sub_block.num_experts_per_tok,
            moe_intermediate_size=sub_block.moe_intermediate_size, norm_topk_prob=sub_block.norm_topk_prob,
            shared_expert_intermediate_size=sub_block.shared_intermediate_size,
        )
    )  # fmt: skip
    own = {n: weights[n] for n in sub_block.inner_tensors() if "experts." not in n}
    own["experts.down_proj"] = weights["experts.down_proj"]
    own["experts.gate_up_proj"] = torch.cat((weights["experts.gate_proj"], weights["experts.up_proj"]), dim=1)
    module.load_state_dict(own)
    return module


def their_gpt_oss(sub_block: Moe, weights: dict) -> torch.nn.Module:
    module = GptOssMLP(
        AutoConfig.for_model(
            "gpt_oss", hidden_size=H, num_local_experts=sub_block.num_experts, num_experts_per_tok=sub_block.num_experts_per_tok,
            intermediate_size=sub_block.moe_intermediate_size,
        )
    )  # fmt: skip
    own = {f"router.{n}": weights[f"gate.{n}"] for n in ("weight", "bias")}
    for end in ("", "_bias"):
        both = torch.stack([weights[f"experts.{n}_proj{end}"] for n in ("gate", "up")], dim=2).flatten(1, 2)
        for name, tensor in (("gate_up_proj", both), ("down_proj", weights[f"experts.down_proj{end}"])):
            own[f"experts.{name}{end}"] = tensor if end else tensor.transpose(1, 2)
    module.load_state_dict(own)
    return lambda x: module(x)[0]


@torch.no_grad()
@pytest.mark.parametrize(
    ("key", "theirs"),
    [
        (KEYS["gpt-oss"], their_gpt_oss),
        (KEYS["sigmoid"], their_nemotron_h),
        (KEYS["latent"], their_nemotron_h),
        (
            f"moe h{H} e12 k3 f16 act=relu2 router=sigmoid correction_bias shared8 groups4 topk_groups2",
            their_nemotron_h,
        ),
        (KEYS["softmax, shared"], their_qwen2),
        (f"moe h{H} e6 k2 f20 shared32 shared_gate norm_topk", their_qwen2),
    ],
)
def test_it_computes_what_transformers_does(key, theirs):
    block = block_of(key)
    if theirs is their_gpt_oss:  # far enough to be clamped
        block.weights |= {n: 9 * t for n, t in block.weights.items() if n in ("experts.gate_proj", "experts.up_proj")}
    part, x = loaded(block.sub_block, block.weights), rows(5)
    wanted = theirs(block.sub_block, block.weights)(part.enter(x))
    assert wanted.std() > 0.05
    assert (part(x, {}) - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=1)
    assert (part(x[:1, :1], {}) - wanted[:1, :1]).abs().max() <= 1e-5 * wanted.abs().max().clamp(
        min=1
    )  # a decode step of one sequence


def test_sizes(block):
    sub_block, part = block.sub_block, loaded(block.sub_block, block.weights)
    assert {n: tuple(p.shape) for n, p in part.named_parameters()} == sub_block.tensors()
    one = len(sub_block.matrices) * (sub_block.latent_size or H) * sub_block.moe_intermediate_size
    idle = (sub_block.num_experts - sub_block.num_experts_per_tok) * one
    biases = H + 2 * sub_block.moe_intermediate_size if sub_block.bias else 0
    without = (sub_block.num_experts - sub_block.num_experts_per_tok) * biases
    assert sub_block.active_parameters() == sub_block.num_parameters - idle - without
    matrices = sum(p.numel() for n, p in part.named_parameters() if p.ndim > 1 and "bias" not in n)
    assert sub_block.num_matrix_parameters == matrices
    assert sub_block.flops(3, 100) == 6 * (sub_block.num_matrix_parameters - idle)
    assert not sub_block.state()


@torch.no_grad()
def test_shares_add_up(block):
    sub_block, x = block.sub_block, rows(6)
    if sub_block.moe_intermediate_size % 2 or (sub_block.shared_intermediate_size or 0) % 2:
        with pytest.raises(UserError, match="does not divide"):
            sub_block.shared(2)
        return
    shares = [loaded(sub_block.shared(2), sub_block.cut(block.weights, rank, 2)) for rank in range(2)]
    assert torch.allclose(sum(s(x, {}) for s in shares), loaded(sub_block, block.weights)(x, {}), atol=1e-5)


@torch.no_grad()
def test_our_kernels_path_is_the_plain_one(block, monkeypatch):
    x, batch = rows(7).flatten(0, 1), new_batch(1, 64, {}, "cpu")
    part = loaded(block.sub_block, block.weights)
    for bounds, limit in product((None, (0.0, 1e9)), (512, 0)):  # torch's ways, the twins of our kernels
        monkeypatch.setattr(grouped, "FASTER", bounds)
        monkeypatch.setattr(fast_moe, "MAX_ROWS", limit)
        for rows_in_hand in (x[:1], x):
            delta, residual = make_fast(part, batch).decode((rows_in_hand, None), batch)
            assert torch.allclose(delta + residual, part.add(rows_in_hand[None], {})[0], atol=1e-5)
    batch.fp8 = True
    with pytest.raises(UserError, match="'moe' have no path on our kernels in fp8"):
        make_fast(part, batch)


def test_a_graph_waits_for_no_numbers(monkeypatch):
    """What a CUDA graph records in float32, or of other sizes: values and gradients of the loop, experts without rows among them."""
    ends, found = torch.tensor([3, 3, 4, 9]), []
    for captured in (False, True):
        torch.manual_seed(0)
        rows, weight = (torch.randn(shape, requires_grad=True) for shape in ((9, 5), (4, 7, 5)))
        monkeypatch.setattr(plain_moe, "capturing", lambda _, captured=captured: captured)
        if captured:
            monkeypatch.setattr(torch.Tensor, "tolist", None)
        out = plain_moe.by_expert(rows, weight, ends)
        monkeypatch.undo()
        found.append([out, *torch.autograd.grad(out.square().sum(), (rows, weight))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_the_grouped_product_is_the_loop():
    """What a GPU runs: torch's grouped product takes the same rows, weights and ends."""
    x, weight = torch.randn(11, 16).bfloat16(), torch.randn(4, 24, 16).bfloat16()
    ends = torch.tensor([3, 3, 8, 11])
    grouped = torch._grouped_mm(x, weight.transpose(-2, -1), offs=ends.int())
    assert torch.allclose(plain_moe.by_expert(x, weight, ends).float(), grouped.float(), atol=0.1)


# -- variants ------------------------------------------------------------------------------------------------


def error_of(variant, block: ParentBlock) -> float:
    x = rows(8)
    target = loaded(block.sub_block, block.weights)(x, {})
    out = loaded(variant.sub_block, variant.initialise(block))(x, {})
    return ((out - target).square().sum() / target.square().sum()).item()


@torch.no_grad()
def test_every_variant_is_whole_and_better_than_nothing(block):
    more = "frequent=0.75,merged=0.75,experts=0.9-topk=0.9-width=0.9"
    names = ["none", *search_space(block.sub_block, None, "ffn"), *search_space(block.sub_block, more, "ffn")]
    for name in dict.fromkeys(names):
        variant = variant_of(block.sub_block, name, "ffn")
        started = variant.initialise(block)
        assert {n: tuple(t.shape) for n, t in started.items()} == variant.sub_block.tensors(), name
        assert parse_key(variant.sub_block.key()) == variant.sub_block
        assert variant_of(block.sub_block, variant.name, "ffn").sub_block == variant.sub_block
        if name.startswith(("width", "shared", "parent")):
            assert error_of(variant, block) < 0.9, name


@torch.no_grad()
def test_experts_that_nobody_needs_go_first():
    """One whose output is nothing is the first to go by what it adds, and stays by frequency where every token has it."""
    block = block_of(KEYS["softmax"])
    block.weights["experts.down_proj"][2] = 0.0
    block.weights["gate.weight"][2] = 0.0
    block.weights["gate.weight"][:, 0] = 0.0
    block.weights["gate.weight"][2, 0] = 9.0
    part = loaded(block.sub_block, block.weights)
    x = rows(9)
    x[..., 0] = 4.0  # all tokens choose expert 2
    block.statistics = part.calibrate([x])
    assert block.statistics.routed.sum() == 2 * 37 * 3
    assert block.statistics.routed[2] == 2 * 37
    saliency = experts.saliency(block.statistics)
    assert saliency[2] == 0
    chosen, weights = part.gate(part.enter(x).flatten(0, 1))
    given = part.enter(x).flatten(0, 1)
    one = torch.nn.functional.silu(given @ block.weights["experts.gate_proj"][4].T) * (
        given @ block.weights["experts.up_proj"][4].T
    )
    norms = (one @ block.weights["experts.down_proj"][4].T).norm(dim=-1)
    mine = chosen == 4
    wanted = (weights * norms[:, None])[mine].mean()
    assert torch.allclose(saliency[4].float(), wanted, rtol=1e-4)
    kept = variant_of(block.sub_block, "experts=6", "ffn").initialise(block)
    assert torch.equal(kept["gate.weight"], block.weights["gate.weight"][[0, 1, 3, 4, 5, 6]])
    by_frequency = variant_of(block.sub_block, "frequent=3", "ffn").initialise(block)
    assert any(torch.equal(row, block.weights["gate.weight"][2]) for row in by_frequency["gate.weight"])


@pytest.mark.parametrize("words", ["", " act=swiglu_oai bias norm_topk"])
def test_equal_experts_merge_into_themselves(words):
    """Copies of each expert, with their channels in another order, change nothing in the one that they go into."""
    block = block_of(f"moe h{H} e6 k2 f20{words}")
    for n, full in block.weights.items():
        dims = {"down_proj": (1,), "down_proj_bias": ()}.get(n.partition(".")[2], (0,))
        for e in range(3 if n.startswith("experts.") else 0):
            full[e + 3] = full[e].flip(dims)
        if n.startswith("gate."):
            full[3:] = full[:3]
    merged = {n: t.clone() for n, t in block.weights.items()}
    experts.merge(merged, torch.rand(6), torch.arange(3))
    assert all(torch.allclose(t, merged[n], atol=1e-6) for n, t in block.weights.items())


def test_parent_weights_stay_as_they_are(block):
    before = {n: t.clone() for n, t in block.weights.items()}
    for name in ("merged=0.75", "experts=0.5-width=0.5"):
        variant_of(block.sub_block, name, "ffn").initialise(block)
    assert all(torch.equal(before[n], t) for n, t in block.weights.items())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("experts=9", "experts=9 is more than the parent's 7"),
        ("experts=2", "num_experts_per_tok 3 is more than the 2 to choose from"),
        ("experts=0", "experts=0 is neither a count, such as experts=4, nor a fraction of the parent's, such as experts=0.5"),
        ("width=1.5", "width=1.5 is neither"),
        ("topk=half", "topk=half is neither"),
        ("shared=0.5", "the parent has no shared expert"),
        ("dense=900", "900 channels are more than the 140 of all experts"),
        ("dense=0.5-topk=1", "dense alone"),
        ("experts=4-merged=4", "one of experts, frequent, merged, and topk, width and shared once each"),
        ("expert=4", "unknown ffn variant 'expert=4'"),
    ],
)  # fmt: skip
def test_impossible_variants(name, message):
    with pytest.raises(UserError, match=message) as caught:
        variant_of(parse_key(KEYS["softmax"]), name, "ffn")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("moe h8 e4 k5 f8", "num_experts_per_tok 5 is more than the 4 to choose from"),
        ("moe h8 e9 k2 f8 router=sigmoid groups2", "9 experts do not fall into 2 equal groups"),
        ("moe h8 e8 k2 f8 groups2", "2 groups of experts need router sigmoid"),
        ("moe h8 e8 k5 f8 router=sigmoid groups2", "5 is more than the 4 to choose from"),
        ("moe h8 e8 k2 f8 shared_gate", "shared_gate without shared_intermediate_size"),
        ("moe h8 e8 k2 f8 shared4 bias", "a shared expert beside biases or swiglu_oai is not supported"),
    ],
)
def test_numbers_that_do_not_go_together(key, message):
    with pytest.raises(UserError, match=message):
        parse_key(key)


def test_no_dense_ffn_is_like_clamped_experts():
    own = parse_key(KEYS["gpt-oss"])
    assert not [name for name in search_space(own, None, "ffn") if name.startswith("dense")]
    with pytest.raises(
        UserError, match="FFN variant 'dense=8': no dense FFN is like experts with biases or swiglu_oai"
    ):
        variant_of(own, "dense=8", "ffn")


def test_names_by_layer():
    """Dense layers of a mixed parent take fractions, mixtures the rest."""
    dense, mixed = parse_key(f"swiglu h{H} f64"), parse_key(KEYS["softmax"])
    spaces = search_spaces({0: {"ffn": dense}, 1: {"ffn": mixed}}, {"ffn": "0.5,experts=4,none"})
    assert [list(spaces[n]["ffn"]) for n in (0, 1)] == [["parent", "0.5", "none"], ["parent", "experts=4", "none"]]


def test_training_reaches_the_router_and_tells_the_load(block):
    """The correction bias has no gradient and stays; everything else moves."""
    recipe = Recipe(num_steps=8, batch_size=2, seq_len=37, lr=1e-2)
    variant = variant_of(block.sub_block, "width=0.5", "ffn")
    lr = torch.tensor(1e-2)
    trainer = VariantTrainer(0, "ffn", [variant], block, recipe, torch.device("cpu"), lr)
    shown = Shown(loaded(block.sub_block, block.weights), rows(4), {})
    trainer.validate(shown)
    trainer.losses[0] = trainer.validated()
    for _ in range(8):
        trainer.step(shown)
    trainer.validate(shown)
    trainer.losses[-1] = trainer.validated()
    (found,) = trainer.trained()
    started = variant.initialise(block)
    assert found.improved
    assert {n for n, t in found.tensors.items() if torch.equal(t, started[n])} <= {"gate.e_score_correction_bias"}
    load = found.facts["expert_load"]
    assert len(load) == block.sub_block.num_experts
    assert sum(load) == pytest.approx(1, abs=1e-4)
    other = VariantTrainer(0, "ffn", [variant], block, recipe, torch.device("cpu"), lr)
    other.load_state({n: t.clone() for n, t in trainer.state().items()})
    assert other._facts == trainer._facts[:1]


def test_an_expert_without_tokens_stays_as_it_is():
    """Its correction bias keeps it from every token; the others, which have none, share them and learn."""
    block = block_of(KEYS["sigmoid"])
    block.weights["gate.e_score_correction_bias"] = torch.tensor([0, 0, 0, -100.0, 0])
    recipe = Recipe(num_steps=3, batch_size=2, seq_len=37, lr=1e-2)
    kept = variant_of(block.sub_block, "topk=1", "ffn")
    trainer = VariantTrainer(0, "ffn", [kept], block, recipe, torch.device("cpu"), torch.tensor(1e-2))
    shown = Shown(loaded(block.sub_block, block.weights), rows(4), {})
    for _ in range(recipe.num_steps):
        trainer.step(shown)
    now = trainer.masters.values()
    for name in (f"experts.{matrix}" for matrix in block.sub_block.matrices):
        same = [torch.equal(after, before) for after, before in zip(now[name], block.weights[name], strict=True)]
        assert same == [False, False, False, True, False]


def test_what_has_no_gradient_does_not_learn():
    part = loaded(parse_key(KEYS["sigmoid"]), block_of(KEYS["sigmoid"]).weights)
    assert [n for n, p in learning(part).named_parameters() if not p.requires_grad] == ["gate.e_score_correction_bias"]


@pytest.mark.parametrize("latent", ["", " latent7"])
@pytest.mark.parametrize("act", ["silu", "relu2"])
def test_a_dense_ffn_of_all_channels_is_a_mixture_that_prefers_nobody(act, latent):
    """A router of zeros gives every expert to every token with the same weight; the FFN is of the experts' kind."""
    key = f"moe h{H} e4 k4 f10 act={act} router=sigmoid shared6 scaling=1.5{latent}"
    block = block_of(key)
    block.weights["gate.weight"] = torch.zeros_like(block.weights["gate.weight"])
    own = loaded(block.sub_block, block.weights)
    block.statistics = own.calibrate([rows(2)])
    assert torch.allclose(experts._reach(block.weights), _norms(block, own), atol=1e-4)
    dense = variant_of(block.sub_block, "dense=46", "ffn")
    assert dense.sub_block.kind == ("relu2" if act == "relu2" else "swiglu")
    found = loaded(dense.sub_block, dense.initialise(block))(rows(5), {})
    torch.testing.assert_close(found, own(rows(5), {}), rtol=1e-4, atol=1e-5)


def _norms(block: ParentBlock, own: torch.nn.Module) -> torch.Tensor:
    """‖what a channel adds‖ of every expert, written down as plainly as possible. [E, F]"""
    return own.given(block.weights["experts.down_proj"].transpose(1, 2)).norm(dim=-1)
