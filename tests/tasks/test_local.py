"""Task files of lm-eval's form: columns and templates say the same, and what is wrong is told before any model answers."""

from __future__ import annotations

import json

import pytest
import yaml

from puzzle.base.errors import UserError
from puzzle.tasks.local import NotReadHere, read_task
from puzzle.tasks.request import Answers

ROWS = [
    {"question": "which is red?", "choices": ["sky", "blood"], "label": 1, "answer": "blood", "prompt": "def f():\n"},
    {"question": "which is two?", "choices": ["1", "2", "0"], "label": 1, "answer": "2", "prompt": "def g():\n"},
]
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{label}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
TEXT = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "exact_match"}],
}


@pytest.fixture
def read(tmp_path):
    def task(base: dict, rows=ROWS, **changes):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}, "test_split": "test"}
        config = {name: one for name, one in ({"task": "own"} | data | base | changes).items() if one is not None}
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
        return read_task(tmp_path / "own.yaml", None, None)

    return task


def asked(task):
    return [[(r.context, r.continuation, r.until) for r in task.requests(row, None)] for row in task.rows]


@pytest.mark.parametrize(
    ("base", "columns"),
    [
        (CHOICE, {"doc_to_text": "question", "doc_to_choice": "choices", "doc_to_target": "label"}),
        (CHOICE, {"doc_to_target": "answer"}),  # a text is found among the choices, also where it is a number
        (TEXT, {"doc_to_text": "question", "doc_to_target": "answer"}),
    ],
)
def test_a_columns_name_stands_for_what_it_holds(read, base, columns):
    plain, named = read(base), read(base, **columns)
    assert asked(plain) == asked(named)
    assert asked(plain)[0][0][0] == "which is red?"
    for row in ROWS:
        assert plain.render("doc_to_target", row) == named.render("doc_to_target", row) or base is CHOICE
        assert base is TEXT or (plain.right(row), named.right(row)) == (row["label"], row["label"])
    if base is TEXT:
        assert named.scores([["blood"], ["3"]]) == {"exact_match,none": [1.0, 0.0]}


def test_choices_may_be_a_list_or_by_name(read):
    for given in (["sky", "blood"], {"a": "sky", "b": "blood"}):
        assert read(CHOICE, ROWS[:1], doc_to_choice=given).choices(ROWS[0]) == ["sky", "blood"]
    assert read(CHOICE, [ROWS[0] | {"choices": [3, 4]}]).choices({"choices": [3, 4]}) == ["3", "4"]


@pytest.mark.parametrize(
    ("base", "changes", "told"),
    [
        (CHOICE, {"doc_to_text": None}, "task own has no `doc_to_text`"),
        (CHOICE, {"doc_to_choice": None}, "task own has no `doc_to_choice`"),
        (TEXT, {"doc_to_target": None}, "task own has no `doc_to_target`"),
        (CHOICE, {"doc_to_text": ["a"]}, r"`doc_to_text` \['a'\] is no text"),
        (CHOICE, {"doc_to_text": "{{nothing}}"}, "`doc_to_text` does not fit a row of its data"),
        (CHOICE, {"doc_to_text": "7"}, "`doc_to_text` gives 7, which lm-eval takes for a number"),
        (CHOICE, {"doc_to_choice": "{{ choices | join(', ') }}"}, "`doc_to_choice` gives no list of choices"),
        (CHOICE, {"doc_to_choice": "question"}, "`doc_to_choice` gives no list of choices"),
        (CHOICE, {"doc_to_choice": []}, "`doc_to_choice` gives no list of choices"),
        (CHOICE, {"doc_to_choice": ["", "a"]}, "acc_norm divides by a choice's length, and one is empty"),
        (CHOICE, {"doc_to_target": "9"}, "the right answer is '9' of 2 choices"),
        (TEXT, {"doc_to_target": "{{choices}}"}, "`doc_to_target` gives the list"),
        (TEXT, {"filter_list": [{"name": "x", "filter": [{"function": "regex", "regex_pattern": "("}]}]}, r"`regex_pattern` '\(' is no regular"),
        (TEXT, {"metric_list": [{"metric": "exact_match", "regexes_to_ignore": ["["]}]}, r"`regexes_to_ignore` '\[' is no regular"),
        (TEXT, {"filter_list": [{"name": "x"}]}, "is not of lm-eval's form"),
        (CHOICE, {"doc_to_text": "{{ 1 / 0 }}"}, r"`doc_to_text` does not fit a row of its data \(division by zero"),
        (CHOICE, {"metric_list": [{"metric": "acc"}, {"metric": "acc"}]}, "metric_list has acc twice: leave one out"),
        (TEXT, {"filter_list": [{"name": "x", "filter": []}] * 2}, "filter_list has x twice: leave one out"),
        *(
            (TEXT, {"generation_kwargs": {"max_gen_toks": value}}, "generation_kwargs max_gen_toks is .*: give a whole number, 1 or more")
            for value in ("abc", -5, 0, None, 1.5, [3], True)
        ),
        *((TEXT, {"generation_kwargs": {"until": value}}, "generation_kwargs until is .*: give a text or a list") for value in (5, [1, 2])),
        *((CHOICE, {"target_delimiter": value}, "target_delimiter is .*: give a text") for value in (5, ["x"], True)),
        *((CHOICE, {"num_fewshot": value}, "num_fewshot is .*: give a whole number, 0 or more") for value in (-1, 0.0, [])),
        (CHOICE, {"test_split": ["test"]}, "test_split is .*: give a text"),
        *(
            (CHOICE, {"dataset_kwargs": {"data_files": value}}, "data_files is .*: give a file's name or a list of names")
            for value in (5, [1], {"test": 5}, {"test": ["own.jsonl"], "train": None})
        ),
        (TEXT, {"metric_list": [{"metric": "exact_match", "regexes_to_ignore": 5}]}, "regexes_to_ignore is 5: give a list of texts"),
        (TEXT, {"metric_list": [{"metric": "exact_match", "ignore_case": "no"}]}, "ignore_case is 'no': give true or false"),
        (TEXT, {"filter_list": [{"filter": []}]}, "filter_list has an entry without name"),
        (TEXT, {"filter_list": [{"name": "x", "filter": [{"function": "regex"}]}]}, "a step regex has no regex_pattern"),
        (TEXT, {"filter_list": [{"name": "x", "filter": [{"function": "regex", "regex_pattern": "a", "group_select": "0"}]}]}, "step group_select is '0'"),
        *((CHOICE, {"num_fewshot": 1, "fewshot_config": {"samples": value}}, "samples is .*: give a list of rows") for value in ([5], {"q": 1}, "abc")),
        *((CHOICE, {"doc_to_target": value}, "the right answer is") for value in ("²", "1" * 5000)),
        (CHOICE, {"doc_to_choice": "{[1]: 2}"}, "`doc_to_choice` gives no list of choices"),
        (TEXT, {"metric_list": [{"metric": "pass@1"}], "doc_to_text": "question"}, None),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_told_before_anything_is_answered(read, base, changes, told):
    if told is None:
        with pytest.raises(UserError, match="pass@1 completes the text in the column `prompt`; a row has question"):
            read(base, [{"question": "?", "answer": "x"}], **changes)
        return
    with pytest.raises(UserError, match=told):
        read(base, **changes)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("metadata: 2020-99-99", "a value that is none: month must be in 1..12"),
        ("metadata: " + "[" * 3000, "nested too deeply"),
        ("task: own", "the key task stands twice"),
    ],
)
def test_a_file_that_is_no_yaml(tmp_path, text, told):
    (tmp_path / "own.yaml").write_text(f"task: own\n{text}\n")
    with pytest.raises(UserError, match=f"own.yaml cannot be read .*{told}"):
        read_task(tmp_path / "own.yaml", None, None)


