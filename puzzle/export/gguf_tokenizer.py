"""A Hugging Face byte-level BPE tokenizer as GGUF metadata, and which of llama.cpp's pre-tokenizers splits as it does.

llama.cpp does not read the splitting rule from the file: it knows a list of rules by name (`tokenizer.ggml.pre`). The
rule written in tokenizer.json is therefore looked up here, letter by letter; one that is not known is refused, because
a wrong one gives other tokens without any error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from puzzle.base.errors import UserError
from puzzle.base.files import parse_json
from puzzle.data.tokenizer import load_tokenizer, tokenizer_files

_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# (splits in order, ignore_merges) -> tokenizer.ggml.pre
_PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_CASELESS + r"\p{N}{1,3}" + _REST,), True): "llama-bpe",
    ((_CASELESS + r"\p{N}{1,3}" + _REST,), False): "smaug-bpe",
    ((_CASELESS + r"\p{N}" + _REST,), False): "qwen2",
    ((_GPT2,), False): "gpt-2",
    (("digits", _GPT2), False): "smollm",
}


def tokenizer_metadata(directory: Path | None, vocab_size: int, special: dict[str, Any]) -> dict[str, Any]:
    """The `tokenizer.*` keys of a GGUF file for the Hugging Face tokenizer in `directory`.

    special: {"bos": id, "eos": id or list of ids, "pad": id}, used where tokenizer_config.json names no such token. Ids
    that no token has are named [PAD<id>] and marked unused. Without a tokenizer the model is "none": llama.cpp then
    takes and gives ids only. Raises UserError for a tokenizer that llama.cpp would not reproduce.
    """
    if directory is None or not tokenizer_files(directory):
        return {"tokenizer.ggml.model": "none"}
    path = directory / "tokenizer.json"
    tokenizer = _read(path) if path.is_file() else _converted(directory)
    settings = _read(directory / "tokenizer_config.json") if (directory / "tokenizer_config.json").is_file() else {}
    pre = pre_tokenizer(tokenizer, path)
    ids = dict(tokenizer["model"]["vocab"])
    kinds = dict.fromkeys(ids.values(), 1)  # 1 normal, 3 control, 4 user-defined, 5 unused
    for added in tokenizer.get("added_tokens") or []:
        ids[added["content"]] = added["id"]
        kinds[added["id"]] = 3 if added.get("special") else 4
    if max(ids.values()) >= vocab_size:
        raise UserError(
            f"{path} has token id {max(ids.values())}, but config.json says vocab_size {vocab_size}: "
            "the tokenizer does not belong to these weights"
        )
    names = {number: token for token, number in ids.items()}
    merges = tokenizer["model"]["merges"]
    found: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [names.get(number, f"[PAD{number}]") for number in range(vocab_size)],
        "tokenizer.ggml.token_type": [kinds.get(number, 5) for number in range(vocab_size)],
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        "tokenizer.ggml.add_bos_token": _adds_bos(tokenizer, settings),
        "tokenizer.ggml.add_eos_token": False,
    }
    for role, key in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("pad", "padding_token_id")):
        number = _special(settings.get(f"{role}_token"), special.get(role), ids)
        if number is not None:
            found[f"tokenizer.ggml.{key}"] = number
    template = settings.get("chat_template")
    if (directory / "chat_template.jinja").is_file():
        template = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(template, str):
        found["tokenizer.chat_template"] = template
    return found


def pre_tokenizer(tokenizer: dict[str, Any], path: Path) -> str:
    """llama.cpp's name for the way this tokenizer.json splits text. Raises UserError when it has none."""
    model = tokenizer["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        kind = "SentencePiece-like BPE (byte_fallback)" if model.get("type") == "BPE" else model.get("type")
        raise UserError(
            f"{path} is a {kind} tokenizer: `format` gguf writes byte-level BPE only; "
            "use `format` nemotron-nas or hf for this child"
        )
    steps = tokenizer.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    splits: list[str] = []
    for step in steps:
        if step.get("type") == "Split":
            isolated = step.get("behavior") == "Isolated" and not step.get("invert")
            splits.append((isolated and step["pattern"].get("Regex")) or json.dumps(step, allow_nan=False))
        elif step.get("type") == "Digits" and step.get("individual_digits"):
            splits.append("digits")
        elif step.get("type") == "ByteLevel" and not step.get("add_prefix_space"):
            splits += [_GPT2] if step.get("use_regex", True) else []
        else:
            splits.append(json.dumps(step, allow_nan=False))
    name = _PRE_TOKENIZERS.get((tuple(splits), bool(model.get("ignore_merges"))))
    if name is None:
        raise UserError(
            f"{path} splits text by a rule that llama.cpp has no name for ({' then '.join(splits) or 'none'}): it would "
            "give other tokens; use `format` nemotron-nas or hf for this child"
        )
    return name


def _adds_bos(tokenizer: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether encoding puts the BOS token first: by the post-processor's template where there is one."""
    if "add_bos_token" in settings:
        return bool(settings["add_bos_token"])
    post = tokenizer.get("post_processor") or {}
    processors = post["processors"] if post.get("type") == "Sequence" else [post]
    return any(
        "SpecialToken" in (p.get("single") or [{}])[0] for p in processors if p.get("type") == "TemplateProcessing"
    )


def _special(token: Any, fallback: Any, ids: dict[str, int]) -> int | None:
    """The id of a special token: by its name in tokenizer_config.json, else the first id in config.json."""
    name = token.get("content") if isinstance(token, dict) else token
    if name in ids:
        return ids[name]
    return fallback[0] if isinstance(fallback, list) else fallback


def _converted(directory: Path) -> dict[str, Any]:
    """tokenizer.json's content of a tokenizer that has none, such as vocab.json and merges.txt, by transformers."""
    backend = getattr(load_tokenizer(directory), "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"the tokenizer in {directory} has no tokenizer.json, and transformers makes none of it: `format` gguf needs one; "
            "use `format` nemotron-nas or hf for this child"
        )
    return json.loads(backend.to_str())


def _read(path: Path) -> dict[str, Any]:
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): download the checkpoint again") from error
