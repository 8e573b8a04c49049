"""Supervised fine-tuning of a child on chats, in stages, with reasoning switched by the system prompt.

    python examples/post_training/sft.py examples/post_training/stages.yaml --child healed --out sft

A stage names a blend file of `puzzle heal` whose sources have `messages`, and `tokens` to draw from it: sources in proportion to their
weights, none more often than its `max_epochs`. A chat whose answers hold <think>…</think> gets the system prompt `detailed
thinking on`, any other `detailed thinking off`. The loss is the mean over the assistant's tokens; chats are packed without padding.
Several GPUs: `accelerate launch`. The same command goes on where it was: finished stages are left alone, and another one goes on
from its newest checkpoint, one every --save-every steps, which stands in OUT/.NAME.part: on a CPU with the bits of a run that was left alone.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from puzzle.base.errors import UserError
from puzzle.base.units import parse_count
from puzzle.data.blend import read_blend
from puzzle.data.chats import render_chat, within
from puzzle.data.documents import Source
from puzzle.data.files import list_files, read_field
from puzzle.data.tokenizer import load_tokenizer
from puzzle.parents.grown import FILE, new_tensors
from puzzle.parents.opened import open_model
from resuming import train
from rewards import COUNT, MODES, SEED, Script, check_same, is_made

ASKED = "sft.json"  # what a stage was made of
USUAL = {"max_length": 8192, "batch_size": 32, "lr": 1e-5, "tokens": "10M"}


def read_stages(path: Path) -> list[dict[str, Any]]:
    """Stages with all their keys, numbers as such. Raises UserError for anything else."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())})") from error
    found, given = [], value.get("stages") if isinstance(value, dict) else None
    if not isinstance(given, list) or not given or not all(isinstance(one, dict) for one in given):
        raise UserError(f"{path}: must hold `stages`, a list of sections, each with a name and a blend")
    for number, one in enumerate(given, 1):
        told = f"{path} stage {number}"
        if unknown := sorted(set(one) - {"name", "blend", *USUAL}):
            raise UserError(f"{told}: unknown key '{unknown[0]}'; known: name, blend, {', '.join(USUAL)}")
        stage = {**USUAL, **one}
        if not re.fullmatch(r"[\w-]+", str(stage.get("name", ""))) or stage["name"] in [s["name"] for s in found]:
            raise UserError(f"{told}: name {stage.get('name')}: a name of its own, of letters, digits, '-' and '_'")
        if not isinstance(stage.get("blend"), str) or not (path.parent / stage["blend"]).is_file():
            raise UserError(f"{told}: blend {stage.get('blend')}: no such file beside {path.name}")
        for key in ("tokens", "max_length", "batch_size"):
            stage[key] = parse_count(key, str(stage[key]))
        try:
            stage["lr"] = float(stage["lr"])
        except (TypeError, ValueError):
            stage["lr"] = 0.0
        if not 0 < stage["lr"] < 1:
            raise UserError(f"{told}: lr {one['lr']}: must be a number between 0 and 1")
        found.append(stage | {"name": str(stage["name"])})
    return found


def with_mode(messages: list[dict[str, str]], where: str) -> list[dict[str, str]]:
    """The chat with the system prompt of its mode before its own. Raises UserError where answers and prompt contradict each other."""
    found = {"<think>" in m["content"] for m in messages if m["role"] == "assistant"}
    if len(found) != 1:
        raise UserError(f"{where}: all answers of a chat think, or none does, and there is one: split the chat")
    [thinks] = found
    own, rest = (messages[0]["content"], messages[1:]) if messages[0]["role"] == "system" else ("", messages)
    if own.startswith(MODES[not thinks]):
        raise UserError(f"{where}: the system prompt says '{MODES[not thinks]}', the answers do otherwise")
    said = own if own.startswith(MODES[thinks]) else f"{MODES[thinks]}\n\n{own}".strip()
    return [{"role": "system", "content": said}, *rest]


def chats(source: Source, tokenizer: Any, max_length: int) -> list[dict[str, list[int]]]:
    """Tokens of every chat that fits, and a mask of the assistant's."""
    if not source.messages:
        raise UserError(f"source '{source.name}' is plain text: add `messages: FIELD`, or use `puzzle heal`")
    rows, found = 0, []
    for _, path in [file for place in source.paths for file in list_files(place) or []]:
        for where, messages, _ in read_field(path, source.messages):
            text, spans = render_chat(tokenizer, with_mode(messages, where), where)
            coded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
            rows += 1
            if len(coded["input_ids"]) <= max_length:
                mask = within(coded["offset_mapping"], spans).astype(int).tolist()
                found.append({"input_ids": coded["input_ids"], "assistant_masks": mask})
    if not found:
        raise UserError(f"source '{source.name}' has no chat of at most `max_length` {max_length} tokens")
    click.echo(
        f"{source.name}: {len(found)} chats; {rows - len(found)} are longer than {max_length} tokens and left out"
    )
    return found


