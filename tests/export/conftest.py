import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def modules_cache(tmp_path, monkeypatch):
    """A cache of remote code for this test alone: transformers reads the variables once, when it is imported."""
    cache = tmp_path / "hf" / "modules"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(cache))
    monkeypatch.setattr(sys, "path", list(sys.path))  # transformers appends the cache to it
    return cache


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
