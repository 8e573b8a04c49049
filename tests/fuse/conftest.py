"""Children with rows of attention-free layers of unequal widths, on a tiny parent."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from puzzle.export.child import ABSENT, LINEAR, Absent, Gqa, SwiGlu, no_tensors, sub_block_shapes
from puzzle.export.sources import child_of_checkpoint
from puzzle.export.write import Source, export

BLOCK = (Gqa(num_key_value_heads=2), SwiGlu(width=96))
NOTHING = (ABSENT, ABSENT)
MATRIX = (ABSENT, LINEAR)


def free(width: int):
    return ABSENT, SwiGlu(width=width)


def random_child(parent: Path, shapes, *, mlp_bias: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0):
    """A child in memory with these (attention, FFN) layers and random weights around a real tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    child = replace(child_of_checkpoint(parent), mlp_bias=mlp_bias, dtype=dtype, layers=())

    def tensors(shape):
        found = {}
        for name, dims in sub_block_shapes(child, shape).items():
            noise = torch.randn(dims, generator=generator, dtype=torch.float64)
            value = 1 + 0.5 * noise if "norm" in name else noise / (dims[1] ** 0.5 if len(dims) == 2 else 3)
            found[name] = value.to(dtype)
        return lambda: dict(found)

    layers = []
    for index, (attention, ffn) in enumerate(shapes):
        like = child_of_checkpoint(parent).layers[0]
        layers.append(
            replace(
                like,
                attention=attention,
                ffn=ffn,
                read_attention=no_tensors if isinstance(attention, Absent) else tensors(attention),
                read_ffn=no_tensors if isinstance(ffn, Absent) else tensors(ffn),
                origin=index,
            )
        )
    ends = {
        name: (lambda read: lambda: read().to(dtype))(getattr(child, name))
        for name in ("read_embedding", "read_final_norm", "read_head")
    }
    return replace(child, layers=tuple(layers), **ends)


def write(child, out: Path) -> Path:
    export(Source(child=child, solved=None, facts=None, measured=None), out, force=True)
    return out


@pytest.fixture(scope="session")
def fusible(tmp_path_factory, parent) -> Path:
    """attention, 3 free, attention, 4 free with an empty one, a linear FFN, attention. Not to be changed."""
    shapes = [BLOCK, free(48), free(96), free(16), BLOCK, free(40), NOTHING, free(96), free(24), MATRIX, BLOCK]
    return write(random_child(parent, shapes), tmp_path_factory.mktemp("fuse") / "child")


@pytest.fixture
def costly(library, fake_costs, tmp_path) -> Path:
    """A library of six pairs per layer where every FFN costs 6 ms a call besides its channels, so that fusion pays."""
    copy = shutil.copytree(library, tmp_path / "lib")
    fake_costs(copy)
    path = next((copy / "costs" / "cpu").glob("*.csv"))
    with open(path, newline="") as handle:
        rows = list(csv.DictReader(handle))
    for row in rows:
        row["p50_s"] = float(row["p50_s"]) + (6e-3 if row["kind"] == "ffn" else 0.0)
    with open(path, "w", newline="") as handle:
        writer = csv.DictWriter(handle, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    facts = json.loads((copy / "library.json").read_text())
    kept = {"attention": ["parent", "none"], "ffn": ["parent", "0.5", "0.25"]}
    facts["variants"] = {k: {name: facts["variants"][k][name] for name in names} for k, names in kept.items()}
    (copy / "library.json").write_text(json.dumps(facts))
    return copy
