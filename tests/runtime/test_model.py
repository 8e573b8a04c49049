"""Our model against transformers', our runtime against our model, in float32 at odd sizes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from puzzle.base.errors import UserError
from puzzle.blocklib.none import NO_OP
from puzzle.parents.opened import open_model
from puzzle.runtime.model import Block, load_model
from puzzle.runtime.plain import PlainRuntime


@torch.no_grad()
def test_logits_equal_transformers(pair):
    theirs, ours = pair
    ids = torch.randint(0, 97, (2, 63))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_runtime_generates_what_the_whole_model_does(pair):
    """Prefill and decode over the static cache = a full forward for every token."""
    _, ours = pair
    prompt = torch.randint(1, 97, (3, 17))
    expected = prompt
    for _ in range(24):
        expected = torch.cat((expected, ours(expected)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(PlainRuntime(ours, 3, 64).generate(prompt, 24), expected[:, 17:])


@torch.no_grad()
@pytest.mark.parametrize("drawn", range(6))
def test_runtime_on_heterogeneous_children(parent, replace_parts, drawn):
    """Random mixes of variants, with none left in some layers; windows shorter than the prompt."""
    model = load_model(parent)
    generator = torch.Generator().manual_seed(drawn)
    names = {
        "attention": ["parent", "kv1", "linear", "none", "window-5", "window-40"],
        "ffn": ["parent", "0.5", "linear", "none"],
    }
    for index in range(len(model.blocks)):
        chosen = {s: found[torch.randint(len(found), (1,), generator=generator).item()] for s, found in names.items()}
        replace_parts(model, index, chosen)
    prompt = torch.randint(2, 384, (2, 19), generator=generator)
    expected = prompt
    for _ in range(30):
        expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(PlainRuntime(model, 2, 64).generate(prompt, 30), expected[:, 19:])


@torch.no_grad()
def test_no_op_blocks_pass_everything_through(parent):
    model = load_model(parent)
    ids = torch.randint(0, 384, (1, 9))
    for index in range(len(model.blocks)):
        model.blocks[index] = Block({"attention": NO_OP.module(), "ffn": NO_OP.module()})
    assert torch.equal(model.hidden(ids), model.embedding(ids))


def test_weights_are_those_of_the_checkpoint(pair):
    """The same names and shapes, and as many bytes."""
    theirs, ours = pair
    wanted = {name: p.shape for name, p in theirs.named_parameters()}
    assert {name: tensor.shape for name, tensor in ours.named_weights()} == wanted
    assert ours.weight_bytes == 4 * ours.structure.num_parameters == 4 * sum(p.numel() for p in theirs.parameters())


def test_unsupported_rope_is_named(parent, tmp_path):
    directory = shutil.copytree(parent, tmp_path / "other")
    config = json.loads((directory / "config.json").read_text())
    rope = {"rope_type": "proportional", "rope_theta": 100.0, "factor": 2.0}
    (directory / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    with pytest.raises(UserError, match=r"proportional.*not supported"):
        open_model(directory)
