"""`--format gguf` of hybrids: what llama.cpp's loader wants, exact rewrites, and what it cannot say."""

from dataclasses import replace

import pytest
import torch

from puzzle.base.errors import UserError
from puzzle.blocklib.none import NO_OP
from puzzle.export.gguf import export_gguf
from puzzle.export.lower import lower, lowered
from puzzle.export.write import Source, export
from puzzle.runtime.model import load_model
from puzzle.serving.reference import find_export, load_reference, read_gguf
from tiny_children import GATELESS, MAMBA, PLAIN_HEADS, SQUARED, VOCAB, Tiny, build, tiny_child
from tiny_parents import write_tiny_parent

IDS = torch.randint(2, VOCAB, (1, 33), generator=torch.Generator().manual_seed(0))
HEADS = [replace(PLAIN_HEADS, num_attention_heads=q, num_key_value_heads=kv) for q, kv in ((8, 4), (4, 1))]
ODD = replace(MAMBA, num_heads=6, head_dim=5, num_groups=3, state_size=7, conv_width=3, conv_bias=False)
GROUPS = replace(GATELESS, num_groups=2)
LATENT = replace(GATELESS, latent_size=72)


def mixed(*layers, experts=False, **sizes):
    base = (PLAIN_HEADS, replace(GATELESS if experts else SQUARED, **sizes))
    return Tiny(base=base, layers=tuple((a or NO_OP, f or NO_OP) for a, f in layers))


CHILDREN = {
    "heads by block": mixed((MAMBA, None), (HEADS[0], SQUARED), (HEADS[1], replace(SQUARED, intermediate_size=77))),
    "odd sizes, biases": mixed((ODD, replace(SQUARED, bias=True, intermediate_size=51)), (PLAIN_HEADS, None), (None, None), bias=True),
    "no attention": mixed((MAMBA, None), (None, SQUARED)),
    "no Mamba-2": mixed((PLAIN_HEADS, SQUARED), (PLAIN_HEADS, None)),
    "FFNs alone": mixed((None, SQUARED)),
    "groups of experts": mixed((MAMBA, GROUPS), (PLAIN_HEADS, replace(GROUPS, num_experts=4, moe_intermediate_size=33)), experts=True, num_groups=2),
    "latent experts": mixed((MAMBA, LATENT), (PLAIN_HEADS, replace(LATENT, num_experts=5, moe_intermediate_size=33)), experts=True, latent_size=72),
    "groups that are all looked at": mixed((MAMBA, replace(GROUPS, num_topk_groups=2)), (PLAIN_HEADS, None), experts=True, num_groups=2, num_topk_groups=2),
}  # fmt: skip
LOWERED = {
    "nemotron-h, dense": [],
    "nemotron-h, one mixture": [],
    "nemotron-h, experts": ["equal-experts", "equal-shared-experts"],
    "heads by block": [],
    "odd sizes, biases": ["zero-conv-bias"],
    "no attention": ["some-attention"],
    "no Mamba-2": ["some-mamba"],
    "FFNs alone": ["some-attention", "some-mamba"],
    "groups of experts": ["equal-experts"],
    "latent experts": ["equal-experts"],
    "groups that are all looked at": [],
}


