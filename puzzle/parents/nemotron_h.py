"""Nemotron-H: blocks of one mixer each, a norm before it: Mamba-2 (M), attention without positions (*), squared ReLUs (-).

Steps of time are as they come: transformers holds those of prompts at `time_step_min` or more, which the training did not, nor does
vLLM. A block is a layer here whose other slot is `none`: what mixes tokens stands in "attention", what mixes channels in "ffn".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from puzzle.base.errors import UserError
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.mamba2 import Mamba2
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
UNUSED = (  # fields that change no output: of how weights were first drawn, of kernels, of dropout
    "expand", "time_step_min", "time_step_max", "time_step_floor", "rescale_prenorm_residual", "use_mamba_kernels", "num_logits_to_keep",
    "hidden_dropout", "mtp_layers_block_type", "rms_norm_eps",
)  # fmt: skip
OF_EXPERTS = (  # which only a block of experts reads
    "n_routed_experts", "n_shared_experts", "moe_intermediate_size", "moe_shared_expert_intermediate_size", "moe_latent_size",
    "moe_shared_expert_overlap", "num_experts_per_tok", "routed_scaling_factor", "n_group", "topk_group", "norm_topk_prob",
    "output_router_logits",
)  # fmt: skip


def where(layer: int, slot: str, sub_block: SubBlock, name: str) -> Where:
    return Where(f"model.layers.{layer}.{block_where(name)}")


def block_where(name: str) -> str:
    """The norm of a block, or a tensor of its mixer, whose own norm, if it has one, is called norm too."""
    return name if name == "norm.weight" else f"mixer.{name.replace('gate_norm.', 'norm.')}"


def mamba(c: Config) -> Mamba2:
    if c["mamba_hidden_act"] != "silu":
        raise UserError(f"mamba_hidden_act '{c['mamba_hidden_act']}' in config.json is not supported: silu is")
    low, high = c.get("time_step_limit") or (0.0, float("inf"))
    if low > 0 or high < 1e6:
        raise UserError(f"time_step_limit = {[low, high]} in config.json is passed over by engines: take it out")
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


BLOCKS: Mapping[str, Callable[[Config], Layer]] = {  # by their names in `layers_block_type`; experts would be "moe"
    "linear_attention": lambda c: {"attention": mamba(c), "ffn": NO_OP},
    "full_attention": lambda c: {"attention": attention(c), "ffn": NO_OP},
    "mlp": lambda c: {"attention": NO_OP, "ffn": mlp(c)},
}
SINCE = {"mamba": "linear_attention", "attention": "full_attention"}  # earlier names, and today's
LETTERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}  # of `hybrid_override_pattern`
BLOCK_WORDS = {  # of an entry in `block_configs` by its block_type
    "mamba": (),
    "attention": ("num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window"),
    "mlp": ("intermediate_size",),
}


def base(c: Config) -> Layer:
    """What the global values describe, beside Mamba-2; where blocks say their own widths, the widest."""
    widths = [entry.get("intermediate_size", 1) for entry in c.get("block_configs") or ()]
    return {"attention": attention(c), "ffn": mlp(c, max(widths, default=None))}


@family(
    "nemotron_h",
    where=where,
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
    for name in (*UNUSED, *OF_EXPERTS):
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
            what = "experts (E, 'moe')" if kind == "moe" else f"'{kind}'"
            raise UserError(
                f"block {index} in config.json is one of {what}, which is not supported: of Nemotron-H, M, * and - are"
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
