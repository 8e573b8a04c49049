"""Generation of exported children, whatever the transformers: with a cache, without, padded on the left, and with beams.

The truth is the plain forward of whole sequences, which knows no cache: test_modeling.py and test_matrix.py compare that
with other implementations.
"""

import inspect

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from puzzle.export.configuration_decilm import DeciLMConfig
from puzzle.export.modeling_decilm import DeciLMForCausalLM
from puzzle.export.modeling_puzzle import CACHE_NAME, CACHE_NAMES, PuzzleConfig, PuzzleForCausalLM

SHARED = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# A layer is (attention, FFN): KV heads with "w" behind them for a window, or a width; "-" is nothing, "linear" a matrix, "m" Mamba-2, "g" and "G" Gated
# DeltaNet.
LAYOUTS = {
    "plain": (("4", 80), ("4", 80)),
    "kv heads and widths": (("1", 80), ("4", 24), ("2", 80)),
    "no attention in layer 0": (("-", 80), ("2", 80), ("4", 24)),
    "no attention in the middle": (("4", 80), ("-", 80), ("-", 24), ("1", 80)),
    "no attention at the end": (("2", 80), ("4", 80), ("-", 80)),
    "no attention at all": (("-", 80), ("linear", 80), ("-", "-")),
    "linear": (("linear", 80), ("4", "linear"), ("linear", "linear"), ("2", 80), ("-", "linear")),
    "windows": (("4", 80), ("2w", 80), ("1w", 24)),
    "windows in all": (("4w", 80), ("2w", 80)),
    "mamba": (("m", 80), ("4", "-"), ("m", "linear"), ("2w", 80)),
    "mamba alone": (("-", 80), ("m", "-"), ("m", "-"), ("-", "relu2")),
    "delta": (("g", 80), ("4", "-"), ("G", "linear"), ("2w", 80)),
    "delta alone and beside mamba": (("-", 80), ("g", "-"), ("m", "-"), ("-", "relu2")),
    "window after nothing": (("-", "-"), ("linear", 80), ("2w", 80), ("-", "linear"), ("4", 80)),
}
WINDOW, NUM_NEW = 6, 16
MAMBA = {
    "num_heads": 6,
    "head_dim": 5,
    "num_groups": 3,
    "state_size": 7,
    "conv_width": 3,
    "chunk_size": 4,
    "bias": True,
}
DELTA = {"num_key_heads": 2, "key_dim": 5, "num_value_heads": 6, "value_dim": 7, "conv_width": 3, "chunk_size": 4}
RECURRENT = {"m": ("mamba", MAMBA), "g": ("gated_delta", DELTA), "G": ("gated_delta", DELTA | {"gate": False})}
OPTIONS = {"do_sample": False, "max_new_tokens": NUM_NEW, "min_new_tokens": NUM_NEW}


def puzzle_model(layout: str) -> PuzzleForCausalLM:
    layers = {}
    for index, (attention, ffn) in enumerate(LAYOUTS[layout]):
        entry: dict = {"skip": [], "linear": []}
        for owner, part in (("attention", attention), ("mlp", ffn)):
            if part in ("-", "linear"):
                entry["skip" if part == "-" else "linear"].append(owner)
        if attention in RECURRENT:
            word, sizes = RECURRENT[attention]
            entry[word] = sizes
        if attention[0].isdigit():
            entry["num_key_value_heads"] = int(attention[0])
            entry |= {"sliding_window": WINDOW} if attention.endswith("w") else {}
        if isinstance(ffn, int):
            entry["intermediate_size"] = ffn
        layers[str(index)] = {key: value for key, value in entry.items() if value != []}
    act = {"hidden_act": "relu2"} if any(ffn == "relu2" for _, ffn in LAYOUTS[layout]) else {}
    return PuzzleForCausalLM(PuzzleConfig(**SHARED, **act, num_hidden_layers=len(layers), per_layer_config=layers))


def decilm_model(layout: str) -> DeciLMForCausalLM:
    blocks, types = [], []
    for attention, ffn in LAYOUTS[layout]:
        kv_heads = int(attention[0]) if attention[0].isdigit() else None
        attention_entry = {"no_op": attention == "-", "replace_with_linear": attention == "linear"}
        ffn_entry = {"no_op": ffn == "-", "replace_with_linear": ffn == "linear"}
        blocks.append(
            {
                "attention": {
                    **attention_entry,
                    "n_heads_in_group": kv_heads and SHARED["num_attention_heads"] // kv_heads,
                },
                "ffn": {**ffn_entry, "intermediate_size": ffn if isinstance(ffn, int) else None},
            }
        )
        types.append("sliding_attention" if attention.endswith("w") else "full_attention")
    windows = {"layer_types": types, "sliding_window": WINDOW} if "sliding_attention" in types else {}
    return DeciLMForCausalLM(DeciLMConfig(**SHARED, block_configs=blocks, **windows))


