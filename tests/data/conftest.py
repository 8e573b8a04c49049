"""Small data of every kind, and tokenizers whose ids no training and no version decides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def folder(tmp_path, corpus):
    """Text, another field, chats; and a function that writes a blend of them."""
    (tmp_path / "code").mkdir()
    for path in sorted(corpus.glob("*.py"))[:20]:
        (tmp_path / "code" / path.name).write_text(path.read_text())
    rows = [{"body": f"note {i} " + "words and more words " * 20} for i in range(60)]
    (tmp_path / "notes.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    (tmp_path / "empty.jsonl").write_text('{"text": "  "}\n')
    chats = [
        {"messages": [{"role": "user", "content": f"what is {i}?"}, {"role": "assistant", "content": f"{i} it is"}] * 3}
        for i in range(60)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps(r) for r in chats))

    def write(text: str):
        path = tmp_path / "blend.yaml"
        path.write_text(text)
        return path

    return write


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory) -> Path:
    """A directory with a tokenizer of one token a byte and a chat template: its ids, and its file, are always the same."""
    directory = tmp_path_factory.mktemp("bytes")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"id": 256, "content": "<|endoftext|>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    model = {"type": "BPE", "vocab": {letter: i for i, letter in enumerate([*letters, end["content"]])}, "merges": []}
    whole = {"version": "1.0", "added_tokens": [end | flags], "pre_tokenizer": level, "decoder": level, "model": model}
    (directory / "tokenizer.json").write_text(json.dumps(whole))
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(facts))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return directory


@pytest.fixture
def tokenizer(byte_model):
    return AutoTokenizer.from_pretrained(byte_model)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """200 texts, the last 20 of them repeats; 6 are held out."""
    texts = [f"document {i}: " + "some words " * (i % 13) + "ünïcode" * (i % 3) for i in range(180)]
    return [*texts, *texts[40:60]]
