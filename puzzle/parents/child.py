"""Our own children (model_type "puzzle"): config.json to structure and back.

    {"num_key_value_heads": 8, "intermediate_size": 14336, "sliding_window": null, …,
     "per_layer_config": {"3": {"num_key_value_heads": 2}, "4": {"skip": ["attention"]}, "6": {"linear": ["attention", "mlp"]}}}

What `linear` names is one matrix, or the product of two with `"linear_rank": {"mlp": 64}`. With `num_experts` the usual FFN is a mixture, and layers say `num_experts`, `num_experts_per_tok`, `moe_intermediate_size` and
`shared_expert_intermediate_size` of their own, or `{"dense": ["mlp"], "intermediate_size": 512}`.
A layer with Mamba-2 in place of attention has its sizes, {"mamba": {"num_heads": 128, "head_dim": 80, …}}, one with Gated DeltaNet
{"gated_delta": {"num_key_heads": 16, "key_dim": 128, …}}; with hidden_act "relu2" FFNs have no gate. The global values describe what most layers have (`usual`), `per_layer_config` what single layers change. A word that is not
understood is refused: it would mean a layer that this version cannot know. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from typing import Any

from puzzle.base.errors import UserError, nearest
from puzzle.blocklib.ffn import Ffn
from puzzle.blocklib.gated_delta import GatedDelta
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.linear import Linear
from puzzle.blocklib.mamba2 import Mamba2
from puzzle.blocklib.moe import Moe
from puzzle.blocklib.none import NO_OP, NoOp
from puzzle.blocklib.relu2 import Relu2
from puzzle.blocklib.sub_block import Normed, SubBlock
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.parents.family import EXPERTS, Config, attention, decoder, family, ffn, moe
from puzzle.parents.structure import Layer, Structure

OWNERS = {"attention": "attention", "ffn": "mlp"}  # slot: its name in the lists of `per_layer_config`
LISTS = {"skip": NoOp, "linear": Linear}  # lists of `per_layer_config`, and the kind of what they name
RANK = "linear_rank"  # beside the list `linear`: {owner: rank} of what is the product of two matrices
DENSE = "dense"  # a list too: of what is one FFN for all tokens where others are mixtures
# Words with the sizes of a kind: the slot that it stands in, and the kind.
SIZED = {"mamba": ("attention", Mamba2), "gated_delta": ("attention", GatedDelta)}
PLACEMENTS = ("before", "after", "both")
MIXTURE = {  # fields of a mixture that config.json has where they differ from their defaults, and their names there
    "router": "router", "correction_bias": "correction_bias", "num_groups": "n_group", "num_topk_groups": "topk_group",
    "routed_scaling_factor": "routed_scaling_factor", "shared_intermediate_size": "shared_expert_intermediate_size",
    "shared_gate": "shared_expert_gate", "bias": "moe_bias", "latent_size": "moe_latent_size",
}  # fmt: skip


def usual(c: Config) -> dict[str, SubBlock]:
    """What a layer without an entry has."""
    placement = c.get("norm_placement", "before")
    if placement not in PLACEMENTS:
        raise UserError(f"norm_placement '{placement}' in config.json: {nearest(str(placement), PLACEMENTS)}")
    shared = {
        "norm": placement,
        "norm_offset": bool(c.get("norm_offset", False)),
        "residual_scale": float(c.get("residual_multiplier", 1.0)),
    }
    norms = {True: "head", "head": "head", "all": "all", False: None, None: None}
    if c.get("qk_norm") not in norms:
        raise UserError(f'qk_norm {c["qk_norm"]!r} in config.json is not understood: true, "all" and false are')
    scale = c.get("attention_multiplier")
    attends = attention(
        c,
        window=c.get("sliding_window"),
        qkv_bias=bool(c.get("attention_bias") or c.get("qkv_bias")),
        qk_norm=norms[c.get("qk_norm")],
        scale=None if scale is None else float(scale),
        rope=c.get("rope", "default"),
        sinks=bool(c.get("attention_sinks", False)),
        **shared,
    )
    if c.get("num_experts"):
        return {
            "attention": attends,
            "ffn": moe(c, EXPERTS, **shared, **{f: c[w] for f, w in MIXTURE.items() if w in c}),
        }
    return {"attention": attends, "ffn": relu2(c, **shared) if c.get("hidden_act") == "relu2" else ffn(c, **shared)}


def relu2(c: Config, **changes: Any) -> Relu2:
    return Relu2(
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        bias=bool(c.get("mlp_bias", False)),
        norm_eps=float(c["rms_norm_eps"]),
        **changes,
    )


@family("puzzle", base=usual)
def child(c: Config) -> Structure:
    """Raises UserError for a word in `per_layer_config` that is not understood."""
    base = usual(c)
    entries = {int(index): entry for index, entry in (c.get("per_layer_config") or {}).items()}
    if unknown := sorted(set(entries) - set(range(c["num_hidden_layers"]))):
        raise UserError(f"per_layer_config has an entry for layer {unknown[0]} of {c['num_hidden_layers']} layers")
    layers = [layer_of(entries.get(index, {}), base, index) for index in range(c["num_hidden_layers"])]
    return decoder(
        c,
        layers,
        norm_offset=bool(c.get("norm_offset", False)),
        embedding_scale=float(c.get("embedding_multiplier", 1.0)),
        logits_divisor=float(c.get("logits_scaling", 1.0)),
    )


def layer_of(entry: Mapping[str, Any], base: Layer, index: int) -> dict[str, SubBlock]:
    """One entry of `per_layer_config`. Raises UserError for a word or a value that is not understood."""
    mixture, lists = isinstance(base["ffn"], Moe), [*LISTS]
    if mixture:
        lists.append(DENSE)
    named = {kind: list(entry.get(kind) or []) for kind in lists}
    owners = [owner for names in named.values() for owner in names]
    owners += [OWNERS[slot] for word, (slot, _) in SIZED.items() if word in entry]
    if unknown := sorted({*owners} - {*OWNERS.values()}):
        raise UserError(
            f"per_layer_config[{index}] names '{unknown[0]}', which is none of {', '.join(OWNERS.values())}"
        )
    if len(owners) != len(set(owners)):
        raise UserError(f"per_layer_config[{index}] says two things of one sub-block: {dict(entry)}")
    known = {word for sub_block in base.values() for word in sub_block.config_words()} | {*lists, *SIZED, RANK}
    if mixture and named[DENSE]:
        known |= {"intermediate_size"}
    if unknown := sorted(set(entry) - known):
        raise UserError(
            f"per_layer_config[{index}] has '{unknown[0]}', which is not understood ({nearest(unknown[0], sorted(known))})"
        )
    ranks = entry.get(RANK) or {}
    if not isinstance(ranks, Mapping) or not set(ranks) <= set(named["linear"]):
        raise UserError(
            f"per_layer_config[{index}].{RANK} = {ranks} is not understood: it has ranks of what is linear there"
        )
    found: dict[str, SubBlock] = {}
    for slot, sub_block in base.items():
        words = sub_block.config_words()
        found[slot] = replace(sub_block, **{words[word]: value for word, value in entry.items() if word in words})
        if OWNERS[slot] in named["skip"]:
            found[slot] = NO_OP
        elif OWNERS[slot] in named["linear"]:
            assert isinstance(sub_block, Normed)
            found[slot] = Linear(**sub_block.norm_fields(), rank=ranks.get(OWNERS[slot]))
        elif OWNERS[slot] in named.get(DENSE, ()):
            found[slot] = _dense(sub_block, entry.get("intermediate_size"), index)
    for word, (slot, kind) in SIZED.items():
        if word in entry:
            found[slot] = _sized(kind, entry[word], base[slot], f"per_layer_config[{index}].{word}")
    return found


def _dense(mixture: SubBlock, width: Any, index: int) -> Ffn:
    """The FFN in place of one. Raises UserError where none is meant."""
    if not isinstance(mixture, Moe) or width is None:
        raise UserError(
            f"per_layer_config[{index}] is dense: its mlp needs an intermediate_size, and other layers experts"
        )
    return mixture.dense(width)


def _sized(kind: type[Normed], sizes: Any, base: SubBlock, where: str) -> Normed:
    """A sub-block of these sizes with the norms of `base`."""
    own = {f.name: f for f in fields(kind) if f.name not in {f.name for f in fields(Normed)}}
    needed = {name for name, f in own.items() if f.default is MISSING}
    if not isinstance(sizes, Mapping) or not needed <= set(sizes) <= set(own):
        raise UserError(
            f"{where} = {sizes} is not understood: it has {', '.join(own)}, and {', '.join(sorted(needed))} always"
        )
    assert isinstance(base, Normed)
    return kind(**base.norm_fields(), **sizes)


def entry_of(layer: Layer, base: Layer) -> dict[str, Any]:
    """The entry of `per_layer_config` that `layer_of` reads back; {} for a layer like `base`.

    Raises UserError for a kind or a difference that the config has no words for.
    """
    if list(layer) != list(base):
        raise UserError(f"config.json of a child has words for {' and then '.join(base)}, not for {list(layer)}")
    entry: dict[str, Any] = {}
    for slot, sub_block in layer.items():
        lists = [word for word, kind in LISTS.items() if isinstance(sub_block, kind)]
        sized = [word for word, (_, kind) in SIZED.items() if isinstance(sub_block, kind)]
        if sized:
            norms = {f.name for f in fields(Normed)}
            told = [(f, getattr(sub_block, f.name)) for f in fields(sub_block) if f.name not in norms]
            entry[sized[0]] = {f.name: value for f, value in told if value != f.default}
        elif lists:
            entry[lists[0]] = [*entry.get(lists[0], []), OWNERS[slot]]
            if isinstance(sub_block, Linear) and sub_block.rank is not None:
                entry[RANK] = {**entry.get(RANK, {}), OWNERS[slot]: sub_block.rank}
        elif isinstance(sub_block, SwiGLU | Relu2) and isinstance(base[slot], Moe):
            entry |= {DENSE: [OWNERS[slot]], "intermediate_size": sub_block.intermediate_size}
        else:
            entry |= sub_block.to_config(base[slot])
    return entry


def config_of(structure: Structure, base: Layer) -> dict[str, Any]:
    """All fields of config.json that `child` reads. base: what its global values describe, usually `structure.usual` of the parent.

    Values that every earlier version had are always there, later ones only where they say something, here or in a layer: what a layer
    names has to stand for all as well, or transformers refuses the config wherever it does not run the child's code (AutoTokenizer).
    """
    attends, gated = base["attention"], base["ffn"]
    if not isinstance(attends, Gqa) or not isinstance(gated, Ffn | Moe):
        raise UserError(
            f"config.json of a child has words for gqa with swiglu, relu2 or moe alone, not {attends.kind} and {gated.kind}"
        )
    entries = {str(index): entry for index, layer in enumerate(structure.layers) if (entry := entry_of(layer, base))}
    ropes = {name: dict(rope.parameters) for name, rope in structure.ropes.items()}
    plain = structure.ropes.get(attends.rope or "default") or next(iter(structure.ropes.values()))
    names = {None: False, "head": True}
    config: dict[str, Any] = {
        "num_hidden_layers": structure.num_layers,
        "num_attention_heads": attends.num_attention_heads,
        "num_key_value_heads": attends.num_key_value_heads,
        "head_dim": attends.head_dim,
        "rope_parameters": dict(plain.parameters),
        "attention_bias": attends.o_bias,
        "qkv_bias": attends.qkv_bias and not attends.o_bias,
        "intermediate_size": gated.active_width if isinstance(gated, Moe) else gated.intermediate_size,
        "hidden_act": hidden_act(gated),
        "mlp_bias": isinstance(gated, Ffn) and gated.bias,
        "qk_norm": names.get(attends.qk_norm, attends.qk_norm),
        "sliding_window": attends.window,
    }
    told = {
        "norm_placement": (attends.norm, "before"),
        "norm_offset": (attends.norm_offset, False),
        "residual_multiplier": (attends.residual_scale, 1.0),
        "attention_multiplier": (attends.scale, None),
        "embedding_multiplier": (structure.embedding_scale, 1.0),
        "logits_scaling": (structure.logits_divisor, 1.0),
        "rope": (attends.rope, "default"),
        "attention_sinks": (attends.sinks, False),
        "ropes": (ropes, {"default": dict(plain.parameters)}),
    }
    config |= {name: value for name, (value, default) in told.items() if value != default}
    if isinstance(gated, Moe):
        numbers = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
        config |= {name: getattr(gated, name) for name in numbers}
        own = {f.name: getattr(gated, f.name) for f in fields(gated) if getattr(gated, f.name) != f.default}
        config |= {word: own[name] for name, word in MIXTURE.items() if name in own}
    said = {word: getattr(part, name) for part in base.values() for word, name in part.config_words().items()}
    said |= dict.fromkeys([*LISTS, *SIZED, DENSE, RANK])
    named = {word for entry in entries.values() for word in entry} - {"skip", *config}
    return config | {word: said[word] for word in sorted(named)} | {"per_layer_config": entries}


def check_said(config: Config, structure: Structure) -> None:
    """Raise UserError unless config.json says all of `structure`: read back, it is an equal one."""
    found = child(config)
    for index, (said, meant) in enumerate(zip(found.layers, structure.layers, strict=True)):
        for slot, sub_block in meant.items():
            if said.get(slot) != sub_block:
                raise UserError(f"layer {index} {slot}: config.json of a child has no words for '{sub_block.key()}'")
    if found != structure.with_layers(found.layers):
        raise UserError("config.json of a child has no words for what stands around this one's layers")


def hidden_act(gated: Ffn | Moe) -> str:
    """transformers' name of its activation. Raises UserError for a kind that has none."""
    if isinstance(gated, Relu2):
        return "relu2"
    if not isinstance(gated, SwiGLU | Moe):
        raise UserError(f"config.json of a child has no activation for FFNs of kind '{gated.kind}'")
    return next(name for name, ours in EXPERTS.items() if ours == gated.activation)
