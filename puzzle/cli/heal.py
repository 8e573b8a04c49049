"""`puzzle heal`"""

from __future__ import annotations

from pathlib import Path

import click

from puzzle.base.units import bytes_text, parse_count, seconds_text
from puzzle.cli import options
from puzzle.cli.modes import Mode, Verb

MODES = (
    Mode("by one process, without torchrun", lambda p: options.alone(), unused="parallel"),
    Mode("with `blend`, whose sources name their own", lambda p: p["blend"] is not None, unused="text_field"),
    Mode("with `stages`, which say both", lambda p: p["stages"] is not None, unused="tokens seq_len"),
    Mode(
        "with `kl_weight` 0", lambda p: p["kl_weight"] == 0, unused="temperature reverse_kl teacher_logits align_tokens"
    ),
    Mode("without `teacher_logits`", lambda p: p["teacher_logits"] is None, unused="top_k"),
    Mode(
        "with `kl_weight` 0 and `cosine_weight` 0",
        lambda p: p["kl_weight"] == p["cosine_weight"] == 0 < p["lm_weight"],
        unused="teacher teacher_device on_policy",
    ),
)


@click.command("heal", cls=Verb, modes=MODES)
@click.argument("child")
@click.option("--teacher", metavar="PARENT", help="The parent, or any model; see --align-tokens.")
@options.data
@click.option("--data-blend", "blend", type=options.PATH, metavar="YAML", help="Weighted sources, as above.")
@click.option("--out", type=options.PATH, required=True, metavar="HEALED", help="New directory.")
@click.option("--tokens", default="10M", metavar="COUNT", help="Training tokens, e.g. 100M.")
@click.option("--seq-len", type=int, default=1024, help="Tokens of a sequence.")
@click.option("--stages", metavar="LEN:TOKENS,...", help="e.g. 8k:100M,64k:20M instead of the two above.")
@click.option("--batch-size", type=int, default=32, help="Sequences a step (of the first stage).")
@click.option("--accumulate", type=int, default=1, help="Micro-batches a step is split into.")
@click.option("--kl-weight", type=float, default=1.0, help="Of KL(teacher‖child) on the logits.")
@click.option("--cosine-weight", type=float, default=1.0, help="Of the hidden states' cosine distance.")
@click.option("--lm-weight", type=float, default=0.0, help="Of the next-token loss on the text.")
@click.option("--temperature", type=float, default=1.0, help="Of both distributions in the KL.")
@click.option(
    "--reverse-kl", type=float, default=0.0, metavar="SHARE", help="Of the KL, 0 to 1, that is KL(child‖teacher)."
)
@click.option(
    "--teacher-logits",
    type=options.PATH,
    metavar="DIR",
    help="Run the teacher once, keep its top words of every token there, learn from these.",
)
@click.option("--top-k", type=int, default=32, help="Words kept of a token.")
@click.option(
    "--align-tokens", is_flag=True, help="A teacher with another tokenizer: compare where both come to the same token."
)
@click.option(
    "--on-policy",
    type=float,
    default=0.0,
    metavar="SHARE",
    help="Of the steps, 0 to 1, on what the child writes itself.",
)
@click.option("--lr", type=float, default=3e-4, help="Peak learning rate; cosine after warm-up.")
@click.option(
    "--old-lr",
    type=float,
    default=1.0,
    metavar="SHARE",
    help="Of --lr, for what a grown child had before; 0: it stays.",
)
@click.option("--warm-up", type=float, default=0.05, help="Share of all steps.")
@click.option("--weight-decay", type=float, default=0.0, help="Of matrices (AdamW).")
@click.option("--clip-norm", type=float, default=1.0, help="Largest norm of a gradient.")
@click.option("--train-embeddings", is_flag=True, help="Train embedding and LM head too, which stay else.")
@click.option("--recompute", is_flag=True, help="Activation checkpointing: less memory, a third more time.")
@click.option("--dtype", default="auto", help="bf16 (weights stay float32) or fp32; auto: by device.")
@click.option("--seed", type=int, default=0, help="Orders the data.")
@click.option("--allow-repeats", is_flag=True, help="Go past a source's max_epochs.")
@click.option("--save-every", type=int, default=500, help="Steps between checkpoints; 0: at the end.")
@click.option("--eval-every", type=int, default=100, help="Steps between evaluations; 0: at the end.")
@click.option("--validation-sequences", type=int, default=64, help="Held out, for the evaluations.")
@click.option("--cuda-graph/--no-cuda-graph", default=True, help="Replay steps on a GPU that has the whole child.")
@click.option(
    "--parallel",
    default="auto",
    help="Under torchrun: replicas in every process, shards; auto: replicas where they fit.",
)
@click.option("--teacher-device", help="Another device for the teacher, e.g. cuda:1.")
@options.memory_limit
@click.option("--tensorboard", type=options.PATH, metavar="DIR", help="Also log there.")
@click.option("--wandb", metavar="PROJECT", help="Also log to Weights & Biases.")
@click.option("--force", is_flag=True, help="Replace what is in --out, and an unfinished run with other options.")
@click.option("--dry-run", is_flag=True, help="Print time, memory and disk; write nothing.")
@options.text_field
@options.device
@options.as_json
def heal_command(
    child: str, out: Path, tokens: str, data: tuple[str, ...], dry_run: bool, as_json: bool, **chosen
) -> None:
    """Train CHILD as a whole until it behaves like its parent again, and write it to HEALED.

    The loss is KL of the next-token distributions plus cosine distance of the hidden states of matching layers. The same
    command continues a run that was stopped at any moment; HEALED.heal holds its checkpoint and log until it is done.

    \b
    Examples:
      puzzle heal child --teacher examples/parent --data /usr/lib/python3 --tokens 50M --out healed
      puzzle heal child --teacher parent --data-blend blend.yaml --stages 8k:100M,64k:20M --recompute --out healed
      puzzle heal child --data-blend chats.yaml --kl-weight 0 --cosine-weight 0 --lm-weight 1 --out healed
      puzzle heal child --teacher parent --data corpus --teacher-logits said --cosine-weight 0 --out healed
      puzzle heal grown --data-blend blend.yaml --old-lr 0 --kl-weight 0 --cosine-weight 0 --lm-weight 1 --out taught
      puzzle heal child --teacher parent --data corpus --on-policy 0.5 --reverse-kl 0.5 --out healed
      puzzle heal child --teacher other --align-tokens --cosine-weight 0 --data corpus --out healed
      torchrun --nproc-per-node 8 -m puzzle.cli heal child --teacher parent --data corpus.jsonl --out healed

    \b
    A blend file:
      sources:
        - {path: code/, weight: 0.7, max_epochs: 4}
        - {path: notes.jsonl, weight: 0.1, text_field: body}
        - {path: chats.jsonl, weight: 0.2, messages: messages, loss: assistant}
    """
    from puzzle.heal.settings import HealOptions

    wanted = HealOptions(child=child, out=out, data=list(data), tokens=parse_count("tokens", tokens), **chosen)
    if dry_run:
        from puzzle.heal.plan import plan_heal

        facts = plan_heal(wanted)
        options.show(lambda: facts, as_json, _print_plan)
        return
    from puzzle.heal.run import heal, summary

    record = heal(wanted)
    options.show(lambda: record, as_json, lambda _: click.echo(f"{summary(record)}\nwrote {out}", err=True))


def _print_plan(facts: dict) -> None:
    found = facts["predicted"]
    stages = ", ".join(f"{s['num_steps']} steps of {s['batch_size']} x {s['seq_len']} tokens" for s in facts["stages"])
    click.echo(
        f"{stages} on {facts['processes']} x {facts['device']} in {facts['dtype']}; "
        f"{facts['trained_parameters']:,} parameters learn, {facts['matching_layers']} layers are compared; "
        f"teacher: {facts['teacher']}\n"
        f"predicted: {seconds_text(found['seconds'])} ({found['tokens_per_second']:,.0f} tokens/s), "
        + (f"{seconds_text(found['sampling_seconds'])} of them sampling, " if found["sampling_seconds"] else "")
        + f"memory {bytes_text(found['peak_memory_bytes'])}, disk {bytes_text(found['disk_bytes'])}"
    )
