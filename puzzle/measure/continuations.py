"""How models go on from a prompt, side by side: sampled, since a small parent under greedy decoding repeats itself.

Letters: T tokens, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from puzzle.base.errors import UserError
from puzzle.base.units import check_text
from puzzle.data.tokenizer import load_tokenizer
from puzzle.parents.structure import Structure
from puzzle.runtime.model import CausalModel

TEMPERATURE = 0.7
NEW_TOKENS = 48
SEED = 0  # of every prompt and model anew, so that all draw the same numbers


def encode(prompts: Sequence[str], directory: Path, structure: Structure) -> list[list[int]]:
    """Token ids of each prompt. Raises UserError for one that gives none, or leaves no room for the continuation."""
    for prompt in prompts:
        check_text("prompts", prompt)
    tokenizer = load_tokenizer(directory)
    found = [tokenizer(prompt, verbose=False)["input_ids"] for prompt in prompts]
    for prompt, ids in zip(prompts, found, strict=True):
        if not ids:
            raise UserError(f"`prompts` has {prompt!r}, which the tokenizer in {directory} makes no token of")
        if max(ids) >= structure.vocab_size:
            raise UserError(
                f"`prompts` has {prompt!r}: the tokenizer in {directory} gives token id {max(ids)}, but config.json says "
                f"vocab_size {structure.vocab_size}"
            )
        if len(ids) + NEW_TOKENS > structure.max_length:
            raise UserError(
                f"`prompts` has one of {len(ids)} tokens: with {NEW_TOKENS} more they exceed the parent's context of "
                f"{structure.max_length}; shorten it"
            )
    return found


@torch.inference_mode()
def continuations(models: Mapping[str, CausalModel], prompts: Sequence[str], directory: Path) -> dict[str, Any]:
    """{"temperature", "seed", "new_tokens", "texts": [{"prompt", and of each model's name its continuation}]}

    directory: of the tokenizer that the models share. Every token is from a pass over the whole text, without a cache.
    """
    tokenizer = load_tokenizer(directory)
    structure = next(iter(models.values())).structure
    texts = []
    for prompt, ids in zip(prompts, encode(prompts, directory, structure), strict=True):
        told = {name: tokenizer.decode(_sampled(model, ids, tokenizer.eos_token_id)) for name, model in models.items()}
        texts.append({"prompt": prompt} | told)
    return {"temperature": TEMPERATURE, "seed": SEED, "new_tokens": NEW_TOKENS, "texts": texts}


def _sampled(model: CausalModel, prompt: list[int], end: int | None) -> list[int]:
    """Up to NEW_TOKENS, or up to the `end` that is left out."""
    generator, ids = torch.Generator().manual_seed(SEED), list(prompt)
    while len(ids) < len(prompt) + NEW_TOKENS:
        hidden = model.hidden(torch.tensor([ids], device=model.head_weight.device))
        weights = (model.logits(hidden[0, -1]).float() / TEMPERATURE).softmax(-1).cpu()  # [V]
        ids.append(int(torch.multinomial(weights, 1, generator=generator)))
        if ids[-1] == end:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]
