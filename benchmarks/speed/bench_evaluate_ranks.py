"""`puzzle evaluate` on one and two GPUs: seconds of the pass over text, apart from what comes before it; killed and started again.

Protocol: after a few sequences that fill the caches of kernels, `torchrun --nproc-per-node N -m puzzle.cli evaluate PARENT CHILD --no-speed` for each
number of processes. seconds: from the first batch to the figures of all processes; text_seconds: reading text; before_seconds: all else, start
of Python and of the processes, loading models. With --kill the last process of the largest number is ended by SIGKILL when half of the
seconds of that number have passed; the others must end by themselves, and the same command again gives the row `again`. CHILD without
--child: the parent with every third layer's FFN replaced from --library.

    PYTHONPATH=. python benchmarks/speed/bench_evaluate_ranks.py WORK --parent SMOL --library LIB --data text.jsonl --csv evaluate_ranks.csv
    PYTHONPATH=. python benchmarks/speed/bench_evaluate_ranks.py /tmp/x --library LIB --data /usr/lib/python3.12/email --small --csv /tmp/x.csv
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from bench_ranks import ROOT, environment

from point_table import PointTable, Row
from puzzle.blocklib.variant import PARENT
from puzzle.export.sources import child_of_library
from puzzle.export.write import Source, export
from puzzle.library.assemble import open_parent
from puzzle.library.manifest import Library
from timed_puzzle import read_timed

COLUMNS = (
    "run,ranks,parent,sequences,seq_len,num_tokens,seconds,tokens_per_second,times_of_one,text_seconds,before_seconds,wall_seconds,"
    "kl,kl_stderr,loss,top1_agreement,device,versions,date"
)
POINT = ("run", "ranks", "parent", "num_tokens", "device")
SMALL = {"sequences": 24, "seq_len": 64}


@dataclass
class Run:
    """One evaluation by several processes."""

    ranks: int
    arguments: list[str]
    begin: float = field(default_factory=time.monotonic)
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", str(self.ranks), "--master-port", str(port))
        command = [sys.executable, *torchrun, str(ROOT / "benchmarks/lib/timed_puzzle.py"), "evaluate", *self.arguments]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
        )
        self._begun = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if "BEGUN evaluate" in line:
                self._begun.set()
        self._begun.set()

    def ended(self) -> tuple[int, str, float]:
        """Exit status, standard output and seconds, once all of it is over."""
        assert self.process.stdout is not None
        out = self.process.stdout.read()
        self._reader.join()
        return self.process.wait(), out, time.monotonic() - self.begin

    def kill_last(self, after: float) -> None:
        """Its last process, so many seconds after the pass has begun."""
        self._begun.wait()
        time.sleep(after)
        for child in children(self.process.pid):
            if f"RANK={self.ranks - 1}" in variables(child):
                os.kill(child, signal.SIGKILL)
                return
        raise RuntimeError(f"no process to kill: {''.join(self.said)[-2000:]}")


def children(process: int) -> list[int]:
    return [int(n) for path in Path(f"/proc/{process}/task").glob("*/children") for n in path.read_text().split()]


def variables(process: int) -> list[str]:
    return Path(f"/proc/{process}/environ").read_bytes().decode(errors="replace").split("\0")


def make_child(library: Path, parent: Path, out: Path) -> None:
    """The parent with every third layer's FFN replaced by the smallest one that is trained and has channels."""
    opened = Library.open(library)
    layers: list[dict[str, str]] = []
    for index, offered in enumerate(opened.spaces):
        sizes = {n: b.num_parameters for n, b in offered["ffn"].items() if n != PARENT and n[0].isdigit()}
        layers.append({"ffn": min(sizes, key=lambda n: sizes[n])} if index % 3 == 1 and sizes else {})
    child = child_of_library(opened, layers, open_parent(opened, str(parent)))
    export(Source(child=child, solved=None, facts=opened.facts, measured=None), out, force=True)


def fill_times(rows: list[Row]) -> None:
    """Of every row the speed over that of one process."""
    for one in rows:
        alone = [r for r in rows if all(r[k] == (one | {"ranks": "1", "run": "whole"})[k] for k in POINT)]
        ratio = [float(one["tokens_per_second"]) / float(r["tokens_per_second"]) for r in alone]
        one["times_of_one"] = f"{ratio[0]:.3f}" if ratio else ""


