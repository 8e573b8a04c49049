"""Through lm-eval, where it is installed: our model against its own `hf`, and our reader against its."""

from __future__ import annotations

import json

import pytest
import yaml

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'puzzle-nas[eval]'")

from puzzle.measure.measurable import of_checkpoint
from puzzle.tasks import harness, local
from puzzle.tasks.evaluate import TaskOptions, evaluate_tasks

ROLLING = {
    "task": "rolling", "dataset_path": "json", "test_split": "test", "output_type": "loglikelihood_rolling", "doc_to_text": "",
    "doc_to_target": "{{text}}", "metric_list": [{"metric": "word_perplexity"}], "num_fewshot": 0,
}  # fmt: skip


@pytest.fixture
def files(tmp_path, data, monkeypatch):
    """Task files that only lm-eval reads: the shipped ones with a key of its own, and one of perplexity."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "import os and return it\n" * 700}) + "\n")
    found = {}
    for name in ("hellaswag", "truthfulqa_mc1", "gsm8k"):
        config = yaml.safe_load((local.SHIPPED / f"{name}.yaml").read_text()) | {
            "task": f"their_{name}",
            "should_decontaminate": False,
        }
        config["dataset_kwargs"] = {"data_files": {"test": str(data / f"{name}.jsonl")}}
        config["generation_kwargs"] = (
            {"until": ["Q:"], "max_gen_toks": 12, "do_sample": False} if name == "gsm8k" else None
        )
        found[name] = {key: value for key, value in config.items() if value is not None}
    found["rolling"] = ROLLING | {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "long.jsonl")}}}
    for name, config in found.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return {name: str(tmp_path / f"{name}.yaml") for name in found}


@pytest.mark.parametrize("chat", [False, True])
def test_same_numbers_as_its_own_model_and_as_our_reader(files, chatting, cut, data, tmp_path, chat):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parent = of_checkpoint(str(chatting))
    options = TaskOptions(tasks=tuple(files.values()), answers=tmp_path / "a", chat=chat)
    found = evaluate_tasks(parent, of_checkpoint(str(cut)), options)
    ours = {line["key"]: line["answer"] for line in map(json.loads, (tmp_path / "a").read_text().splitlines())}
    for directory, who in ((chatting, "parent"), (cut, "child")):
        model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
        theirs = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(chatting), batch_size=2, device="cpu")
        how = {"apply_chat_template": chat, "fewshot_as_multiturn": chat, "bootstrap_iters": 0}
        wanted = lm_eval.simple_evaluate(theirs, tasks=list(harness.load(list(files.values())).values()), **how)
        for task, one in found["tasks"].items():
            for metric, each in one["metrics"].items():
                key = metric if "," in metric else f"{metric},none"
                assert each[who]["mean"] == pytest.approx(wanted["results"][task][key], rel=1e-5), (task, metric)
        if who == "parent":
            answers = [
                value for rows in wanted["samples"].values() for row in rows for each in row["resps"] for value in each
            ]
            likely = sorted(value[0] for value in answers if isinstance(value, tuple))
            mine = sorted(value[0] for value in list(ours.values()) if isinstance(value, list))
            assert all(any(abs(value - one) < 1e-4 for one in mine) for value in likely)
            texts = {value for value in answers if isinstance(value, str)}
            assert texts <= {value for value in ours.values() if isinstance(value, str)}
    again = TaskOptions(
        tasks=("hellaswag", "truthfulqa_mc1", "gsm8k"),
        task_data=data,
        answers=tmp_path / "b",
        chat=chat,
        max_new_tokens=12,
    )
    own = evaluate_tasks(parent, of_checkpoint(str(cut)), again)["tasks"]
    for task, one in own.items():
        assert one == found["tasks"][f"their_{task}"]
    assert len((tmp_path / "b").read_text().splitlines()) > 40


def test_refusals(puzzle, one_line_error, parent):
    one_line_error(puzzle("evaluate", parent, parent, "--tasks", "hellasweg"), "no such task", "hellaswag")
    one_line_error(puzzle("evaluate", parent, parent, "--tasks", "humaneval"), "in this very process", "--task-data")
