"""A sliced parent against the whole one, a masked twin and transformers, for every family."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from puzzle.base.errors import UserError
from puzzle.blocklib.hidden import hidden_axes
from puzzle.blocklib.mamba2 import Mamba2
from puzzle.blocklib.plain.part import RMSNorm
from puzzle.export.checkpoint import write_checkpoint
from puzzle.parents.opened import open_model
from puzzle.runtime.model import load_model
from puzzle.slice.config import sliced_config
from puzzle.slice.model import Axes, SlicedParent
from puzzle.slice.statistics import gather
from tiny_parents import PARENTS, write_tiny_parent

CPU = torch.device("cpu")
NO_WORDS = {
    "gemma3": "embedding_scale would be",
    "granitemoehybrid, attention alone": "Mamba head state do not match",
    "granitemoehybrid, Mamba-2 and dense FFNs": "Mamba head state do not match",
    "phi3, partial longrope": "short_factor field must have length",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")

    def opened(name: str, **sizes):
        out = root / "-".join([name.replace(" ", "-"), *sizes])
        return open_model(out if out.is_dir() else write_tiny_parent(name, out, **sizes))

    return opened


def ids(count: int = 2, length: int = 8) -> torch.Tensor:
    return torch.randint(2, 380, (count, length), generator=torch.Generator().manual_seed(length))


def sliced(parent, **axes) -> SlicedParent:
    text = ids(4, 32)
    return SlicedParent.of(parent, Axes(**axes), gather(parent, text, CPU, torch.float32, mixers="mamba" in axes))


def write(made: SlicedParent, out: Path) -> Path:
    config = sliced_config(made.parent, made.structure, made.layers)
    write_checkpoint(
        out, config=config, tensors=made.tensors(), tokenizer_from=None, generation_config=None, card="", code=()
    )
    return out


@torch.no_grad()
@pytest.mark.parametrize("name", PARENTS)
def test_the_whole_is_itself(name, whole, tmp_path):
    """With all channels and layers: the parent's logits to the bit, before and after it is written."""
    parent = whole(name)
    made, wanted = sliced(parent, hidden=parent.structure.hidden_size), load_model(parent)(ids())
    assert torch.equal(load_model(made)(ids()), wanted)
    assert torch.equal(load_model(write(made, tmp_path / "same"))(ids()), wanted)


@torch.no_grad()
@pytest.mark.parametrize("name", PARENTS)
def test_transformers_loads_it(name, whole, tmp_path):
    """Narrower and with a layer less, in the parent's own names: the same logits; or refused by the name of what cannot be said."""
    parent = whole(name)
    made = sliced(parent, hidden=parent.structure.hidden_size - 12, depth=parent.structure.num_layers - 1)
    if name in NO_WORDS:
        with pytest.raises(
            UserError, match=f"has no words for .* `hidden` {made.structure.hidden_size} .*{NO_WORDS[name]}"
        ):
            write(made, tmp_path / "sliced")
        return
    out = write(made, tmp_path / "sliced")
    assert open_model(out).structure == made.structure
    wanted = load_model(made)(ids())
    assert wanted.std() > 0.1
    assert torch.equal(load_model(out)(ids()), wanted)
    model, told = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert (model.eval()(ids(), use_cache=False).logits - wanted).abs().max() <= 1e-4


