"""The scripts of examples/post_training/ in a test: imported and called as they are, in an empty directory."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

FOLDER = Path(__file__).parents[2] / "examples" / "post_training"
PROMPTS = [{"question": f"{a} + {b}?", "answer": str(a + b)} for a in range(3) for b in range(3)]


@pytest.fixture
def scripts(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.chdir(tmp_path)


def module(name: str):
    return importlib.import_module(name)


def run(name: str, *arguments: object):
    done = CliRunner().invoke(module(name).main, [str(a) for a in arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
