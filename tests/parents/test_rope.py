"""RoPE of every kind against transformers' own functions, to the bit."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from puzzle.base.errors import UserError
from puzzle.parents.rope import KINDS, Rope

MAX_LENGTH = 512
LENGTHS = (1, 63, 64, 65, 200, MAX_LENGTH)
ORIGINAL = {"original_max_position_embeddings": 64}
FACTORS = {"short_factor": [1.0, 1.25, 1.5, 2.0], "long_factor": [1.5, 3.0, 7.5, 12.0]}
PARAMETERS = {  # beside rope_theta
    "default": [{}],
    "linear": [{"factor": 4.0}, {"factor": 2.5}],
    "dynamic": [{"factor": 2.0}, {"factor": 8.0}],
    "yarn": [
        {"factor": 8.0, **ORIGINAL},
        {"factor": 4.0, "beta_fast": 20.0, "beta_slow": 2.0, "original_max_position_embeddings": 128},
        {"factor": 8.0, "attention_factor": 1.3, **ORIGINAL},
        {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7, **ORIGINAL},
        {"factor": 8.0, "truncate": False, **ORIGINAL},
    ],
    "longrope": [{**FACTORS, **ORIGINAL}, {**FACTORS, **ORIGINAL, "attention_factor": 1.2}],
    "llama3": [
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
        {"factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 9.0, "original_max_position_embeddings": 200},
    ],
}
CASES = [(kind, values) for kind, every in PARAMETERS.items() for values in every]


def pair(kind: str, values: dict, theta: float, share: float):
    """(transformers' module, its config, ours) of one RoPE. share: of a head's dimensions that turn, which are eight."""
    parameters = {"rope_type": kind, "rope_theta": theta, **values}
    dim, module, config_class = round(8 / share), LlamaRotaryEmbedding, LlamaConfig
    if share != 1:
        parameters["partial_rotary_factor"] = share
        if kind == "default":  # Llama turns whole heads
            module, config_class = Phi3RotaryEmbedding, Phi3Config
    sizes = {"hidden_size": 2 * dim, "num_attention_heads": 2, "head_dim": dim, "pad_token_id": 0}
    config = config_class(rope_parameters=parameters, max_position_embeddings=MAX_LENGTH, **sizes)
    ours = Rope(head_dim=dim, max_length=MAX_LENGTH, parameters=config.rope_parameters)
    return module(config), config, ours


def test_every_kind_has_parameters_here():
    assert set(PARAMETERS) == set(KINDS)
    assert set(KINDS) - {"default"} <= set(ROPE_INIT_FUNCTIONS)


@pytest.mark.parametrize("theta", [100.0, 10000.0, 500000.0])
@pytest.mark.parametrize("share", [1, 0.5, 0.4])
def test_frequencies_and_tables_are_transformers(theta, share):
    for kind, values in CASES:
        theirs, config, ours = pair(kind, values, theta, share)
        assert ours.rotary_dim == 8
        for length in LENGTHS:
            inv_freq, scaling = ours.frequencies(length)
            if kind == "default":
                wanted, factor = theirs.compute_default_rope_parameters(config)
            else:
                wanted, factor = ROPE_INIT_FUNCTIONS[kind](config, seq_len=length)
            assert inv_freq.dtype == torch.float32
            assert torch.equal(inv_freq, wanted), (kind, values, length)
            assert scaling == factor, (kind, values, length)
            cos, sin = theirs(torch.zeros(1), torch.arange(length)[None])
            for mine, table in zip(ours.tables(length), (cos, sin), strict=True):
                assert torch.equal(mine, table[0]), (kind, values, length)


def test_more_positions_of_the_same_sequence():
    """`tables_of`: as many rows as pages want, at the frequencies of the length that is served."""
    parameters = {"rope_type": "longrope", "rope_theta": 100.0, **FACTORS, **ORIGINAL}
    rope = Rope(head_dim=8, max_length=MAX_LENGTH, parameters=parameters)
    for length in (50, 64, 65):
        for whole, part in zip(rope.tables_of(128, length, "cpu"), rope.tables(length), strict=True):
            assert whole.shape == (128, 8)
            assert torch.equal(whole[:length], part)


def test_dynamic_keeps_to_its_trained_length():
    rope = Rope(head_dim=8, max_length=64, parameters={"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0})
    plain = Rope(head_dim=8, max_length=64, parameters={"rope_theta": 100.0})
    assert all(torch.equal(a, b) for a, b in zip(rope.tables(64), plain.tables(64), strict=True))
    assert rope.switches_at is None
    for ask in (rope.frequencies, rope.tables):
        with pytest.raises(UserError, match=r"dynamic RoPE beyond 64 tokens \(65 asked for\)"):
            ask(65)


def test_longrope_switches_at_its_original_length():
    parameters = {"rope_type": "longrope", "rope_theta": 100.0, **FACTORS, **ORIGINAL}
    rope = Rope(head_dim=8, max_length=MAX_LENGTH, parameters=parameters)
    base = 100.0 ** (torch.arange(0, 8, 2).float() / 8)
    for length, factors in ((64, FACTORS["short_factor"]), (65, FACTORS["long_factor"])):
        inv_freq, scaling = rope.frequencies(length)
        torch.testing.assert_close(inv_freq, 1 / (torch.tensor(factors) * base))
        assert scaling == pytest.approx(math.sqrt(1 + math.log(MAX_LENGTH / 64) / math.log(64)))
    assert rope.switches_at == 64
    short = Rope(head_dim=8, max_length=64, parameters=parameters)
    assert short.switches_at is None, "it never serves a sequence that long"


def test_json_round_trip():
    for kind, values in CASES:
        parameters = {"rope_type": kind, "rope_theta": 100.0, **values}
        rope = Rope(head_dim=8, max_length=MAX_LENGTH, parameters=parameters)
        assert Rope(**json.loads(json.dumps(rope.to_json()))) == rope


@pytest.mark.parametrize(
    ("parameters", "wanted"),
    [
        ({"rope_type": "dynamix", "rope_theta": 1.0}, "'dynamix' is not supported: did you mean 'dynamic'?"),
        ({"type": "su", "rope_theta": 1.0}, "'su' is not supported: known: default, linear"),
        ({"rope_theta": 1.0, "factor": 2.0}, "'default' has the parameter 'factor', which is not understood"),
        ({"rope_type": "linear", "rope_theta": 1.0, "factr": 2.0}, "the parameter 'factr', which is not understood"),
        ({"rope_type": "linear", "factor": 2.0}, "'linear' has no rope_theta"),
        ({"rope_type": "longrope", "rope_theta": 1.0, "short_mscale": 1.1}, "short_mscale or long_mscale"),
    ],
)
def test_what_is_not_understood_is_refused(parameters, wanted):
    with pytest.raises(UserError, match=wanted.replace("?", r"\?")):
        Rope(head_dim=8, max_length=64, parameters=parameters)