class Masked(RMSNorm):
    """The norm over some of the channels, the others 0; its scale times a factor."""

    def __init__(self, norm: RMSNorm, channels: torch.Tensor, factor: float):
        super().__init__(len(norm.weight), norm.eps)
        self.weight, self.channels, self.factor, self.offset = norm.weight, channels, factor, norm.offset

    def forward(self, x):
        kept = x[..., self.channels]
        unit = kept * (kept.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        found = torch.zeros_like(x)
        found[..., self.channels] = unit * (self.weight[self.channels] + int(self.offset)) * self.factor
        return found


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["llama tied, with biases", "qwen3_moe", "gpt_oss", "olmo2", "gemma3", "nemotron_h with experts"]
)
def test_a_twin_that_masks_channels(name, whole):
    """The whole model whose norms see the kept channels alone, and none of the left-out layers."""
    parent = whole(name)
    made = sliced(parent, hidden=29, depth=parent.structure.num_layers - 1)
    twin, use = copy.deepcopy(load_model(parent)), made.statistics
    for layer, slot, part in twin.parts():
        for norm in ("norm", "post_norm"):
            if hasattr(part, norm):
                factor = use.norms[layer, slot, f"{norm}.weight"].scale(made.channels)
                setattr(part, norm, Masked(getattr(part, norm), made.channels, factor))
    twin.embedding.weight.data *= torch.zeros(36).index_fill(0, made.channels, 1)
    twin.norm = Masked(twin.norm, made.channels, use.final.scale(made.channels))
    twin.blocks = torch.nn.ModuleList(twin.blocks[index] for index in made.layers)
    assert (load_model(made)(ids()) - twin(ids())).abs().max() <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "nemotron_h", "granite", "phi3"])
def test_channels_that_are_always_0_cost_nothing(name, whole):
    """Nothing writes five of the channels: without them the logits are the parent's."""
    parent = whole(name, **{"layer_norm_epsilon" if name == "nemotron_h" else "rms_norm_eps": 1e-12})
    dead = torch.tensor([3, 7, 8, 20, 35])

    def silent(layer: int, slot: str):
        found, own = type(parent).weights(parent, layer, slot), parent.structure.layers[layer][slot]
        for one, axes in hidden_axes(own).items():
            if "o_proj" in one or "out_proj" in one or "down_proj" in one:
                found[one] = found[one].index_fill(axes[0], dead, 0)
        return found

    object.__setattr__(parent, "weights", silent)
    embedding = parent.embedding().index_fill(1, dead, 0)
    object.__setattr__(parent, "embedding", lambda: embedding)
    wanted, made = load_model(parent)(ids()), sliced(parent, hidden=31)
    assert not set(made.channels.tolist()) & set(dead.tolist())
    assert (load_model(made)(ids()) - wanted).abs().max() <= 1e-4


@torch.no_grad()
def test_mamba_and_layers_by_what_they_do(whole, tmp_path):
    """Heads and channels of heads as the local variants cut them; a layer that adds nothing is the first to go."""
    parent = whole("nemotron_h")
    made = sliced(parent, hidden=30, depth=5, mamba="heads3-dim5")
    sizes = {(b.num_heads, b.head_dim, b.hidden_size) for _, _, b in made.structure if isinstance(b, Mamba2)}
    assert sizes == {(3, 5, 30)}
    out = write(made, tmp_path / "sliced")
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert (model(ids(), use_cache=False).logits - load_model(out)(ids())).abs().max() <= 1e-4
    idle, weights = 3, type(parent).weights
    object.__setattr__(
        parent,
        "weights",
        lambda n, s: {k: t * (n != idle or "out_proj" not in k) for k, t in weights(parent, n, s).items()},
    )
    assert sliced(parent, depth=5).layers == [0, 1, 2, 4, 5]


@torch.no_grad()
def test_a_hybrid_as_the_hub_has_it(tmp_path):
    """A pattern instead of a list, and a file of model code that is named and not copied."""
    directory = write_tiny_parent("nemotron_h", tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    for name in ("layers_block_type", "layer_types", "time_step_limit"):
        config.pop(name, None)
    config |= {"hybrid_override_pattern": "M-*M-M", "num_hidden_layers": 6, "auto_map": {"AutoConfig": "code.Config"}}
    (directory / "config.json").write_text(json.dumps(config | {"time_step_limit": [0.0, float("inf")]}))
    made = sliced(open_model(directory), hidden=24, depth=4)
    out = write(made, tmp_path / "sliced")
    said = json.loads((out / "config.json").read_text())
    assert said["hybrid_override_pattern"] == "".join("M-*M-M"[index] for index in made.layers)
    assert said["num_hidden_layers"] == 4
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert (model(ids(), use_cache=False).logits - load_model(made)(ids())).abs().max() <= 1e-4
