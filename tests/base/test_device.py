"""Which device tests run on: the CPU, on every machine."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from puzzle.base.device import pick_device, this_gpu
from puzzle.base.errors import UserError

WITH_A_GPU = "import sys, torch, pytest; torch.cuda.is_available = lambda: True; sys.exit(pytest.main(sys.argv[1:]))"


@pytest.fixture(scope="session")
def picked() -> str:
    """As fixtures that make libraries and models pick it."""
    return pick_device("auto").type


def test_the_cpu_is_picked(picked, ended, launch):
    """By fixtures, tests, and processes that they start."""
    assert (picked, pick_device("auto").type) == ("cpu", "cpu")
    with pytest.raises(UserError, match="`device` cuda: no CUDA GPU is visible here"):
        pick_device("cuda")
    with pytest.raises(UserError, match="`gpu` h100: no CUDA device can be used here"):
        this_gpu("h100")
    code = "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "''\n"
    group = launch(("--help",), setup=f"assert os.environ['CUDA_VISIBLE_DEVICES'] == {''!r}")
    assert ended(group) == [0]


@pytest.mark.gpu
def test_a_marked_test_sees_the_gpu(picked):
    assert picked == "cpu"
    assert torch.cuda.is_available()


@pytest.fixture
def seeds(monkeypatch) -> list[object]:
    """What is asked of every GPU that is visible, whose number torch 2.11 then keeps."""
    asked: list[object] = []
    monkeypatch.setattr(torch.cuda.random, "_lazy_call", lambda callback, **settings: asked.append(callback))
    return asked


def test_a_gpu_that_is_hidden_is_not_seeded(seeds):
    torch.manual_seed(0)
    assert not seeds


def test_a_gpu_that_is_seen_is_seeded(seeds, gpu):
    assert len(seeds) == 1
    torch.manual_seed(0)
    assert len(seeds) == 2


def test_whatever_the_machine_has(tmp_path):
    """All of the above where torch says that there is a GPU."""
    asked = ("-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'pt'}", "-k", "not whatever", __file__)
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", WITH_A_GPU, *asked], cwd=root, capture_output=True, text=True)
    assert "4 passed, 1 deselected" in done.stdout, done.stdout
