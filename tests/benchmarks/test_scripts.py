"""Every script of benchmarks/ imports what it needs and says how it is called."""

from __future__ import annotations

import importlib.util
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
def test_a_script_starts(script: Path, monkeypatch, capsys):
    path = BENCHMARKS / script
    monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    main = getattr(module, "main", None)
    if isinstance(main, click.Command):
        shown = CliRunner().invoke(main, ["--help"])
        assert shown.exit_code == 0, shown.output
        assert "--" in shown.output
    elif "argparse" in vars(module):
        monkeypatch.setattr(sys, "argv", [path.name, "--help"])
        with pytest.raises(SystemExit) as ended:
            module.main()
        assert ended.value.code == 0
        assert "usage:" in capsys.readouterr().out
