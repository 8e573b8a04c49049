"""Scripts of benchmarks/ as modules."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest

from results_page import BENCHMARKS


@pytest.fixture(scope="session")
def load_script():
    """`load_script("speed/bench_x.py")`"""
    with pytest.MonkeyPatch.context() as patch:

        def load(script: str) -> ModuleType:
            path = BENCHMARKS / script
            patch.syspath_prepend(path.parent)
            spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
            spec.loader.exec_module(module)
            return module

        yield load
