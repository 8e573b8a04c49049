"""Hybrid children in blocks of one mixer: plain Nemotron-H where blocks are alike, nemotron_h_puzzle where they are not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, NemotronHForCausalLM

from puzzle.base.errors import UserError
from puzzle.blocklib.none import NoOp
from puzzle.export.child import Child, with_dtype
from puzzle.export.engines import HYBRIDS
from puzzle.export.sources import child_of_checkpoint
from puzzle.export.write import Source, export
from puzzle.parents.opened import open_model
from puzzle.runtime.model import load_model
from puzzle.serving.check import mixed_kv_heads
from puzzle.serving.reference import find_export
from tiny_parents import write_tiny_parent

IDS = torch.randint(2, 384, (2, 31), generator=torch.Generator().manual_seed(0))
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 1, "max_new_tokens": 9}


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory) -> Path:
    """Blocks M-*M-M: what mixes tokens in layers 0, 2, 3 and 5, FFNs in 1 and 4."""
    return write_tiny_parent("nemotron_h", tmp_path_factory.mktemp("hybrid"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Path:
    """Blocks ME*EM, five experts of which a token has three."""
    return write_tiny_parent("nemotron_h with experts", tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def latent(tmp_path_factory) -> Path:
    """Blocks ME*E, whose experts work on 20 channels."""
    return write_tiny_parent("nemotron_h with latent experts", tmp_path_factory.mktemp("latent"))


def changed(parent: Path, *changes: tuple[int, str, dict | None]) -> Child:
    """A child whose sub-blocks have other sizes, and the first rows and columns of the parent's weights; None: gone."""
    child = child_of_checkpoint(parent)
    layers = list(child.layers)
    for index, slot, sizes in changes:
        if sizes is None:
            layers[index] = layers[index].put(slot, NoOp())
            continue
        made, own = replace(layers[index].slots[slot], **sizes), layers[index].read(slot)
        cut = {n: own[n][tuple(map(slice, shape))].contiguous() for n, shape in made.tensors().items()}
        layers[index] = layers[index].put(slot, made, lambda cut=cut: dict(cut))
    return replace(child, layers=tuple(layers))


def written(child: Child, out: Path, format: str, **options) -> Path:
    return export(Source(child=child, solved=None, facts=None, measured=None), out, format=format, **options).out


