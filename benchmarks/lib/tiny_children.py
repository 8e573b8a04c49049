"""Twelve tiny children that hold, between them, every kind of layer, one with maps of low rank, one of each family that is unlike Llama, and
those that have formats of their own: for the matrix of engines and for tests.

    python benchmarks/lib/tiny_children.py DIRECTORY        (writes them all as --format hf: DIRECTORY/<name>)
    from tiny_children import CHILDREN, FAMILIES, WITH_FORMATS, on_gpu, tiny_child, write_tiny_child

Random weights of fixed seeds, scaled so that greedy text varies and its margins are wide; a byte-level tokenizer of 384
tokens. hidden_size 256 and head_dim 32: the smallest that all engines' kernels take. About 15 MB each in float32.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from puzzle.blocklib.gated_delta import GatedDelta
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.linear import Linear
from puzzle.blocklib.mamba2 import Mamba2
from puzzle.blocklib.moe import Moe
from puzzle.blocklib.none import NO_OP
from puzzle.blocklib.relu2 import Relu2
from puzzle.blocklib.sub_block import Normed, SubBlock
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.export.child import Child, ChildLayer
from puzzle.export.hf import write_hf
from puzzle.parents.rope import Rope
from puzzle.parents.structure import Structure

HIDDEN, VOCAB, CONTEXT, EPS = 256, 384, 512, 1e-5
PLAIN: dict[str, object] = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3: dict[str, object] = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FULL = Gqa(hidden_size=HIDDEN, num_attention_heads=8, num_key_value_heads=4, head_dim=32, norm_eps=EPS)
FFN = SwiGLU(hidden_size=HIDDEN, intermediate_size=512, norm_eps=EPS)
LINEAR = Linear(hidden_size=HIDDEN, norm_eps=EPS)
BLOCK = (FULL, FFN)
LICENSE = Path(__file__).parents[2] / "LICENSE"  # the text that the tokenizer learns from


def kv(count: int) -> Gqa:
    return replace(FULL, num_key_value_heads=count)


def width(channels: int) -> SwiGLU:
    return replace(FFN, intermediate_size=channels)


def low_rank(rank: int) -> Linear:
    return replace(LINEAR, rank=rank)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiny:
    """layers: (attention, FFN) each; context: the most tokens. base: what config.json's global values describe. ropes: by name, where there is not one alone,
    `rope`; around: other fields of `Structure`; formats: of stock engines, that have words for it beside those that all are tried in."""

    layers: tuple[tuple[SubBlock, SubBlock], ...]
    base: tuple[Gqa, SwiGLU | Relu2 | Moe] = BLOCK
    tied: bool = False
    rope: dict[str, object] | None = None
    ropes: dict[str, dict[str, object]] | None = None
    around: Mapping[str, Any] = field(default_factory=dict)
    context: int = CONTEXT
    formats: tuple[str, ...] = ()

    def but(self, attention: Mapping[str, Any] | None = None, ffn: Mapping[str, Any] | None = None) -> Tiny:
        """With other values of these fields in every attention and every FFN; those of norms in every linear map too."""
        norms = {f.name for f in fields(Normed)}

        def changed(sub_block: SubBlock) -> SubBlock:
            linear = {name: value for name, value in (ffn or {}).items() if name in norms}
            values = {Gqa: attention, SwiGLU: ffn, Linear: linear}.get(type(sub_block))
            return replace(sub_block, **values) if values else sub_block

        pairs = [(changed(a), changed(f)) for a, f in (self.base, *self.layers)]
        return replace(self, base=pairs[0], layers=tuple(pairs[1:]))


CHILDREN: dict[str, Tiny] = {
    "kv-heads": Tiny(layers=(BLOCK, (kv(1), FFN), (kv(2), FFN), BLOCK)),
    "no-attention-middle": Tiny(layers=(BLOCK, (NO_OP, FFN), (NO_OP, FFN), (kv(2), FFN)), tied=True),
    "no-attention-first": Tiny(layers=((NO_OP, FFN), (kv(2), FFN), BLOCK)),
    "no-attention-last": Tiny(layers=(BLOCK, (kv(1), FFN), (NO_OP, FFN)), tied=True),
    "no-ffn": Tiny(layers=((FULL, NO_OP), BLOCK, (kv(1), NO_OP))),
    "empty-layers": Tiny(layers=((NO_OP, NO_OP), BLOCK, (NO_OP, NO_OP), (kv(2), FFN), (NO_OP, NO_OP))),
    "linear-attention": Tiny(layers=((LINEAR, FFN), BLOCK, (LINEAR, NO_OP), (kv(2), FFN), (LINEAR, FFN))),
    "linear-ffn": Tiny(layers=(BLOCK, (kv(2), LINEAR), (LINEAR, LINEAR), (NO_OP, LINEAR))),
    "odd-widths": Tiny(layers=((FULL, width(352)), (kv(1), width(16)), BLOCK)),
    "fused-ffn": Tiny(layers=((FULL, width(1024)), (kv(2), width(256)), (FULL, width(1024)))),
    "llama3-rope": Tiny(layers=(BLOCK, (kv(1), width(256)), (NO_OP, FFN), BLOCK), rope=LLAMA3),
    "window": Tiny(layers=(BLOCK, (replace(FULL, window=16), FFN), (kv(2), FFN))),
}
# Maps of low rank in every place that a linear map may have, beside whole ones.
LOW_RANK = {
    "low-rank": Tiny(
        layers=(
            BLOCK,
            (kv(2), low_rank(64)),
            (low_rank(96), FFN),
            (low_rank(8), low_rank(200)),
            (NO_OP, LINEAR),
            (LINEAR, low_rank(HIDDEN)),
        )
    )
}
# What layers have of their own, whatever the family: KV heads, nothing, one matrix, widths.
MIXED = Tiny(layers=((NO_OP, FFN), BLOCK, (kv(2), LINEAR), (LINEAR, width(352)), (kv(1), NO_OP), (NO_OP, NO_OP), BLOCK))
BOTH = {"norm": "both", "norm_offset": True}
SCALED = {"residual_scale": 0.4}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "attention_factor": 1.2,
}


EXPERTS = Moe(
    hidden_size=HIDDEN, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=128, norm_topk_prob=True,
    shared_intermediate_size=64, shared_gate=True, norm_eps=EPS,
)  # fmt: skip
SIGMOIDS = Moe(
    hidden_size=HIDDEN, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128, router="sigmoid",
    correction_bias=True, num_groups=2, num_topk_groups=1, norm_topk_prob=True, routed_scaling_factor=2.5, norm_eps=EPS,
)  # fmt: skip
CLAMPED = Moe(
    hidden_size=HIDDEN, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=128, activation="swiglu_oai", bias=True,
    norm_topk_prob=True, norm_eps=EPS,
)  # fmt: skip
SINKS = replace(FULL, qkv_bias=True, o_bias=True, sinks=True)
LATENT = replace(EXPERTS, latent_size=128)
# Mixtures that differ in all that they can, one dense FFN, and what other layers have beside.
MIXTURES = Tiny(
    base=(FULL, EXPERTS),
    layers=(
        (NO_OP, width(352)), (FULL, EXPERTS), (kv(2), LINEAR), (LINEAR, replace(EXPERTS, num_experts=5, num_experts_per_tok=3)),
        (kv(1), NO_OP), (NO_OP, NO_OP), (FULL, replace(EXPERTS, moe_intermediate_size=96, shared_intermediate_size=32)),
        (FULL, replace(EXPERTS, num_experts_per_tok=1)),
    ),
)  # fmt: skip


def with_windows(tiny: Tiny, **own: Mapping[str, Any]) -> Tiny:
    """Layers 1 and 4 with a window of 16, layer 2 with one of 64; own: other fields of these two and of that one."""
    changes = {
        1: {"window": 16, **own.get("short", {})},
        4: {"window": 16, **own.get("short", {})},
        2: {"window": 64, **own.get("long", {})},
    }
    pairs = ((replace(a, **changes[i]) if i in changes else a, f) for i, (a, f) in enumerate(tiny.layers))  # type: ignore[arg-type]
    return replace(tiny, layers=tuple(pairs))


FAMILIES: dict[str, Tiny] = {
    "qwen3": replace(MIXED.but({"qk_norm": "head"}), tied=True),
    "qwen2": MIXED.but({"qkv_bias": True}),
    "gemma3": replace(
        with_windows(MIXED.but({"qk_norm": "head", "scale": 0.15, **BOTH}, {"activation": "gelu_tanh", **BOTH}), short={"rope": "local"}),
        ropes={"default": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0}, "local": {"rope_type": "default", "rope_theta": 10000.0}},
        tied=True,
        around={"norm_offset": True, "embedding_scale": 3.0},
    ),
    "olmo3": replace(with_windows(MIXED.but({"qk_norm": "all", "norm": "after"}, {"norm": "after"})), rope=YARN),
    "granite": replace(
        MIXED.but({"scale": 0.1, **SCALED}, SCALED), around={"embedding_scale": 3.0, "logits_divisor": 2.5}
    ),
    "smollm3": with_windows(MIXED, long={"rope": None}),
    "qwen3_moe": MIXTURES.but({"qk_norm": "head"}),
    "gpt_oss": Tiny(
        base=(SINKS, CLAMPED), rope=YARN | {"truncate": False},
        layers=(
            (replace(SINKS, window=16), CLAMPED), (SINKS, replace(CLAMPED, num_experts=4, num_experts_per_tok=3)),
            (replace(SINKS, window=16, num_key_value_heads=2), LINEAR), (NO_OP, replace(CLAMPED, moe_intermediate_size=96)), (SINKS, NO_OP),
        ),
    ),
    "sigmoid experts": Tiny(base=(FULL, SIGMOIDS), layers=((FULL, SIGMOIDS), (kv(2), replace(SIGMOIDS, num_experts=4)), (NO_OP, width(96)))),
    "latent experts": Tiny(base=(FULL, LATENT), layers=((FULL, LATENT), (kv(2), replace(LATENT, num_experts=4)), (NO_OP, width(96)))),
    "biases": MIXED.but({"qkv_bias": True, "o_bias": True}, {"bias": True}),
}  # fmt: skip


# Kinds that stock engines read in formats of their own, and Gated DeltaNet, whose keys are as wide as values in vLLM on a CPU. Inner channels of Mamba-2 are twice the hidden size, as Granite-4 has them.
MAMBA = Mamba2(hidden_size=HIDDEN, num_heads=8, head_dim=64, num_groups=2, state_size=64, chunk_size=64, norm_eps=EPS)
DELTA = GatedDelta(hidden_size=HIDDEN, num_key_heads=2, key_dim=64, num_value_heads=4, value_dim=64, norm_eps=EPS)
WIDE = replace(FULL, num_attention_heads=4, num_key_value_heads=2, head_dim=64)  # whose heads are as wide on a GPU
PLAIN_HEADS = replace(FULL, num_key_value_heads=2, rope=None)
SQUARED = Relu2(hidden_size=HIDDEN, intermediate_size=512, norm_eps=EPS)
GATELESS = replace(SIGMOIDS, activation="relu2", num_groups=1, shared_intermediate_size=128)


def blocks(pattern: str, **experts: Moe) -> tuple[tuple[SubBlock, SubBlock], ...]:
    """Layers of one sub-block each: M, *, - or a letter of `experts`."""
    mixers = {"M": (MAMBA, NO_OP), "*": (PLAIN_HEADS, NO_OP), "-": (NO_OP, SQUARED)}
    return tuple(mixers[letter] if letter in mixers else (NO_OP, experts[letter]) for letter in pattern)


WITH_FORMATS: dict[str, Tiny] = {
    "qwen3-moe, alike": Tiny(
        base=(WIDE, replace(EXPERTS, shared_intermediate_size=None, shared_gate=False)), layers=((WIDE, width(352)), *[(WIDE, replace(EXPERTS, shared_intermediate_size=None, shared_gate=False))] * 3), formats=("qwen3-moe",),
    ).but({"qk_norm": "head"}),
    "gpt-oss, alike": Tiny(
        base=(SINKS, CLAMPED), layers=((replace(SINKS, window=16), CLAMPED), (SINKS, CLAMPED)) * 2, formats=("gpt-oss",),
        rope={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    ),
    "nemotron-h, dense": Tiny(base=(PLAIN_HEADS, SQUARED), layers=blocks("M-*M-M*-"), formats=("nemotron-h", "nemotron-h-puzzle")),
    "nemotron-h, experts": Tiny(
        base=(PLAIN_HEADS, GATELESS),
        layers=blocks(
            "MA*BM*MCD", A=GATELESS,
            B=replace(GATELESS, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=96, shared_intermediate_size=64),
            C=replace(GATELESS, num_experts=4, num_experts_per_tok=1, moe_intermediate_size=192, shared_intermediate_size=256),
            D=replace(GATELESS, num_experts_per_tok=4, moe_intermediate_size=32),
        ),
        formats=("nemotron-h-puzzle",),
    ),
    "nemotron-h, one mixture": Tiny(base=(PLAIN_HEADS, GATELESS), layers=blocks("ME*EM", E=GATELESS), formats=("nemotron-h",)),
    "mamba in a llama": Tiny(base=(WIDE, FFN), layers=((WIDE, FFN), (MAMBA, FFN), (MAMBA, FFN), (WIDE, FFN), (MAMBA, FFN)), formats=("granitemoehybrid",)),
    "mamba, all sizes": Tiny(
        layers=(
            BLOCK, (MAMBA, width(352)), (replace(MAMBA, num_heads=4, head_dim=32), FFN), (kv(2), NO_OP), (replace(FULL, window=64), FFN),
            (replace(MAMBA, num_groups=1, num_heads=16, chunk_size=48), FFN), (NO_OP, FFN), (MAMBA, NO_OP),
        ),
    ),
    "gated delta, all sizes": Tiny(
        layers=(
            BLOCK, (DELTA, width(352)), (replace(DELTA, num_value_heads=8), FFN), (kv(2), NO_OP), (replace(DELTA, num_key_heads=4), FFN),
            (replace(DELTA, num_key_heads=1, num_value_heads=2), FFN), (NO_OP, FFN), (DELTA, NO_OP),
        ),
    ),
}  # fmt: skip


ALL = CHILDREN | LOW_RANK | FAMILIES | WITH_FORMATS


def random_tensors(sub_block: SubBlock, seed: str) -> dict[str, Tensor]:
    """A sub-block's tensors in float32, the same for the same seed: norms about 1, matrices of unit gain."""
    generator = torch.Generator().manual_seed(crc32(seed.encode()))
    found = {}
    for name, dims in sub_block.tensors().items():
        noise = torch.randn(dims, generator=generator)
        one = 0 if getattr(sub_block, "norm_offset", False) else 1  # which such a norm adds itself
        found[name] = (
            one + 0.2 * noise
            if "norm" in name
            else noise
            if name == "sinks"
            else 0.1 * noise
            if len(dims) == 1
            else noise / dims[-1] ** 0.5
        )
        if name == "dt_bias":  # steps of time from 0.001 to 1: states of a few and of a thousand tokens
            found[name] = 1.5 * noise - 3
    return found


