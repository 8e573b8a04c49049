"""A problem.json of one's own, without a library."""

from __future__ import annotations

import json


def test_a_problem_file_of_ones_own(puzzle, one_line_error, tmp_path):
    """The documented format in, the documented format out; a conflict is in the file and on the terminal."""
    variants = [
        {"name": "a", "score": 0.0, "resources": {"memory": 2.0}},
        {"name": "b", "score": 1.0, "resources": {"memory": 1.0}},
    ]
    problem = {
        "schema": 1,
        "layers": [{"name": f"L{i:02d}", "variants": variants} for i in range(3)],
        "constraints": [{"resource": "memory", "max": 5.0}],
        "pairs": [{"a": ["L00", "b"], "b": ["L01", "a"], "score": 0.5, "resources": {"memory": -0.1}}],
        "diverse": {"count": 2, "min_distance": 2},
    }
    source, out = tmp_path / "problem.json", tmp_path / "solution.json"
    source.write_text(json.dumps(problem))
    done = puzzle("solve", "--problem", source, "--out", out)
    assert done.exit_code == 0, done.output
    value = json.loads(out.read_text())
    assert value["schema"] == 1
    assert value["conflict"] is None
    assert [s["objective"] for s in value["solutions"]] == [1.0, 1.0]
    keys = {"status", "objective", "bound", "gap", "choice", "totals", "slack", "seconds", "solver"}
    assert set(value["solutions"][0]) == keys
    source.write_text(json.dumps(problem | {"constraints": [{"resource": "memory", "max": 1.0}]}))
    one_line_error(puzzle("solve", "--problem", source, "--out", out), "memory cannot be met", "memory max 3")
    assert json.loads(out.read_text())["conflict"]["nearest"]["memory"] == {"side": "max", "value": 3.0}
    for broken, wanted in (
        ("{", "is not JSON"),
        ('{"schema": 2, "layers": []}', "schema is 2"),
        ('{"schema": 1, "layers": [], "pears": []}', "unknown field 'pears'"),
        (
            '{"schema": 1, "layers": [{"name": "L", "variants": [{"name": "v", "score": NaN}]}]}',
            "L variant v score is nan",
        ),
    ):
        source.write_text(broken)
        one_line_error(puzzle("solve", "--problem", source, "--out", out), wanted)
    one_line_error(puzzle("solve"), "name a LIBRARY")
