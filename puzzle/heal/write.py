"""Write a healed child: the checkpoint it came from, with what was trained in place of what was there."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from puzzle.base.files import SCHEMA, json_text
from puzzle.export.card import plain_card
from puzzle.export.checkpoint import KINDS_FILES, MODELING_FILE
from puzzle.export.child import Child
from puzzle.export.hf import write_hf
from puzzle.export.sources import child_of_checkpoint
from puzzle.heal.checkpoint import WorkDir
from puzzle.heal.parallel import whole
from puzzle.heal.train import Trainer
from puzzle.measure.architecture import architecture_beside
from puzzle.parents.grown import FILE, grown_beside
from puzzle.parents.opened import HfModel
from puzzle.runtime.model import CausalModel


def with_trained(original: Child, model: CausalModel, train_embeddings: bool) -> Child:
    """The child with the tensors of `model` that were trained, in the checkpoint's dtype; all others as the checkpoint has them.

    Under FSDP every rank must read the same tensors in the same order.
    """

    def ready(tensor: Tensor, exact: bool = False) -> Tensor:
        return whole(tensor.detach()).to("cpu", tensor.dtype if exact else original.dtype)

    def read(index: int, slot: str) -> dict[str, Tensor]:
        part = getattr(model.blocks[index], slot)
        exact, own = part.sub_block.exact, dict(part.named_parameters())
        found = {name: ready(t, name in exact) for name, t in own.items() if t.requires_grad or name in exact}
        return found if found.keys() == own.keys() else original.layers[index].read(slot) | found

    layers = tuple(
        replace(layer, reads={slot: partial(read, index, slot) for slot in layer.slots})
        for index, layer in enumerate(original.layers)
    )
    child = replace(original, layers=layers)
    if model.norm.weight.requires_grad:
        child = replace(child, read_final_norm=lambda: ready(model.norm.weight))
    if not train_embeddings:
        return child
    embedding, head = model.embedding.weight, model.head_weight
    return replace(child, read_embedding=lambda: ready(embedding), read_head=lambda: ready(head))


def write_healed(
    out: Path, source: HfModel, trainer: Trainer, record: dict[str, Any], work: WorkDir, *, force: bool
) -> None:
    """Write `out` as `puzzle export --format hf` does, with heal.json and heal.jsonl beside the weights."""
    original = child_of_checkpoint(source)
    child = with_trained(original, trainer.learner.child, trainer.learner.train_head)
    if not work.ranks.is_first:
        for _ in child.tensors():  # takes part in putting the shards together
            pass
        return
    solved = architecture_beside(source.directory)
    extra = {"heal.json": {"schema": SCHEMA, **record}}
    extra |= {} if solved is None else {"architecture.json": solved.to_json()}
    grown = grown_beside(source.directory)
    extra |= {} if grown is None else {FILE: grown}
    card = plain_card(child, solved).replace("## Serve\n", f"{healing(record)}\n\n## Serve\n", 1)
    code = (MODELING_FILE, *KINDS_FILES, work.log)  # the log travels with the files that are copied as they are
    write_hf(child, out, card, extra_json=extra, code=code, force=force)


def healing(record: dict[str, Any]) -> str:
    """The card's section: what was measured before and after, on what it was trained, with which settings."""
    before, after, run = record["before"], record["after"], record["run"]
    rows = [("held-out loss, nats/token", before["loss"], after["loss"], after.get("teacher_loss"))]
    if "kl" in after:
        rows.append(("KL(teacher‖child), nats/token", before["kl"], after["kl"], 0.0))
    if "kl_top" in after:
        told = f"KL over the teacher's top {run['top_k']} words and the rest, nats/token"
        rows.append((told, before["kl_top"], after["kl_top"], 0.0))
    if "kl_aligned" in after:
        where = f"KL at the {record['aligned']['tokens']:.1%} of tokens where the teacher's tokenizer comes to the same, nats"
        rows.append((where, before["kl_aligned"], after["kl_aligned"], 0.0))
    if "cosine" in after:
        rows.append(("cosine distance of hidden states", before["cosine"], after["cosine"], 0.0))
    lines = "\n".join(
        f"| {name} | {a:.4f} | {b:.4f} | {'' if c is None else format(c, '.4f')} |" for name, a, b, c in rows
    )
    sources = "\n".join(
        f"| {s['source'].replace('|', ' ')} | {s['share']:.1%} | {s['tokens']:,} | {s['epochs']:.2f} |"
        for s in record["sources"]
    )
    settings = json_text({k: run[k] for k in sorted(run) if k not in ("child", "teacher", "data")}, indent=None)
    return (
        f"## Healed\n\nGlobal distillation{'' if record['teacher'] is None else ' from ' + record['teacher']}, "
        f"{record['num_tokens']:,} tokens in {record['num_steps']:,} steps on {record['device']}"
        f" ({record['seconds']:.0f} s, {record['skipped_steps']} steps skipped).\n\n"
        f"| measured on {record['held_out_tokens']:,} held-out tokens | before | after | teacher |\n|---|---|---|---|\n"
        f"{lines}\n\n| source | share | tokens | epochs |\n|---|---|---|---|\n{sources}\n\nSettings: `{settings}`."
    )
