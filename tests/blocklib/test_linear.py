"""Two matrices of low rank: the optimum that the formula promises, where it starts, and its share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from puzzle.blocklib.initialize import least_squares, low_rank
from puzzle.blocklib.linear import Linear
from puzzle.blocklib.moments import RIDGE, RIDGES, Moments, best_ridge, ridged
from puzzle.blocklib.plain.part import loaded
from puzzle.blocklib.sub_block import ParentBlock, parse_key
from puzzle.blocklib.variant import default_names, search_space, variant_of
from puzzle.kernels.block_loss import block_loss

SIZE, RANK = 23, 5


KINDS = (
    "gqa h24 q4 kv2 d5",
    "gqa h24 q4 kv4 d6 window7 qkv_bias o_bias sinks",
    "gqa h24 q6 kv3 d4 qk_norm=head norm=both norm_offset residual=0.5",
    "gqa h24 q4 kv2 d6 qk_norm=all norm=after",
    "swiglu h24 f33 bias norm=both",
    "moe h24 e5 k2 f20 shared17",
    "mamba2 h24 heads4 d5 groups2 state6 conv3 chunk7",
    "gated_delta h24 kheads2 k5 vheads4 v6 conv3 chunk7",
)  # every one that mixes tokens, biases and all places of the norms


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def matrix() -> torch.Tensor:
    return random(SIZE, SIZE)


@pytest.fixture
def gram() -> torch.Tensor:
    """Of inputs whose channels go together, some of them large."""
    inputs = random(400, SIZE, seed=1) @ (random(SIZE, SIZE, seed=2) * torch.logspace(-1, 1, SIZE))
    return inputs.T @ inputs


def error(matrix: torch.Tensor, product: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """‖(W - M) C^½‖²"""
    wrong = matrix - product
    return torch.einsum("if,fg,ig->", wrong, gram, wrong)


def started(block: ParentBlock, name: str):
    """(the tensors of a variant as it starts, its module)"""
    variant = variant_of(block.sub_block, name)
    tensors = variant.initialise(block)
    return tensors, loaded(variant.sub_block, tensors)


def moments_of(n: torch.Tensor, y: torch.Tensor) -> Moments:
    """Of tokens that are sequences of their own."""
    halves = [(n[i::2], y[i::2]) for i in (0, 1)]
    return Moments(torch.stack([a.T @ a for a, _ in halves]), torch.stack([b.T @ a for a, b in halves]))


def test_least_squares_are_those_of_lapack():
    """At odd sizes, in float64; with one sequence and with none it is finite."""
    n = random(401, SIZE)
    y = n @ random(SIZE, SIZE, seed=1) + 1e-3 * random(401, SIZE, seed=2)
    wanted = np.linalg.lstsq(n.numpy(), y.numpy(), rcond=None)[0].T
    found = least_squares(moments_of(n, y))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.from_numpy(wanted), rtol=0, atol=10 * RIDGE)
    zeros = torch.zeros(2, SIZE, SIZE, dtype=torch.float64)
    assert torch.equal(least_squares(Moments(zeros, zeros)), zeros[0].float())
    one = torch.stack([n.T @ n, zeros[0]]), torch.stack([y.T @ n, zeros[0]])
    assert best_ridge(Moments(*one)) == RIDGES[0]
    assert (y - n @ least_squares(Moments(*one)).T.double()).square().sum() < y.square().sum()


@pytest.mark.parametrize("tokens", [3, SIZE, 2 * SIZE, 8 * SIZE, 100 * SIZE])
def test_few_tokens_are_no_worse_than_nothing(tokens):
    """On others, of which a map explains half; and no other λ does much better. With the least one, as many tokens as channels are many
    times worse than nothing."""
    true = random(SIZE, SIZE, seed=1) / SIZE**0.5
    n, y = random(tokens, SIZE), random(tokens, SIZE, seed=2)
    others, noise = random(4000, SIZE, seed=3), random(4000, SIZE, seed=4)
    moments, wanted = moments_of(n, y + n @ true), noise + others @ true

    def lost(matrix: torch.Tensor) -> float:
        return float((wanted - others @ matrix.T.double()).square().sum() / wanted.square().sum())

    def fitted(ridge: float) -> torch.Tensor:
        return torch.linalg.solve(ridged(moments.grams.sum(0), ridge), moments.cross.T).T

    assert lost(least_squares(moments)) < min(1.05, 1.1 * min(lost(fitted(ridge)) for ridge in RIDGES))
    if tokens == SIZE:
        assert lost(fitted(RIDGE)) > 3


@pytest.mark.parametrize("key", KINDS)
def test_of_any_kind_it_is_fitted_on_what_the_parent_gives(key, ropes_of):
    """Moments of two calls, against all sequences by themselves, token by token; the start leaves out no more than nothing would."""
    torch.manual_seed(0)
    sub_block = parse_key(key)
    weights = {n: 0.4 * torch.randn(s) + ("norm" in n) for n, s in sub_block.tensors().items()}
    block = ParentBlock(sub_block=sub_block, weights=weights)
    part, x, ropes = loaded(sub_block, weights), torch.randn(4, 37, 24), {"default": ropes_of(37)["default"]}
    if key.startswith("gqa"):
        angles = torch.rand(37, sub_block.head_dim // 2 * 2)
        ropes = {"default": (angles.cos(), angles.sin())}
    moments = part.moments([x[:1], x[1:]], ropes)
    pairs = []
    for one in x:
        entered = part.enter(one[None])
        pairs += zip(entered[0].double(), part.inner(entered, ropes)[0].double(), strict=True)
    for half in (0, 1):  # sequences in turn
        own = [pair for i, pair in enumerate(pairs) if i // 37 % 2 == half]
        torch.testing.assert_close(moments.grams[half], sum(torch.outer(n, n) for n, _ in own))
        torch.testing.assert_close(moments.crosses[half], sum(torch.outer(y, n) for n, y in own), rtol=1e-5, atol=1e-4)
    block.moments = lambda: moments
    variant = variant_of(sub_block, "linear")
    tensors = variant.initialise(block)
    ns, ys = (torch.stack(some) for some in zip(*pairs, strict=True))
    matrix = tensors.pop("linear.weight").double()
    best = torch.linalg.lstsq(ns, ys).solution
    least, mine = ((ys - ns @ m).square().sum() for m in (best, matrix.T))
    assert least <= mine
    assert mine < ys.square().sum()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in tensors.items())
    made = loaded(variant.sub_block, tensors | {"linear.weight": matrix.float()})
    torch.testing.assert_close(made(x, {}), part.leave(part.enter(x) @ matrix.T.float()))


@pytest.mark.parametrize("rank", [1, RANK, SIZE - 1])
def test_it_is_the_truncated_svd_in_the_metric_of_the_inputs(matrix, gram, rank):
    """By the formula as SVD-LLM has it: the SVD of W S, truncated, times S⁻¹. The error is what was cut off."""
    u, v = low_rank(matrix, gram, rank)
    assert (u.shape, v.shape, u.dtype) == ((SIZE, rank), (rank, SIZE), torch.float64)
    root = torch.linalg.cholesky(gram)
    left, values, right = torch.linalg.svd(matrix @ root)
    whitened = torch.linalg.solve_triangular(root, right[:rank], left=False, upper=False)
    torch.testing.assert_close(u @ v, (left[:, :rank] * values[:rank]) @ whitened)
    torch.testing.assert_close(error(matrix, u @ v, gram), values[rank:].square().sum())


def test_nothing_near_it_or_by_descent_is_better(matrix, gram):
    u, v = low_rank(matrix, gram, RANK)
    least = error(matrix, u @ v, gram)
    for seed in range(50):
        for size in (1e-1, 1e-3):
            other = (u + size * random(SIZE, RANK, seed=seed)) @ (v + size * random(RANK, SIZE, seed=seed + 50))
            assert error(matrix, other, gram) > least
    for start in range(3):  # what alternating least squares come to, from anywhere
        left = random(SIZE, RANK, seed=start)
        for _ in range(2000):
            right = torch.linalg.lstsq(left, matrix).solution
            left = torch.linalg.solve(right @ gram @ right.T, right @ gram @ matrix.T).T
        found = error(matrix, left @ right, gram)
        torch.testing.assert_close(found, least, rtol=1e-6, atol=0)
        assert found > least * (1 - 1e-9)
    plain = low_rank(matrix, None, RANK)
    assert error(matrix, plain[0] @ plain[1], gram) > 1.2 * least


def test_without_inputs_it_is_the_truncated_svd(matrix):
    left, values, right = torch.linalg.svd(matrix)
    wanted = (left[:, :RANK] * values[:RANK]) @ right[:RANK]
    for gram in (None, 7 * torch.eye(SIZE, dtype=torch.float64)):
        u, v = low_rank(matrix, gram, RANK)
        torch.testing.assert_close(u @ v, wanted)


@pytest.mark.parametrize("which", ["inputs", "fewer inputs than channels", "none", "only zeros"])
def test_full_rank_gives_the_matrix_back(matrix, gram, which):
    few = random(3, SIZE)
    gram = {"inputs": gram, "fewer inputs than channels": few.T @ few, "none": None, "only zeros": 0 * gram}[which]
    u, v = low_rank(matrix, gram, SIZE)
    torch.testing.assert_close(u @ v, matrix)


@pytest.mark.parametrize("slot", ["attention", "ffn"])
def test_it_is_the_best_of_its_rank(make_layer, ropes_of, slot):
    """Reduced-rank regression: no other pair has a smaller error of the sub-block's own output, λ ‖U V‖² added, which full rank has as
    `linear`."""
    block, ropes = make_layer()[slot], ropes_of(60)
    part, x = loaded(block.sub_block, block.weights), torch.randn(4, 60, 24)
    moments = part.moments([x[:1], x[1:]], ropes)
    block.moments = lambda: moments
    normed, target = part.norm(x).flatten(0, 1).double(), part(x, ropes).flatten(0, 1).double()
    whole, ridge = least_squares(moments), (moments.damped - moments.grams.sum(0))[0, 0]

    def lost(matrix: torch.Tensor) -> torch.Tensor:
        return (target - normed @ matrix.T).square().sum() + ridge * matrix.square().sum()

    tensors, module = started(block, "linear-6")
    product = (tensors["linear.u.weight"] @ tensors["linear.v.weight"]).double()
    assert torch.allclose(module(x, {}), (normed @ product.T).float().view_as(x), atol=1e-5)
    u, v = tensors["linear.u.weight"].double(), tensors["linear.v.weight"].double()
    for seed in range(20):
        other = (u + 0.02 * random(24, 6, seed=seed)) @ (v + 0.02 * random(6, 24, seed=seed + 20))
        assert lost(other) > lost(product)
    losses = [block_loss(started(block, f"linear-{rank}")[1](x, {}), part(x, ropes)) for rank in (1, 6, 12, 24)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] < 1
    assert losses[1] < block_loss(started(block, "linear-6-svd")[1](x, {}), part(x, ropes))
    full = started(block, "linear-24")[0]
    torch.testing.assert_close(full["linear.u.weight"] @ full["linear.v.weight"], whole, rtol=1e-4, atol=1e-5)


def test_between_two_norms_it_is_nearest_to_what_linear_gives(make_layer, ropes_of):
    block = make_layer(norm="both")["attention"]
    part, mixed = loaded(block.sub_block, block.weights), torch.randn(24, 24)
    x = torch.randn(3, 40, 24) @ mixed
    block.moments = lambda: part.moments([x], ropes_of(40))
    wanted = part.enter(x) @ least_squares(block.moments()).T
    off = {}
    for name in ("linear-4", "linear-4-svd"):
        tensors, module = started(block, name)
        product = tensors["linear.u.weight"] @ tensors["linear.v.weight"]
        off[name] = (wanted - part.enter(x) @ product.T).square().sum()
        assert torch.equal(tensors["post_norm.weight"], block.weights["post_norm.weight"])
        torch.testing.assert_close(module(x, {}), part.leave(part.enter(x) @ product.T), rtol=1e-4, atol=1e-5)
    assert off["linear-4"] < 0.95 * off["linear-4-svd"]


def test_only_who_asks_pays(make_layer):
    """Nothing is counted for other variants."""

    def counted():
        raise AssertionError("nobody asked for it")

    for slot, block in make_layer().items():
        block.moments = counted
        for name in search_space(block.sub_block, None, slot):
            if name != "linear":
                variant_of(block.sub_block, name).initialise(block)
        for name in ("linear", "linear-3", "linear-3-svd"):
            block.moments = counted
            with pytest.raises(AssertionError, match="nobody asked"):
                started(block, name)
            block.moments = None
            with pytest.raises(
                ValueError, match=f"a linear map in place of {block.sub_block.kind} needs calibration inputs"
            ):
                started(block, name)


def test_it_is_offered_by_name_alone(make_layer):
    for slot, block in make_layer().items():
        assert not any(name.startswith("linear-") for name in default_names(block.sub_block))
        found = search_space(block.sub_block, "linear-16,linear-016,linear-4,linear-4-svd", slot)
        assert list(found) == ["parent", "linear-16", "linear-4", "linear-4-svd"]
        assert found["linear-4"] == found["linear-4-svd"] == Linear(**block.sub_block.norm_fields(), rank=4)
        assert found["linear-16"].num_matrix_parameters == 2 * 24 * 16


def test_what_people_and_clocks_see():
    one, two = parse_key("linear h4096 eps=1e-05"), parse_key("linear h4096 rank256 eps=1e-05")
    assert (two.symbol(one), two.words(one)) == ("r", "linear, rank 256")
    assert two.timed() == parse_key("linear h4096 rank256")
    assert two.flops(3, 7.0) == 3 * 2 * 2 * 4096 * 256
    assert two.training_flops(7.0) == (3 * 2 * 2 - 2) * 4096 * 256  # no gradient of what enters v
    assert not two.state()
    assert two.by_rows


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_shares_add_up(tp):
    whole = Linear(hidden_size=24, rank=12, norm="both")
    weights = {name: torch.randn(shape) for name, shape in whole.tensors().items()}
    x, part = torch.randn(2, 7, 24), loaded(whole, weights)
    shares = [loaded(whole.shared(tp), whole.cut(weights, rank, tp)) for rank in range(tp)]
    assert {share.sub_block.rank for share in shares} == {12 // tp}
    total = sum(share.inner(share.enter(x), {}) for share in shares)
    torch.testing.assert_close(part.leave(total), part(x, {}))