FORMATS = {"hf": puzzle_model, "nemotron-nas": decilm_model}


@pytest.fixture(params=LAYOUTS)
def layout(request) -> str:
    return request.param


@pytest.fixture(params=FORMATS)
def model(request, layout) -> nn.Module:
    """Random weights, large enough for greedy text to vary."""
    if request.param == "nemotron-nas" and layout.startswith(("mamba", "delta")):
        pytest.skip("the format has no words for kinds with a recurrent state")
    made = FORMATS[request.param](layout)
    generator = torch.Generator().manual_seed(0)
    for name, weight in made.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data = 1 + 0.2 * noise if "norm" in name else 0.2 * noise - 2 * name.endswith("dt_bias")
    return made.eval()


def tokens(length: int) -> Tensor:
    """[1, length], without the padding token 0"""
    return torch.randint(1, SHARED["vocab_size"], (1, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def plain_scores(model: nn.Module, ids: Tensor) -> Tensor:
    """Log-probabilities of the next token, from a forward of the whole sequences. [B, T] -> [B, V]"""
    out = model(ids, use_cache=False)
    assert getattr(out, CACHE_NAME) is None
    return out.logits[:, -1].log_softmax(-1)


def plain_greedy(model: nn.Module, ids: Tensor, num_new: int = NUM_NEW) -> Tensor:
    """[1, T] -> [1, T + num_new]"""
    for _ in range(num_new):
        ids = torch.cat((ids, plain_scores(model, ids).argmax(-1, keepdim=True)), dim=1)
    return ids


def plain_beams(model: nn.Module, ids: Tensor, num_beams: int, num_new: int) -> Tensor:
    """The likeliest of `num_beams` sequences that each step keeps. [1, T] -> [1, T + num_new]"""
    totals = torch.zeros(1)
    for _ in range(num_new):
        scores = totals[:, None] + plain_scores(model, ids)
        totals, best = scores.flatten().topk(num_beams)
        parents, added = best // scores.shape[1], best % scores.shape[1]
        ids = torch.cat((ids[parents], added[:, None]), dim=1)
    return ids[:1]


def padded(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """One batch and its mask, padded on the left with 0."""
    longest = max(prompt.shape[1] for prompt in prompts)
    ids = torch.cat([nn.functional.pad(prompt, (longest - prompt.shape[1], 0)) for prompt in prompts])
    return ids, (ids != 0).long()


def test_greedy(model):
    """With a cache, without, and in a batch that is padded on the left: token for token what the plain forward says."""
    prompts = [tokens(length) for length in (3, 13, 8)]
    wanted = [plain_greedy(model, prompt)[0, prompt.shape[1] :] for prompt in prompts]
    assert len(set(torch.cat(wanted).tolist())) > 6  # the text varies, so that the comparison means something
    ids, mask = padded(prompts)
    for use_cache in (True, False):
        for prompt, want in zip(prompts, wanted, strict=True):
            alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=use_cache, **OPTIONS)
            assert torch.equal(alone[0, prompt.shape[1] :], want)
        batch = model.generate(ids, attention_mask=mask, use_cache=use_cache, **OPTIONS)
        for row, want in zip(batch, wanted, strict=True):
            assert torch.equal(row[ids.shape[1] :], want)


def test_beams(model):
    prompts, options = [tokens(5), tokens(9)], {**OPTIONS, "max_new_tokens": 12, "min_new_tokens": 12, "num_beams": 3}
    wanted = [plain_beams(model, prompt, 3, 12)[0, prompt.shape[1] :] for prompt in prompts]
    ids, mask = padded(prompts)
    for use_cache in (True, False):
        batch = model.generate(ids, attention_mask=mask, use_cache=use_cache, **options)
        for row, want in zip(batch, wanted, strict=True):
            assert torch.equal(row[ids.shape[1] :], want)


def test_from_a_returned_cache_in_chunks_and_by_lookup(model):
    ids = tokens(9)
    wanted = plain_greedy(model, ids)
    start = model.generate(ids, do_sample=False, max_new_tokens=10, return_dict_in_generate=True)
    again = {CACHE_NAME: getattr(start, CACHE_NAME), "attention_mask": torch.ones_like(start.sequences)}
    rest = model.generate(start.sequences, do_sample=False, max_new_tokens=NUM_NEW - 10, **again)
    assert torch.equal(rest, wanted)
    assert torch.equal(model.generate(ids, prefill_chunk_size=4, **OPTIONS), wanted)
    if model._is_stateful:
        with pytest.raises(ValueError, match="stateful"):
            model.generate(ids, prompt_lookup_num_tokens=3, **OPTIONS)
        return
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **OPTIONS), wanted)