def test_data_are_where_they_were_said_to_be(read, tmp_path, monkeypatch):
    """Not where we are, unless they are nowhere else and nobody has said; a path by itself counts either way."""
    here, named = tmp_path / "here", tmp_path / "named"
    for place in (here, named):
        place.mkdir()
        (place / "rows.jsonl").write_text(json.dumps(ROWS[1]) + "\n")
    (named / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS * 2))
    monkeypatch.chdir(here)
    assert len(read(CHOICE).rows) == 2
    assert len(read_task(tmp_path / "own.yaml", named, None).rows) == 4
    (tmp_path / "rows.jsonl").unlink()
    assert len(read_task(tmp_path / "own.yaml", None, None).rows) == 1
    (named / "rows.jsonl").unlink()
    with pytest.raises(UserError, match="give another `task_data`"):
        read_task(tmp_path / "own.yaml", named, None)
    read(CHOICE, dataset_kwargs={"data_files": {"test": str(here / "rows.jsonl")}})
    assert len(read_task(tmp_path / "own.yaml", named, None).rows) == 1


def test_what_only_lm_eval_knows(read):
    for changes in ({"metric_list": [{"metric": "bleu"}]}, {"include": "x"}, {"output_type": "loglikelihood"}):
        with pytest.raises(NotReadHere):
            read(TEXT, **changes)


def test_a_match_that_is_not_there_is_no_answer(read):
    steps = [{"function": "regex", "regex_pattern": "[0-9]+", "group_select": 1}]
    task = read(TEXT, [ROWS[1]], filter_list=[{"name": "second", "filter": steps}])
    assert [task.scores([[said]])["exact_match,second"] for said in ("2", "1 2", "none")] == [[0.0], [1.0], [0.0]]


def test_answers_are_kept_in_a_file(tmp_path):
    for place in ("/dev/null", tmp_path):
        with pytest.raises(UserError, match="is no file: name one"):
            Answers(type(tmp_path)(place))


@pytest.mark.parametrize("name", ["/", ".", "nowhere.jsonl"])
def test_data_that_are_not_there(read, name):
    """Where the directory is the task file's own, `task_data` is what to give."""
    with pytest.raises(
        UserError, match=r"task own: .*(names no file of its data|give `task_data` with the directory|cannot be read)"
    ):
        read(CHOICE, dataset_kwargs={"data_files": {"test": name}})


@pytest.mark.parametrize(
    "row", ['{"question": "\\ud800"}', '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", '{"a": NaN', "[1]"]
)
def test_rows_that_cannot_be_read(read, tmp_path, row):
    (tmp_path / "bad.jsonl").write_text(row)
    with pytest.raises(UserError, match=r"task own: .*bad.jsonl (cannot be read as|has no) rows"):
        read(CHOICE, dataset_kwargs={"data_files": {"test": "bad.jsonl"}})


@pytest.mark.parametrize(
    "changed",
    [{"key": ["a"]}, *({"answer": one} for one in (None, [1], [float("nan"), True], {}, ["x", True], [-1.0, 1])), {"seconds": None},
     {"tokens": "7"}, {"seconds": -1}],
)  # fmt: skip
def test_lines_that_are_no_answers(tmp_path, changed):
    line = {"key": "k", "model": "m", "answer": [-1.5, True], "tokens": 3, "seconds": 0.1}
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(line) + "\n")
    assert Answers(path).lines == {"k": line}
    path.write_text(json.dumps(line | changed) + "\n")
    with pytest.raises(UserError, match="line 1 is no answer"):
        Answers(path)
