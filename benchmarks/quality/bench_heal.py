"""Heal children of the reference parent and follow KL and loss on held-out text: losses, learning rates, children.

Protocol: the corpus is that of lib/reference_corpus.py (permissively licensed Python source of the running environment),
visited in the order of the texts' hashes; 2 % of the files are held out by their hash, the same ones as for
the parent. Every --child is healed with every loss of --ablations at every --lr: all runs of one child start from the same
weights, all runs see the same rows in the same order, and differ in child, loss or rate alone. KL(parent‖child) at
temperature 1 and next-token loss are measured on the same held-out sequences before, during and after. `run_seconds` are of
the steps alone, without evaluations. The share of the loss gap that is closed: (before - now) / (before - parent). A run's
rows are written when it ends; typed again, the command leaves out runs whose rows are there.

    python benchmarks/quality/bench_heal.py --child CHILD --ablations KL+cosine --lr 5e-4,1e-3,2e-3 --tokens 4e6 \\
        --out benchmarks/results/heal_lr.csv --plot docs/heal_lr.png                      # which learning rate
    python benchmarks/quality/bench_heal.py --child CHILD --lr-from benchmarks/results/heal_lr.csv --tokens 50e6    # one GPU
    python benchmarks/quality/bench_heal.py --child fusion/unfused --child fusion/own --ablations KL+cosine --tokens 25e6 \\
        --out benchmarks/results/fusion_heal.csv --plot docs/fusion_heal.png
    python benchmarks/quality/bench_heal.py --child CHILD --tokens 20e3 --seq-len 128 --batch-size 4 --max-files 40 \\
        --validation-sequences 4 --out /tmp/heal.csv --plot /tmp/heal.png                 # rehearsal on a CPU
    python benchmarks/quality/bench_heal.py --plot-only --out benchmarks/results/heal.csv --plot docs/heal.png
"""

from __future__ import annotations

import csv
import gc
import itertools
import math
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from puzzle import __version__
from puzzle.base.errors import UserError
from puzzle.base.ranks import start_ranks
from puzzle.data.mixture import HealData, Mixture, Stage
from puzzle.heal.log import read_log
from puzzle.heal.prepare import open_models
from puzzle.heal.run import heal, read_data
from puzzle.heal.settings import HealOptions
from reference_corpus import write_corpus

ROOT = Path(__file__).resolve().parents[2]
ABLATIONS = {  # weights of KL, cosine, LM
    "KL": (1.0, 0.0, 0.0),
    "cosine": (0.0, 1.0, 0.0),
    "KL+cosine": (1.0, 1.0, 0.0),
    "KL+cosine+LM": (1.0, 1.0, 1.0),
}
NUM_EVALUATIONS = 20
SHOWN = (0.0, 0.2, 0.5, 1.0)  # of the tokens: before, 10, 25 and 50 M of 50 M
FIELDS = (
    "ablation", "tokens", "kl", "loss", "cosine", "parent_loss", "gap_closed", "run_tokens_per_second", "run_seconds",
    "skipped_steps", "lr", "seq_len", "batch_size", "held_out_tokens", "child", "device", "dtype", "torch", "puzzle",
    "date",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Run:
    """What tells the rows of one healing from those of another."""

    child: str
    ablation: str
    lr: float
    stage: Stage

    def owns(self, row: dict[str, Any]) -> bool:
        """Whether a row of the CSV is of this run, whatever its number of tokens."""
        same = row["child"] == self.child and row["ablation"] == self.ablation and float(row["lr"]) == self.lr
        return same and int(row["seq_len"]) == self.stage.seq_len and int(row["batch_size"]) == self.stage.batch_size

    def done_in(self, rows: list[dict[str, Any]]) -> bool:
        return any(self.owns(row) and int(row["tokens"]) == self.stage.num_tokens for row in rows)


def tokenised(cache: Path | None, options: HealOptions, stage: Stage) -> HealData:
    """The streams of `options`' data, enough for `stage`; kept in `cache`, where a later call of this script finds them."""
    asked = (str(options.data), stage.seq_len, options.validation_sequences)
    if cache is not None and cache.is_file():
        kept = torch.load(cache, weights_only=False)
        if kept["asked"] == asked and kept["data"].mixture.stages[0].num_tokens >= stage.num_tokens:
            return kept["data"]
    data = read_data(options, [stage], open_models(options, [stage], start_ranks(options.device)))
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"asked": asked, "data": data}, cache)
    return data


