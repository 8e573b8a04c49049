"""The Pareto frontier of the tiny library."""

from __future__ import annotations

import json

SOLVE = ("--gpu", "cpu", "--input-len", 16, "--output-len", 16)


def test_frontier_is_monotone_and_resumes(puzzle, own_library, tmp_path):
    arguments = [
        "solve",
        own_library,
        "--pareto",
        "throughput",
        "--points",
        6,
        *SOLVE,
        "--out",
        tmp_path / "f",
        "--json",
    ]
    points = json.loads(puzzle(*arguments).stdout)["points"]
    scores = [float(p["score"]) for p in points]
    assert len(points) >= 5
    assert scores == sorted(scores)
    path = tmp_path / "f" / "frontier.csv"
    kept = path.read_text()
    path.write_text("".join(kept.splitlines(keepends=True)[:3]))
    assert json.loads(puzzle(*arguments).stdout)["points"] == points
    assert sorted(path.read_text().splitlines()) == sorted(kept.splitlines())
    assert "●" in puzzle(*arguments[:-1]).output


def test_another_question_is_asked_anew(puzzle, own_library, tmp_path):
    """Points of another rule, of other scores or of a broken file are no answer to this one."""

    def points(*more: object, out: str = "f") -> list[dict]:
        asked = [
            "solve",
            own_library,
            "--pareto",
            "memory",
            "--points",
            4,
            *SOLVE,
            *more,
            "--out",
            tmp_path / out,
            "--json",
        ]
        done = puzzle(*asked)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)["points"]

    first = points()
    uniform = points("--baseline", "uniform")
    assert uniform == points("--baseline", "uniform", out="fresh")
    assert uniform != first
    also = points("--also", "16/16@1:ttft=90%")
    assert also == points("--also", "16/16@1:ttft=90%", out="also")
    for path in (own_library / "scores").glob("L*.json"):
        told = json.loads(path.read_text())
        for score in told["scores"].values():
            score["kl"] *= 2
        path.write_text(json.dumps(told))
    dearer = points()
    assert [p["score"] for p in dearer] == [2 * p["score"] for p in first]
    path = tmp_path / "f" / "frontier.csv"
    path.write_text(path.read_text().replace("attention", "", 1)[:-40] + "\n")
    assert points() == dearer


def test_two_at_once_do_not_write_into_each_other(puzzle, own_library, tmp_path, one_line_error):
    from puzzle.base.lock import locked

    (tmp_path / "f").mkdir()
    with locked(tmp_path / "f" / ".lock", tmp_path / "f"):
        done = puzzle("solve", own_library, "--pareto", "memory", "--points", 4, *SOLVE, "--out", tmp_path / "f")
    one_line_error(done, "is being changed by", "wait for it")
    assert not (tmp_path / "f" / "frontier.csv").exists()
