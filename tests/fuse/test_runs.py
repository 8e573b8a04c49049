"""Which layers become one: properties of the choice, and what is refused."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle.base.errors import UserError
from puzzle.fuse.runs import Rule, check_runs, choose_runs, members, parse_runs, stretches, width_of, worst

WIDTHS = st.lists(st.one_of(st.none(), st.integers(0, 40)), max_size=14)


@st.composite
def cases(draw):
    widths = draw(WIDTHS)
    count = len(widths)
    rule = Rule(
        max_dependency=draw(st.sampled_from([0.2, 0.5, math.inf])),
        keep_last=draw(st.booleans()),
        max_width=draw(st.one_of(st.none(), st.integers(1, 120))),
    )
    values = draw(st.lists(st.floats(0, 1), min_size=count * count, max_size=count * count))
    return widths, rule, [values[i * count : (i + 1) * count] for i in range(count)]


@given(cases())
@settings(max_examples=300, deadline=None)
def test_runs_are_disjoint_allowed_and_as_long_as_can_be(case):
    widths, rule, matrix = case
    runs = choose_runs(widths, rule, matrix)
    assert check_runs(runs, widths, [""] * len(widths)) == runs, (
        "disjoint, in order, two FFNs each, nothing else inside"
    )
    inside = {layer for first, last in runs for layer in range(first, last + 1)}
    for first, last in stretches(widths):
        if rule.keep_last:
            assert last not in inside
        assert min(widths[first], widths[last]) > 0
    for run in runs:
        assert rule.max_width is None or width_of(run, widths) <= rule.max_width
        assert worst(run, widths, matrix) < rule.max_dependency
    for first, last in stretches(widths):
        row = members((first, last), widths)[: -1 if rule.keep_last else None]
        assert fewest(row, widths, rule, matrix) == len(row) - sum(
            len(members(run, widths)) - 1 for run in runs if first <= run[0] <= last
        )


def fewest(row, widths, rule, matrix) -> int:
    """The least number of layers that a row can become, by trying every way to cut it."""
    best = [0] + [math.inf] * len(row)
    for end in range(1, len(row) + 1):
        for begin in range(end):
            part = row[begin:end]
            fits = rule.max_width is None or sum(widths[k] for k in part) <= rule.max_width
            near = all(matrix[i][j] < rule.max_dependency for i in part for j in part if i < j)
            if len(part) == 1 or (fits and near):
                best[end] = min(best[end], best[begin] + 1)
    return best[-1]


def test_what_was_not_measured_is_not_fused():
    assert choose_runs([4, 4, 4], Rule(keep_last=False, max_dependency=0.5), [[None] * 3] * 3) == []


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("3", "'3' is no run"),
        ("a-b", "'a-b' is no run"),
        ("3-5,,7-8", "'' is no run"),
        ("5-3", "'5-3' holds no two layers"),
        ("4-4", "holds no two layers"),
        ("3-10", "outside the child's layers 0-9"),
        ("-1-3", "is no run"),
    ],
)
def test_runs_by_hand_are_checked(text, wanted):
    with pytest.raises(UserError, match=wanted):
        parse_runs(text, 10)
    assert parse_runs(" 3-5, 8-9", 10) == [(3, 5), (8, 9)]


@pytest.mark.parametrize("values", [{"max_dependency": 0}, {"max_dependency": math.nan}, {"max_width": 0}])
def test_impossible_rules(values):
    ((field, value),) = values.items()
    with pytest.raises(UserError, match=f"^`{field}` {value}: "):
        Rule(**values)
