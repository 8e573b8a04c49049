"""Packed token sequences for building, scores, evaluation and fusion: the same for the same texts, wherever they lie."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from puzzle.base.console import progress
from puzzle.base.errors import UserError
from puzzle.data.documents import Source
from puzzle.data.tokenizer import load_tokenizer, tokenizer_hash, vocabulary
from puzzle.data.tokens import num_tokens, pack, read_source


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenData:
    """Packed sequences [num_sequences, seq_len] int32 of both splits, and the hash of all that determined them."""

    train: Tensor
    validation: Tensor
    num_documents: int
    hash: str

    def check_error_of_mean(self) -> None:
        """Raise UserError for one held-out sequence alone: over sequences there is no error of the mean then."""
        count, length = self.validation.shape
        if count < 2:
            raise UserError(
                f"the text gives one held-out sequence of {length} tokens, and an error of the mean takes 2: give more `data`, or a "
                "smaller `seq_len`"
            )

    def train_batch(self, step: int, batch_size: int) -> Tensor:
        """The step's [batch_size, seq_len] int64; past the end it starts over in a new seeded order."""
        count, rows = len(self.train), range(step * batch_size, (step + 1) * batch_size)
        return self.train[[int(_order(row // count, count)[row % count]) for row in rows]].long()


@lru_cache(maxsize=1)
def _order(epoch: int, count: int) -> np.ndarray:
    """The order of one epoch: as packed first, shuffled later."""
    return np.arange(count) if epoch == 0 else np.random.default_rng(epoch).permutation(count)


def load_tokens(
    sources: list[str],
    tokenizer_dir: Path,
    *,
    seq_len: int,
    num_train: int,
    num_validation: int,
    text_field: str = "text",
    seed: int = 0,
) -> TokenData:
    """Tokenise until `num_train` training and `num_validation` validation sequences are packed, or data ends.

    sources: directories, globs, files, or one `datasets` name. Documents are joined by the end-of-sequence token. Where
    none is held out, the last ones are. Fewer sequences than asked are fine for training (epochs follow), at least one of
    each split is needed. Raises UserError when there is no data, nothing readable in it, or less than one sequence.
    """
    tokenizer = load_tokenizer(tokenizer_dir)
    source = Source(name=f"--data {' '.join(sources)}", paths=tuple(sources), text_field=text_field)
    total, wanted = num_train + num_validation, (num_train * seq_len, num_validation * seq_len)
    with progress("tokenise", total) as bar:
        limit = vocabulary(tokenizer_dir)
        tokens = read_source(source, tokenizer, wanted, seed=seed, bar=bar, bar_steps=total, vocab_size=limit)
    if tokens.num_seen == 0:
        raise UserError(f"no text in {source.name}: every document is empty")
    tokens.lend(min(wanted[1], seq_len))
    packed = {}
    for name, split, count in (("training", tokens.train, num_train), ("validation", tokens.held_out, num_validation)):
        packed[name] = torch.from_numpy(pack([document.ids for document in split], seq_len, count))
        if len(packed[name]) == 0:
            raise UserError(
                f"{source.name} gives {num_tokens(split)} {name} tokens, less than one sequence of {seq_len}: give more "
                "text or a smaller `seq_len`"
            )
    sizes = json.dumps([tokenizer_hash(tokenizer_dir), seq_len, num_train, num_validation], allow_nan=False).encode()
    return TokenData(
        train=packed["training"],
        validation=packed["validation"],
        num_documents=tokens.num_seen,
        hash=hashlib.sha256(sizes + b"".join(tokens.keys)).hexdigest(),
    )
