"""Answers of a child to many questions at once, as the scripts beside this one ask for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from puzzle.base.errors import UserError
from puzzle.data.tokenizer import load_tokenizer
from puzzle.parents.opened import open_model


def check_room(child: str, chats: list[list[dict[str, str]]], max_new_tokens: int) -> None:
    """Raise UserError where an answer could pass the child's context: it would go on, and say nothing that counts."""
    room, tokenizer = open_model(child).structure.max_length, load_tokenizer(Path(child))
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    longest = max(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
    if longest + max_new_tokens > room:
        raise UserError(
            f"`max_new_tokens` {max_new_tokens} after a prompt of {longest} tokens are more than the child's context of {room}: give at "
            "most what is left, or leave the longest prompts out"
        )


class Child:
    """An exported child on the GPU, if there is one."""

    def __init__(self, path: str):
        open_model(path)  # refuses in one line what is no model
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype="auto").to(device).eval()
        self.tokenizer = load_tokenizer(Path(path))

    @torch.no_grad()
    def answers(self, chats: list[list[dict[str, str]]], max_new_tokens: int, samples: int | None) -> list[list[str]]:
        """Of each chat: `samples` answers drawn at temperature 1, or the greedy one where that is None."""
        tokenizer = self.tokenizer
        texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        given: Any = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        how: dict[str, Any] = {"do_sample": False}
        if samples is not None:
            how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": samples}
        more = {"max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
        drawn = self.model.generate(**given.to(self.model.device), **how, **more)
        told = tokenizer.batch_decode(drawn[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
        each = samples or 1
        return [told[i : i + each] for i in range(0, len(told), each)]
