"""A small recipe of every stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml


@pytest.fixture
def write(parent, corpus, tmp_path):
    """A small recipe of every stage, with these sections changed; None leaves one out."""
    whole = {
        "parent": str(parent),
        "data": str(corpus),
        "device": "cpu",
        "build": {
            "attention": "kv1,none", "ffn": "0.5,none", "tokens": 1024, "seq_len": 32, "batch_size": 4,
            "validation_sequences": 4, "calibration_sequences": 8,
        },
        "score": {"sequences": 4},
        "profile": {"gpu": "cpu", "batches": [1, 2], "seconds": 0.005, "rounds": 1},
        "goal": {"throughput": "1.2x"},
        "workload": {"input_len": 8, "output_len": 8},
        "solve": {"also": ["16/8@1:latency=400%"], "explain": True},
        "heal": {"tokens": 1024, "seq_len": 32, "batch_size": 4, "validation_sequences": 4, "save_every": 2},
        "export": ["hf", "nemotron-nas"],
        "evaluate": {"sequences": 4, "repeats": 1},
    }  # fmt: skip

    def recipe(**changed) -> Path:
        for name, value in changed.items():
            whole[name] = whole.get(name, {}) | value if isinstance(value, dict) else value
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({n: v for n, v in whole.items() if v is not None}, sort_keys=False))
        return path

    return recipe
