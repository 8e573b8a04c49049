"""Streams between groups of layers: what comes back is what was put, however far the host runs ahead of a GPU."""

from __future__ import annotations

import pytest
import torch

from puzzle.base.replay import Replayed
from puzzle.library.streams import ResidualStreams

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_groups_pass_streams_on(device, steps):
    """Three groups, each x -> (x + k) through a graph that takes long; calibration reads some batches twice."""
    size = 512 if device == "cuda" else 8
    first = {step: torch.full((2, size, size), float(step), device=device) for step in range(steps)}
    validation = torch.full((1, size, size), 100.0, device=device)

    def embed(split, step):
        return first[step].clone() if split == "train" else validation.clone()

    streams = ResidualStreams(embed, lambda split, step: torch.empty_like(embed(split, step)))
    weight = torch.eye(size, device=device)

    def slow(x, add):
        for _ in range(20):
            x = x @ weight
        return x + add

    for group in (1, 2, 3):
        streams.connect(None, None, keep=group < 3)
        for step in range(min(2, steps)):
            assert torch.equal(streams.get("train", step), first[step] + sum(range(group)))
        call = Replayed(lambda x, add=group: slow(x, add))
        found = []
        for step in range(steps):
            x = call(streams.get("train", step))
            found.append(x.clone())
            streams.put("train", step, x)
        streams.put("validation", 0, streams.get("validation", 0) + group)
        streams.finish()
        for step in range(steps):
            assert torch.equal(found[step], first[step] + sum(range(group + 1))), (group, step)
    if device == "cuda":
        assert streams._beside is not None