def rows_of(run: Run, record: dict[str, Any], log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A CSV row per evaluation."""
    before, parent_loss = record["before"]["loss"], record["before"]["teacher_loss"]
    rows = []
    for line in log:
        if "held_out" not in line:
            continue
        found = line["held_out"]
        rows.append(
            {
                "ablation": run.ablation,
                "tokens": line["tokens"],
                "kl": f"{found['kl']:.5f}",
                "loss": f"{found['loss']:.5f}",
                "cosine": f"{found['cosine']:.5f}",
                "parent_loss": f"{parent_loss:.5f}",
                "gap_closed": f"{(before - found['loss']) / (before - parent_loss):.4f}",
                "run_tokens_per_second": f"{record['num_tokens'] / record['seconds']:.0f}",
                "run_seconds": record["seconds"],
                "skipped_steps": record["skipped_steps"],
                "lr": run.lr,
                "seq_len": run.stage.seq_len,
                "batch_size": run.stage.batch_size,
                "held_out_tokens": record["held_out_tokens"],
                "child": run.child,
                "device": record["device"],
                "dtype": record["run"]["dtype"],
                "torch": torch.__version__,
                "puzzle": __version__,
                "date": time.strftime("%Y-%m-%d"),
            }
        )
    return rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with open(path, newline="") as handle:
        return list(csv.DictReader(handle))


def best_rate(path: Path) -> float:
    """The learning rate whose last KL in the CSV of an earlier call is the lowest."""
    rows = read_rows(path)
    if not rows:
        raise click.UsageError(f"--lr-from {path}: no such CSV, or no rows in it")
    last = max(int(row["tokens"]) for row in rows)
    ended = [row for row in rows if int(row["tokens"]) == last and math.isfinite(float(row["kl"]))]
    if not ended:
        raise click.UsageError(f"--lr-from {path}: no rate in it healed anything")
    best = min(ended, key=lambda row: float(row["kl"]))
    print(f"learning rate {best['lr']}: KL {best['kl']} after {last / 1e6:g} M tokens", flush=True)
    return float(best["lr"])


def write_rows(out: Path, rows: list[dict[str, Any]]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", newline="") as handle:
        writer = csv.DictWriter(handle, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


VARYING = ("child", "ablation", "lr")


def label_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """What this run differs in from the others of the CSV."""
    return " ".join(str(row[k]) for k in VARYING if len({str(r[k]) for r in rows}) > 1) or str(row["ablation"])


def plot(out: Path, target: Path) -> None:
    """KL and loss over tokens, a line per run."""
    try:
        import matplotlib
    except ImportError:
        print(f"no matplotlib here: draw {target} elsewhere with --plot-only")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_rows(out)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in dict.fromkeys(label_of(row, rows) for row in rows):
        mine = [row for row in rows if label_of(row, rows) == name]
        tokens = [float(row["tokens"]) / 1e6 for row in mine]
        left.plot(tokens, [float(row["kl"]) for row in mine], label=name)
        right.plot(tokens, [float(row["loss"]) for row in mine], label=name)
    right.axhline(float(rows[0]["parent_loss"]), color="black", linestyle=":", label="parent")
    left.set_yscale("log")
    left.set_ylabel("KL(parent‖child), nats per token")
    right.set_ylabel("held-out loss, nats per token")
    for axis in (left, right):
        axis.set_xlabel("tokens, M")
        axis.grid(alpha=0.3)
        axis.legend()
    common = {k: rows[0][k] for k in VARYING if len({str(r[k]) for r in rows}) == 1}
    said = [f"Healing {common['child']}" if "child" in common else "Healing", f"on {rows[0]['device']}"]
    said += [common["ablation"]] if "ablation" in common else []
    said += [f"learning rate {common['lr']}"] if "lr" in common else []
    figure.suptitle(", ".join(said))
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    print(f"wrote {target}")


def show(rows: list[dict[str, Any]]) -> None:
    """A line per milestone of one run."""
    last = max(int(row["tokens"]) for row in rows)
    for share in SHOWN:
        row = min(rows, key=lambda r: abs(int(r["tokens"]) - share * last))
        print(
            f"{row['child']} {row['ablation']:<13} lr {row['lr']:g} {int(row['tokens']) / 1e6:8.3f} M tokens  "
            f"KL {row['kl']}  loss {row['loss']}  gap closed {float(row['gap_closed']):6.1%}  "
            f"({row['run_tokens_per_second']} tokens/s)",
            flush=True,
        )


@click.command()
@click.option("--child", "children", type=click.Path(path_type=Path), multiple=True, help="In format hf; any number.")
@click.option("--parent", default=str(ROOT / "examples" / "parent"), show_default=True)
@click.option("--tokens", type=float, default=50e6, show_default=True)
@click.option("--ablations", default=",".join(ABLATIONS), show_default=True)
@click.option("--lr", "rates", default="1e-3", show_default=True, help="One or several.")
@click.option("--lr-from", type=click.Path(path_type=Path), default=None, help="A CSV of this script: its best rate.")
@click.option("--seq-len", type=int, default=1024, show_default=True)
@click.option("--batch-size", type=int, default=32, show_default=True)
@click.option("--validation-sequences", type=int, default=128, show_default=True)
@click.option("--evaluations", type=int, default=NUM_EVALUATIONS, show_default=True, help="During a run.")
@click.option("--train-embeddings", is_flag=True)
@click.option("--cuda-graph/--no-cuda-graph", default=True, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--corpus", type=click.Path(path_type=Path), default=None, help="Keep the gathered text here (.jsonl).")
@click.option(
    "--cache", type=click.Path(path_type=Path), default=None, help="Keep the tokens of the corpus here (.pt)."
)
@click.option("--max-files", type=int, default=None, help="Only the first files of the corpus, for a rehearsal.")
@click.option("--healed", type=click.Path(path_type=Path), default=None, help="Keep the healed children in here.")
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "benchmarks/results/heal.csv", show_default=True)
@click.option("--plot", "picture", type=click.Path(path_type=Path), default=ROOT / "docs/heal.png", show_default=True)
@click.option("--plot-only", is_flag=True, help="Draw what --out holds.")
@click.option("--force", is_flag=True, help="Run again what --out holds.")
def main(
    children: tuple[Path, ...],
    parent: str,
    tokens: float,
    ablations: str,
    rates: str,
    lr_from: Path | None,
    seq_len: int,
    batch_size: int,
    validation_sequences: int,
    evaluations: int,
    train_embeddings: bool,
    cuda_graph: bool,
    device: str,
    corpus: Path | None,
    cache: Path | None,
    max_files: int | None,
    healed: Path | None,
    out: Path,
    picture: Path,
    plot_only: bool,
    force: bool,
) -> None:
    if plot_only:
        plot(out, picture)
        return
    if not children:
        raise click.UsageError("--child is needed")
    chosen = ablations.split(",")
    for name in chosen:
        if name not in ABLATIONS:
            raise click.UsageError(f"--ablations {name}: known are {', '.join(ABLATIONS)}")
    lrs = [float(lr) for lr in rates.split(",")] if lr_from is None else [best_rate(lr_from)]
    rows = read_rows(out)  # what was measured before stays
    started = time.time()
    with tempfile.TemporaryDirectory() as work:
        corpus = corpus or Path(work) / "corpus.jsonl"
        if not corpus.is_file():
            count = write_corpus(corpus, max_files)
            print(f"{count} files after {time.time() - started:.0f} s", flush=True)
        streams: HealData | None = None
        for child, name, lr in itertools.product(children, chosen, lrs):
            kl, cosine, lm = ABLATIONS[name]
            options = HealOptions(
                child=str(child),
                teacher=parent,
                out=(healed or Path(work)) / f"{child.name}-{name.replace('+', '-')}-{lr:g}",
                data=[str(corpus)],
                kl_weight=kl,
                cosine_weight=cosine,
                lm_weight=lm,
                tokens=int(tokens),
                seq_len=seq_len,
                batch_size=batch_size,
                lr=lr,
                train_embeddings=train_embeddings,
                cuda_graph=cuda_graph,
                device=device,
                save_every=0,
                validation_sequences=validation_sequences,
                force=True,
            )
            [stage] = options.plan_stages()
            run = Run(child.name, name, lr, stage)
            if run.done_in(rows) and not force:
                print(f"{run.child} {name} lr {lr:g}: its rows are in {out}", flush=True)
                continue
            options = replace(options, eval_every=max(1, stage.num_steps // evaluations))
            if streams is None:
                streams = tokenised(cache, options, stage)
                print(f"data ready after {time.time() - started:.0f} s", flush=True)
            mixture = Mixture(streams.mixture.streams, [stage], seed=options.seed)
            data = HealData(mixture=mixture, validation=streams.validation, num_documents=streams.num_documents)
            try:
                record = heal(options, data)
            except UserError as error:  # such as a rate at which training diverges
                print(f"{run.child} {name} lr {lr:g}: {error}", flush=True)
                continue
            found = rows_of(run, record, read_log(options.out / "heal.jsonl"))
            rows = [row for row in rows if not run.owns(row)] + found
            write_rows(out, rows)
            show(found)
            gc.collect()  # AdamW refers to itself: a run's weights and graph would stay beside the next one's
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            print(f"{run.child} {name} lr {lr:g} done after {time.time() - started:.0f} s", flush=True)
    plot(out, picture)


if __name__ == "__main__":
    main()
