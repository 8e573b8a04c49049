"""The scripts of examples/post_training/: what they count as right, and a few steps of each on the tiny child."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from example_scripts import FOLDER, PROMPTS, module, run, write_rows
from puzzle.base.errors import UserError
from puzzle.runtime.model import load_model

for package in ("trl", "peft", "datasets"):
    pytest.importorskip(package, reason=f"needs {package}: pip install 'puzzle-nas[train]'")

pytestmark = pytest.mark.usefixtures("scripts")
SANDBOX = shlex.join([sys.executable, "-"])  # of a test that knows what it runs


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("<think>2+2</think> It is \\boxed{4}.", "4", True),
        ("<think>so \\boxed{4}</think> I do not know", "4", False),  # what is thought does not count
        ("\\boxed{\\frac{1}{2}}", "0.5", True),
        ("\\boxed{\\dfrac{2}{4}}", "1/2", True),
        ("\\boxed{x = 1,234}", "1234", True),
        ("\\boxed{12\\,\\text{cm}}", "12", True),
        ("\\boxed{0.333}", "1/3", False),  # near is not equal
        ("\\boxed{(1, 2)}", "(1,2)", True),
        ("\\boxed{(2, 1)}", "(1,2)", False),
        ("\\boxed{1/0}", "1/0", True),
        ("first 3, then 7", "7", True),
        ("nothing here", "7", False),
        ("\\boxed{}", "", False),
        ("\\boxed{4", "4", True),  # cut off: the last number
    ],
)
def test_answers(text, answer, right):
    assert module("rewards").is_right(text, {"answer": answer}) is right


@pytest.mark.parametrize(
    ("text", "on", "off"),
    [
        ("<think>why</think>\n\nyes", True, False),
        ("yes", False, True),
        ("<think>why</think>", False, False),
        ("<think></think>yes", False, False),
        ("before <think>why</think> yes", False, False),
        ("<think>a</think> b <think>c</think> d", False, False),
        ("why</think>yes", False, False),
        ("  ", False, False),
    ],
)
def test_formats(text, on, off):
    in_format = module("rewards").in_format
    assert (in_format(text, True), in_format(text, False)) == (on, off)


@pytest.mark.parametrize(
    ("program", "right"),
    [
        ("f = lambda: 3", True),
        ("f = lambda: 4", False),
        ("while True: pass", False),
        ("import sys; sys.exit(1)", False),
    ],
)
def test_programs_run_in_the_sandbox_that_was_named_or_nowhere(program, right):
    is_right, row = module("rewards").is_right, {"tests": "assert f() == 3"}
    text = f"<think>?</think>\n```python\n{program}\n```\n"
    assert is_right(text, row, SANDBOX, seconds=3 if "while" in program else 60) is right
    assert not is_right("no program", row, SANDBOX)
    with pytest.raises(UserError, match="a model's program runs in a sandbox alone: pass `sandbox`"):
        is_right(text, row)


def test_batches_go_from_easy_to_hard():
    by_difficulty = module("curriculum").by_difficulty
    rates = [i / 100 for i in range(101)]
    batches = by_difficulty(rates, 6, 5, easiest=0.75, width=0.08)
    drawn = [index for batch in batches for index in batch]
    assert len(set(drawn)) == len(drawn) == 30
    assert max(rates[i] for i in drawn) <= 0.75
    means = [sum(rates[i] for i in batch) / 6 for batch in batches]
    assert means[0] > 0.55
    assert means[-1] < 0.25
    assert means == sorted(means, reverse=True)
    assert batches == by_difficulty(rates, 6, 5, easiest=0.75, width=0.08)
    few = by_difficulty([0.1, 0.5, 1.0], 4, 2)  # two are left: each comes as often as the other
    assert [sorted(batch) for batch in few] == [[0, 0, 1, 1]] * 2
    with pytest.raises(UserError, match="all 2 prompts are solved more often"):
        by_difficulty([0.8, 1.0], 4, 2)
    solved = by_difficulty([0.0, 0.1, 0.5, 1.0], 4, 2, hardest=0.1)
    assert {index for batch in solved for index in batch} == {1, 2}
    with pytest.raises(UserError, match=r"none of 3 prompts is solved at a rate of 0\.2 to 0\.75"):
        by_difficulty([0.0, 0.1, 1.0], 4, 2, hardest=0.2)


def test_curriculum_and_grpo_run(mixed, tmp_path, one_line_error):
    """Rated, stopped in the middle and gone on with, then trained on from easy to hard."""
    prompts, rated = write_rows(tmp_path / "prompts.jsonl", PROMPTS), tmp_path / "rated.jsonl"
    options = ("--out", rated, "--samples", 2, "--at-once", 3, "--max-new-tokens", 4)
    run("curriculum", mixed, prompts, *options)
    whole = rated.read_text()
    rated.write_text("".join(whole.splitlines(keepends=True)[:4]) + '{"question": "1 +')  # killed while it wrote
    run("curriculum", mixed, prompts, *options)
    assert rated.read_text() == whole
    for other, told in (
        ((mixed, prompts, *options, "--seed", 1), "another seed"),
        ((FOLDER, prompts, *options), "config.json"),
    ):
        one_line_error(CliRunner().invoke(module("curriculum").main, [str(a) for a in other]), told)
    assert rated.read_text() == whole
    rows = [json.loads(line) for line in whole.splitlines()]
    assert all(0 <= row["pass_rate"] <= 1 for row in rows)
    small = ("--steps", 2, "--group", 2, "--prompts-per-step", 2, "--max-new-tokens", 6, "--lr", 1e-3, "--off", 0.5)
    run("grpo", mixed, rated, "--out", tmp_path / "rl", *small, "--easiest", 1.0)
    run("grpo", mixed, prompts, "--out", tmp_path / "lora", *small, "--lora", 4)
    found = CliRunner().invoke(
        module("grpo").main, [str(a) for a in (mixed, prompts, "--out", tmp_path / "no", *small, "--hardest", 0.1)]
    )
    one_line_error(found, "`hardest` goes by a `pass_rate`")
    assert load_model(tmp_path / "rl").structure == load_model(tmp_path / "lora").structure


def how_a_copy_ends(work) -> int:
    """The exit code of a copy of this process that does `work`: trl is imported here already, which takes longer than the steps."""
    if (copy := os.fork()) == 0:
        with contextlib.suppress(BaseException), open(os.devnull, "w") as nowhere:
            for stream in (1, 2):
                os.dup2(nowhere.fileno(), stream)
            work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1])


@pytest.mark.parametrize("lora", [(), ("--lora", 4)], ids=["all", "lora"])
def test_grpo_killed_goes_on(mixed, tmp_path, one_line_error, monkeypatch, lora):
    """After the second step's checkpoint, while the fourth's is written, and once all has been learned: the same bits as of a run that was
    left alone."""
    grpo, prompts = module("grpo"), write_rows(tmp_path / "prompts.jsonl", PROMPTS)
    small = ("--steps", 5, "--group", 2, "--prompts-per-step", 2, "--max-new-tokens", 6, "--lr", 1e-3, *lora)
    asked = (mixed, prompts, *small, "--save-every", 2, "--out")
    run("grpo", *asked, tmp_path / "whole")
    out, part = tmp_path / "rl", tmp_path / "rl/.part"

    def die(name: str, at: int) -> None:
        plain = getattr(grpo.GRPOTrainer, name)

        def function(self, *given, **named):
            if self.state.global_step >= at and (name != "save_model" or given[0].endswith("whole")):
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(self, *given, **named)

        setattr(grpo.GRPOTrainer, name, function)
        grpo.main([str(word) for word in (*asked, out)])

    for name, at, left in (
        ("training_step", 3, ["checkpoint-2"]),
        ("_save_rng_state", 4, ["checkpoint-2", "checkpoint-4"]),
        ("save_model", 5, ["checkpoint-5"]),
    ):
        assert how_a_copy_ends(lambda name=name, at=at: die(name, at)) == -signal.SIGKILL
        assert sorted(path.name for path in part.glob("checkpoint-*")) == left
        for other, told in (("--seed", "seed"), ("--beta", "beta")):
            done = CliRunner().invoke(grpo.main, [str(a) for a in (*asked, out, other, 1)])
            one_line_error(done, f"rl, which is not finished, was made with another {told}: give another `out`")
    done = run("grpo", *asked, out)
    assert f"going on from {part / 'checkpoint-5'}" in done.output
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in (tmp_path / "whole").iterdir())
    first, second = (load_file(path / "model.safetensors") for path in (tmp_path / "whole", out))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    logs = [json.loads((path / "trainer_state.json").read_text())["log_history"] for path in (tmp_path / "whole", out)]
    rewards = [[one.get("reward") for one in log] for log in logs]
    assert rewards[0] == rewards[1]
    assert "is there already" in run("grpo", *asked, out).output
    done = CliRunner().invoke(grpo.main, [str(a) for a in (*asked, out, "--steps", 6)])
    one_line_error(done, "rl was made with another steps: give another `out`, or remove it")
    (tmp_path / "used").mkdir()
    (tmp_path / "used/notes").write_text("mine")
    one_line_error(CliRunner().invoke(grpo.main, [str(a) for a in (*asked, tmp_path / "used")]), "used is not empty")


def test_arithmetic_is_right_and_assessed(mixed, tmp_path, one_line_error):
    """Every line of a solution holds, no question is asked twice, and what is made of it goes through sft.py and assess.py."""
    small = ("--count", 300, "--largest", 99, "--tokens", 600)
    for name in ("one", "two"):
        run("arithmetic", "--out", tmp_path / name, *small)
    files = {path.name: path.read_text() for path in (tmp_path / "one").iterdir()}
    assert files == {path.name: path.read_text() for path in (tmp_path / "two").iterdir()}
    rows = {n: [json.loads(line) for line in text.splitlines()] for n, text in files.items() if n.endswith("jsonl")}
    chats = rows["reasoning.jsonl"] + rows["direct.jsonl"]
    told = [(c["messages"][0]["content"], c["messages"][1]["content"]) for c in chats]
    told += [(r["question"], f"\\boxed{{{r['answer']}}}") for r in rows["prompts.jsonl"] + rows["held-out.jsonl"]]
    assert len(told) == 300
    seen = set()
    for question, answer in told:
        a, sign, b = re.search(r"(\d+) (\S+) (\d+)", question).groups()
        sign = {"plus": "+", "minus": "-", "times": "*"}.get(sign, sign)
        seen.add((a, sign, b))
        assert module("rewards").is_right(answer, {"answer": str(eval(a + sign + b))})
        for line in answer.partition("</think>")[0].splitlines() if "<think>" in answer else ():
            left, equals, right = line.partition(" = ")
            assert not equals or eval(left) == int(right)
        assert module("rewards").in_format(answer, "<think>" in answer)
    assert len(seen) == 300
    run("sft", tmp_path / "one/stages.yaml", "--child", mixed, "--out", tmp_path / "sft")
    out = tmp_path / "deep/assessed.json"
    asked = ("--limit", 3, "--at-once", 2, "--max-new-tokens", 4)
    run("assess", tmp_path / "sft/both", tmp_path / "one/held-out.jsonl", "--out", out, *asked)
    found = json.loads(out.read_text())
    assert found["questions"] == 3
    assert all(0 <= found[f"detailed thinking {m}"][k] <= 1 for m in ("on", "off") for k in ("format", "accuracy"))
    many = CliRunner().invoke(
        module("arithmetic").main, ["--out", str(tmp_path / "x"), "--count", "999", "--largest", "3"]
    )
    one_line_error(many, "`count` 999: numbers up to 3 make fewer different questions")


def test_answers_do_not_depend_on_their_neighbours(mixed):
    """Questions of several lengths in a batch, greedy."""
    child, ask = module("sampling").Child(str(mixed)), module("rewards").prompt
    chats = [ask("1 + 1?" + " again" * n, n % 2 == 0) for n in range(4)]
    assert child.answers(chats, 8, None) == [child.answers([chat], 8, None)[0] for chat in chats]
    assert [len(texts) for texts in child.answers(chats, 4, 3)] == [3] * 4


def test_a_teacher_writes_and_a_child_learns(mixed, tmp_path, puzzle):
    """Whole answers alone, with the thought; wrong ones are dropped; stopped and gone on with; heal reads what was written."""
    rows = [{"question": f"{a} + 1?"} for a in range(12)]
    prompts, out = write_rows(tmp_path / "prompts.jsonl", rows), tmp_path / "chats.jsonl"
    options = (
        mixed,
        prompts,
        "--out",
        out,
        "--max-new-tokens",
        24,
        "--samples",
        3,
        "--temperature",
        3,
        "--device",
        "cpu",
    )
    done = run("generate", *options)
    written = [json.loads(line)["messages"] for line in out.read_text().splitlines()]
    assert f"{len(written)} of 36 answers to 12 prompts kept, {36 - len(written)} without an end" in done.output
    assert 0 < len(written) < 36
    assert all([m["role"] for m in one] == ["user", "assistant"] for one in written)
    whole, answers = out.read_text(), out.with_suffix(".answers.jsonl")
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[:16]) + '{"key": "cut')
    out.unlink()
    run("generate", *options)
    assert out.read_text() == whole
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": "import os", "answer": "none"}, {"text": "def main("}])
    done = run("generate", mixed, texts, "--out", tmp_path / "said.jsonl", "--max-new-tokens", 4, "--device", "cpu")
    assert "1 of 2 answers to 2 prompts kept, 1 wrong" in done.output
    assert json.loads((tmp_path / "said.jsonl").read_text())["text"].startswith("def main(")
    blend = tmp_path / "blend.yaml"
    blend.write_text("sources: [{path: chats.jsonl, messages: messages, loss: assistant}]")
    learn = (
        "--kl-weight",
        0,
        "--cosine-weight",
        0,
        "--lm-weight",
        1,
        "--tokens",
        256,
        "--seq-len",
        16,
        "--batch-size",
        4,
    )
    done = puzzle("heal", mixed, "--data-blend", blend, *learn, "--out", tmp_path / "healed", "--device", "cpu")
    assert done.exit_code == 0, (done.output, done.exception)


def test_what_the_scripts_refuse(mixed, tmp_path, one_line_error):
    tests = write_rows(tmp_path / "tests.jsonl", [{"question": "write f", "tests": "f()"}])
    broken = write_rows(tmp_path / "broken.jsonl", [{"question": "why"}, {"messages": []}])
    small = ("--out", tmp_path / "out")
    names = ("grpo", "curriculum", "sft", "generate", "assess", "arithmetic")
    grpo, curriculum, sft, generate, assess, arithmetic = (module(name).main for name in names)
    good = write_rows(tmp_path / "good.jsonl", PROMPTS)
    half = write_rows(tmp_path / "half.jsonl", [PROMPTS[0], {**PROMPTS[1], "pass_rate": 0.5}])
    empty, number = write_rows(tmp_path / "empty.jsonl", []), write_rows(tmp_path / "number.jsonl", [3])
    cut = tmp_path / "cut.jsonl"
    cut.write_text(good.read_text()[:60])
    (tmp_path / "dir").write_text("- 3")
    stages = tmp_path / "stages.yaml"
    stages.write_text("stages: [{name: a, blend: b.yaml, epochs: 3}]")
    for main, arguments, words in (
        (grpo, (mixed, tests), "runs in a sandbox alone"),
        (grpo, (mixed, broken), "broken.jsonl line 1: a prompt has a `question`, and an `answer` or `tests`"),
        (curriculum, (mixed, broken), "broken.jsonl line 1"),
        (
            generate,
            (mixed, broken),
            "broken.jsonl line 2: a prompt has a `question`, `messages` that end with the user, or a `text`",
        ),
        (generate, (mixed, tests, "--samples", 2, "--temperature", 0), "`samples` 2 are all alike at `temperature` 0"),
        (sft, (stages, "--child", mixed), "stage 1: unknown key 'epochs'"),
        (grpo, (mixed, good, "--off", 2), "Invalid value for '--off': 2.0 is not in the range"),
        (grpo, (mixed, good, "--accumulate", 3), "`accumulate` 3: 128 answers of a step"),
        *(
            (one, (mixed, good, "--max-new-tokens", 999), "`max_new_tokens` 999 after a prompt of")
            for one in (grpo, curriculum, assess)
        ),
        (grpo, (mixed, half), "1 of 2 prompts have a `pass_rate`"),
        (grpo, (tmp_path, good), "config.json"),
        (grpo, (mixed, good, "--sandbox", "no-such-program"), "`sandbox` no-such-program: no such program here"),
        (assess, (mixed, good, "--limit", 0), "Invalid value for '--limit': 0 is not in the range"),
        (assess, (mixed, empty), "empty.jsonl has no rows"),
        (assess, (mixed, cut), "cut.jsonl line 2: no JSON"),
        (assess, (mixed, number), "number.jsonl line 1: 3 is no JSON object"),
        (assess, (mixed, tests), "runs in a sandbox alone"),
        (assess, (mixed, tmp_path), "cannot be read"),
        (assess, (tmp_path, good), "config.json"),
        (curriculum, (mixed, good, "--samples", 0), "Invalid value for '--samples'"),
        (generate, (mixed, number), "number.jsonl line 1: 3 is no JSON object"),
        (generate, (mixed, good, "--temperature", -1), "Invalid value for '--temperature'"),
        (arithmetic, ("--count", 3), "Invalid value for '--count': 3 is not in the range"),
        (arithmetic, ("--tokens", "x"), "`tokens` x: write a count"),
        (sft, (half.with_name("dir"), "--child", mixed), "dir: must hold `stages`"),
        (sft, (stages, "--child", mixed, "--lora", 0), "Invalid value for '--lora'"),
    ):
        one_line_error(CliRunner().invoke(main, [str(a) for a in (*arguments, *small)]), words)
    before = good.read_text()
    for main in (assess, curriculum, generate):
        one_line_error(
            CliRunner().invoke(main, [str(mixed), str(good), "--out", str(good)]), "is the file that is read"
        )
    assert good.read_text() == before
    for given, told in (
        ("{name: a, blend: none.yaml}", "stage 1: blend none.yaml: no such file"),
        ("{name: ../a, blend: good.jsonl}", "stage 1: name ../a: "),
        ("{name: a, blend: good.jsonl}, {name: a, blend: good.jsonl}", "stage 2: name a: a name of its own"),
        ("{name: a, blend: good.jsonl, lr: x}", "stage 1: lr x: "),
        ("{name: a, blend: good.jsonl, batch_size: 0}", "`batch_size` 0: "),
    ):
        stages.write_text(f"stages: [{given}]")
        one_line_error(CliRunner().invoke(sft, [str(a) for a in (stages, "--child", mixed, *small)]), told)
    assert not (tmp_path / "out").exists()


def test_an_answer_of_zero_counts(mixed, tmp_path, monkeypatch):
    """As a number in JSON."""
    grpo, seen = module("grpo"), []

    class Trainer:
        def __init__(self, *given, train_dataset, **named):
            seen.extend(train_dataset["answer"])
            raise UserError("enough")

    monkeypatch.setattr(grpo, "GRPOTrainer", Trainer)
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "2 - 2?", "answer": 0}])
    CliRunner().invoke(
        grpo.main, [str(mixed), str(rows), "--out", str(tmp_path / "rl"), "--steps", "1", "--max-new-tokens", "4"]
    )
    assert seen == ["0"] * 8


def test_lines_end_at_line_feeds_alone(tmp_path):
    """JSON may hold other ends of a line, within its texts."""
    rows = [{"question": "a\u2028b\x85c", "answer": 1}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(rows[0], ensure_ascii=False) + "\n", encoding="utf-8")
    assert module("rewards").read_lines(path) == rows