def row_of(run: str, ranks: int, parent: Path, sizes: dict[str, int], ended: Run) -> Row:
    """Raises RuntimeError where it failed."""
    status, out, wall = ended.ended()
    told = "".join(ended.said)
    if status != 0:
        raise RuntimeError(f"evaluate on {ranks} ended with {status}: {told[-2000:]}")
    found, stages = json.loads(out), read_timed(told)
    child, seconds = found["child"], stages["evaluate"]
    print(f"{run} on {ranks}: {seconds:.2f} s of {wall:.2f} s, text {stages['text']:.2f} s", flush=True)
    return {
        "run": run,
        "ranks": str(ranks),
        "parent": "/".join(parent.absolute().parts[-2:]),
        "sequences": str(found["num_tokens"] // sizes["seq_len"]),
        "seq_len": str(sizes["seq_len"]),
        "num_tokens": str(found["num_tokens"]),
        "seconds": f"{seconds:.3f}",
        "tokens_per_second": f"{found['num_tokens'] / seconds:.0f}",
        "text_seconds": f"{stages['text']:.3f}",
        "before_seconds": f"{wall - seconds - stages['text']:.3f}",
        "wall_seconds": f"{wall:.1f}",
        "kl": repr(child["kl"]),
        "kl_stderr": repr(child["kl_stderr"]),
        "loss": repr(child["loss"]),
        "top1_agreement": repr(child["top1_agreement"]),
        "device": found["device"],
        "versions": f"torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
    }


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--parent", type=click.Path(path_type=Path), default=ROOT / "examples" / "parent")
@click.option("--child", type=click.Path(path_type=Path), help="Default: of --library, in WORK/child.")
@click.option("--library", type=click.Path(path_type=Path))
@click.option("--data", required=True, help="Text.")
@click.option("--ranks", "counts", default="1,2", show_default=True)
@click.option("--sequences", type=int, default=4096, show_default=True)
@click.option("--seq-len", type=int, default=256, show_default=True)
@click.option("--kill/--no-kill", default=True, show_default=True)
@click.option("--small", is_flag=True, help="A few tokens on a CPU, to rehearse.")
@click.option("--csv", "path", type=click.Path(path_type=Path), default=Path("benchmarks/results/evaluate_ranks.csv"))
@click.option("--append", is_flag=True, help="Keep the rows that are in the CSV.")
def main(
    work: Path, parent: Path, child: Path | None, library: Path | None, data: str, counts: str, kill: bool, small: bool, path: Path,
    append: bool, **sizes: int,
) -> None:  # fmt: skip
    sizes |= SMALL if small else {}
    work.mkdir(parents=True, exist_ok=True)
    if child is None:
        child = work / "child"
        if library is None:
            raise click.ClickException("--child or --library")
        if not (child / "config.json").is_file():
            make_child(library, parent, child)
    device = "cpu" if small else "cuda"

    def asked(sequences: int) -> list[str]:
        lengths = ("--sequences", sequences, "--seq-len", sizes["seq_len"])
        return [str(a) for a in (parent, child, "--data", data, *lengths, "--no-speed", "--json", "--device", device)]

    numbers = [int(n) for n in counts.split(",")]
    table = PointTable(path, COLUMNS, POINT, append=append, writes=True, fill=fill_times)
    print(f"caches filled in {Run(max(numbers), asked(16)).ended()[2]:.1f} s", flush=True)
    rows = {}
    for ranks in numbers:
        rows[ranks] = row_of("whole", ranks, parent, sizes, Run(ranks, asked(sizes["sequences"])))
        table.add(rows[ranks])
    if kill and max(numbers) > 1:
        most = max(numbers)
        run = Run(most, asked(sizes["sequences"]))
        run.kill_last(float(rows[most]["seconds"]) / 2)
        killed = time.monotonic()
        status, out, _ = run.ended()
        if status == 0 or out.strip():
            raise RuntimeError("the evaluation went on as if nothing had happened, or had ended before")
        print(f"killed one of {most}: the others ended {time.monotonic() - killed:.1f} s later", flush=True)
        again = row_of("again", most, parent, sizes, Run(most, asked(sizes["sequences"])))
        table.add(again)
        same = all(again[k] == rows[most][k] for k in ("kl", "kl_stderr", "loss", "top1_agreement"))
        print(f"figures after the kill are {'the same' if same else 'others'}", flush=True)
    figures = {tuple(row[k] for k in ("kl", "kl_stderr", "loss", "top1_agreement")) for row in rows.values()}
    print(f"figures of {counts} processes are {'the same' if len(figures) == 1 else 'others'}", flush=True)


if __name__ == "__main__":
    main()
