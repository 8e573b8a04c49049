"""Amounts as people write and read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle.base.errors import UserError
from puzzle.base.units import (
    bytes_text,
    layer_name,
    parse_bytes,
    parse_count,
    parse_layers,
    parse_seconds,
    seconds_text,
)

SCALES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
STEPS = {"B": 0.5, "KiB": 0.05 * 2**10, "MiB": 0.05 * 2**20, "GiB": 0.05 * 2**30, "TiB": 0.05 * 2**40}


@given(st.integers(1, 10**6), st.sampled_from(list(SCALES)), st.sampled_from(["", " "]), st.booleans())
def test_bytes_as_written(number, unit, gap, lower):
    text = f" {number}{gap}{unit} "
    assert parse_bytes(text.lower() if lower else text) == number * SCALES[unit]


@given(st.integers(1, 2**50))
def test_bytes_are_read_as_they_are_shown(count):
    """To the digit that is shown, rounded down to whole bytes."""
    shown = bytes_text(count)
    assert abs(parse_bytes(shown) - count) <= STEPS[shown.split()[1]] + 1
    number, unit = shown.split()
    assert float(number) < 1024.05 or unit == "TiB"


@given(st.floats(1e-6, 1e6))
def test_seconds_as_written(value):
    assert parse_seconds("x", f"{value!r}") == parse_seconds("x", f" {value!r} s ") == value
    assert parse_seconds("x", f"{value!r}ms") == value / 1000


@given(st.integers(1, 10**6))
def test_counts_as_written(number):
    scales = {"": 1, "k": 10**3, "M": 10**6, "b": 10**9, "T": 10**12}
    for letter, scale in scales.items():
        assert parse_count("x", f"{number}{letter}") == number * scale
    assert parse_count("x", f"{number}e3") == number * 1000


@given(st.sets(st.integers(0, 11), min_size=1))
def test_layers_as_written(chosen):
    """In any order, single or as ranges that overlap."""
    parts = [f"{i}" for i in sorted(chosen, reverse=True)] + [f"{i} - {i + 1}" for i in chosen if i + 1 in chosen]
    assert parse_layers("x", " , ".join(parts), 12) == sorted(chosen)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (99.4, "99 s"), (100, "1 min 40 s"), (3599, "59 min 59 s"), (7260, "2 h 1 min")],
)
def test_seconds_shown(seconds, text):
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (80e9, "74.5 GiB"), (2**52, "4096.0 TiB")]
)
def test_bytes_shown(count, text):
    assert bytes_text(count) == text


def test_examples():
    assert parse_bytes("80GB") == 80 * 10**9
    assert parse_bytes("1.5GiB") == 3 * 2**29
    assert parse_count("x", "6.5B") == 6_500_000_000
    assert parse_seconds("x", "800ms") == 0.8
    assert parse_layers("x", "0-1,3", 4) == [0, 1, 3]
    assert [layer_name(i) for i in (7, 80, 125)] == ["L07", "L80", "L125"]


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "1e400GB", "nan", "8 apples", "8G B", "0.5B", "ten"])
def test_no_amount_of_memory(text):
    with pytest.raises(UserError, match=f"'{text}' is no amount of memory: "):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["", "0", "-1s", "nan", "inf", "1 h", "1e400", "--3", "."])
def test_no_seconds(text):
    with pytest.raises(UserError, match=f"`ttft` {text}: write seconds such as 1.5 or 800ms; it must be above 0"):
        parse_seconds("ttft", text)


@pytest.mark.parametrize("text", ["", "0", "-7", "7Q", "B", "1e400", "e", "nan"])
def test_no_count(text):
    with pytest.raises(UserError, match=f"`params` {text}: write a count such as 6.5B, 12M or 1000000"):
        parse_count("params", text)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("0-4", "'0-4' is outside the parent's layers 0-3"),
        ("3-1", "'3-1' is outside the parent's layers 0-3"),
        ("1,,2", "'' is no layer or range; write for example 0-3,7"),
        ("a", "'a' is no layer or range"),
        ("-1", "'-1' is no layer or range"),
        ("1-2-3", "'1-2-3' is no layer or range"),
    ],
)
def test_no_layers(text, wanted):
    with pytest.raises(UserError, match=f"`layers` {text}: {wanted}"):
        parse_layers("layers", text, 4)
