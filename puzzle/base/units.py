"""Amounts as people write and read them: bytes, seconds, counts, layers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from puzzle.base.errors import UserError

PRECISION_BYTES = {"float32": 4, "bf16": 2, "float16": 2, "fp8": 1}  # of an element of a sub-block's weights and cache
FIXED_BYTES = {**PRECISION_BYTES, "fp8": 2}  # embedding and LM head stay in bf16


def bytes_text(count: float) -> str:
    """1536 -> '1.5 KiB' (binary units)"""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def count_text(count: float) -> str:
    """1,234,000 -> "1.23 M": three digits and k, M, B or T."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.3g}{unit}" if count < 999.5 * size else f"{count / size:.0f}{unit}"
    return f"{count:.0f}"


def seconds_text(seconds: float) -> str:
    """95 -> '1 min 35 s'"""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def parse_bytes(text: str, option: str | None = None) -> int:
    """'80GB' -> 80·10⁹, '1.5GiB' -> 1.5·2³⁰, '1000' -> 1000. Raises UserError for anything else or below 1."""
    told = f"'{text}'" if option is None else f"`{option}` '{text}'"
    units = {"": 1, "b": 1}
    for power, letter in enumerate("kmgt", 1):
        units |= {f"{letter}b": 1000**power, f"{letter}ib": 1024**power}
    cleaned = text.strip().lower()
    number = cleaned.rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = cleaned[len(number) :].strip()
    try:
        value = float(number) * units[unit]
    except (ValueError, KeyError):
        raise UserError(f"{told} is no amount of memory: write for example 80GB or 24GiB") from None
    if not 1 <= value < float("inf"):
        raise UserError(f"{told} is no amount of memory: it must be at least 1 byte")
    return int(value)


def number_in(text: str, units: Mapping[str, int]) -> float | None:
    """The number before one of these units, divided by what it stands for; NaN for what is none, None without such a unit."""
    found = re.fullmatch(rf"\s*([-+0-9.eE]+|nan|inf)\s*({'|'.join(units)})\s*", text)
    try:
        return float(found[1]) / units[found[2]] if found else None
    except ValueError:
        return math.nan


def parse_seconds(option: str, text: str) -> float:
    """'1.5', '1.5s', '800ms' -> seconds. Raises UserError unless positive."""
    value = number_in(text, {"": 1, "s": 1, "ms": 1000})
    if value is None or not 0 < value < math.inf:
        raise UserError(f"`{option}` {text}: write seconds such as 1.5 or 800ms; it must be above 0")
    return value


def parse_count(option: str, text: str, least: int = 1) -> int:
    """'7e9', '7B', '12M' -> a count. Raises UserError below `least`."""
    found = re.fullmatch(r"\s*([-+0-9.eE]+?)\s*([kKmMbBtT])?\s*", text)
    scale = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
    try:
        value = float(found[1]) * (scale[found[2].lower()] if found[2] else 1) if found else math.nan
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= least):
        raise UserError(f"`{option}` {text}: write a count such as 6.5B, 12M or 1000000")
    return int(value)


def positive(option: str, value: float) -> None:
    """Raise UserError unless value > 0."""
    if not 0 < value < math.inf:
        raise UserError(f"`{option}` {value:g}: must be above 0")


def check_positive(options: object, *names: str) -> None:
    """Raise UserError unless each named field of `options` is above 0, in a tuple every number; None is left alone."""
    for name in names:
        value = getattr(options, name)
        if value == ():
            raise UserError(f"`{name}` is empty: name at least one")
        for one in value if isinstance(value, tuple) else [value]:
            if one is not None:
                positive(name, one)


def check_text(name: str, text: str) -> None:
    """Raise UserError for what no tokenizer takes: bytes of a command line that are not UTF-8, or half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"`{name}` {text!r} is no text in UTF-8: write it in UTF-8") from error


def check_seed(seed: int) -> None:
    """Raise UserError unless a random generator takes it."""
    if seed < 0:
        raise UserError(f"`seed` {seed}: must not be negative")


def parse_layers(option: str, text: str, num_layers: int) -> list[int]:
    """'0-3,7' -> [0, 1, 2, 3, 7]. Raises UserError outside the model or for anything else."""
    chosen: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        try:
            begin, end = int(first), int(last or first)
        except ValueError:
            raise UserError(f"`{option}` {text}: '{part}' is no layer or range; write for example 0-3,7") from None
        if not 0 <= begin <= end < num_layers:
            raise UserError(f"`{option}` {text}: '{part}' is outside the parent's layers 0-{num_layers - 1}")
        chosen.update(range(begin, end + 1))
    return sorted(chosen)


def layer_name(index: int) -> str:
    """7 -> "L07" """
    return f"L{index:02d}"
