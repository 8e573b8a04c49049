"""Documents in, packed token sequences out: the same documents give the same sequences, wherever they lie.

A document belongs to the validation split when the sha256 of its text says so, so a text never moves between the
splits, and documents are visited in the order of a seeded hash of their text.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from puzzle.base.console import progress
from puzzle.base.errors import UserError

TEXT_SUFFIXES = {
    ".txt",
    ".md",
    ".rst",
    ".py",
    ".pyi",
    ".c",
    ".h",
    ".cpp",
    ".hpp",
    ".cc",
    ".cu",
    ".rs",
    ".go",
    ".java",
    ".js",
    ".ts",
    ".html",
    ".css",
    ".sh",
    ".toml",
    ".yaml",
    ".yml",
    ".tex",
    ".sql",
    ".rb",
    ".jl",
}
TABLE_SUFFIXES = {".jsonl", ".parquet"}
VALIDATION_PER_10000 = 200  # 2 % of documents; examples/train_parent.py holds out the same ones


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenData:
    """Packed sequences [num_sequences, seq_len] int32 of both splits, and the hash of all that determined them."""

    train: Tensor
    validation: Tensor
    num_documents: int
    hash: str

    def train_batch(self, step: int, batch_size: int) -> Tensor:
        """The step's [batch_size, seq_len] int64; past the end it starts over in a new seeded order."""
        count = len(self.train)
        rows = np.arange(step * batch_size, (step + 1) * batch_size)
        epochs, within = rows // count, rows % count
        picked = [int(_order(int(e), count)[w]) for e, w in zip(epochs, within, strict=True)]
        return self.train[picked].long()


_ORDERS: dict[tuple[int, int], np.ndarray] = {}


def _order(epoch: int, count: int) -> np.ndarray:
    """The order of one epoch: as packed first, shuffled later."""
    if (epoch, count) not in _ORDERS:
        _ORDERS.clear()
        rows = np.arange(count)
        _ORDERS[epoch, count] = rows if epoch == 0 else np.random.default_rng(epoch).permutation(count)
    return _ORDERS[epoch, count]


def is_validation(text: str) -> bool:
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 10_000 < VALIDATION_PER_10000


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

    sources: directories, globs, files, or one `datasets` name. Documents are joined by the end-of-sequence token.
    Fewer sequences than asked are fine for training (epochs follow), at least one of each split is needed.
    Raises UserError when there is no data, nothing readable in it, or less than one sequence.
    """
    tokenizer = load_tokenizer(tokenizer_dir)
    separator = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    if separator is None:
        raise UserError(f"the tokenizer in {tokenizer_dir} has neither an end nor a begin token to join documents")
    wanted = {False: num_train * seq_len, True: num_validation * seq_len}
    streams: dict[bool, list[np.ndarray]] = {False: [], True: []}
    lengths = {False: 0, True: 0}
    digest = hashlib.sha256(json.dumps([tokenizer_hash(tokenizer_dir), seq_len, num_train, num_validation]).encode())
    seen: set[bytes] = set()
    pending: list[tuple[bool, str]] = []

    def flush() -> None:
        if not pending:
            return
        for (split, _), ids in zip(
            pending,
            tokenizer([t for _, t in pending], verbose=False, add_special_tokens=False)["input_ids"],
            strict=True,
        ):
            streams[split].append(np.array([separator, *ids], dtype=np.int32))
            lengths[split] += len(ids) + 1
        pending.clear()

    with progress("tokenise", num_train + num_validation) as bar:
        shown = 0
        for text in documents(sources, text_field, seed):
            key = hashlib.sha256(text.encode(errors="surrogatepass")).digest()
            if key in seen or not text.strip():
                continue
            seen.add(key)
            split = is_validation(text)
            if lengths[split] >= wanted[split]:
                if lengths[not split] >= wanted[not split]:
                    break
                continue  # this split is full: only the other one still needs documents
            digest.update(key)
            pending.append((split, text))
            if len(pending) >= 64:
                flush()
                done = sum(min(lengths[s], wanted[s]) for s in (False, True)) // seq_len
                bar.advance(done - shown)
                shown = done
        flush()
        bar.advance(num_train + num_validation - shown)
    if not seen:
        raise UserError(f"no text in --data {' '.join(sources)}: every document is empty")
    if lengths[True] < seq_len:
        _lend_validation(streams, lengths, wanted[True], seq_len)
    packed = {}
    for split, name in ((False, "training"), (True, "validation")):
        stream = np.concatenate(streams[split]) if streams[split] else np.empty(0, dtype=np.int32)
        count = min(len(stream), wanted[split]) // seq_len
        if count == 0:
            raise UserError(
                f"--data {' '.join(sources)} gives {len(stream)} {name} tokens, less than one sequence of "
                f"{seq_len}: give more text or a smaller --seq-len"
            )
        packed[split] = torch.from_numpy(stream[: count * seq_len].reshape(count, seq_len))
    return TokenData(train=packed[False], validation=packed[True], num_documents=len(seen), hash=digest.hexdigest())


def _lend_validation(streams: dict[bool, list], lengths: dict[bool, int], wanted: int, seq_len: int) -> None:
    """Few documents: none hashed to validation. The last training documents become validation, as whole documents."""
    while lengths[True] < min(wanted, seq_len) and len(streams[False]) > 1:
        document = streams[False].pop()
        streams[True].append(document)
        lengths[True] += len(document)
        lengths[False] -= len(document)


def load_tokenizer(directory: Path):
    """The checkpoint's tokenizer. Raises UserError when there is none."""
    from transformers import AutoTokenizer, PreTrainedConfig

    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        ours = config.get("model_type") == "puzzle"  # its config class is code of the checkpoint, which stays unread
        known = {"config": PreTrainedConfig()} if ours else {}
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, **known)
    except Exception as error:  # transformers raises OSError, ValueError, ImportError and more
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"no tokenizer can be loaded from {directory} ({reason}): put tokenizer.json beside config.json"
        ) from error