def loader_wants(v: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes, as llama.cpp's src/models/nemotron-h.cpp makes them of a file's metadata (that of 0.3.36's copy)."""
    v = {key.partition(".")[2]: value for key, value in v.items()}
    count, hidden, dim = v["block_count"], v["embedding_length"], v["attention.key_length"]

    def of(key, index, default=0):
        return v[key][index] if isinstance(v.get(key), list) else v.get(key, default)

    inner, groups, state = v["ssm.inner_size"], v["ssm.group_count"], v["ssm.state_size"]
    heads, convolved = v["ssm.time_step_rank"], inner + 2 * groups * state
    found = {"token_embd.weight": (VOCAB, hidden), "output_norm.weight": (hidden,), "output.weight": (VOCAB, hidden)}
    for i in range(count):
        kv, width = of("attention.head_count_kv", i), of("feed_forward_length", i)
        q, experts, own = of("attention.head_count", i) * dim, v.get("expert_count", 0), {"attn_norm.weight": (hidden,)}
        if not kv and not width:
            own |= {"ssm_in.weight": (inner + convolved + heads, hidden), "ssm_out.weight": (hidden, inner)}
            own |= {"ssm_conv1d.weight": (convolved, v["ssm.conv_kernel"]), "ssm_conv1d.bias": (convolved,)}
            own |= {"ssm_dt.bias": (heads,), "ssm_a": (heads, 1), "ssm_d": (heads, 1)}
            own |= {"ssm_norm.weight": (groups, inner // groups)}
        elif not width:
            own |= {"attn_q.weight": (q, hidden), "attn_output.weight": (hidden, q)}
            own |= dict.fromkeys(("attn_k.weight", "attn_v.weight"), (kv * dim, hidden))
        elif experts:
            width, shared = of("expert_feed_forward_length", i), v["expert_shared_feed_forward_length"]
            own |= {"ffn_gate_inp.weight": (experts, hidden), "exp_probs_b.bias": (experts,)}
            outer = v.get("moe_latent_size", hidden)
            own |= {"ffn_up_exps.weight": (experts, width, outer), "ffn_down_exps.weight": (experts, outer, width)}
            if outer != hidden:
                own |= {"ffn_latent_down.weight": (outer, hidden), "ffn_latent_up.weight": (hidden, outer)}
            own |= {"ffn_up_shexp.weight": (shared, hidden), "ffn_down_shexp.weight": (hidden, shared)}
        else:
            own |= {"ffn_up.weight": (width, hidden), "ffn_down.weight": (hidden, width)}
        found |= {f"blk.{i}.{name}": shape for name, shape in own.items()}
    return found


@pytest.mark.parametrize("which", LOWERED)
def test_what_the_loader_wants_and_the_childs_own_logits(which, tmp_path):
    child = build(which, CHILDREN[which]) if which in CHILDREN else tiny_child(which)
    low, done = lower(child, "llama.cpp", "gguf")
    assert [one.name for one in done] == LOWERED[which]
    path = export_gguf(low, tmp_path / "child.gguf", dtype="f32", force=False)
    values, tensors = read_gguf(path)
    found = {tensor.name: tuple(map(int, tensor.shape[::-1])) for tensor in tensors.values()}
    optional = {key: found.pop(key) for key in list(found) if key.endswith((".ffn_up.bias", ".ffn_down.bias"))}
    assert found == loader_wants(values)
    assert bool(optional) == (which == "odd sizes, biases")
    source = Source(child=child, solved=None, facts=None, measured=None)
    whole = load_model(export(source, tmp_path / "whole", format="nemotron-h-puzzle").out)
    wanted, got = whole(IDS), load_reference(find_export(path))(IDS)
    assert (got - wanted).abs().max() <= 1e-4 * wanted.std()


def test_numbers_by_block_are_arrays_and_the_rest_one_for_all(tmp_path):
    def metadata(name):
        low, _ = lower(tiny_child(name), "llama.cpp", "gguf")
        values, tensors = read_gguf(export_gguf(low, tmp_path / "child.gguf", dtype="q8_0", force=True))
        kinds = {part: tensors[f"blk.1.{part}.weight"].tensor_type.name for part in ("ffn_up_exps", "ffn_gate_inp")}
        assert kinds == {"ffn_up_exps": "Q8_0", "ffn_gate_inp": "F32"}
        return {key.removeprefix("nemotron_h_moe."): value for key, value in values.items()}

    own = metadata("nemotron-h, experts")  # MA*BM*MCD
    assert own["attention.head_count_kv"] == [0, 0, 2, 0, 0, 2, 0, 0, 0]
    assert own["feed_forward_length"] == [0, 128, 0, 96, 0, 0, 0, 192, 32]
    assert own["expert_feed_forward_length"] == own["feed_forward_length"]
    assert own["expert_used_count"] == [0, 2, 0, 3, 0, 0, 0, 1, 4]
    assert (own["expert_count"], own["expert_shared_feed_forward_length"], own["expert_weights_scale"]) == (8, 256, 2.5)
    assert "expert_group_count" not in own
    alike = metadata("nemotron-h, one mixture")  # ME*EM
    assert (alike["expert_used_count"], alike["expert_feed_forward_length"], alike["attention.head_count"]) == (
        2,
        128,
        8,
    )


def test_padded_experts_are_never_chosen():
    low, _ = lower(tiny_child("nemotron-h, experts"), "llama.cpp", "gguf")
    bias = low.layers[7].read("ffn")["gate.e_score_correction_bias"]
    assert (bias[4:] == -1e30).all()
    assert (bias[:4].abs() < 1).all()


REFUSED = {
    "a window": (mixed((MAMBA, None), (replace(PLAIN_HEADS, window=7), SQUARED)), "layer 1 attention: llama.cpp has no windows in hybrids"),
    "Mamba-2 unlike": (mixed((MAMBA, SQUARED), (replace(MAMBA, num_heads=4), None)), "layer 1 attention: num_heads is 4, and 8 in layer 0 attention; llama.cpp has one"),
    "head_dim unlike": (mixed((PLAIN_HEADS, SQUARED), (replace(PLAIN_HEADS, head_dim=16), None)), "layer 1 attention: head_dim is 16, and 32"),
    "biases of Mamba-2": (mixed((replace(MAMBA, bias=True), SQUARED)), "layer 0 attention: llama.cpp reads no biases of Mamba-2's projections"),
    "a dense FFN beside experts": (mixed((MAMBA, SQUARED), (None, GATELESS), experts=True), "layer 1 ffn: llama.cpp has experts in all FFNs or in none, and here is 'moe' after 'relu2'"),
    "scales unlike": (mixed((MAMBA, GATELESS), (None, replace(GATELESS, routed_scaling_factor=1.5)), experts=True), "layer 1 ffn: routed_scaling_factor is 1.5, and 2.5"),
    "groups unlike": (mixed((MAMBA, GATELESS), (None, GROUPS), experts=True), "layer 1 ffn: num_groups is 2, and 1"),
    "positions": (mixed((MAMBA, SQUARED), (replace(PLAIN_HEADS, rope="default"), None)), "layer 1 attention: Nemotron-H has no attention with rotary positions"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_llama_cpp_cannot_say_is_refused_by_name(what, tmp_path):
    tiny, message = REFUSED[what]
    source = Source(child=build(what, tiny), solved=None, facts=None, measured=None)
    with pytest.raises(UserError) as refused:
        export(source, tmp_path / "out", engine="llama.cpp")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("first", [False, True])
def test_solve_prices_what_the_file_will_hold(first):
    """Beside a layer with all experts, as other layers may keep them; nothing is put in for what other layers have."""
    fewer = replace(GATELESS, num_experts=6, shared_intermediate_size=64)
    priced = [
        ((NO_OP, fewer), [replace(GATELESS)]),
        ((MAMBA, NO_OP), [MAMBA]),
        ((ODD, NO_OP), [replace(ODD, conv_bias=True)]),
        ((HEADS[1], NO_OP), [HEADS[1]]),
    ]
    structure, base = tiny_child("nemotron-h, experts").structure, {"attention": PLAIN_HEADS, "ffn": GATELESS}
    for layer, wanted in priced:
        slots = dict(zip(("attention", "ffn"), layer, strict=True))
        assert lowered(slots, structure, base, "llama.cpp", first=first) == wanted


def test_the_command_line_refuses_in_one_line(tmp_path, puzzle, one_line_error):
    parent = write_tiny_parent("nemotron_h with groups of experts, and FFNs", tmp_path / "parent")
    done = puzzle("export", parent, "--engine", "llama.cpp", "--out", tmp_path / "out")
    one_line_error(done, "layer 3 ffn: llama.cpp has experts in all FFNs or in none")
    assert not (tmp_path / "out").exists()
