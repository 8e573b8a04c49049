"""The tokenizer of a checkpoint: loading it, telling two apart, and the token that joins documents."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from puzzle.base.errors import UserError, first_line


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
    path = directory / "tokenizer.json"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "slow"


def separator_id(tokenizer: Any) -> int:
    """The token before each document: the end of a sequence, else its begin. Raises UserError when it has neither."""
    for token_id in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        if token_id is not None:
            return token_id
    raise UserError(f"the tokenizer in {tokenizer.name_or_path} has neither an end nor a begin token to join documents")