def tokenizer_hash(directory: Path) -> str:
    path = directory / "tokenizer.json"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "slow"


def documents(sources: list[str], text_field: str, seed: int) -> Iterator[str]:
    """The texts of all sources; files in an order that depends on `seed` and their relative paths alone."""
    if not sources:
        raise UserError("no data: pass --data with a directory, a glob, a .jsonl or .parquet file, or a datasets name")
    files: list[tuple[str, Path]] = []
    for source in sources:
        found = _files(source)
        if found is None:
            yield from _hub_documents(source, text_field)
        else:
            files += found
    files.sort(key=lambda item: hashlib.sha256(f"{seed}:{item[0]}".encode()).digest())
    for _, path in files:
        if path.suffix in TABLE_SUFFIXES:
            yield from _table_documents(path, text_field)
        else:
            try:
                yield path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue  # not text, or not ours to read


def _files(source: str) -> list[tuple[str, Path]] | None:
    """(relative path, path) of a source's files; None when it can only be a `datasets` name."""
    path = Path(source)
    if path.is_dir():
        suffixes = TEXT_SUFFIXES | TABLE_SUFFIXES
        found = [p for p in path.rglob("*") if p.suffix in suffixes and p.is_file()]
        if not found:
            raise UserError(
                f"--data {source} has no text files (looked for {', '.join(sorted(suffixes))}): "
                "give a glob such as 'DIR/**/*.log' for other names"
            )
        return [(str(p.relative_to(path)), p) for p in found]
    if path.is_file():
        return [(path.name, path)]
    if any(c in source for c in "*?["):
        matches = [Path(m) for m in glob.glob(source, recursive=True)]
        found = [p for p in matches if p.is_file()]
        if not found:
            raise UserError(f"--data {source} matches no file: check the pattern (quote it, and use ** for subfolders)")
        root = Path(source[: min(source.index(c) for c in "*?[" if c in source)]).parent / "x"
        return [(os.path.relpath(p, root.parent), p) for p in found]
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or path.suffix in TEXT_SUFFIXES | TABLE_SUFFIXES:
        raise UserError(f"--data {source} does not exist: give a directory, a glob, a file, or a datasets name")
    return None


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of every line that is not blank. Raises UserError for one that is not JSON."""
    with open(path, encoding="utf-8") as handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path} line {number} is not JSON ({error.msg}): mend or remove it") from error
            yield number, row


def open_parquet(path: Path) -> Any:
    """A pyarrow ParquetFile. Raises UserError without pyarrow, and for a file that is none."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"{path} needs pyarrow: pip install pyarrow, or convert it to .jsonl") from None
    try:
        return parquet.ParquetFile(path)
    except Exception as error:  # pyarrow's own error types
        raise UserError(f"{path} is not a readable parquet file ({error})") from error


def _table_documents(path: Path, text_field: str) -> Iterator[str]:
    if path.suffix == ".jsonl":
        for number, row in json_lines(path):
            if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
                fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise UserError(
                    f"{path} line {number} has no text field '{text_field}' (it has: {fields}): pass --text-field"
                )
            yield row[text_field]
        return
    table = open_parquet(path)
    if text_field not in table.schema_arrow.names:
        names = ", ".join(table.schema_arrow.names)
        raise UserError(f"{path} has no column '{text_field}' (it has: {names}): pass --text-field")
    for batch in table.iter_batches(columns=[text_field], batch_size=256):
        yield from (t for t in batch.column(0).to_pylist() if t)


def _hub_documents(name: str, text_field: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"--data {name} is no file or directory here; to read it as a datasets name, pip install 'puzzle-nas[heal]'"
        ) from None
    try:
        rows = datasets.load_dataset(name, split="train", streaming=True)
        for row in rows:
            if not isinstance(row.get(text_field), str):
                raise UserError(
                    f"dataset {name} has no text field '{text_field}' (it has: {', '.join(row)}): pass --text-field"
                )
            yield row[text_field]
    except UserError:
        raise
    except Exception as error:  # the hub client raises many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"--data {name} is neither a file here nor a dataset that can be loaded ({reason})") from error