def draw(sources: list[Source], pools: list[list[dict]], tokens: int, seed: int) -> Iterator[dict]:
    """Chats until there are `tokens`: always from the source that is furthest behind its weight."""
    used, orders, read = [0.0] * len(pools), [[] for _ in pools], [0] * len(pools)
    shuffle = random.Random(seed)
    while sum(used) < tokens:
        i = min(range(len(pools)), key=lambda i: used[i] / sources[i].weight)
        limit = sources[i].max_epochs
        if limit is not None and read[i] >= limit * len(pools[i]):
            raise UserError(
                f"source '{sources[i].name}' would be read more often than its max_epochs {limit:g}: lower `tokens` "
                "or its weight"
            )
        orders[i] = orders[i] or shuffle.sample(pools[i], len(pools[i]))
        row = orders[i].pop()
        read[i] += 1
        used[i] += len(row["input_ids"])
        yield row


@click.command(cls=Script)
@click.argument("stages", type=click.Path(exists=True, path_type=Path))
@click.option("--child", required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--lora", type=COUNT, help="Train adapters of this rank, and merge them after each stage.")
@click.option("--new-only", is_flag=True, help="Train what `puzzle grow` added; the rest stays.")
@click.option("--save-every", type=COUNT, default=100, show_default=True, help="Steps between checkpoints.")
@click.option("--seed", type=SEED, default=0)
def main(stages: Path, child: str, out: Path, lora: int | None, new_only: bool, save_every: int, seed: int) -> None:
    """Train --child through STAGES; the child of each stands in OUT/NAME."""
    if new_only and (lora or not new_tensors(Path(child))):
        raise UserError(f"`new_only` needs a --child of `puzzle grow`, and no `lora`: {child}")
    read, processes = read_stages(stages), int(os.environ.get("WORLD_SIZE", "1"))
    for stage in read:
        if stage["batch_size"] % processes:
            told = f"batch_size {stage['batch_size']} is no multiple of {processes} processes"
            raise UserError(f"{stages} stage {stage['name']}: {told}")
    for stage in read:
        blend, target = stages.parent / stage["blend"], out / stage["name"]
        asked = {"child": open_model(child).fingerprint(), "stage": stage, "blend": blend.read_text(encoding="utf-8")}
        asked |= {"lora": lora, "new_only": new_only, "seed": seed, "processes": processes}
        part = out / f".{stage['name']}.part"
        if is_made(target, ASKED, asked):
            shutil.rmtree(part, ignore_errors=True)  # killed once it was there
            child = str(target)
            continue
        if (part / ASKED).is_file():
            check_same(part / ASKED, asked, f"{target}, which is not finished,")
        tokenizer, sources = load_tokenizer(Path(child)), read_blend(blend)
        pools = [chats(source, tokenizer, stage["max_length"]) for source in sources]
        rows = list(draw(sources, pools, stage["tokens"], seed))
        gpu = torch.cuda.is_available()
        config = SFTConfig(
            output_dir=str(part),
            num_train_epochs=1,
            per_device_train_batch_size=1,  # a row of packed chats
            gradient_accumulation_steps=stage["batch_size"] // processes,
            max_length=stage["max_length"],
            packing=True,
            learning_rate=stage["lr"],
            lr_scheduler_type="cosine",
            trust_remote_code=True,
            use_cpu=not gpu,
            bf16=gpu,
            report_to="none",
            save_strategy="steps",
            save_steps=save_every,
            save_total_limit=1,
            logging_steps=1,
            seed=seed,
        )
        adapters = LoraConfig(r=lora, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
        data = Dataset.from_list(rows)
        trainer = SFTTrainer(child, config, train_dataset=data, processing_class=tokenizer, peft_config=adapters)
        new = new_tensors(Path(child)) if new_only else frozenset()
        for name, parameter in trainer.model.named_parameters() if new_only else ():
            parameter.requires_grad_(parameter.requires_grad and name in new)
        whole = train(trainer, part, ASKED, asked)
        if trainer.is_world_process_zero():
            if (grown := Path(child) / FILE).is_file():
                shutil.copy(grown, whole)
            whole.replace(target)  # a stage is there as a whole, or not
            shutil.rmtree(part)
        trainer.accelerator.wait_for_everyone()
        child = str(target)


if __name__ == "__main__":
    main()
