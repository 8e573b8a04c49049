"""Twelve tiny children that hold, between them, every kind of layer: for the matrix of engines and for tests.

    python benchmarks/lib/tiny_children.py DIRECTORY        (writes them all as --format hf: DIRECTORY/<name>)
    from tiny_children import CHILDREN, tiny_child, write_tiny_child

Random weights of fixed seeds, scaled so that greedy text varies and its margins are wide; a byte-level tokenizer of 384
tokens. hidden_size 256 and head_dim 32: the smallest that all engines' kernels take. About 15 MB each in float32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from puzzle.export.child import (
    ABSENT,
    LINEAR,
    Absent,
    Attention,
    Child,
    ChildLayer,
    Ffn,
    Gqa,
    SwiGlu,
    no_tensors,
    sub_block_shapes,
)
from puzzle.export.hf import write_hf

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WIDTH, VOCAB, CONTEXT = 256, 8, 4, 32, 512, 384, 512
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FULL, WIDE = Gqa(num_key_value_heads=KV_HEADS), SwiGlu(width=2 * WIDTH)
FFN = SwiGlu(width=WIDTH)
BLOCK = (FULL, FFN)


def kv(count: int) -> Gqa:
    return Gqa(num_key_value_heads=count)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiny:
    """layers: (attention, FFN) each. facts: fields of `Child` that differ."""

    layers: tuple[tuple[Attention, Ffn], ...]
    facts: dict[str, Any] = field(default_factory=dict)


CHILDREN: dict[str, Tiny] = {
    "kv-heads": Tiny(layers=(BLOCK, (kv(1), FFN), (kv(2), FFN), BLOCK)),
    "no-attention-middle": Tiny(layers=(BLOCK, (ABSENT, FFN), (ABSENT, FFN), (kv(2), FFN)), facts={"tied": True}),
    "no-attention-first": Tiny(layers=((ABSENT, FFN), (kv(2), FFN), BLOCK)),
    "no-attention-last": Tiny(layers=(BLOCK, (kv(1), FFN), (ABSENT, FFN)), facts={"tied": True}),
    "no-ffn": Tiny(layers=((FULL, ABSENT), BLOCK, (kv(1), ABSENT))),
    "empty-layers": Tiny(layers=((ABSENT, ABSENT), BLOCK, (ABSENT, ABSENT), (kv(2), FFN), (ABSENT, ABSENT))),
    "linear-attention": Tiny(layers=((LINEAR, FFN), BLOCK, (LINEAR, ABSENT), (kv(2), FFN), (LINEAR, FFN))),
    "linear-ffn": Tiny(layers=(BLOCK, (kv(2), LINEAR), (LINEAR, LINEAR), (ABSENT, LINEAR))),
    "odd-widths": Tiny(layers=((FULL, SwiGlu(width=352)), (kv(1), SwiGlu(width=16)), BLOCK)),
    "fused-ffn": Tiny(layers=((FULL, WIDE), (kv(2), SwiGlu(width=256)), (FULL, WIDE))),
    "llama3-rope": Tiny(
        layers=(BLOCK, (kv(1), SwiGlu(width=256)), (ABSENT, FFN), BLOCK), facts={"rope_parameters": LLAMA3}
    ),
    "window": Tiny(layers=(BLOCK, (Gqa(num_key_value_heads=KV_HEADS, window=16), FFN), (kv(2), FFN))),
}


def random_tensors(child: Child, seed: str, shape: Attention | Ffn) -> dict[str, Tensor]:
    """A sub-block's tensors in float32, the same for the same seed: norms about 1, matrices of unit gain."""
    generator = torch.Generator().manual_seed(crc32(seed.encode()))
    found = {}
    for name, dims in sub_block_shapes(child, shape).items():
        noise = torch.randn(dims, generator=generator)
        found[name] = 1 + 0.2 * noise if "norm" in name else 0.1 * noise if len(dims) == 1 else noise / dims[1] ** 0.5
    return found


def random_matrix(seed: str, rows: int, scale: float) -> Tensor:
    return scale * torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(crc32(seed.encode())))


def build(name: str, tiny: Tiny, tokenizer: Path | None = None) -> Child:
    """A child of these layers in memory, float32; `name` seeds its weights."""
    child = Child(
        name=name,
        layers=(),
        hidden_size=HIDDEN,
        vocab_size=VOCAB,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        intermediate_size=WIDTH,
        rms_norm_eps=1e-5,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tied=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        window=None,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        dtype=torch.float32,
        tokenizer=tokenizer,
        generation_config={"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1},
        parent_name="tiny",
        licence="apache-2.0",
        parent_config={
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "num_attention_heads": HEADS,
            "intermediate_size": WIDTH,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": CONTEXT,
            "tie_word_embeddings": bool(tiny.facts.get("tied")),
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 1,
        },
        # Small ones leave greedy text without variety; large ones make a tied head repeat the last token for ever.
        read_embedding=partial(random_matrix, f"{name} embedding", VOCAB, 0.1 if tiny.facts.get("tied") else 2.0),
        read_final_norm=lambda: 1 + 0.2 * random_matrix(f"{name} norm", 1, 1.0)[0],
        read_head=partial(random_matrix, f"{name} head", VOCAB, 0.2),
    )
    child = replace(child, **tiny.facts)
    if child.tied:
        child = replace(child, read_head=child.read_embedding)

    def reader(seed: str, shape: Attention | Ffn) -> Callable[[], dict[str, Tensor]]:
        return no_tensors if isinstance(shape, Absent) else partial(random_tensors, child, seed, shape)

    layers = tuple(
        ChildLayer(
            attention=attention,
            ffn=ffn,
            read_attention=reader(f"{name} {index} attention", attention),
            read_ffn=reader(f"{name} {index} ffn", ffn),
            origin=index,
        )
        for index, (attention, ffn) in enumerate(tiny.layers)
    )
    return replace(child, layers=layers)


def tiny_child(name: str, tokenizer: Path | None = None) -> Child:
    """One of CHILDREN in memory."""
    return build(name, CHILDREN[name], tokenizer)


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
    tokenizer.train_from_iterator(Path(__file__).read_text(encoding="utf-8").splitlines(keepends=True), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|pad|>"
    )
    fast.save_pretrained(directory)
    return directory


def write_tiny_child(name: str, out: Path) -> Path:
    """One of CHILDREN as `--format hf` writes it, with a tokenizer (kept in out's parent, `tokenizer/`)."""
    tokenizer = out.parent / "tokenizer"
    if not (tokenizer / "tokenizer.json").is_file():
        write_tokenizer(tokenizer)
    child = tiny_child(name, tokenizer)
    write_hf(child, out, f"---\nlicense: {child.licence}\n---\n# {name}\n", force=True)
    return out


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for child_name in CHILDREN:
        print(write_tiny_child(child_name, Path(sys.argv[1]) / child_name))
