"""Does a second pass of block-local distillation, on inputs that the child so far produces, give a better child?

Protocol: an architecture of a library. Its trained sub-blocks (of --layers) learn again on --tokens, all at once: the parent passes over
a batch, the child beside it, and each sub-block learns from what enters it, in the first --mix of every batch what the child's layers
before it gave, in the rest what the parent's did. What it is held against there:

    ordinary   nothing of the child's: the first pass goes on
    own        what the parent's sub-block adds to the child's own stream
    parent     what the parent's sub-block adds to the parent's stream of the same tokens
    stream     what takes the child's stream to the parent's after this sub-block

Then KL(parent‖child) on held-out text, seconds, and KL after `heal` of as many tokens, beside `heal` of the child as it was (`none`), of
these tokens and of twice as many. Batches are those of the library's recipe, after all that the library has seen.

    python benchmarks/quality/bench_coupled.py LIBRARY ARCHITECTURE --data DATA --tokens 2M --work WORK --out benchmarks/results/coupled.csv
"""

from __future__ import annotations

import csv
import datetime
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
import torch
from torch import Tensor

from puzzle.base.device import compute_dtype, name_of, pick_device
from puzzle.base.units import parse_count, parse_layers
from puzzle.blocklib.distill import Recipe, Shown, VariantTrainer, autocast
from puzzle.blocklib.plain.part import Part, Ropes, loaded
from puzzle.blocklib.sub_block import ParentBlock, SubBlock, Variant
from puzzle.blocklib.variant import PARENT
from puzzle.data.packing import load_tokens
from puzzle.export.write import export, open_source
from puzzle.heal.run import heal
from puzzle.heal.settings import HealOptions
from puzzle.kernels.block_loss import output_gradient
from puzzle.library.assemble import architecture_of, open_parent, read_variant
from puzzle.library.manifest import Library
from puzzle.library.store import BlockStore
from puzzle.measure.evaluate import EvaluateOptions, evaluate
from puzzle.runtime.model import embed

Place = tuple[int, str]  # layer and slot
Tensors = dict[str, Tensor]
FIELDS = ("library", "target", "mix", "tokens", "lr", "kl", "kl_stderr", "loss", "seconds", "healed_tokens", "kl_healed", "loss_healed",
          "heal_s", "device", "date")  # fmt: skip
METHODS = ("stream:0.5", "ordinary:0", "own:1", "parent:0.5", "stream:1", "stream:0.25")


class Seen(Shown):
    """What a sub-block of the child is shown: what enters it, and what it is held against. [B, T, H] each"""

    def __init__(self, x: Tensor, target: Tensor, ropes: Ropes):
        self.x, self.target, self.ropes = x, target, ropes
        self._normed: dict[float, Tensor] = {}
        self._energy: Tensor | None = None


