"""A whole model as a value: through JSON and back, and its parameters counted."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from puzzle.base.errors import UserError
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.linear import Linear
from puzzle.blocklib.none import NO_OP
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.parents.known import STRUCTURES
from puzzle.parents.rope import Rope
from puzzle.parents.structure import Structure
from puzzle.runtime.model import random_model

GQA = Gqa(hidden_size=24, num_attention_heads=6, num_key_value_heads=3, head_dim=10, norm_eps=1e-5)
FFN = SwiGLU(hidden_size=24, intermediate_size=50, norm_eps=1e-5)
ROPE = Rope(head_dim=10, max_length=128, parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0})
UNLIKE = Structure(
    hidden_size=24,
    vocab_size=101,
    max_length=128,
    tied=False,
    norm_eps=1e-5,
    norm_offset=True,
    embedding_scale=4.5,
    logits_divisor=3.0,
    ropes={"default": ROPE, "local": replace(ROPE, parameters={"rope_theta": 10.0, "partial_rotary_factor": 0.5})},
    layers=(
        {"attention": GQA, "ffn": FFN},
        {"attention": replace(GQA, window=7, rope="local", qkv_bias=True, o_bias=True, qk_norm="all"), "ffn": NO_OP},
        {"mixer": replace(FFN, bias=True, activation="gelu_tanh")},
        {"attention": NO_OP, "ffn": Linear(hidden_size=24, norm="after")},
        {"ffn": replace(FFN, norm="both", norm_offset=True), "attention": replace(GQA, rope=None, scale=0.25)},
        {"attention": GQA, "ffn": FFN},
    ),
)
EVERY = {**STRUCTURES, "unlike": UNLIKE}


@pytest.mark.parametrize("structure", EVERY.values(), ids=EVERY)
def test_json_round_trip(structure):
    again = Structure.from_json(json.loads(json.dumps(structure.to_json())))
    assert again == structure
    assert [list(layer) for layer in again.layers] == [list(layer) for layer in structure.layers]
    assert again.to_json() == structure.to_json()


@pytest.mark.parametrize("structure", EVERY.values(), ids=EVERY)
def test_parameters_are_those_of_a_model(structure):
    """On the meta device, where 405 billion weigh nothing."""
    for tied in (True, False):
        own = replace(structure, tied=tied)
        model = random_model(own, "meta", torch.bfloat16)
        count = sum(p.numel() for p in model.parameters())
        assert own.num_parameters == count == sum(t.numel() for t in parameters_by_layer(model))
        assert own.num_fixed_parameters == count - sum(p.numel() for p in model.blocks.parameters())


def parameters_by_layer(model):
    """Embedding, head and final norm, and what each sub-block says that it has."""
    ends = [model.embedding.weight, model.norm.weight, *([] if model.head is None else [model.head])]
    return [*ends, *(torch.empty(b, device="meta") for _, _, s in model.structure for b in s.tensors().values())]


def test_slots_and_what_is_usual():
    assert UNLIKE.slots == ("attention", "ffn", "mixer")
    assert UNLIKE.usual == {"attention": GQA, "ffn": FFN, "mixer": replace(FFN, bias=True, activation="gelu_tanh")}
    assert UNLIKE.num_layers == 6
    assert [(i, s) for i, s, _ in UNLIKE][:5] == [
        (0, "attention"),
        (0, "ffn"),
        (1, "attention"),
        (1, "ffn"),
        (2, "mixer"),
    ]
    assert UNLIKE.with_layers([]).num_parameters == UNLIKE.num_fixed_parameters == 2 * 101 * 24 + 24


@pytest.mark.parametrize(
    ("layer", "wanted"),
    [
        ({"ffn": "swiglu h24 f50 g3"}, "'g3' is no word of kind 'swiglu'"),
        ({"ffn": "moa h24 e8"}, "kind 'moa' is unknown"),
        ({"ffn": "moe h24 e8"}, "lacks k, f: 'moe' is not whole without"),
        ({"attention": "gqa h24 q6 d10"}, "lacks kv"),
    ],
)
def test_a_layer_that_is_not_understood(layer, wanted):
    value = UNLIKE.to_json()
    value["layers"][3] = layer
    with pytest.raises(UserError, match=wanted):
        Structure.from_json(value)


def test_experts_as_their_card_says():
    """Nemotron 3 Nano: 31.58 B parameters, of which a token uses 3.58 B."""
    structure = STRUCTURES["nemotron-3-nano-30b-a3b"]
    idle = sum(b.num_parameters - b.active_parameters() for _, _, b in structure)
    assert structure.num_parameters == 31_577_940_288
    assert structure.num_parameters - idle == 3_580_076_352
    assert [
        sum(kind in (b.kind for b in layer.values()) for layer in structure.layers) for kind in ("mamba2", "moe", "gqa")
    ] == [23, 23, 6]


def test_hybrids_as_their_cards_say():
    """Nemotron-Nano v2: parameters of the checkpoints on the hub, and what a sequence keeps: by tokens, and whatever its length."""
    for name, layers, count, attending in (("9b", 56, 8_888_227_328, 4), ("12b", 62, 12_310_001_152, 6)):
        structure = STRUCTURES[f"nemotron-nano-{name}-v2"]
        states = [sub_block.state() for _, _, sub_block in structure]
        assert (structure.num_layers, structure.num_parameters) == (layers, count)
        assert sum(state.per_token for state in states) == attending * 2 * 8 * 128
        each = 128 * 80 * 128 * 4 + 3 * (128 * 80 + 2 * 8 * 128) * 2
        assert sum(state.fixed_bytes("bf16") for state in states) == (layers - attending) // 2 * each + each * (
            name == "9b"
        )
