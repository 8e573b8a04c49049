"""Small data of the shipped tasks, made here, and a chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
ROWS = {
    "hellaswag.jsonl": [
        {"activity_label": "Cooking", "ctx_a": f"Someone cuts {n} carrots.", "ctx_b": "they", "endings": [f" put [x] {n} in", "sing", "sleep a while"], "label": str(n % 3)}
        for n in range(5)
    ],
    "gsm8k.jsonl": [{"question": f"What is {n} and {n}?", "answer": f"{n}+{n}\n#### {2 * n}"} for n in range(3)],
    "truthfulqa_mc1.jsonl": [
        {"question": f"Are there {n} moons?", "mc1_targets": {"choices": ["No.", f"There are {n}."], "labels": [1, 0]}} for n in range(3)
    ],
    "HumanEval.jsonl": [
        {"prompt": f"def add{n}(a):\n    \"\"\"Add {n}.\"\"\"\n", "test": f"def check(f):\n    assert f(1) == {n + 1}\n", "entry_point": f"add{n}"}
        for n in range(2)
    ],
}  # fmt: skip


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("sets")
    for name, rows in ROWS.items():
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture(scope="session")
def chatting(tmp_path_factory, make_parent, corpus) -> Path:
    """A parent with room for few-shot prompts, and a chat template that knows thinking."""
    directory = make_parent(tmp_path_factory.mktemp("chat") / "parent", corpus, max_position_embeddings=4096)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture(scope="session")
def cut(tmp_path_factory, chatting, make_child) -> Path:
    """Its child, with layers without attention or anything."""
    out = make_child(chatting, tmp_path_factory.mktemp("cut") / "child")
    shutil.copy(chatting / "chat_template.jinja", out)
    return out