class Coupled:
    def __init__(
        self, library: Library, layers: list[dict[str, str]], parent: str | None, device: torch.device, only: set[int]
    ):
        self.library, self.layers, self.device = library, layers, device
        self.parent, self.store, self.dtype = (
            open_parent(library, parent),
            BlockStore(library.root),
            compute_dtype(device),
        )
        self.structure = self.parent.structure
        self.embedding = self.parent.embedding().to(device, self.dtype)
        self.whole = {(n, s): self.part(b, self.parent.weights(n, s)) for n, s, b in self.structure}
        chosen = {
            (n, s): library.spaces[n][s][v] for n, layer in enumerate(layers) for s, v in layer.items() if v != PARENT
        }
        self.taught = {(n, s): b for (n, s), b in chosen.items() if n in only and b.tensors()}
        if not self.taught:
            raise click.ClickException("no layer has a sub-block from the library that has weights: none can learn")
        self.fixed = {at: self.part(b, self.stored(at)) for at, b in chosen.items() if at not in self.taught}

    def stored(self, at: Place) -> Tensors:
        n, slot = at
        name = self.layers[n][slot]
        return read_variant(self.store, n, slot, name, self.library.spaces[n][slot][name])

    def part(self, sub_block: SubBlock, weights: Tensors) -> Part:
        moved = {n: t.to(self.device, self.dtype) for n, t in weights.items()}
        return loaded(sub_block, moved, in_training=True)

    def train(self, batches: Iterator[Tensor], recipe: Recipe, target: str, mix: float) -> dict[Place, Tensors]:
        """The trained weights. batches: of token ids [B, T]."""
        lr = torch.zeros((), device=self.device)
        ropes = {n: r.tables(recipe.seq_len, self.device) for n, r in self.structure.ropes.items()}
        trainers = {}
        for (n, slot), sub_block in self.taught.items():
            start = {name: t.float() for name, t in self.stored((n, slot)).items()}
            variant = Variant(name=self.layers[n][slot], sub_block=sub_block, initialise=lambda _, start=start: start)  # type: ignore[misc]
            block = ParentBlock(sub_block=sub_block, weights={})
            trainers[n, slot] = VariantTrainer(n, slot, [variant], block, recipe, self.device, lr)
        rows = round(mix * recipe.batch_size)
        for step, ids in enumerate(batches):
            lr.fill_(recipe.lr_at(step))
            x = embed(ids.to(self.device), self.embedding, self.structure.embedding_scale)
            z = x[:rows].clone()
            for at, part in self.whole.items():
                with torch.no_grad(), autocast(self.device):
                    added = part(x, ropes).to(x.dtype)
                    own = (
                        part(z, ropes).to(x.dtype) if rows and (target == "own" or at not in trainers) else added[:rows]
                    )
                if at in trainers:
                    wanted = {"stream": x[:rows] + added[:rows] - z, "own": own}.get(target, added[:rows])
                    seen = Seen(torch.cat([z, x[rows:]]), torch.cat([wanted, added[rows:]]), ropes)
                    z = z + learn(trainers[at], seen)[:rows]
                elif rows and at in self.fixed:
                    with torch.no_grad(), autocast(self.device):
                        z = z + self.fixed[at](z, ropes).to(z.dtype)
                elif rows:
                    z = z + own
                x = x + added
        return {at: {n: t.detach().cpu() for n, t in one.masters.values().items()} for at, one in trainers.items()}

    def put(self, root: Path, trained: dict[Place, Tensors]) -> Library:
        """A copy of the library with these blocks."""
        if root.exists():
            shutil.rmtree(root)
        shutil.copytree(
            self.library.root, root, copy_function=os.link, ignore=shutil.ignore_patterns("children", ".lock")
        )
        store = BlockStore(root)
        for (n, slot), tensors in trained.items():
            name, sub_block = self.layers[n][slot], self.taught[n, slot]
            like = self.parent.final_norm().dtype
            spec = {"layer": n, "slot": slot, "variant": name, "sub_block": sub_block.key()}
            record = {k: v for k, v in store.record(n, slot, name).items() if k != "sha256"}
            store.write(n, slot, name, {k: t.to(like) for k, t in tensors.items()}, spec, record)
        return Library.open(root)


def learn(trainer: VariantTrainer, seen: Seen) -> Tensor:
    """A step; what the sub-block gave before it."""
    (out,) = outputs = trainer._outputs(seen)
    gradients = [output_gradient(out.detach(), seen.target, seen.energy)]
    trainer.masters.step(torch.autograd.grad(outputs, trainer.masters.parameters, gradients))
    return out.detach().to(seen.x.dtype)


