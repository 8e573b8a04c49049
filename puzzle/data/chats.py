"""Chats: rows of {role, content} messages, as text through the tokenizer's chat template, with the assistant's part of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from puzzle.base.errors import UserError, first_line
from puzzle.data.documents import Source
from puzzle.data.files import in_seeded_order, is_table, list_files, read_field, whole_text

Span = tuple[int, int]  # [start, end) in characters


def chats(source: Source, tokenizer: Any, seed: int) -> Iterator[tuple[str, list[Span]]]:
    """Text and the assistant's spans of every row of the source's tables, files in a seeded order.

    Raises UserError when there are no such files, for a row that is no chat, and as `render_chat` does.
    """
    files = [path for place in source.paths for _, path in list_files(place) or [] if is_table(path)]
    if not files:
        raise UserError(
            f"source '{source.name}' has no .jsonl, .ndjson, .json or .parquet file: chats are read from these alone"
        )
    for path in in_seeded_order([(path.name, path) for path in files], seed):
        for where, messages, names in read_field(path, str(source.messages)):
            if not isinstance(messages, list) or not all(
                isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str | list)
                for m in messages
            ):
                raise UserError(
                    f"{where} has no list of {{role, content}} in field '{source.messages}' "
                    f"(it has: {', '.join(names)}): set `messages`"
                )
            joined = [m | {"content": _joined(m["content"], f"{where} turn {n}")} for n, m in enumerate(messages, 1)]
            yield render_chat(tokenizer, joined, where)


def _joined(content: str | list[Any], where: str) -> str:
    """The text of a turn, which may come in parts {type: text, text}. Raises UserError for a part of another kind."""
    if isinstance(content, str):
        return content
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise UserError(
                f"{where} has a part of type '{kind}': only {{type: text, text: …}} is read; remove the row"
            )
    return "".join(part["text"] for part in content)


def render_chat(tokenizer: Any, messages: list[dict[str, Any]], where: str) -> tuple[str, list[Span]]:
    """The chat as text, and the character spans [start, end) that the assistant writes, its end-of-turn mark included.

    A turn's span is what the template adds to the prompt for it. Raises UserError when the tokenizer has no template, the
    template refuses the chat, or renders earlier turns differently once later ones follow.
    """

    def render(count: int, prompt: bool) -> str:
        try:
            return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # jinja's own error types, or transformers' when there is no template
            raise UserError(
                f"{where}: the tokenizer's chat template does not take this chat ({first_line(error)})"
            ) from error

    if not tokenizer.chat_template:
        raise UserError(f"{where}: the tokenizer has no chat template; add chat_template.jinja beside tokenizer.json")
    text = whole_text(where, render(len(messages), False))
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(index, True) if index else ""
        after = render(index + 1, False)
        if not text.startswith(after) or not after.startswith(before):
            raise UserError(
                f"{where}: the chat template renders turn {index + 1} differently when others follow, so that its tokens "
                "cannot be told apart: split the chat into one row per assistant turn"
            )
        spans.append((len(before), len(after.rstrip())))
    return text, spans


def within(offsets: list[Span], spans: list[Span]) -> np.ndarray:
    """Which tokens, given by their character offsets, begin inside one of the spans. [num_tokens] bool"""
    begins = np.array([begin for begin, _ in offsets], dtype=np.int64)
    found = np.zeros(len(begins), dtype=bool)
    for start, end in spans:
        found |= (begins >= start) & (begins < end)
    return found
