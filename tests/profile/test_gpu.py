"""How single points are timed on a GPU, as far as a CPU shows it."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from puzzle.kernels.timer import Timing
from puzzle.profile import gpu
from puzzle.profile.gpu import GpuTimer


def test_a_noisy_point_is_timed_again(monkeypatch):
    timings = [Timing(p20=1.0, p50=2.0, p80=3.0, num_samples=5), Timing(p20=1.9, p50=2.0, p80=2.01, num_samples=5)]
    monkeypatch.setattr(gpu, "time_replays", lambda *_: timings.pop(0))
    timer = object.__new__(GpuTimer)
    timer.device, timer.on_gpu, timer.grid = torch.device("cpu"), False, SimpleNamespace(seconds=0.0, min_samples=1)
    timing, workspace = timer._measured(lambda: None, 1, 1.0, 7)
    assert (timing.p20, workspace) == (1.9, 7)
    assert timings == []
