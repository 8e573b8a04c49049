"""A tiny child with every kind of layer and a chat template, for TRL's trainers."""

from __future__ import annotations

from pathlib import Path

import pytest

from puzzle.blocklib.none import NO_OP
from puzzle.export.hf import write_hf
from tiny_children import BLOCK, FFN, LINEAR, Tiny, build, kv, width, write_tokenizer

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
def mixed(tmp_path_factory) -> Path:
    """No attention, a fused FFN, no FFN, one matrix each, nothing: as `--format hf` writes them."""
    root = tmp_path_factory.mktemp("post_training")
    write_hf(build("mixed", MIXED, write_tokenizer(root / "tokenizer")), root / "mixed", "card")
    (root / "mixed" / "chat_template.jinja").write_text(CHATS)
    return root / "mixed"
