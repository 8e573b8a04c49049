"""GRPO of a child on questions with checkable answers: a reward for the answer, one for the format of the mode, KL to where it began.

    python examples/post_training/grpo.py healed rated.jsonl --out rl --group 16 --prompts-per-step 8 --steps 200

Rows as curriculum.py has them; where all have a `pass_rate`, batches go from easy to hard. Every prompt is asked with the system
prompt `detailed thinking on`, or `off` for the share --off. Several GPUs: `accelerate launch`. The
same command goes on from the newest checkpoint, one every --save-every steps, which stands in OUT/.part until the child is whole: on a
CPU with the bits of a run that was left alone.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import click
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from curriculum import by_difficulty, read_rows
from puzzle.base.errors import UserError
from puzzle.base.files import content_hash
from puzzle.data.tokenizer import load_tokenizer
from puzzle.parents.opened import open_model
from resuming import train
from rewards import COUNT, SEED, Script, is_made, prompt, rewards
from sampling import check_room

ASKED = "grpo.json"  # what a run was asked for
FREE = ("save_every", "sandbox")  # changes nothing of what is learned


def ordered(
    rows: list[dict[str, Any]], per_step: int, steps: int, easiest: float, hardest: float, seed: int
) -> list[dict[str, Any]]:
    """The prompts of all steps."""
    if rated := sum("pass_rate" in row for row in rows):
        if rated < len(rows):
            raise UserError(
                f"{rated} of {len(rows)} prompts have a `pass_rate`: let curriculum.py rate all of them, or none"
            )
        rates = [row["pass_rate"] for row in rows]
        batches = by_difficulty(rates, per_step, steps, easiest=easiest, hardest=hardest, seed=seed)
        return [rows[i] for batch in batches for i in batch]
    if hardest:
        raise UserError("`hardest` goes by a `pass_rate`, which no prompt has: let curriculum.py rate them")
    drawn: list[dict[str, Any]] = []
    shuffle = random.Random(seed)
    while len(drawn) < per_step * steps:
        drawn += shuffle.sample(rows, len(rows))
    return drawn[: per_step * steps]


@click.command(cls=Script)
@click.argument("child")
@click.argument("prompts", type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--steps", type=COUNT, default=200, show_default=True)
@click.option(
    "--group",
    type=click.IntRange(min=2),
    default=16,
    show_default=True,
    help="Answers to a prompt, which are compared with each other.",
)
@click.option("--prompts-per-step", type=COUNT, default=8, show_default=True)
@click.option("--accumulate", type=COUNT, default=1, help="Micro-batches of a step.")
@click.option("--max-new-tokens", type=COUNT, default=1024, show_default=True)
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), default=1e-6, show_default=True)
@click.option(
    "--beta", type=click.FloatRange(min=0), default=0.02, show_default=True, help="Of KL(child‖CHILD as it was)."
)
@click.option(
    "--off", type=click.FloatRange(0, 1), default=0.2, show_default=True, help="Share of prompts without thinking."
)
@click.option("--easiest", default=0.75, show_default=True, help="Prompts that are solved more often are dropped.")
@click.option(
    "--hardest",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Prompts that are solved less often are dropped, e.g. 0.1: a group without a right answer teaches nothing.",
)
@click.option("--lora", type=COUNT, help="Train adapters of this rank, and merge them at the end.")
@click.option("--vllm", is_flag=True, help="Sample in vLLM on the same GPU, through puzzle's plug-in.")
@click.option("--sandbox", help="A command that runs the program on its standard input, for prompts with tests.")
@click.option("--save-every", type=COUNT, default=25, show_default=True, help="Steps between checkpoints.")
@click.option("--seed", type=SEED, default=0)
def main(child: str, prompts: Path, out: Path, **o: Any) -> None:
    """Train CHILD on PROMPTS and write it to --out."""
    rows, at_once = read_rows(prompts, o["sandbox"]), o["group"] * o["prompts_per_step"]
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    asked = {"child": open_model(child).fingerprint(), "prompts": content_hash(rows), "processes": processes}
    asked |= {name: value for name, value in o.items() if name not in FREE}
    if at_once % o["accumulate"]:
        raise UserError(
            f"`accumulate` {o['accumulate']}: {at_once} answers of a step cannot be split into so many parts"
        )
    if out.resolve() == Path(child).resolve():
        raise UserError(f"`out` {out} is the child that is trained: give another directory")
    part = out / ".part"
    if is_made(out, ASKED, asked, part.name):
        shutil.rmtree(part, ignore_errors=True)  # killed once it was there
        return
    off, drawn = random.Random(o["seed"]), []
    for row in ordered(rows, o["prompts_per_step"], o["steps"], o["easiest"], o["hardest"], o["seed"]):
        thinking = off.random() >= o["off"]
        question = {"prompt": prompt(row["question"], thinking), "thinking": thinking}
        drawn.append({**question, "answer": str(row.get("answer", "")), "tests": row.get("tests") or ""})
    check_room(child, [one["prompt"] for one in drawn], o["max_new_tokens"])
    gpu = torch.cuda.is_available()
    config = GRPOConfig(
        output_dir=str(part),
        max_steps=o["steps"],
        per_device_train_batch_size=at_once // o["accumulate"],
        gradient_accumulation_steps=o["accumulate"],
        num_generations=o["group"],
        max_completion_length=o["max_new_tokens"],
        learning_rate=o["lr"],
        beta=o["beta"],
        shuffle_dataset=False,  # the order is the curriculum
        use_vllm=o["vllm"],
        trust_remote_code=True,
        use_cpu=not gpu,
        bf16=gpu,
        report_to="none",
        save_strategy="steps",
        save_steps=o["save_every"],
        save_total_limit=1,
        logging_steps=1,
        seed=o["seed"],
    )
    adapters = LoraConfig(r=o["lora"], target_modules="all-linear", task_type="CAUSAL_LM") if o["lora"] else None
    trainer = GRPOTrainer(
        child,
        rewards(o["sandbox"]),
        config,
        train_dataset=Dataset.from_list(drawn),
        processing_class=load_tokenizer(Path(child)),
        peft_config=adapters,
    )
    whole = train(trainer, part, ASKED, asked)
    if trainer.is_world_process_zero():
        for path in sorted(whole.iterdir(), key=lambda path: path.name == "config.json"):
            path.replace(out / path.name)  # the last one says that all are there
        shutil.rmtree(part)
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
