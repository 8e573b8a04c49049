"""One row of `LIMITS` is all that a limit is: option, recipe key, text, solver's resource, words of what can be reached."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle.base.errors import UserError
from puzzle.base.workload import Workload
from puzzle.choose.goal import BY_OPTION, LIMITS, Goal, GoalOptions, Target, parse_target
from puzzle.choose.infeasible import why_infeasible
from puzzle.choose.problem import Request, select
from puzzle.choose.solve import open_costs
from puzzle.cli import main
from puzzle.library.manifest import Library

WORK = Workload(input_len=16, output_len=16)
EVERY = pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.option)


@pytest.fixture
def ask(own_library):
    """The selection of one limit on the tiny library."""
    library = Library.open(own_library)
    table = open_costs(library, "cpu", None)

    def selection(limit, target: Target):
        return select(library, table, Request(work=WORK, goal=Goal(limits={limit.option: target})))

    return selection


@EVERY
def test_a_row_is_an_option_and_a_field(limit):
    options = {option.name: option for option in main.commands["solve"].params}
    assert options[limit.option].opts == [f"--{limit.option.replace('_', '-')}"]
    assert options[limit.option].help == limit.help
    assert limit.option in {field.name for field in fields(GoalOptions)}
    assert GoalOptions(**{limit.option: "50%"}).goal().plain()[limit.option] == "0.5x"


@EVERY
def test_text_of_a_limit(limit):
    assert parse_target(limit, "20%") == Target(value=0.2, relative=True)
    assert parse_target(limit, " 2x ") == Target(value=2.0, relative=True)
    assert parse_target(limit, "1500") == Target(value=1500.0, relative=False)
    for text in ("0x", "-1x", "0%", "nanx", "infx", "0", "-3", "nan", "much", "", "2xx", "1e"):
        with pytest.raises(UserError, match=f"^`{limit.option}` (?:{re.escape(text)}: |'{re.escape(text)}' is )"):
            parse_target(limit, text)


@EVERY
def test_a_limit_bounds_its_resource(ask, limit):
    """At the parent's own figure it holds the parent's amount exactly, so that whoever keeps within is no worse than the parent."""
    selection = ask(limit, Target(value=1.0, relative=True))
    batch = selection.parent.batch
    (constraint,) = selection.constraints(batch)
    assert (constraint.label, constraint.resource) == (limit.option, limit.resource)
    problem = selection.problem(batch)
    whole = {layer.name: next(n for n, cell in cells.items() if cell.is_parent)
             for layer, cells in zip(problem.layers, selection.cells, strict=True)}  # fmt: skip
    assert float(problem.totals(whole)[limit.resource]) == pytest.approx(constraint.max, rel=1e-12)


@EVERY
def test_what_can_be_reached_is_said_in_its_words(ask, limit):
    """And a child at that figure there is, but none beyond."""
    hopeless = ask(limit, Target(value=1e9 if limit.larger else 1e-9, relative=True))
    said = why_infeasible(hopeless.problems(), hopeless.demands)
    assert said.startswith(f"`{limit.option}` ")
    words = re.split(r"\{[^}]*\}", limit.words)
    assert all(part in said for part in words)
    named = re.search(re.escape(words[0]) + r"([-+.\deE]+)", said)
    assert named is not None
    times = "{times" in limit.words
    value = float(named[1])
    for change, feasible in ((1.01, not limit.larger), (0.99, limit.larger)):
        tried = ask(limit, Target(value=value * change, relative=times))
        assert any(solved(problem) for problem in tried.problems().values()) == feasible


def solved(problem) -> bool:
    from puzzle.solver.solve import solve

    return bool(solve(problem).choice)


@given(
    st.sampled_from(LIMITS),
    st.floats(1e-6, 1e12),
    st.integers(1, 512),
    st.integers(1, 10**5),
    st.integers(1, 10**5),
)
def test_what_is_reached_undoes_the_bound(limit, value, batch, input_len, output_len):
    work = Workload(input_len=input_len, output_len=output_len)
    amount = limit.bound(value, batch, work)
    assert math.isclose(limit.reached(amount, batch, work), value, rel_tol=1e-12)
    assert (limit.bound(2 * value, batch, work) < amount) == limit.larger


def test_no_goal_names_every_limit():
    with pytest.raises(UserError, match="no goal") as caught:
        GoalOptions().goal()
    assert re.findall(r"`(\w+)`", str(caught.value)) == list(BY_OPTION)
    assert GoalOptions().goal(may_be_empty=True) == Goal()


ROW = """
    Limit(
        option="decode_time",
        read=parse_seconds,
        example=_SECONDS,
        help="First to last token: 1.5 or 50%.",
        resource="decode_seconds",
        own=lambda p: p.latency_seconds - p.ttft_seconds,
        words="the shortest way from first to last token takes {value:.4g} s",
        unit="{absolute:.3g} s",
    ),
