"""The tokenizer of a checkpoint: loading it, telling two apart, and the token that joins documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from puzzle.base.errors import UserError, first_line
from puzzle.base.files import content_hash, file_hash, read_any

TOKENIZER_FILES = (
    "tokenizer*", "*token*.json", "tekken.json", "vocab*", "merges*", "*.model", "*.spm", "*.tiktoken", "normalizer.json",
    "chat_template*", "additional_chat_templates/*", "tokenization_*.py",
)  # fmt: skip


def tokenizer_files(directory: Path) -> list[Path]:
    """What a checkpoint's tokenizer and its chat templates consist of."""
    found = {path for pattern in TOKENIZER_FILES for path in directory.glob(pattern)}
    return sorted(path for path in found if path.is_file())


def load_tokenizer(directory: Path) -> Any:
    """The checkpoint's tokenizer. Raises UserError when there is none."""
    from transformers import AutoTokenizer, PreTrainedConfig

    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        ours = config.get("model_type") == "puzzle"  # its config class is code of the checkpoint, which stays unread
        known = {"config": PreTrainedConfig()} if ours else {}
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, **known)
    except Exception as error:  # transformers raises OSError, ValueError, ImportError and more
        raise UserError(
            f"no tokenizer can be loaded from {directory} ({first_line(error)}): put tokenizer.json beside config.json"
        ) from error


def tokenizer_hash(directory: Path) -> str:
    """Of tokenizer.json, or of all files of a tokenizer that has none."""
    path = directory / "tokenizer.json"
    if path.is_file():
        return file_hash(path)
    return content_hash([(found.name, file_hash(found)) for found in tokenizer_files(directory)])


def same_tokenizer(one: Path, other: Path) -> bool:
    """Whether two checkpoints give the same words the same numbers. Raises UserError where one of them has no tokenizer."""
    if tokenizer_hash(one) == tokenizer_hash(other):
        return True
    return bool(load_tokenizer(one).get_vocab() == load_tokenizer(other).get_vocab())


def vocabulary(directory: Path) -> int | None:
    """The checkpoint's `vocab_size`; None where its config.json says none."""
    path = directory / "config.json"
    found = read_any(path, "puzzle export").get("vocab_size") if path.is_file() else None
    return found if isinstance(found, int) else None


def separator_id(tokenizer: Any) -> int:
    """The token before each document: the end of a sequence, else its begin. Raises UserError when it has neither."""
    for token_id in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        if token_id is not None:
            return token_id
    raise UserError(f"the tokenizer in {tokenizer.name_or_path} has neither an end nor a begin token to join documents")
