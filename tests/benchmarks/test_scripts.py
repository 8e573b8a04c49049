"""Every script of benchmarks/ imports what it needs and says how it is called."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from results_page import BENCHMARKS

FOLDERS = ("kernels", "quality", "serving", "solver", "speed", "lib")
NEEDS_ENGINE = ("serving_llama_cpp",)  # runs in llama.cpp's own environment
SCRIPTS = sorted(
    path.relative_to(BENCHMARKS)
    for folder in FOLDERS
    for path in (BENCHMARKS / folder).glob("*.py")
    if path.stem not in NEEDS_ENGINE
)


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_a_script_starts(script: Path, load_script, monkeypatch, capsys):
    module = load_script(str(script))
    main = getattr(module, "main", None)
    if isinstance(main, click.Command):
        shown = CliRunner().invoke(main, ["--help"])
        assert shown.exit_code == 0, shown.output
        assert "--" in shown.output
    elif "argparse" in vars(module):
        monkeypatch.setattr(sys, "argv", [script.name, "--help"])
        with pytest.raises(SystemExit) as ended:
            module.main()
        assert ended.value.code == 0
        assert "usage:" in capsys.readouterr().out