"""
ONE_MORE_ROW = """
import importlib.util, json, sys
from pathlib import Path

spec = importlib.util.find_spec("puzzle.choose.goal")
text = Path(spec.origin).read_text()
assert text.count("LIMITS = (\\n") == 1
goal = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
exec(compile(text.replace("LIMITS = (\\n", "LIMITS = (" + sys.argv[1]), spec.origin, "exec"), goal.__dict__)

from click.testing import CliRunner
from puzzle.cli import main
from puzzle.run.recipe import read_recipe

asked = json.loads(sys.argv[2])
done = [CliRunner().invoke(main, arguments) for arguments in asked["verbs"]]
target = read_recipe(Path(asked["recipe"])).goal.goal().limits["decode_time"]
found = {"done": [(d.exit_code, d.stdout, d.stderr) for d in done], "target": [target.value, target.relative]}
Path(sys.argv[3]).write_text(json.dumps(found))
"""


def test_a_new_row_needs_no_other_change(own_library, tmp_path):
    """Written into the table alone, a limit is an option, a recipe's key, a constraint in every workload, and has its words."""
    recipe, broken = tmp_path / "recipe.yaml", tmp_path / "broken.yaml"
    recipe.write_text("parent: p\ngoal: {decode_time: 20%}")
    broken.write_text("parent: p\ngoal: {decode_time: soon}")
    solve = ["solve", str(own_library), "--gpu", "cpu", "--input-len", "16", "--output-len", "16"]
    verbs = [
        [*solve, "--decode-time", "20%", "--out", str(tmp_path / "a"), "--json"],
        [*solve, "--also", "16/8@1:decode_time=20%", "--out", str(tmp_path / "b"), "--json"],
        [*solve, "--decode-time", "0.001%"],
        [*solve, "--decode-time", "soon"],
        [*solve, "--also", "16/8@1:decode_time=0.001%"],
        ["solve", "--help"],
        ["run", str(broken), "--out", str(tmp_path / "run")],
    ]
    out = tmp_path / "out.json"
    words = [sys.executable, "-c", ONE_MORE_ROW, ROW, json.dumps({"verbs": verbs, "recipe": str(recipe)}), str(out)]
    subprocess.run(words, check=True, cwd=Path(__file__).parents[2])
    found = json.loads(out.read_text())
    assert found["target"] == [0.2, True]
    met, further, *refused, helped, read = found["done"]
    solution = json.loads(met[1])
    assert set(solution["slack"]) == {"decode_time"}
    assert solution["goal"]["decode_time"] == "0.2x"
    assert solution["objective"] > 0
    assert decode(solution["predicted"]) <= 0.2 * decode(solution["parent_predicted"]) * (1 + 1e-9)
    (also,) = json.loads(further[1])["also"]
    assert also["goal"] == {"decode_time": "0.2x"}
    assert decode(also["predicted"]) <= 0.2 * decode(also["parent_predicted"]) * (1 + 1e-9)
    reached = "s cannot be met: the shortest way from first to last token takes "
    for (code, _, said), start, wanted in zip(
        refused,
        ("error: --decode-time ", "error: --decode-time soon: ", "error: --also 16/8@1:decode_time "),
        (reached, "write seconds", reached),
        strict=True,
    ):
        assert code == 2
        assert said.startswith(start)
        assert wanted in said
    assert "--decode-time GOAL" in helped[1]
    assert "First to last token: 1.5 or 50%." in helped[1]
    assert (read[0], read[2]) == (
        2,
        f"error: recipe {broken}: goal.decode_time soon: write seconds such as 1.5 or 800ms; it must be above 0\n",
    )


def decode(figures: dict) -> float:
    return figures["latency_seconds"] - figures["ttft_seconds"]
