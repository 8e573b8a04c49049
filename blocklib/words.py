"""How the value of a sub-block's field is written as a word of its key (`sub_block.py`), and what a field may be. Needs no torch."""

from __future__ import annotations

import math
import re
from dataclasses import Field
from functools import cache
from typing import Any

WANTED = {"int": "a whole number above 0", "float": "a number", "bool": "yes or no", "str": "a name", "None": "none"}


@cache
def types_of(f: Field) -> tuple[str, ...]:
    """("int", "None") of `int | None`."""
    return tuple((f.type.__name__ if isinstance(f.type, type) else str(f.type)).split(" | "))


def wanted(f: Field) -> str:
    """What a field may be, in words."""
    known = dict(WANTED, str=" or ".join(f.metadata["choices"]) or WANTED["str"])
    return " or ".join(known[name] for name in types_of(f))


def fits(f: Field, value: Any) -> bool:
    """Whether a field may have this value, which its key then gives back."""
    types, choices = types_of(f), f.metadata["choices"]
    if value is None or isinstance(value, bool):
        return ("None" if value is None else "bool") in types
    if isinstance(value, str):
        key = f.metadata["key"]
        return "str" in types and (value in choices if choices else read_word(word_of(key, value)) == (key, value))
    if isinstance(value, int) and "int" in types:
        return value > 0
    return "float" in types and isinstance(value, int | float) and math.isfinite(value)


def word_of(name: str, value: Any) -> str:
    """kv8, qkv_bias, rope=local, eps=1e-05, window=none"""
    if value is True:
        return name
    if value is None or value is False:
        return f"{name}={'none' if value is None else 'no'}"
    return f"{name}{value}" if isinstance(value, int) else f"{name}={value}"


def read_word(word: str) -> tuple[str, Any]:
    if found := re.fullmatch(r"([a-z_]+)=(\S+)", word):
        text = found[2]
        if text in ("none", "no"):
            return found[1], None if text == "none" else False
        try:
            return found[1], float(text)
        except ValueError:
            return found[1], text
    if found := re.fullmatch(r"([a-z_]+?)(\d+)", word):
        return found[1], int(found[2])
    return word, True