def logits(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return load_model(directory)(ids)


ALIKE = {
    "as it is": (),
    "blocks gone": ((0, "attention", None), (4, "ffn", None)),
    "no attention": ((2, "attention", None),),
    "narrower, all of them": ((1, "ffn", {"intermediate_size": 16}), (4, "ffn", {"intermediate_size": 16})),
    "fewer heads, all of them": tuple((i, "attention", {"num_heads": 3}) for i in (0, 3, 5)),
    "fewer KV heads": ((2, "attention", {"num_key_value_heads": 1}),),
}
FEWER = {"num_experts": 4, "num_experts_per_tok": 1}
EXPERTS = {
    "experts as they are": (),
    "fewer experts, all of them": ((1, "ffn", FEWER), (3, "ffn", FEWER)),
    "experts in one block": ((1, "ffn", FEWER), (3, "ffn", None)),
    "experts that differ": (
        (1, "ffn", FEWER),
        (3, "ffn", {"moe_intermediate_size": 12, "shared_intermediate_size": 11}),
    ),
}
LATENT = {
    "latent experts": (),
    "latent experts, fewer of them": ((1, "ffn", FEWER), (3, "ffn", FEWER)),
    "latent experts that differ": EXPERTS["experts that differ"],
    "latent sizes that differ": ((1, "ffn", {"latent_size": 7}),),
}
UNLIKE = {
    "widths": ((1, "ffn", {"intermediate_size": 16}),),
    "a window": ((2, "attention", {"window": 7}), (4, "ffn", None)),
}


@pytest.mark.parametrize("what", [*ALIKE, *UNLIKE, *EXPERTS, *LATENT])
@pytest.mark.parametrize("format", HYBRIDS)
def test_transformers_reads_what_was_meant(format, what, hybrid, experts, latent, tmp_path):
    """The same logits and text as `--format hf`, whose blocks stand in layers; plain by transformers' own class."""
    changes = (ALIKE | UNLIKE | EXPERTS | LATENT)[what]
    child = changed(latent if what in LATENT else experts if what in EXPERTS else hybrid, *changes)
    meant = written(child, tmp_path / "hf", "hf")
    if format == "nemotron-h" and (what in UNLIKE or what.endswith("that differ")):
        return
    found = written(child, tmp_path / "out", format)
    ids = torch.randint(2, 384, (2, 31), generator=torch.Generator().manual_seed(0))
    wanted = logits(meant, ids)
    room = 2e-6 if what in LATENT else 0  # rows of 20 numbers begin at other addresses in other files
    torch.testing.assert_close(logits(found, ids), wanted, rtol=0, atol=room)
    model = AutoModelForCausalLM.from_pretrained(found, trust_remote_code=format != "nemotron-h", dtype=torch.float32)
    if format == "nemotron-h":
        assert isinstance(model, NemotronHForCausalLM)
        ids, wanted = ids[:, :8], wanted[:, :8]  # one chunk: transformers 5.14 is wrong beyond
    with torch.no_grad():
        assert (model(ids, use_cache=False).logits - wanted).abs().max() <= 1e-4
    if format != "nemotron-h":
        ours = AutoModelForCausalLM.from_pretrained(meant, trust_remote_code=True, dtype=torch.float32)
        text = ours.generate(ids, **GREEDY)
        assert torch.equal(model.generate(ids, **GREEDY), text)
        assert torch.equal(model.generate(ids, use_cache=False, **GREEDY), text)
        model.save_pretrained(tmp_path / "again")
        torch.testing.assert_close(logits(tmp_path / "again", ids), wanted, rtol=0, atol=room)
    config = json.loads((found / "config.json").read_text())
    assert (
        config["num_hidden_layers"] == len(config["hybrid_override_pattern"]) == open_model(found).structure.num_layers
    )


def test_packed_sequences_are_refused(hybrid, tmp_path):
    """Mamba-2's state would go from one to the next."""
    out = written(changed(hybrid, *ALIKE["no attention"]), tmp_path / "out", "hf")
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    ids, positions = torch.full((1, 6), 7), torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(ValueError, match="a recurrent layer would carry its state"):
        model(ids, position_ids=positions)
    assert model(ids, position_ids=torch.arange(6)[None]).logits.shape[1] == 6


@torch.no_grad()
def test_kv_heads_that_differ_are_repeated_for_engines_that_mix_them_up(tmp_path):
    """vLLM before 0.29 plans FlashAttention 3 with one number for all layers; SGLang reads none of a block's own."""
    sizes = {"hybrid_override_pattern": "M*-*", "num_hidden_layers": 4}
    child = changed(
        write_tiny_parent("nemotron_h", tmp_path / "parent", **sizes), (1, "attention", {"num_key_value_heads": 1})
    )
    meant = logits(written(child, tmp_path / "hf", "hf"), IDS)
    for engine, heads in (("vllm", [1, 2]), ("vllm==0.26", [2, 2]), ("sglang", [2, 2])):
        out = written(child, tmp_path / engine, "nemotron-h-puzzle", engine=engine)
        assert (logits(out, IDS) - meant).abs().max() <= 1e-5
        export = find_export(out)
        assert list(export.kv_heads) == heads
        detected = mixed_kv_heads(export, "vllm", "vllm 0.26.0")
        assert (detected is not None) is (engine == "vllm")
        assert mixed_kv_heads(export, "vllm", "vllm 0.29.0") is None


def test_entries_of_blocks(hybrid, tmp_path):
    out = written(changed(hybrid, *UNLIKE["widths"], *UNLIKE["a window"][:1]), tmp_path / "out", "nemotron-h-puzzle")
    config = json.loads((out / "config.json").read_text())
    assert config["hybrid_override_pattern"] == "M-*M-M"
    assert config["block_configs"] == [
        {"block_type": "mamba"},
        {"block_type": "mlp", "intermediate_size": 16},
        {
            "block_type": "attention",
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 10,
            "sliding_window": 7,
        },
        {"block_type": "mamba"},
        {"block_type": "mlp", "intermediate_size": 52},
        {"block_type": "mamba"},
    ]
    assert not {"intermediate_size", "sliding_window"} & set(config)  # what entries say
    (out / "config.json").write_text(
        json.dumps(config | {"block_configs": [*config["block_configs"][:5], {"block_type": "mlp"}]})
    )
    with pytest.raises(
        UserError, match=r"block_configs\[5\] in config.json is 'mlp', and hybrid_override_pattern says"
    ):
        open_model(out)


def test_entries_of_experts(experts, tmp_path):
    """What they say is in no global value; the numbers of another block are its own."""
    out = written(changed(experts, *EXPERTS["experts that differ"]), tmp_path / "out", "nemotron-h-puzzle")
    config = json.loads((out / "config.json").read_text())
    shared = {
        "routed_scaling_factor": 2.5,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "moe_latent_size": None,
    }
    sizes = ({"n_routed_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 20, "moe_shared_expert_intermediate_size": 28},
             {"n_routed_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "moe_shared_expert_intermediate_size": 11})  # fmt: skip
    assert config["hybrid_override_pattern"] == "ME*EM"
    assert [config["block_configs"][n] for n in (1, 3)] == [{"block_type": "moe"} | own | shared for own in sizes]
    assert not set(config["block_configs"][1]) & set(config)
    assert "vLLM, of which 0.32 was read:" in (out / "README.md").read_text()  # and not run
    names = {name.partition(".mixer.")[2] for name in load_file(out / "model.safetensors") if ".layers.1." in name}
    assert {"gate.e_score_correction_bias", "experts.3.up_proj.weight", "shared_experts.down_proj.weight"} <= names


def test_a_correction_bias_is_never_rounded(experts, tmp_path):
    """In bf16 the router adds the parent's own bias, in our runtime and in transformers, after every format."""
    meant = load_file(experts / "model.safetensors")["backbone.layers.1.mixer.gate.e_score_correction_bias"]
    assert not torch.equal(meant, meant.bfloat16().float())
    for format in ("hf", *HYBRIDS):
        out = written(with_dtype(changed(experts), torch.bfloat16), tmp_path / format, format)
        ours = dict(load_model(out, dtype=torch.bfloat16).named_parameters())
        assert ("through puzzle's plug-in" in (out / "README.md").read_text()) is (format == "hf")
        theirs = AutoModelForCausalLM.from_pretrained(
            out, trust_remote_code=format != "nemotron-h", dtype=torch.bfloat16
        )
        for named in (ours, {**dict(theirs.named_parameters()), **dict(theirs.named_buffers())}):
            (bias,) = (t for n, t in named.items() if "s.1." in n and n.endswith("e_score_correction_bias"))
            assert torch.equal(bias, meant), format
        assert {t.dtype for n, t in ours.items() if "bias" not in n} == {torch.bfloat16}


REFUSED = {
    "experts": ("nemotron-h", EXPERTS["experts that differ"], {}, "layer 3 ffn: num_experts is 5, and 4 in layer 1 ffn; `format` nemotron-h has "
                "one for all blocks of kind 'moe': write `format` hf, which transformers reads, or `format` nemotron-h-puzzle"),
    "experts, one a token, for mlx": ("nemotron-h", EXPERTS["fewer experts, all of them"], {"engine": "mlx==0.32.2"},
                                      "layer 1 ffn: mlx does not divide the weight of a token's only expert by itself: write `format` hf"),
    "FFN widths": ("nemotron-h", UNLIKE["widths"], {}, "layer 4 ffn: intermediate_size is 52, and 16 in layer 1 ffn; `format` nemotron-h has one "
                   "for all blocks of kind 'relu2': write `format` hf, which transformers reads, or `format` nemotron-h-puzzle"),
    "a window": ("nemotron-h", UNLIKE["a window"], {}, "layer 2 attention: `format` nemotron-h has no windows (this one's is 7)"),
    "heads of Mamba-2": ("nemotron-h-puzzle", ((3, "attention", {"num_heads": 3}),), {}, "layer 3 attention: num_heads is 3, and 6 in layer 0 "
                         "attention; `format` nemotron-h-puzzle has one for all blocks of kind 'mamba2': write `format` hf"),
    "a window for an engine that passes over it": ("nemotron-h-puzzle", UNLIKE["a window"], {"engine": "sglang"},
                                                   "layer 2 attention: sglang passes over what an attention has of its own (window 7)"),
    "nothing left": ("nemotron-h", tuple((i, slot, None) for i in range(6) for slot in ("attention", "ffn")), {}, "no sub-block that does anything"),
    "for nemotron-nas": ("nemotron-nas", (), {}, "layer 0 attention: a reader of nemotron-nas has no sub-blocks of kind 'mamba2': write "
                         "`format` nemotron-h or nemotron-h-puzzle, or `format` hf"),
    "in fp8": ("nemotron-h", (), {"dtype": "fp8"}, "`dtype` fp8 with `format` nemotron-h: "),
    "hf in fp8": ("hf", (), {"dtype": "fp8"}, "layer 0 attention: sub-blocks of kind 'mamba2' have no form in fp8"),
    "a cache in fp8": ("nemotron-h-puzzle", (), {"kv_dtype": "fp8"}, "`kv_dtype` fp8: `format` nemotron-h-puzzle has no scales of a cache"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_name_what_is_not_alike(what, hybrid, experts, tmp_path):
    format, changes, options, message = REFUSED[what]
    with pytest.raises(UserError) as refused:
        written(
            changed(experts if what.startswith("experts") else hybrid, *changes), tmp_path / "out", format, **options
        )
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_llama_is_no_hybrid(parent, puzzle, one_line_error, tmp_path):
    done = puzzle("export", parent, "--format", "nemotron-h", "--out", tmp_path / "out")
    one_line_error(done, "layer 0 attention: Nemotron-H has no attention with rotary positions")
