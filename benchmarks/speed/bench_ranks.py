"""Building, scoring and healing on one, two and four GPUs: tokens per second, and whether the results are the same.

Protocol: for each number of processes `puzzle build-library` of --parent with the default search space, and `puzzle heal` of one child: --child, or
what `solve --throughput 1.5x` chooses of the first library by what its blocks cost here at one batch size (`puzzle profile`). `build`: training tokens over the seconds of its steps,
first ones and graph capture included; `score`: tokens that variants were scored on, over the seconds of it; `heal`: as heal.json has it, steps
alone. kl: of scores their mean over all variants, of healing what it was before and after, on held-out text.

    PYTHONPATH=. python benchmarks/speed/bench_ranks.py WORK --data DATA --ranks 1,2,4 --csv benchmarks/results/ranks.csv
    PYTHONPATH=. python benchmarks/speed/bench_ranks.py /tmp/x --data /usr/lib/python3.12/email --small --csv /tmp/x.csv     # rehearse on a CPU
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from point_table import PointTable, Row
from puzzle.library.manifest import Library
from timed_puzzle import read_timed

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = "stage,ranks,parent,num_tokens,seconds,tokens_per_second,times_of_one,kl_before,kl,wall_seconds,device,versions,date"
POINT = ("stage", "ranks", "parent", "num_tokens", "device")
SMALL = {"tokens": "4k", "heal_tokens": "4k", "seq_len": 64, "sequences": 4}
Told = tuple[float, dict[str, float]]  # seconds of the whole, and of its stages


def launched(ranks: int, device: str, *arguments: object) -> Told:
    """`puzzle ARGUMENTS` by so many processes, one as users of one GPU have it. Raises RuntimeError with its last words where it fails."""
    torchrun: tuple[str, ...] = ()
    if ranks > 1:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(port))
    command = [sys.executable, *torchrun, str(ROOT / "benchmarks/lib/timed_puzzle.py"), *map(str, arguments)]
    begin = time.monotonic()
    done = subprocess.run([*command, "--device", device], capture_output=True, text=True, env=environment())
    if done.returncode != 0:
        words = re.search(r"^error.*", done.stderr, re.MULTILINE | re.IGNORECASE)
        raise RuntimeError(f"{arguments[0]} on {ranks}: {words[0] if words else done.stderr[-2000:]}")
    return time.monotonic() - begin, read_timed(done.stderr)


def environment() -> dict[str, str]:
    """With the package, before what else Python was told to look through."""
    return {
        "NCCL_NVLS_ENABLE": "0",
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }


def build(work: Path, ranks: int, device: str, parent: Path, sizes: dict[str, object]) -> list[Row]:
    """The rows of building and scoring, into WORK/library-RANKS."""
    out = work / f"library-{ranks}"
    shutil.rmtree(out, ignore_errors=True)
    asked = ("--tokens", sizes["tokens"], "--seq-len", sizes["seq_len"], "--score-sequences", sizes["sequences"])
    wall, stages = launched(ranks, device, "build-library", parent, "--data", sizes["data"], *asked, "--out", out)
    library = Library.open(out)
    scored = [one for layer in range(library.num_layers) for one in library.scores(layer).values()]
    trained = max(
        json.loads(record.read_text())["num_tokens"] for record in (out / "blocks").glob("*/*/*.json")
    )  # of every block that trains
    kl = f"{mean(one['kl'] for one in scored):.6g}"
    return [
        row_of("build", ranks, parent, trained, stages["build"], wall, kl=kl),
        row_of("score", ranks, parent, sum(int(one["num_tokens"]) for one in scored), stages["score"], wall, kl=kl),
    ]


def heal(work: Path, ranks: int, device: str, parent: Path, child: Path, sizes: dict[str, object]) -> Row:
    """The row of healing `child` into WORK/healed-RANKS."""
    out = work / f"healed-{ranks}"
    lengths = ("--tokens", sizes["heal_tokens"], "--seq-len", sizes["seq_len"], "--eval-every", 0)
    asked = (
        *lengths,
        "--batch-size",
        4 if device == "cpu" else 32,
        "--validation-sequences",
        sizes["sequences"],
        "--force",
    )
    wall, _ = launched(ranks, device, "heal", child, "--teacher", parent, "--data", sizes["data"], *asked, "--out", out)
    said = json.loads((out / "heal.json").read_text())
    kl = {"kl_before": f"{said['before']['kl']:.6g}", "kl": f"{said['after']['kl']:.6g}"}
    return row_of("heal", ranks, parent, said["num_tokens"], said["seconds"], wall, **kl)


def named(parent: Path) -> str:
    """A path's last word: of a hub id the model's."""
    return parent.absolute().name


def row_of(
    stage: str, ranks: int, parent: Path, num_tokens: int, seconds: float, wall: float, kl: str, kl_before: str = ""
) -> Row:
    cuda = torch.cuda.is_available()
    return {
        "stage": stage,
        "ranks": str(ranks),
        "parent": named(parent),
        "num_tokens": str(num_tokens),
        "seconds": f"{seconds:.3f}",
        "tokens_per_second": f"{num_tokens / seconds:.0f}",
        "kl_before": kl_before,
        "kl": kl,
        "wall_seconds": f"{wall:.1f}",
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "versions": f"torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
    }


def fill_times(rows: list[Row]) -> None:
    """Of every row the speed over that of one process."""
    for one in rows:
        alone = [r for r in rows if all(r[k] == (one | {"ranks": "1"})[k] for k in POINT)]
        ratio = [float(one["tokens_per_second"]) / float(r["tokens_per_second"]) for r in alone]
        one["times_of_one"] = f"{ratio[0]:.3f}" if ratio else ""


def choose(work: Path, library: Path, gpu: str) -> Path:
    """The child that is healed, made once."""
    child, solution = work / "child", work / "solution"
    if not child.is_dir():
        grid = ("--batches", 4 if gpu == "cpu" else 64, "--prefill", 128, "--contexts", "128,256")
        here = ("--gpu", gpu)
        for command in (
            ("profile", library, *here, *grid),
            ("solve", library, "--throughput", "1.5x", *here, "--out", solution),
            ("export", library, solution, "--out", child),
        ):
            subprocess.run([sys.executable, "-m", "puzzle", *map(str, command)], check=True, env=environment())
    return child


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--parent", type=click.Path(path_type=Path), default=ROOT / "examples" / "parent")
@click.option("--child", type=click.Path(path_type=Path), help="What is healed. Default: solved for, in WORK/child.")
@click.option("--data", required=True, help="Text.")
@click.option("--gpu", default="h100", show_default=True, help="This machine's.")
@click.option("--ranks", "counts", default="1,2,4", show_default=True)
@click.option("--stages", default="build,heal", show_default=True)
@click.option("--tokens", default="2M", show_default=True, help="Of building.")
@click.option("--heal-tokens", default="10M", show_default=True)
@click.option("--seq-len", type=int, default=512, show_default=True)
@click.option("--sequences", type=int, default=64, show_default=True, help="Held out, for scores and evaluations.")
@click.option("--small", is_flag=True, help="A few tokens on a CPU, to rehearse.")
@click.option("--csv", "path", type=click.Path(path_type=Path), default=Path("benchmarks/results/ranks.csv"))
@click.option("--append", is_flag=True, help="Keep the rows that are in the CSV, to which others may add meanwhile.")
@click.option("--go-on", is_flag=True, help="And do not measure their points again.")
def main(
    work: Path,
    parent: Path,
    child: Path | None,
    gpu: str,
    counts: str,
    stages: str,
    small: bool,
    path: Path,
    append: bool,
    go_on: bool,
    **sizes: object,
) -> None:
    sizes |= SMALL if small else {}
    device, wanted = "cpu" if small else "cuda", stages.split(",")
    work.mkdir(parents=True, exist_ok=True)
    append = append or go_on
    table = PointTable(path, COLUMNS, POINT, append=append, writes=True, fill=fill_times, shared=append)
    numbers = [int(n) for n in counts.split(",")]

    def left(stage: str, last: str) -> list[int]:
        """Numbers of processes of which the stage's last row is wanted."""
        done = [n for n in numbers if go_on and table.has(stage=last, ranks=str(n), parent=named(parent))]
        return [n for n in numbers if stage in wanted and n not in done]

    for ranks in left("build", "score"):
        for row in build(work, ranks, device, parent, sizes):
            table.add(row)
    for ranks in left("heal", "heal"):
        chosen = child or choose(work, work / f"library-{numbers[0]}", "cpu" if small else gpu)
        table.add(heal(work, ranks, device, parent, chosen, sizes))


if __name__ == "__main__":
    main()
