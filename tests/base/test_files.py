"""No JSON of ours holds a number that JSON does not know."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import pytest

from puzzle.base.errors import UserError
from puzzle.base.files import json_text, write_json

ROOT = Path(__file__).parents[2]
FILES = [p for folder in ("puzzle", "blocklib", "solver", "kernels") for p in (ROOT / folder).rglob("*.py")]


def test_an_infinity_is_null():
    value = {"bound": -math.inf, "slack": {"memory": math.inf, "time": 1.5}, "rows": [(1, math.inf)]}
    assert json.loads(json_text(value)) == {"bound": None, "slack": {"memory": None, "time": 1.5}, "rows": [[1, None]]}


@pytest.mark.parametrize(("value", "where"), [({"a": {"kl": math.nan}}, "a.kl"), ({"a": [0.0, math.nan]}, r"a\[1\]")])
def test_nan_is_refused_by_its_place(tmp_path, value, where):
    with pytest.raises(UserError, match=f"^{where} is not a number"):
        write_json(tmp_path / "x.json", value)
    assert list(tmp_path.iterdir()) == []


def test_nobody_writes_json_past_this_rule():
    for path in FILES:
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            function = call.func
            if isinstance(function, ast.Attribute) and function.attr in ("dump", "dumps"):
                named = {word.arg: word.value for word in call.keywords}
                strict = named.get("allow_nan")
                assert isinstance(strict, ast.Constant), f"{path}:{call.lineno}"
                assert strict.value is False, f"{path}:{call.lineno}"
