"""The timer's arithmetic, and that it measures something, on the GPU or the CPU."""

from __future__ import annotations

import time

import pytest
import torch

from puzzle.kernels import timer


def test_percentiles():
    found = timer.percentiles([float(i) for i in range(11)])
    assert (found.p20, found.p50, found.p80, found.num_samples) == (2, 5, 8, 11)
    assert timer.percentiles([3.0]) == timer.Timing(p20=3.0, p50=3.0, p80=3.0, num_samples=1)
    with pytest.raises(ValueError, match="no samples"):
        timer.percentiles([])


def test_calls_take_turns_on_the_cpu():
    seen = []
    found = timer.time_calls([lambda: seen.append(0), lambda: seen.append(1)], seconds=0, min_samples=6, device="cpu")
    assert found.num_samples == 6
    assert seen == [0, 1] * 4  # one warm-up each


def test_cpu_time_is_real():
    found = timer.time_calls([lambda: time.sleep(0.002)], seconds=0, min_samples=3, device="cpu")
    assert 0.002 <= found.p20 <= found.p50 <= found.p80


def test_stops_at_the_largest_number_of_samples():
    assert timer.time_calls([lambda: None], seconds=60, device="cpu").num_samples == timer.MAX_SAMPLES


def test_short_calls_go_into_a_graph_several_times():
    assert timer.rounds_for(1.0) == 1
    assert timer.rounds_for(timer.MIN_GRAPH_SECONDS / 2.5) == 3
    assert timer.rounds_for(0.0) == timer.MAX_ROUNDS
    calls = []
    timer.Graph(lambda: calls.append(0), torch.device("cpu"), rounds=3).replay()
    assert len(calls) == 3


@pytest.mark.parametrize(("launch", "work"), [(5e-6, 2e-4), (3e-4, 2e-4), (3e-4, 2e-5), (5e-6, 1e-7), (0.0, 1.0)])
def test_a_graph_grows_until_its_launch_is_little(monkeypatch, launch, work):
    """Also where the first one took little but its launch."""

    made = []

    class Fake:
        def __init__(self, call, device, warm_ups=2, rounds=1):
            self.rounds = rounds
            made.append(rounds)

        def replay(self):
            return launch + self.rounds * work

    def time_replays(replay, length, *_):
        return timer.percentiles([replay() / length])

    monkeypatch.setattr(timer, "Graph", Fake)
    monkeypatch.setattr(timer, "time_replays", time_replays)
    found = timer.time_calls([lambda: None], device="cuda")
    assert found.p50 == pytest.approx(launch / made[-1] + work)
    assert launch + made[-1] * work > 0.9 * timer.MIN_GRAPH_SECONDS or made[-1] == timer.MAX_ROUNDS
    assert made == sorted(made)
    assert len(made) <= 5
    assert work < timer.MIN_GRAPH_SECONDS or made == [1]


def test_no_calls():
    with pytest.raises(ValueError, match="no calls"):
        timer.time_calls([])


def test_copies(monkeypatch):
    assert timer.num_copies(1000, "cpu") == 1
    monkeypatch.setattr(timer, "l2_bytes", lambda device: 50 * 2**20)
    assert timer.num_copies(2**20) == 201
    assert timer.num_copies(2**40) == 2
    assert timer.num_copies(1, limit=8) == 8


@pytest.mark.gpu
def test_cold_calls_are_slower_than_warm_ones():
    num_bytes = timer.l2_bytes() // 8
    copies = [torch.randn(num_bytes // 4, device="cuda") for _ in range(timer.num_copies(num_bytes))]
    cold = timer.time_calls([lambda x=x: x.sum() for x in copies])
    warm = timer.time_calls([copies[0].sum])
    assert warm.p50 < cold.p50