def random_matrix(seed: str, rows: int, scale: float) -> Tensor:
    return scale * torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(crc32(seed.encode())))


def on_gpu(tiny: Tiny) -> Tiny:
    """The same with heads of 64, the narrowest of FlashAttention 3, and room for prompts of 3,000 tokens."""
    return replace(tiny.but({"head_dim": 64}), context=4096)


def build(name: str, tiny: Tiny, tokenizer: Path | None = None) -> Child:
    """A child of these layers in memory, float32; `name` seeds its weights."""
    ropes = {
        name: Rope(head_dim=tiny.base[0].head_dim, max_length=tiny.context, parameters=parameters)
        for name, parameters in (tiny.ropes or {"default": tiny.rope or PLAIN}).items()
    }
    layers = tuple(
        ChildLayer(
            slots={"attention": attention, "ffn": ffn},
            reads={
                "attention": partial(random_tensors, attention, f"{name} {index} attention"),
                "ffn": partial(random_tensors, ffn, f"{name} {index} ffn"),
            },
            origin=index,
        )
        for index, (attention, ffn) in enumerate(tiny.layers)
    )
    # Small ones leave greedy text without variety; large ones make a tied head repeat the last token for ever.
    embedding = partial(random_matrix, f"{name} embedding", VOCAB, 0.1 if tiny.tied else 2.0)
    return Child(
        name=name,
        layers=layers,
        around=Structure(
            hidden_size=HIDDEN,
            vocab_size=VOCAB,
            max_length=tiny.context,
            tied=tiny.tied,
            layers=(),
            ropes=ropes,
            norm_eps=EPS,
            **tiny.around,
        ),
        base=dict(zip(("attention", "ffn"), tiny.base, strict=True)),
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        dtype=torch.float32,
        tokenizer=tokenizer,
        generation_config={"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1},
        parent_name="tiny",
        licence="apache-2.0",
        kept={"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1},
        read_embedding=embedding,
        read_final_norm=lambda: (
            (0 if tiny.around.get("norm_offset") else 1) + 0.2 * random_matrix(f"{name} norm", 1, 1.0)[0]
        ),
        read_head=embedding if tiny.tied else partial(random_matrix, f"{name} head", VOCAB, 0.2),
    )


def tiny_child(name: str, tokenizer: Path | None = None, *, gpu: bool = False) -> Child:
    """One of ALL in memory; gpu: as `on_gpu` makes it."""
    tiny = ALL[name]
    return build(name, on_gpu(tiny) if gpu else tiny, tokenizer)


def write_tokenizer(directory: Path) -> Path:
    """A byte-level BPE of VOCAB tokens: 0 ends and begins text, 1 pads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(LICENSE.read_text(encoding="utf-8").splitlines(keepends=True), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|pad|>"
    )
    fast.save_pretrained(directory)
    return directory


def write_tiny_child(name: str, out: Path, *, gpu: bool = False) -> Path:
    """`tiny_child` as `--format hf` writes it, with a tokenizer (kept in out's parent, `tokenizer/`)."""
    tokenizer = out.parent / "tokenizer"
    if not (tokenizer / "tokenizer.json").is_file():
        write_tokenizer(tokenizer)
    child = tiny_child(name, tokenizer, gpu=gpu)
    write_hf(child, out, f"---\nlicense: {child.licence}\n---\n# {name}\n", force=True)
    return out


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for child_name in ALL:
        print(write_tiny_child(child_name, Path(sys.argv[1]) / child_name))
