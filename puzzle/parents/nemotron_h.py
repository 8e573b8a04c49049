"""Nemotron-H: blocks of one mixer each, a norm before it: Mamba-2 (M), attention without positions (*), squared ReLUs (-), experts (E).

Steps of time have no limits, as in vLLM; those of transformers depend on its version (docs/architecture.md, "Steps of time"). A block is a
layer here whose other slot is `none`: what mixes tokens stands in "attention", what mixes channels in "ffn".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from puzzle.base.errors import UserError
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.mamba2 import Mamba2
from puzzle.blocklib.moe import Moe
from puzzle.blocklib.none import NO_OP
from puzzle.blocklib.relu2 import Relu2
from puzzle.blocklib.sub_block import SubBlock
from puzzle.parents.family import NEEDED, Config, family, refuse
from puzzle.parents.names import Where
from puzzle.parents.rope import Rope
from puzzle.parents.structure import Layer, Structure

PREFIXES = {  # of stored names; hub checkpoints say backbone, the class in transformers model, its version 5.14 embedding
    "backbone.embeddings.": "model.embed_tokens.",
    "backbone.embedding.": "model.embed_tokens.",
    "model.embeddings.": "model.embed_tokens.",
    "model.embedding.": "model.embed_tokens.",
    "backbone.norm_f.": "model.norm.",
    "model.norm_f.": "model.norm.",
    "backbone.": "model.",
}
NO_LIMIT = (0.0, 1e30)  # on steps of time: JSON has no infinity
UNUSED = (  # fields that change no output: of how weights were first drawn, of kernels, of dropout
    "expand", "time_step_min", "time_step_max", "time_step_floor", "rescale_prenorm_residual", "use_mamba_kernels", "num_logits_to_keep",
    "hidden_dropout", "mtp_layers_block_type", "rms_norm_eps",
)  # fmt: skip
EXPERTS = {  # fields of a mixture, and their words in config.json
    "num_experts": "n_routed_experts", "num_experts_per_tok": "num_experts_per_tok", "moe_intermediate_size": "moe_intermediate_size",
    "shared_intermediate_size": "moe_shared_expert_intermediate_size", "routed_scaling_factor": "routed_scaling_factor",
    "num_groups": "n_group", "num_topk_groups": "topk_group", "norm_topk_prob": "norm_topk_prob", "latent_size": "moe_latent_size",
}  # fmt: skip
OF_EXPERTS = (  # which only a block of experts reads, or nothing does
    *EXPERTS.values(), "n_shared_experts", "moe_shared_expert_overlap", "output_router_logits",
)  # fmt: skip


def fused(layer: int, slot: str, sub_block: SubBlock, name: str) -> Where:
    """Experts stacked, as transformers holds them."""
    return Where(f"model.layers.{layer}.{block_where(name)}")


def where(layer: int, slot: str, sub_block: SubBlock, name: str) -> Where:
    """Experts one by one, as checkpoints have them: `mixer.experts.7.up_proj.weight`."""
    owner, _, matrix = name.partition(".")
    if not isinstance(sub_block, Moe) or owner != "experts":
        return fused(layer, slot, sub_block, name)
    return Where(f"model.layers.{layer}.mixer.experts.{{}}.{matrix}.weight", experts=sub_block.num_experts)


def block_where(name: str) -> str:
    """The norm of a block, or a tensor of its mixer, whose own norm, if it has one, is called norm too."""
    inside = name.replace("gate_norm.", "norm.").replace("shared_expert.", "shared_experts.")
    return name if name == "norm.weight" else f"mixer.{inside}"


def mamba(c: Config) -> Mamba2:
    if c["mamba_hidden_act"] != "silu":
        raise UserError(f"mamba_hidden_act '{c['mamba_hidden_act']}' in config.json is not supported: silu is")
    low, high = c.get("time_step_limit") or NO_LIMIT
    if low > 0 or high < NO_LIMIT[1]:
        raise UserError(
            f"time_step_limit = {[low, high]} in config.json is not supported: steps of time without limits, [0.0, inf], are"
        )
    return Mamba2(
        hidden_size=c["hidden_size"],
        norm_eps=float(c["layer_norm_epsilon"]),
        num_heads=c["mamba_num_heads"],
        head_dim=c["mamba_head_dim"],
        num_groups=c["n_groups"],
        state_size=c["ssm_state_size"],
        conv_width=c["conv_kernel"],
        chunk_size=c["chunk_size"],
        conv_bias=bool(c["use_conv_bias"]),
        bias=bool(c["use_bias"]),
        state_dtype=c["mamba_ssm_cache_dtype"],
    )


def attention(c: Config) -> Gqa:
    return Gqa(
        hidden_size=c["hidden_size"],
        norm_eps=float(c["layer_norm_epsilon"]),
        num_attention_heads=c["num_attention_heads"],
        num_key_value_heads=c["num_key_value_heads"],
        head_dim=c["head_dim"],
        window=c.get("sliding_window"),
        rope=None,
    )


def mlp(c: Config, width: int | None = None) -> Relu2:
    if c["mlp_hidden_act"] != "relu2":
        raise UserError(f"mlp_hidden_act '{c['mlp_hidden_act']}' in config.json is not supported: relu2 is")
    return Relu2(
        hidden_size=c["hidden_size"],
        norm_eps=float(c["layer_norm_epsilon"]),
        intermediate_size=width or c["intermediate_size"],
        bias=bool(c["mlp_bias"]),
    )


def moe(c: Config) -> Moe:
    """Routed experts and a shared one, as in Nemotron 3. Raises UserError for experts of another form."""
    for name, known, what in (
        ("mlp_hidden_act", "relu2", "relu2 is"),
        ("mlp_bias", False, "experts without biases are"),
        ("n_shared_experts", 1, "one is, of moe_shared_expert_intermediate_size channels"),
    ):
        if (value := c.get(name, known)) != known:
            raise UserError(f"{name} = {value!r} in config.json is not supported beside experts: {what}")
    told = {name: c[word] for name, word in EXPERTS.items() if name != "latent_size" or word in c}
    return Moe(
        hidden_size=c["hidden_size"],
        norm_eps=float(c["layer_norm_epsilon"]),
        activation="relu2",
        router="sigmoid",
        correction_bias=True,
        **told | {"routed_scaling_factor": float(told["routed_scaling_factor"])},
    )


BLOCKS: Mapping[str, Callable[[Config], Layer]] = {  # by their names in `layers_block_type`
    "linear_attention": lambda c: {"attention": mamba(c), "ffn": NO_OP},
    "full_attention": lambda c: {"attention": attention(c), "ffn": NO_OP},
    "mlp": lambda c: {"attention": NO_OP, "ffn": mlp(c)},
    "moe": lambda c: {"attention": NO_OP, "ffn": moe(c)},
}
SINCE = {"mamba": "linear_attention", "attention": "full_attention"}  # earlier names, and today's
LETTERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}  # of `hybrid_override_pattern`
BLOCK_WORDS = {  # of an entry in `block_configs` by its block_type
    "mamba": (),
    "attention": ("num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window"),
    "mlp": ("intermediate_size",),
    "moe": (*EXPERTS.values(),),
}


def base(c: Config) -> Layer:
    """What the global values describe, beside Mamba-2: experts where there are any; where blocks say their own sizes, the widest FFN, or
    the first block of experts."""
    entries = c.get("block_configs") or ()
    if "moe" in _types(c):
        first = [entry for entry in entries if entry["block_type"] == "moe"][:1]
        return {"attention": attention(c), "ffn": moe({**c, **(first[0] if first else {})})}
    widest = max((entry.get("intermediate_size", 1) for entry in entries), default=None)
    return {"attention": attention(c), "ffn": mlp(c, widest)}


@family(
    "nemotron_h",
    where=where,
    other_layouts=(fused,),
    base=base,
    prefixes=PREFIXES,
    needed=tuple(name for name in NEEDED if name != "num_hidden_layers"),
)
def nemotron_h(c: Config) -> Structure:
    refuse(
        c,
        sliding_window="windows, which transformers passes over",
        attention_bias="biases of attention, which transformers passes over",
        tie_word_embeddings="one matrix for embedding and head, which transformers passes over",
    )
    if c.get("mamba_proj_bias") and not c.get("use_bias"):
        raise UserError(
            "mamba_proj_bias in config.json asks for biases of Mamba-2, which transformers passes over: use_bias is what it reads"
        )
    for name in (*UNUSED, *OF_EXPERTS, "intermediate_size"):
        c.get(name)
    types = _types(c)
    made = {kind: BLOCKS[kind](c) for kind in dict.fromkeys(types)}
    return _around(c, [made[kind] for kind in types])


@family(
    "nemotron_h_puzzle",
    where=where,
    base=base,
    prefixes=PREFIXES,
    needed=("vocab_size", "hidden_size", "block_configs"),
)
def nemotron_h_puzzle(c: Config) -> Structure:
    """What an entry of `block_configs` says is its block's own; the rest is the config's."""
    layers = []
    for index, (kind, entry) in enumerate(zip(_types(c), c["block_configs"], strict=True)):
        said = SINCE.get(entry["block_type"], entry["block_type"])
        if said != kind:
            raise UserError(
                f"block_configs[{index}] in config.json is '{said}', and hybrid_override_pattern says '{kind}'"
            )
        words = BLOCK_WORDS[entry["block_type"]]
        if unknown := sorted(set(entry) - {*words, "block_type"}):
            raise UserError(
                f"block_configs[{index}] in config.json has '{unknown[0]}', which is not understood: {words} are"
            )
        layers.append(BLOCKS[kind]({**c, "sliding_window": None, **entry}))
    return _around(c, layers)


def _types(c: Config) -> list[str]:
    """Of every block, as `BLOCKS` has it. Raises UserError for one of another kind."""
    told = c.get("layers_block_type") or c.get("layer_types")
    types = [SINCE.get(kind, kind) for kind in told or [LETTERS.get(x, x) for x in c["hybrid_override_pattern"]]]
    for index, kind in enumerate(types):
        if kind not in BLOCKS:
            raise UserError(
                f"block {index} in config.json is of type '{kind}', which is not supported: {', '.join(BLOCKS)} are"
            )
    return types


def _around(c: Config, layers: Sequence[Layer]) -> Structure:
    length = int(c["max_position_embeddings"])
    return Structure(
        hidden_size=c["hidden_size"],
        vocab_size=c["vocab_size"],
        max_length=length,
        tied=False,
        norm_eps=float(c["layer_norm_epsilon"]),
        ropes={  # of a name that no attention asks for here: profiles and configs have one
            "default": Rope(
                head_dim=c["head_dim"], max_length=length, parameters={"rope_type": "default", "rope_theta": 10000.0}
            )
        },
        layers=tuple(layers),
    )
