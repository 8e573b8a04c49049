"""Heal a child of the reference parent with several losses and follow KL and loss on held-out text.

Protocol: the corpus is gathered as examples/train_parent.py does (permissively licensed Python source of the running
environment), visited in the order of the texts' hashes; 2 % of the files are held out by their hash, the same ones as for
the parent. Every ablation starts from the same child, sees the same rows in the same order and differs in the weights of the
losses alone. KL(parent‖child) at temperature 1 and next-token loss are measured on the same held-out sequences before,
during and after. `run_seconds` are of the steps alone, without evaluations. The share of the loss gap that is closed: (before - now) / (before - parent).

    python benchmarks/bench_heal.py --child runs/quickstart/child --tokens 50e6          # one GPU
    python benchmarks/bench_heal.py --child CHILD --tokens 20e3 --seq-len 128 --batch-size 4 --max-files 40 \\
        --validation-sequences 4 --out /tmp/heal.csv --plot /tmp/heal.png                 # rehearsal on a CPU
    python benchmarks/bench_heal.py --plot-only --out benchmarks/results/heal.csv --plot docs/heal.png
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch

from puzzle import __version__
from puzzle.hardware import cpu_name
from puzzle.heal.log import read_log
from puzzle.heal.parallel import start_ranks
from puzzle.heal.prepare import open_models
from puzzle.heal.run import heal, read_data
from puzzle.heal.settings import HealOptions

ROOT = Path(__file__).parents[1]
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


def write_corpus(path: Path, max_files: int | None) -> int:
    """The texts as one .jsonl in the order of their hashes. Returns how many."""
    spec = importlib.util.spec_from_file_location("train_parent", ROOT / "examples" / "train_parent.py")
    assert spec is not None
    assert spec.loader is not None
    train_parent = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train_parent)
    files, _ = train_parent.corpus_files()
    train, held_out = train_parent.read_documents(files[:max_files])
    texts = sorted([*train, *held_out], key=lambda text: hashlib.sha256(text.encode()).digest())
    with open(path, "w", encoding="utf-8") as handle:
        handle.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return len(texts)


def rows_of(name: str, options: HealOptions, record: dict[str, Any], log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A CSV row per evaluation."""
    before, parent_loss = record["before"]["loss"], record["before"]["teacher_loss"]
    rows = []
    for line in log:
        if "held_out" not in line:
            continue
        found = line["held_out"]
        rows.append(
            {
                "ablation": name,
                "tokens": line["tokens"],
                "kl": f"{found['kl']:.5f}",
                "loss": f"{found['loss']:.5f}",
                "cosine": f"{found['cosine']:.5f}",
                "parent_loss": f"{parent_loss:.5f}",
                "gap_closed": f"{(before - found['loss']) / (before - parent_loss):.4f}",
                "run_tokens_per_second": f"{record['num_tokens'] / record['seconds']:.0f}",
                "run_seconds": record["seconds"],
                "skipped_steps": record["skipped_steps"],
                "lr": options.lr,
                "seq_len": options.seq_len,
                "batch_size": options.batch_size,
                "held_out_tokens": record["held_out_tokens"],
                "child": Path(options.child).name,
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
                "dtype": record["run"]["dtype"],
                "torch": torch.__version__,
                "puzzle": __version__,
                "date": time.strftime("%Y-%m-%d"),
            }
        )
    return rows


