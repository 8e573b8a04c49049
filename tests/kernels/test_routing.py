"""route and combine against their twins: every router, odd sizes, ties, NaN; rows of an expert in the order of their tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from puzzle.kernels.routing import ONE_PROGRAM, Routing, combine, combine_reference, route, route_reference

# NumPy's, of what is not finite and of rows that nobody has
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
ROUTERS = {
    "softmax": {},
    "softmax, normalised": {"normalise": True},
    "softmax, bias": {"bias": True, "scale": 0.5},
    "sigmoid": {"sigmoid": True},
    "sigmoid, bias": {"sigmoid": True, "bias": True, "normalise": True, "scale": 2.5},
}
SIZES = [
    (1, 1, 1), (7, 1, 1), (2, 3, 1), (33, 3, 3), (1, 8, 2), (7, 8, 8), (7, 60, 4), (2, 64, 6), (1, 128, 8), (16, 128, 6), (2, 256, 8),
]  # fmt: skip


# A GPU takes all of them. Triton's interpreter takes a second for a large one: each size has one router, and groups few tokens.
GPU = torch.cuda.is_available()
CASES = [
    (size, name)
    for i, size in enumerate(SIZES)
    for j, name in enumerate(ROUTERS)
    if GPU or size[0] * size[1] <= 100 or i % len(ROUTERS) == j
]
GROUPS = [
    (num, *one)
    for one in ((12, 4, 2, 3), (256, 8, 4, 8), (64, 2, 1, 32), (60, 3, 2, 40), (512, 8, 8, 5), (6, 3, 1, 2))
    for num in (1, 7)
    if GPU or num * one[0] <= 512
]


def ways(num: int, experts: int) -> list[bool]:
    """`one_program` of route: where it fits, twice as far as it is chosen and more, and two kernels."""
    return [True, False] if num * max(32, experts) <= 2 * ONE_PROGRAM else [False]


def logits_of(num: int, experts: int, device) -> torch.Tensor:
    """Far enough apart that no two scores of a token are one float32."""
    return torch.rand(num, experts, device=device).argsort(dim=-1) * (6.0 / experts) - 3.0


def options_of(name: str, experts: int, device) -> dict:
    options = dict(ROUTERS[name])
    if options.pop("bias", False):  # steps that no difference of scores is near
        options["bias"] = 4.0 * torch.randperm(experts, device=device)
    return options


def same(found: Routing, want: Routing) -> None:
    for name in ("chosen", "place", "ends", "back"):
        one, other = getattr(found, name), getattr(want, name)
        assert one.dtype == torch.int32
        assert torch.equal(one, other), name
    assert found.weights.dtype == torch.float32
    torch.testing.assert_close(found.weights.double(), want.weights.double(), rtol=1e-5, atol=1e-9, equal_nan=True)


def whole(found: Routing, num: int, experts: int, count: int) -> None:
    """Everything in its place, whatever the logits were."""
    chosen, begins = found.chosen.long(), torch.cat((found.ends.new_zeros(1), found.ends)).long()
    assert int(chosen.min()) >= 0
    assert int(chosen.max()) < experts
    assert (chosen.sort(dim=-1)[0].diff(dim=-1) > 0).all()
    assert torch.equal(begins.diff(), torch.bincount(chosen.flatten(), minlength=experts))
    assert torch.equal(found.back.flatten().sort()[0].long(), torch.arange(num * count, device=chosen.device))
    rows = found.back.long()
    assert torch.equal(found.place[rows].long(), torch.arange(num, device=chosen.device)[:, None].expand(num, count))
    assert ((begins[chosen] <= rows) & (rows < begins[chosen + 1])).all()


@pytest.mark.parametrize(("size", "name"), CASES, ids=str)
def test_matches_twin(size, name, device):
    num, experts, count = size
    logits, options = logits_of(num, experts, device), options_of(name, experts, device)
    want = route_reference(logits.double(), count, **options)
    for one_program in ways(num, experts):
        found = route(logits, count, one_program=one_program, **options)
        same(found, want)
        whole(found, num, experts, count)


@pytest.mark.parametrize(("num", "experts", "count"), [(2, 512, 512), (42, 32, 25)])
def test_many(num, experts, count, device):
    """All experts, and more rows than one step of the alignment sees."""
    logits = logits_of(num, experts, device)
    found = route(logits, count, normalise=True)
    same(found, route_reference(logits.double(), count, normalise=True))
    whole(found, num, experts, count)


@pytest.mark.parametrize(("num", "experts", "groups", "chosen", "count"), GROUPS)
def test_groups(num, experts, groups, chosen, count, device):
    logits = logits_of(num, experts, device)
    bias = 0.37 * torch.randint(-3, 3, (experts,), device=device)
    options = {"sigmoid": True, "bias": bias, "num_groups": groups, "num_topk_groups": chosen, "normalise": True}
    for one_program in ways(num, experts):
        found = route(logits, count, one_program=one_program, scale=2.5, **options)
        same(found, route_reference(logits, count, scale=2.5, **options))
        assert all(len(set(row)) <= chosen for row in (found.chosen // (experts // groups)).tolist())


@pytest.mark.parametrize("one_program", [True, False])
@pytest.mark.parametrize("groups", [1, 4])
def test_of_equal_ones_the_first_comes_first(groups, one_program, device):
    logits = torch.randint(0, 3, (11, 40), device=device).float()
    options = {"sigmoid": True, "num_groups": groups, "num_topk_groups": min(groups, 2)}
    found = route(logits, 9, one_program=one_program, **options)
    same(found, route_reference(logits, 9, **options))
    assert route(torch.zeros(3, 40, device=device), 4, one_program=one_program).chosen.tolist() == 3 * [[0, 1, 2, 3]]


@pytest.mark.parametrize("one_program", [True, False])
@pytest.mark.parametrize("name", ROUTERS)
def test_what_is_not_finite_stays_in_bounds(name, one_program, device):
    logits = torch.randn(6, 20, device=device)
    logits[0] = torch.nan
    logits[1, 3] = torch.nan
    logits[2, 3] = torch.inf
    logits[3] = -torch.inf
    logits[4, 1:] = -torch.inf
    options = options_of(name, 20, device)
    for groups in (1, 4) if "sigmoid" in name else (1,):
        found = route(logits, 5, one_program=one_program, num_groups=groups, num_topk_groups=min(2, groups), **options)
        whole(found, 6, 20, 5)
        assert found.weights[0].isnan().all()
        assert found.weights[5].isfinite().all()
    nowhere = torch.full((20,), -torch.inf, device=device)  # engines' word for an expert that nobody may have
    nowhere[7:] = 0
    found = route(logits, 5, sigmoid=True, bias=nowhere, one_program=one_program)
    whole(found, 6, 20, 5)
    assert int(found.chosen[2:].min()) >= 7


@settings(deadline=None, max_examples=15)
@drawn(st.data())
def test_any_numbers(data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    num, groups, size = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5)), data.draw(st.integers(2, 30))
    chosen = data.draw(st.integers(1, groups))
    count = data.draw(st.integers(1, size * chosen))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    steps = data.draw(st.sampled_from([2, 5, 10_000]))  # few of them: ties
    logits = torch.randint(0, steps, (num, groups * size), device=device) * (6.0 / steps) - 2.5
    options = {"sigmoid": True, "num_groups": groups, "num_topk_groups": chosen, "normalise": data.draw(st.booleans())}
    want = route_reference(logits, count, **options)
    for one_program in ways(num, groups * size):
        found = route(logits, count, one_program=one_program, **options)
        whole(found, num, groups * size, count)
        if groups == 1 or steps < 10_000:
            same(found, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_the_model(dtype, device):
    """Rounded ones tie, and one program or many decide alike; a view need not be contiguous."""
    logits = torch.randn(96, 9, device=device).to(dtype).T
    want = route_reference(logits.float(), 8, normalise=True)
    for one_program in (True, False, None):
        same(route(logits, 8, normalise=True, one_program=one_program), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beside", ["nothing", "shared", "gated"])
@pytest.mark.parametrize(("num", "hidden", "count"), [(1, 2048, 8), (7, 77, 3), (5, 300, 1), (2, 16, 40)])
def test_back_to_the_tokens(num, hidden, count, beside, dtype, device, relative_error):
    routing = route(torch.randn(num, 48, device=device), count)
    given = torch.randn(num * count, hidden, device=device).to(dtype)
    shared = None if beside == "nothing" else torch.randn(num, hidden, device=device).to(dtype)
    gate = torch.randn(num, 1, device=device).to(dtype) if beside == "gated" else None
    out = combine(given, routing.back, routing.weights, shared, gate)
    wide = [None if t is None else t.double() for t in (shared, gate)]
    want = combine_reference(given.double(), routing.back, routing.weights.double(), *wide)
    assert out.dtype == dtype
    assert relative_error(out, want) < (5e-3 if dtype == torch.bfloat16 else 1e-6)


def test_every_element_is_written(device, monkeypatch):
    empty = torch.empty
    poison = {torch.int32: -(2**30), torch.float32: torch.nan}
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(poison[k["dtype"]]))
    for one_program in (True, False):
        whole(route(torch.randn(9, 21, device=device), 5, one_program=one_program), 9, 21, 5)


def test_no_rows_at_all(device):
    for one_program in (True, False):
        found = route(torch.zeros(0, 5, device=device), 2, one_program=one_program)
        assert found.ends.tolist() == 5 * [0]
        assert combine(torch.zeros(0, 8, device=device), found.back, found.weights).shape == (0, 8)


def test_what_does_not_fit(device):
    logits = torch.zeros(3, 8, device=device)
    with pytest.raises(ValueError, match=r"9 of 8 experts"):
        route(logits, 9)
    with pytest.raises(ValueError, match=r"5 of 8 experts in 1 of 2 groups"):
        route(logits, 5, num_groups=2)
    with pytest.raises(ValueError, match=r"2 of 8 experts in 1 of 3 groups"):
        route(logits, 2, num_groups=3)
    with pytest.raises(ValueError, match=r"a bias for each expert, not \(7,\)"):
        route(logits, 2, bias=torch.zeros(7, device=device))
    routing, given = route(logits, 2), torch.zeros(6, 4, device=device)
    with pytest.raises(ValueError, match=r"given \(5, 4\) does not fit"):
        combine(given[:5], routing.back, routing.weights)
    with pytest.raises(ValueError, match=r"gate \(3, 1\) wants 3 rows of a shared expert"):
        combine(given, routing.back, routing.weights, gate=torch.zeros(3, 1, device=device))
