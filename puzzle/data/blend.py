"""Data blends: a YAML file that lists sources with their weights.

sources:
  - path: code/**/*.py          # directory, glob or file, relative to the blend file; or a list of them
    weight: 0.7                 # share of the tokens, relative to the other sources
    max_epochs: 4               # refuse to read any document more often
  - path: notes.jsonl
    weight: 0.1
    text_field: body
  - path: chats.jsonl
    weight: 0.2
    messages: messages          # the field with [{role, content}, …], through the tokenizer's chat template
    loss: assistant             # or all
"""

from __future__ import annotations

import glob
import math
from pathlib import Path
from typing import Any

import yaml

from puzzle.base.errors import UserError, nearest
from puzzle.base.yaml_text import parse_yaml
from puzzle.data.documents import Source

_KEYS = ("name", "path", "weight", "max_epochs", "text_field", "messages", "loss")
LOSSES = ("all", "assistant")


def read_blend(path: Path) -> list[Source]:
    """The sources of a blend file. Raises UserError, naming file, source and value, for anything wrong in it."""
    try:
        value = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"`blend` {path} does not exist: give a YAML file with a list of sources") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"`blend` {path} cannot be read ({reason}): it must be YAML") from error
    if not isinstance(value, dict):
        raise UserError(f"`blend` {path} holds no mapping: start it with `sources:` and a list below")
    for key in value:
        if key != "sources":
            raise UserError(f"`blend` {path}: unknown key '{key}'; {nearest(str(key), ['sources'])}")
    entries = value.get("sources")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"`blend` {path}: `sources` is empty; list at least one, such as `- path: text/`")
    sources = [_source(path, number, entry) for number, entry in enumerate(entries, 1)]
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"`blend` {path}: two sources are called '{name}'; give each a `name` of its own")
    return sources


def _source(blend: Path, number: int, entry: Any) -> Source:
    where = f"`blend` {blend} source {number}"
    if not isinstance(entry, dict):
        raise UserError(f"{where}: '{entry}' is no mapping; write `path: …` and `weight: …`")
    for key in entry:
        if key not in _KEYS:
            raise UserError(f"{where}: unknown key '{key}'; {nearest(str(key), _KEYS)}")
    found = entry.get("path")
    listed: list[Any] = found if isinstance(found, list) else [found]
    if not listed or not all(isinstance(p, str) and p for p in listed):
        raise UserError(f"{where}: `path` is {found!r}; give a directory, a glob or a file")
    paths = tuple(_resolve(where, blend.parent, p) for p in listed)
    weight = _number(where, "weight", entry.get("weight", 1.0))
    max_epochs = None if entry.get("max_epochs") is None else _number(where, "max_epochs", entry["max_epochs"])
    messages = "messages" if entry.get("messages") is True else entry.get("messages")
    for key in ("text_field", "messages", "name"):
        if not isinstance(entry.get(key) or "", str) and entry.get(key) is not True:
            raise UserError(f"{where}: '{key}' is {entry[key]!r}; give a name")
    loss = entry.get("loss", "all")
    if loss not in LOSSES:
        raise UserError(f"{where}: loss '{loss}'; {nearest(str(loss), LOSSES)}")
    if loss == "assistant" and not messages:
        raise UserError(f"{where}: `loss: assistant` needs chats; add `messages: FIELD`")
    return Source(
        name=entry.get("name") or ", ".join(listed),
        paths=paths,
        weight=weight,
        max_epochs=max_epochs,
        text_field=entry.get("text_field") or "text",
        messages=messages or None,
        loss=loss,
    )


def _number(where: str, key: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # YAML reads 1e-1 as text
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(f"{where}: {key} {value}; it must be a number above 0")
    return number


def _resolve(where: str, root: Path, text: str) -> str:
    path = Path(text).expanduser()
    path = path if path.is_absolute() else root / path
    if not path.exists() and not (any(c in text for c in "*?[") and glob.glob(str(path), recursive=True)):
        raise UserError(f"{where}: path '{text}' does not exist (looked in {root.absolute()}); check the spelling")
    return str(path)