def test_both_names_of_the_cache(model):
    """A forward takes the cache by either name, and the fourth argument; two at once are refused."""
    ids = tokens(12)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        for name in CACHE_NAMES:
            cache, steps = DynamicCache(), []
            for part in ids.split([7, 1, 3, 1], dim=1):
                steps.append(model(part, **{name: cache}).logits)
            assert torch.allclose(torch.cat(steps, dim=1), whole, rtol=0, atol=1e-4)
        first = model(ids[:, :7])
        assert torch.allclose(model(ids[:, 7:], None, None, getattr(first, CACHE_NAME)).logits, whole[:, 7:], atol=1e-4)
    with pytest.raises(ValueError, match="two names of one thing"):
        model(ids, cache=DynamicCache(), past_key_values=DynamicCache())


@pytest.mark.parametrize("layout", ["plain"], indirect=True)
def test_an_unknown_keyword_is_refused_by_its_name(model):
    ids = tokens(4)
    for forward in (model, model.get_decoder()):
        assert not [p for p in inspect.signature(forward.forward).parameters.values() if p.kind is p.VAR_KEYWORD]
        with pytest.raises(TypeError, match="'past_states'"):
            forward(ids, past_states=DynamicCache())
    with pytest.raises(ValueError, match="past_states"):
        model.generate(ids, past_states=DynamicCache(), max_new_tokens=2)
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions"):
        model.generate(ids, output_attentions=True, max_new_tokens=2)


@pytest.mark.parametrize("layout", ["window after nothing"], indirect=True)
def test_what_transformers_and_its_trainers_pass(model):
    ids = tokens(11).repeat(2, 1)
    ids[1, :3] = 5
    labels = ids.masked_fill(ids == 5, -100)
    out = model(ids, labels=labels, output_attentions=None, output_hidden_states=None, return_dict=None, use_cache=None)
    count = int((labels[:, 1:] != -100).sum())
    summed = model(ids, labels=labels, num_items_in_batch=torch.tensor(2 * count)).loss
    assert torch.allclose(summed, out.loss / 2)  # as one of two micro-batches of the same size
    assert model.accepts_loss_kwargs
    loss, logits = model(ids, labels=labels, use_cache=False, return_dict=False)
    assert torch.equal(loss, out.loss)
    assert torch.equal(logits, out.logits)
    out = model.generate(ids, output_hidden_states=True, output_logits=True, return_dict_in_generate=True, **OPTIONS)
    assert len(out.hidden_states) == len(out.logits) == NUM_NEW
    assert len(out.hidden_states[0]) == len(model.model.layers) + 1
    embedded = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **OPTIONS)
    assert torch.equal(embedded, out.sequences[:, ids.shape[1] :])
    assert set(CACHE_NAMES) <= set(type(model.config).keys_to_ignore_at_inference)  # Trainer gathers all but these


@pytest.mark.parametrize("layout", ["window after nothing"], indirect=True)
def test_gradient_checkpointing_fills_no_cache(model):
    """Layers run again in the backward pass, where a cache would have every key twice."""
    ids = tokens(14)
    model.train()(ids, labels=ids).loss.backward()
    plain = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    out = model(ids, labels=ids, use_cache=True)
    assert getattr(out, CACHE_NAME) is None
    out.loss.backward()
    assert all(torch.allclose(weight.grad, plain[name], atol=1e-6) for name, weight in model.named_parameters())
    with pytest.raises(ValueError, match="fill the cache twice"):
        model(ids, past_key_values=DynamicCache())
    wanted = plain_greedy(model.eval(), ids)
    assert torch.equal(
        model.train().generate(ids, **OPTIONS), wanted
    )  # without gradients there is nothing to run again
