"""Recipe files: bad ones get one line."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("build: {}", "names no parent"),
        ("parent: p\nbuld: {}", "unknown key 'buld'; did you mean 'build'"),
        ("parent: p\nbuild: {ffns: x}", "unknown key 'build.ffns'; did you mean 'ffn'"),
        ("parent: p\nbuild: {tokens: many}", "build.tokens is 'many'"),
        ("parent: [", "not valid YAML"),
        ("parent: p\ngoal: 2x", "'goal' is '2x'"),
    ],
)
def test_bad_recipes(puzzle, one_line_error, tmp_path, text, wanted):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    one_line_error(puzzle("run", recipe, "--out", tmp_path / "run"), wanted)
    assert not (tmp_path / "run").exists()
