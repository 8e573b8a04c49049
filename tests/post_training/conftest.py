"""A tiny child with every kind of layer and a chat template, for TRL's trainers."""

from __future__ import annotations

from pathlib import Path

import pytest

from puzzle.blocklib.none import NO_OP
from puzzle.export.hf import write_hf
from tiny_children import BLOCK, FAMILIES, FFN, LINEAR, Tiny, build, kv, width, write_tokenizer

CHATS = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MIXED = Tiny(
    layers=((NO_OP, FFN), BLOCK, (kv(1), width(1024)), (kv(2), NO_OP), (LINEAR, LINEAR), (NO_OP, NO_OP), BLOCK),
    tied=True,
)


@pytest.fixture(scope="session")
def scaled(tmp_path_factory):
    """`scaled(name)`: the directory of one of FAMILIES, or of MIXED, as `--format hf` writes it."""
    root = tmp_path_factory.mktemp("post_training")
    tokenizer = write_tokenizer(root / "tokenizer")

    def directory(name: str) -> Path:
        if not (root / name).is_dir():
            write_hf(build(name, {"mixed": MIXED, **FAMILIES}[name], tokenizer), root / name, "card")
            (root / name / "chat_template.jinja").write_text(CHATS)
        return root / name

    return directory


@pytest.fixture(scope="session")
def mixed(scaled) -> Path:
    """No attention, a fused FFN, no FFN, one matrix each, nothing."""
    return scaled("mixed")
