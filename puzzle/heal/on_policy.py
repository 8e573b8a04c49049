"""On-policy distillation, `--on-policy SHARE`: in that share of the steps the child goes on from the beginnings of the rows by itself, and learns from what the
teacher says of its own words (GKD, λ in arXiv 2306.13649); no gradient goes through the sampling.

Steps are spread evenly. A prompt has a quarter to three quarters of a row, drawn from the step's number alone; a row's random numbers from
seed, step and row: neither a stop nor the number of processes changes what is sampled. Letters: B rows, T tokens, P of them given.
"""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from torch import Tensor

from puzzle.base.device import wait_for
from puzzle.base.errors import UserError
from puzzle.blocklib.plain.part import blank
from puzzle.data.mixture import IGNORE, Stage
from puzzle.parents.structure import Structure
from puzzle.runtime.interface import check_lengths
from puzzle.runtime.model import CausalModel, load_model
from puzzle.runtime.open import DTYPES, open_runtime, pick_precision


def is_on_policy(step: int, fraction: float) -> bool:
    """Whether the child writes the rows of this step."""
    return on_policy_steps(step + 1, fraction) > on_policy_steps(step, fraction)


def on_policy_steps(num_steps: int, fraction: float) -> int:
    """How many of the first `num_steps` steps are; fraction: 0 to 1."""
    return math.floor(num_steps * fraction + 1e-9)


def prompt_length(seq_len: int, seed: int, step: int) -> int:
    """Tokens of every row that are given in this step: a quarter to three quarters of them."""
    quarter = max(1, seq_len // 4)
    return int(np.random.default_rng([seed, step]).integers(quarter, seq_len - quarter, endpoint=True))


def check_sampling(structure: Structure, stages: list[Stage], fraction: float) -> None:
    """Raise UserError for a share of the steps that is none of them, for layers that have no decode step, and for lengths at which RoPE
    would change under a cache."""
    if not on_policy_steps(count := sum(stage.num_steps for stage in stages), fraction):
        raise UserError(f"`on_policy` {fraction:g} of {count} steps is none: give a larger share, or more `tokens`")
    for sub_block in {block for _, _, block in structure}:
        blank(sub_block).new_state(1, 2, torch.empty(0, device="meta"))
    for stage in stages:
        check_lengths(structure, 1, stage.seq_len)


class _Live:
    """The weights of a model as they are now, for a copy in another precision; in the same one they are shared."""

    def __init__(self, model: CausalModel):
        self.model, self.structure = model, model.structure

    def weights(self, layer: int, slot: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = getattr(self.model.blocks[layer], slot).state_dict()
        return found

    def embedding(self) -> Tensor:
        return self.model.embedding.weight.detach()

    def final_norm(self) -> Tensor:
        return self.model.norm.weight.detach()

    def lm_head(self) -> Tensor:
        return self.model.head_weight.detach()


def continued(child: CausalModel, ids: Tensor, prompt: int, seeds: list[int], words: int, parts: int) -> Tensor:
    """The first `prompt` tokens of every row and, in place of the rest, what the child goes on with at temperature 1. ids [B, T] -> [B, T]

    seeds: of each row. words: that the teacher knows too, the first ones; no others are drawn. parts: that go through one after the other.
    """
    device, precision = child.embedding.weight.device, pick_precision(child.embedding.weight.device)
    rows, length = len(ids) // parts, ids.shape[1]
    model = load_model(_Live(child), device=device, dtype=DTYPES[precision])
    runtime = open_runtime(model, rows, length, precision, consume=True)
    noise = runtime.noise = torch.full((rows, runtime.vocab_size), math.inf, device=device)
    runtime.temperature = torch.ones(rows, 1, device=device)
    noise[:, :words] = 1
    runtime.at(0)
    step, found = runtime.replayed(runtime.step), []
    for at in range(0, len(ids), rows):
        draws = [torch.Generator(device).manual_seed(seed) for seed in seeds[at : at + rows]]
        tokens = [ids[at : at + rows, :prompt].to(device)]
        for number in range(length - prompt):
            for row, draw in enumerate(draws):
                noise[row, :words].exponential_(generator=draw)
            if number:
                step()
            else:
                runtime.prefill(tokens[0])
            tokens.append(runtime.ids[:, None].clone())
        found.append(torch.cat(tokens, dim=1))
    return torch.cat(found)


def on_policy_batch(
    child: CausalModel, batch: Tensor, first: int, step: int, seed: int, words: int, parts: int
) -> tuple[Tensor, dict[str, float]]:
    """Ids and labels [2, B, T] in place of `batch`, of which those count that the child has drawn; and what to log: tokens of the prompt,
    seconds. first: the number of the first row within the step; words, parts: as of `continued`."""
    device = child.embedding.weight.device
    wait_for(device)
    begin, (_, rows, length) = time.perf_counter(), batch.shape
    prompt = prompt_length(length, seed, step)
    seeds = [int(np.random.default_rng([seed, step, first + row]).integers(2**62)) for row in range(rows)]
    ids = continued(child, batch[0], prompt, seeds, words, parts)
    labels = torch.full_like(ids, IGNORE)
    labels[:, prompt - 1 : -1] = ids[:, prompt:]
    wait_for(device)
    return torch.stack((ids, labels)), {"prompt": prompt, "sampling_seconds": round(time.perf_counter() - begin, 4)}