@click.command()
@click.argument("root", type=click.Path(path_type=Path), metavar="LIBRARY")
@click.argument("architecture", type=click.Path(path_type=Path))
@click.option("--data", required=True, multiple=True)
@click.option("--parent", help="Where it is now.")
@click.option("--layers", help="Whose sub-blocks learn again. Default: all.")
@click.option("--methods", default=",".join(METHODS), show_default=True, help="target:mix")
@click.option("--tokens", default="1M", show_default=True)
@click.option("--lr", type=float, default=1e-3, show_default=True)
@click.option("--heal-lr", type=float, default=3e-4, show_default=True)
@click.option("--heal-batch", type=int, default=32, show_default=True)
@click.option("--sequences", type=int, default=256, show_default=True)
@click.option("--minutes", type=float, default=8.0, show_default=True, help="No method is begun later than this.")
@click.option("--device", default="auto", show_default=True)
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(root: Path, architecture: Path, data: tuple[str, ...], parent: str | None, layers: str | None, methods: str, tokens: str, lr: float, heal_lr: float, heal_batch: int, sequences: int, minutes: float, device: str, work: Path, out: Path) -> None:  # fmt: skip
    begin, library, count = time.monotonic(), Library.open(root), parse_count("tokens", tokens)
    only = set(range(library.num_layers) if layers is None else parse_layers("layers", layers, library.num_layers))
    chosen = architecture_of(architecture, library).variants
    bench = Coupled(library, chosen, parent, pick_device(device), only)
    source = library.parent_source(parent)
    recipe = Recipe(**library.facts["recipe"])
    before, steps = recipe.num_steps, -(-count // (recipe.batch_size * recipe.seq_len))
    recipe = replace(recipe, num_steps=steps, lr=lr)
    text = load_tokens(
        list(data), bench.parent.directory, seq_len=recipe.seq_len, num_train=(before + steps) * recipe.batch_size, num_validation=1,
        text_field="text", seed=library.facts["seed"],
    )  # fmt: skip
    measured = EvaluateOptions(sequences=sequences, seq_len=recipe.seq_len, device=device)
    rows = list(csv.DictReader(open(out, newline="", encoding="utf-8"))) if out.is_file() else []  # noqa: SIM115
    work.mkdir(parents=True, exist_ok=True)
    shared = {"library": library.name, "tokens": count, "lr": lr, "device": name_of(bench.device)}
    for method in ["none:0", "none:0:2", *methods.split(",")]:
        target, mix, times = [*method.split(":"), "1"][:3]
        told = {"target": target, "mix": mix, "healed_tokens": count * int(times)}
        if any(all(str(row[name]) == str(value) for name, value in (shared | told).items()) for row in rows):
            continue
        if time.monotonic() - begin > 60 * minutes:
            print("out of time: run the same command again, it goes on from here")
            return
        started, there = time.monotonic(), root
        if target != "none":
            batches = (text.train_batch(before + step, recipe.batch_size) for step in range(steps))
            trained = bench.train(batches, recipe, target, float(mix))
            seconds = time.monotonic() - started
            there = bench.put(work / "library", trained).root
        else:
            seconds = 0.0
        child, healed = work / "child", work / "healed"
        export(open_source(there, architecture, source), child, force=True)
        first = evaluate(source, str(child), list(data), measured).child
        asked = HealOptions(
            child=str(child), out=healed, teacher=source, data=list(data), tokens=count * int(times), seq_len=recipe.seq_len,
            batch_size=heal_batch, lr=heal_lr, eval_every=0, device=device, force=True, validation_sequences=8,
        )  # fmt: skip
        record = heal(asked)
        last = evaluate(source, str(healed), list(data), measured).child
        values = {"kl": first.kl, "kl_stderr": first.kl_stderr, "loss": first.loss, "seconds": seconds,
                  "kl_healed": last.kl, "loss_healed": last.loss, "heal_s": record["seconds"]}  # fmt: skip
        plain = {n: f"{v:.6g}" for n, v in values.items()}
        rows.append(shared | told | plain | {"date": datetime.date.today().isoformat()})
        print(*rows[-1].values(), flush=True)
        with open(out, "w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, FIELDS, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