def write_rows(out: Path, rows: list[dict[str, Any]]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", newline="") as handle:
        writer = csv.DictWriter(handle, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def plot(out: Path, target: Path) -> None:
    """KL and loss over tokens, a line per ablation."""
    try:
        import matplotlib
    except ImportError:
        print(f"no matplotlib here: draw {target} elsewhere with --plot-only")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with open(out, newline="") as handle:
        rows = list(csv.DictReader(handle))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in dict.fromkeys(row["ablation"] for row in rows):
        mine = [row for row in rows if row["ablation"] == name]
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
    figure.suptitle(f"Healing {rows[0]['child']} on {rows[0]['device']}, learning rate {rows[0]['lr']}")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    print(f"wrote {target}")


def show(rows: list[dict[str, Any]]) -> None:
    """A line per ablation and milestone."""
    last = max(int(row["tokens"]) for row in rows)
    for share in SHOWN:
        row = min(rows, key=lambda r: abs(int(r["tokens"]) - share * last))
        print(
            f"{row['ablation']:<13} {int(row['tokens']) / 1e6:8.3f} M tokens  KL {row['kl']}  loss {row['loss']}  "
            f"gap closed {float(row['gap_closed']):6.1%}  ({row['run_tokens_per_second']} tokens/s)",
            flush=True,
        )


@click.command()
@click.option("--child", type=click.Path(path_type=Path), default=None, help="A child of the parent, in format hf.")
@click.option("--parent", default=str(ROOT / "examples" / "parent"), show_default=True)
@click.option("--tokens", type=float, default=50e6, show_default=True)
@click.option("--ablations", default=",".join(ABLATIONS), show_default=True)
@click.option("--lr", type=float, default=1e-3, show_default=True)
@click.option("--seq-len", type=int, default=1024, show_default=True)
@click.option("--batch-size", type=int, default=32, show_default=True)
@click.option("--validation-sequences", type=int, default=128, show_default=True)
@click.option("--train-embeddings", is_flag=True)
@click.option("--cuda-graph/--no-cuda-graph", default=True, show_default=True)
@click.option("--max-files", type=int, default=None, help="Only the first files of the corpus, for a rehearsal.")
@click.option("--healed", type=click.Path(path_type=Path), default=None, help="Keep the healed children in here.")
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "benchmarks/results/heal.csv", show_default=True)
@click.option("--plot", "picture", type=click.Path(path_type=Path), default=ROOT / "docs/heal.png", show_default=True)
@click.option("--plot-only", is_flag=True, help="Draw what --out holds.")
def main(
    child: Path | None,
    parent: str,
    tokens: float,
    ablations: str,
    lr: float,
    seq_len: int,
    batch_size: int,
    validation_sequences: int,
    train_embeddings: bool,
    cuda_graph: bool,
    max_files: int | None,
    healed: Path | None,
    out: Path,
    picture: Path,
    plot_only: bool,
) -> None:
    if plot_only:
        plot(out, picture)
        return
    if child is None:
        raise click.UsageError("--child is needed")
    chosen = ablations.split(",")
    for name in chosen:
        if name not in ABLATIONS:
            raise click.UsageError(f"--ablations {name}: known are {', '.join(ABLATIONS)}")
    num_steps = -(-int(tokens) // (seq_len * batch_size))
    rows: list[dict[str, Any]] = []
    if out.is_file():  # other ablations measured before stay
        with open(out, newline="") as handle:
            rows = [row for row in csv.DictReader(handle) if row["ablation"] not in chosen]
    with tempfile.TemporaryDirectory() as work:
        started = time.time()
        corpus = Path(work) / "corpus.jsonl"
        count = write_corpus(corpus, max_files)
        print(f"{count} files after {time.time() - started:.0f} s", flush=True)
        data = None
        for name in chosen:
            kl, cosine, lm = ABLATIONS[name]
            options = HealOptions(
                child=str(child),
                teacher=parent,
                out=(healed or Path(work)) / name.replace("+", "-"),
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
                save_every=0,
                eval_every=max(1, num_steps // NUM_EVALUATIONS),
                validation_sequences=validation_sequences,
                force=True,
            )
            if data is None:
                stages = options.plan_stages()
                data = read_data(options, stages, open_models(options, stages, start_ranks("auto")))
                print(f"data ready after {time.time() - started:.0f} s", flush=True)
            record = heal(options, data)
            found = rows_of(name, options, record, read_log(options.out / "heal.jsonl"))
            rows += found
            write_rows(out, rows)
            show(found)
    plot(out, picture)


if __name__ == "__main__":
    main()
