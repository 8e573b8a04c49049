"""`puzzle evaluate --tasks` on tiny models and data made here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from puzzle.measure.measurable import of_checkpoint
from puzzle.parents.opened import open_model
from puzzle.tasks import harness, local
from puzzle.tasks.evaluate import TaskOptions, evaluate_tasks
from puzzle.tasks.model import Model
from puzzle.tasks.statistics import difference_interval, mean_interval

FOUR = "hellaswag,truthfulqa_mc1,gsm8k,humaneval"
SHORT = ("--max-new-tokens", 8)


def test_four_tasks_side_by_side(puzzle, chatting, cut, data, tmp_path, monkeypatch):
    """And again from the answers that were kept, without a model."""
    asked = (
        "evaluate",
        chatting,
        cut,
        "--tasks",
        FOUR,
        "--task-data",
        data,
        *SHORT,
        "--answers",
        tmp_path / "a",
        "--run-code",
        "--json",
    )
    dry = json.loads(puzzle(*asked, "--dry-run").stdout)
    assert not (tmp_path / "a").exists()
    assert dry["parent"]["requests"] == dry["child"]["requests"] == 5 * 3 + 3 * 2 + 3 + 2
    done = puzzle(*asked)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {task: one["documents"] for task, one in found["tasks"].items()} == dict(
        zip(FOUR.split(","), (5, 3, 3, 2), strict=True)
    )
    assert set(found["tasks"]["gsm8k"]["metrics"]) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    for one in found["tasks"].values():
        for metric, each in one["metrics"].items():
            difference = one["differences"]["child - parent"][metric]
            assert difference["mean"] == pytest.approx(each["child"]["mean"] - each["parent"]["mean"])
            assert all(value["low"] <= value["mean"] <= value["high"] for value in (*each.values(), difference))
    assert found["sandbox"].keys() == {"no_network", "writes_inside_only"}
    monkeypatch.setattr(Model, "_answer", None)
    assert json.loads(puzzle(*asked).stdout)["tasks"] == found["tasks"]
    assert json.loads(puzzle(*asked, "--dry-run").stdout)["child"] == {"requests": 0, "tokens": 0, "seconds": 0.0}


def test_a_child_of_a_library(puzzle, own_library, parent, data, tmp_path):
    """As it was solved, its answers are those of its export."""
    puzzle("solve", own_library, "--throughput", "1.5x", "--gpu", "cpu", "--input-len", 16, "--output-len", 16)
    puzzle("export", own_library, own_library / "solution", "--out", tmp_path / "child")
    asked = ("--tasks", "hellaswag", "--task-data", data, "--answers", tmp_path / "a", "--json")
    found = [
        json.loads(puzzle("evaluate", parent, one, *asked).stdout)
        for one in (own_library / "solution", tmp_path / "child")
    ]
    assert found[0]["tasks"] == found[1]["tasks"]
    places = [str(own_library / "solution"), str(tmp_path / "child")]
    assert [one["models"]["child"]["path"] for one in found] == places
    assert found[1]["models"]["child"]["fingerprint"] == open_model(str(tmp_path / "child")).fingerprint()


def test_killed_and_started_again(launch, ended, held, wait, chatting, data, tmp_path):
    """The file has what was answered; a part of a line at its end is dropped."""
    words = [
        "evaluate",
        chatting,
        chatting,
        "--tasks",
        "gsm8k",
        "--task-data",
        data,
        *SHORT,
        "--answers",
        tmp_path / "a",
    ]
    single = "from puzzle.tasks import model; model.MOST['cpu'] = 1\n"
    (process,) = launch(words, setup=single + held("puzzle.tasks.model.Answers.keep", 3))
    wait(lambda: (tmp_path / "a").exists() and (tmp_path / "a").stat().st_size, process)
    process.kill()
    process.join()
    before = (tmp_path / "a").read_bytes()
    assert 1 <= before.count(b"\n") < 3
    (tmp_path / "a").write_bytes(before + b'{"key": "1')
    (process,) = launch(words, setup=single)
    assert ended([process]) == [0], process.log.read_text()
    after = (tmp_path / "a").read_bytes()
    assert after.startswith(before)
    assert len([json.loads(line) for line in after.splitlines()]) == 3


def test_right_answers_count(data, monkeypatch, chatting):
    """Scores of each task where every answer is right, and where none is."""
    rows = {name: local.read_task(local.SHIPPED / f"{name}.yaml", data, None) for name in local.shipped()}
    harmony = rows["hellaswag"].rows[1]
    request = rows["hellaswag"].requests(harmony, None)[0]
    assert (request.context, request.continuation) == ("Cooking: Someone cuts 1 carrots. They", " put 1 in")
    best = [
        [[0.0, True] if n == rows["hellaswag"].right(row) else [-9.0, False] for n in range(3)]
        for row in rows["hellaswag"].rows
    ]
    assert set(map(tuple, rows["hellaswag"].scores(best).values())) == {(1.0,) * 5}
    said = ["The answer is 0.", "so $2", "It is 5."]
    scores = rows["gsm8k"].scores([[one] for one in said])
    assert scores == {"exact_match,strict-match": [1.0, 0.0, 0.0], "exact_match,flexible-extract": [1.0, 1.0, 0.0]}
    assert rows["humaneval"].scores([["    return a\n"], ["    return a\n"]])["pass@1,none"] == [1.0, 0.0]
    assert rows["humaneval"].scores([["    return a\n```\nwhich"], ["    return a + 1\n```"]])["pass@1,none"] == [
        1.0,
        1.0,
    ]
    chat = ["Sure:\n```python\ndef add0(a):\n    return a + 0\n```\nDone.", "```\n    return a + 1\n```"]
    assert rows["humaneval_instruct"].scores([[one] for one in chat])["pass@1,none"] == [1.0, 1.0]


def test_chats_and_samples(chatting, cut, data, tmp_path):
    """System prompt and thinking reach the model; the mean over samples is of different answers, the same for the same model."""
    seen = {}
    for thinking in ("on", "off"):
        chosen = {
            "chat": True,
            "system": "Be brief.",
            "thinking": thinking,
            "samples": 2,
            "temperature": 0.7,
            "max_new_tokens": 6,
        }
        path = tmp_path / thinking
        options = TaskOptions(tasks=("gsm8k", "hellaswag"), task_data=data, answers=path, **chosen)
        found = evaluate_tasks(of_checkpoint(str(chatting)), of_checkpoint(str(chatting)), options)
        for one in found["tasks"].values():
            assert all(value["mean"] == 0 for value in one["differences"]["child - parent"].values())
        seen[thinking] = {line["key"] for line in map(json.loads, path.read_text().splitlines())}
        assert len(seen[thinking]) == 3 * 2 + 5 * 3  # choices are asked for once
    assert not seen["on"] & seen["off"]


REFUSED = {
    "unknown": (["--tasks", "gsm9k"], "gsm9k", "gsm8k"),
    "no data": (["--tasks", "gsm8k", "--task-data", "."], "no **/gsm8k/test.jsonl or", "--task-data"),
    "code": (["--tasks", "humaneval", "--task-data", "DATA"], "runs generated code", "--run-code"),
    "unused": (["--tasks", "hellaswag", "--task-data", "DATA", "--max-new-tokens", 5], "--max-new-tokens 5 is for generated answers", "leave it out"),
    "samples": (["--tasks", "gsm8k", "--task-data", "DATA", "--samples", 3], "--samples 3 are all alike", "--temperature"),
    "too many samples": (["--tasks", "gsm8k", "--task-data", "DATA", "--samples", 10**9, "--temperature", 1], "--samples 1000000000 of each answer are too many", "1024 at most"),
    "no text": (["--tasks", "gsm8k", "--task-data", "DATA", "--chat", "--system", "\udcff"], "--system '\\udcff' is no text in UTF-8", ""),
    "no chat": (["--tasks", "gsm8k", "--task-data", "DATA", "--system", "x"], "--system is part of a chat", "--chat"),
    "precision": (["--tasks", "gsm8k", "--task-data", "DATA", "--precision", "fp8"], "--precision fp8", "float32"),
    "answers": (["--tasks", "gsm8k", "--task-data", "DATA", "--answers", "FOREIGN"], "is no answer of", "--answers"),
    "too long": (["--tasks", "gsm8k", "--task-data", "DATA", "--max-new-tokens", 5000], "answers of up to 5000 tokens leave nothing of the 4096", "--max-new-tokens"),
    "streamed": (["--tasks", "gsm8k", "--task-data", "DATA", "--memory-limit", "1KB"], "does not fit whole", "does not stream"),
    "text": (["--tasks", "gsm8k", "--task-data", "DATA", "--data", "DATA"], "--data is not used with --tasks", ""),
    "no tasks": (["--limit", 3], "--limit is not used without --tasks", ""),
    "endless heat": (["--tasks", "gsm8k", "--task-data", "DATA", "--temperature", "inf"], "--temperature inf", "0 is greedy"),
    "precision twice": (["--tasks", "gsm8k", "--task-data", "DATA", "--precision", "float32,float32"], "has float32 twice", ""),
    "twice": (["--tasks", "gsm8k,gsm8k", "--task-data", "DATA"], "has a task twice", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(puzzle, one_line_error, chatting, cut, data, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(harness, "installed", lambda: False)
    Path("notes").write_text("mine\n")
    words = [{"DATA": data, "FOREIGN": "notes"}.get(word, word) for word in REFUSED[name][0]]
    one_line_error(puzzle("evaluate", chatting, cut, *words), *[part for part in REFUSED[name][1:] if part])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes"]
    assert Path("notes").read_text() == "mine\n"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"process_docs": "x"}, "`process_docs`"),
        ({"output_type": "loglikelihood"}, "loglikelihood"),
        ({"metric_list": [{"metric": "f1"}]}, "f1"),
    ],
)
def test_what_only_lm_eval_knows(puzzle, one_line_error, parent, data, tmp_path, monkeypatch, change, named):
    monkeypatch.setattr(harness, "installed", lambda: False)
    config = yaml.safe_load((local.SHIPPED / "gsm8k.yaml").read_text()) | change
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    asked = ("--tasks", tmp_path / "own.yaml", "--task-data", data)
    one_line_error(puzzle("evaluate", parent, parent, *asked), named, "needs lm-eval", "puzzle-nas[eval]")


def test_thinking_that_a_template_does_not_know(puzzle, one_line_error, parent, data):
    asked = ("--tasks", "gsm8k", "--task-data", data, "--chat")
    one_line_error(
        puzzle("evaluate", parent, parent, *asked, "--thinking", "on"), "knows no enable_thinking", "--system"
    )
    one_line_error(puzzle("evaluate", parent, parent, *asked), "chat template", "does not take this")


def test_intervals():
    """Of few documents that agree, neither vanishes; known values of Agresti-Coull and Bonett-Price."""
    assert mean_interval([0.0] * 20)["high"] == pytest.approx(0.1939, abs=1e-4)
    assert mean_interval([1, 0, 1, 1, 0, 1, 1, 1])["low"] == pytest.approx(0.4006, abs=1e-3)
    assert difference_interval([1.0] * 20, [1.0] * 20)["high"] == pytest.approx(1.96 * 2**0.5 / 22)
    assert difference_interval([1, 1, 0, 1], [0, 1, 1, 0])["mean"] == pytest.approx(-0.25)
    free = mean_interval([2.0, 4.0])
    assert (free["low"], free["high"]) == (3 - 1.96, 3 + 1.96)
