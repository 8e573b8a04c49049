"""A healing that is killed and continued against healings that are left alone: how far the loss curves are apart.

Protocol: `puzzle heal` of one child with the same options, in processes of its own: two uninterrupted, and one killed with
SIGKILL as soon as its checkpoint of step --kill-at (default: half of all steps) is on the disk, and started again. Losses
are those that heal.jsonl has per step. `noise` is the largest difference between the two uninterrupted runs, `resumed` that
between the continued run and the nearer of both: on a CPU both are 0, to the last bit; on a GPU kernels add in an order of
their own, and `resumed` should be no more than noise is. `differs_from_step` says where the curves leave each other first.

    python benchmarks/quality/bench_heal_resume.py --child CHILD --data corpus.jsonl --tokens 3M --work /tmp/resume
    python benchmarks/quality/bench_heal_resume.py --child CHILD --data corpus.jsonl --tokens 12k --seq-len 128 --batch-size 8 \\
        --save-every 4 --device cpu --work /tmp/resume --out /tmp/heal_resume.csv         # rehearsal on a CPU
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch

from puzzle import __version__
from puzzle.base.device import pick_device
from puzzle.base.files import read_json
from puzzle.base.units import parse_count
from puzzle.heal.log import read_log

ROOT = Path(__file__).resolve().parents[2]
FIELDS = "step,tokens,loss_1,loss_2,loss_resumed,continued,killed_after_step,lr,batch_size,seq_len,device,dtype,torch,puzzle,date"
POLL_SECONDS = 0.01


def steps_of(out: Path) -> dict[int, dict[str, Any]]:
    """The lines of a finished run's log, by step."""
    return {line["step"]: line for line in read_log(out / "heal.jsonl") if "loss" in line}


def newest_checkpoint(work: Path) -> int:
    found = [re.fullmatch(r"step-(\d+)", p.name) for p in work.iterdir()] if work.is_dir() else []
    return max((int(match[1]) for match in found if match), default=0)


def finished(process: subprocess.Popen) -> None:
    if process.wait() != 0:
        raise SystemExit(f"a run ended with status {process.returncode}: {process.args!r}")


def killed(process: subprocess.Popen, work: Path, step: int) -> int:
    """Kill the process once the checkpoint of `step` is there. Returns the last checkpoint's step."""
    while newest_checkpoint(work) < step:
        if process.poll() is not None:
            raise SystemExit(f"the run ended before its checkpoint of step {step} was seen: heal more --tokens")
        time.sleep(POLL_SECONDS)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return newest_checkpoint(work)


def largest(
    one: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]], first: int = 0
) -> tuple[float, int | None]:
    """(largest |difference| of the losses, first step that differs) from step `first` on."""
    gaps = {step: abs(line["loss"] - other[step]["loss"]) for step, line in one.items() if step >= first}
    return max(gaps.values()), min((step for step, gap in gaps.items() if gap > 0), default=None)


@click.command()
@click.option("--child", type=click.Path(path_type=Path), required=True)
@click.option("--parent", default=str(ROOT / "examples" / "parent"), show_default=True)
@click.option("--data", required=True)
@click.option("--tokens", default="3M", show_default=True)
@click.option("--seq-len", type=int, default=1024, show_default=True)
@click.option("--batch-size", type=int, default=32, show_default=True)
@click.option("--lr", type=float, default=1e-3, show_default=True)
@click.option("--save-every", type=int, default=20, show_default=True)
@click.option(
    "--kill-at", type=int, default=None, help="Step of a checkpoint; default: the first after half the steps."
)
@click.option("--together/--apart", default=None, help="The first three runs side by side; default: on a GPU.")
@click.option("--device", default="auto", show_default=True)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Directory for the three runs.")
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "benchmarks/results/heal_resume.csv")
def main(
    child: Path,
    parent: str,
    data: str,
    tokens: str,
    seq_len: int,
    batch_size: int,
    lr: float,
    save_every: int,
    kill_at: int | None,
    together: bool | None,
    device: str,
    work: Path,
    out: Path,
) -> None:
    num_steps = -(-parse_count("tokens", tokens) // (seq_len * batch_size))
    kill_at = kill_at or save_every * max(1, num_steps // 2 // save_every)
    if kill_at % save_every or kill_at >= num_steps:
        raise click.UsageError(f"--kill-at {kill_at}: a multiple of --save-every {save_every} below {num_steps} steps")
    work.mkdir(parents=True, exist_ok=True)

    def started(name: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "puzzle.cli", "heal", str(child), "--teacher", parent, "--data", data]
        command += ["--tokens", tokens, "--seq-len", str(seq_len), "--batch-size", str(batch_size), "--lr", str(lr)]
        command += ["--save-every", str(save_every), "--eval-every", "0", "--validation-sequences", "16"]
        return subprocess.Popen([*command, "--device", device, "--out", str(work / name)])

    for name in ("one", "two", "resumed"):
        for left in (work / name, work / f"{name}.heal"):
            shutil.rmtree(left, ignore_errors=True)
    begin = time.time()
    if together is None:
        together = pick_device(device).type == "cuda"
    processes: list[subprocess.Popen] = []
    try:
        for name in ("one", "two"):
            processes.append(started(name))
            if not together:
                finished(processes[-1])
        processes.append(started("resumed"))
        checkpoint = killed(processes.pop(), work / "resumed.heal", kill_at)
        print(f"killed; its last checkpoint is of step {checkpoint} of {num_steps}", flush=True)
        for process in processes:
            finished(process)
        processes.append(started("resumed"))
        finished(processes[-1])
    finally:
        for process in processes:
            process.kill()
    print(f"{time.time() - begin:.0f} s", flush=True)

    one, two, resumed = (steps_of(work / name) for name in ("one", "two", "resumed"))
    if not list(one) == list(two) == list(resumed) == list(range(1, num_steps + 1)):
        raise SystemExit(f"steps are missing: {len(one)}, {len(two)} and {len(resumed)} of {num_steps} logged")
    record = read_json(work / "one" / "heal.json", "puzzle heal")
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(FIELDS.split(","))
        common = (checkpoint, lr, batch_size, seq_len, record["device"], record["run"]["dtype"], torch.__version__)
        for step, line in one.items():
            losses = [repr(run[step]["loss"]) for run in (one, two, resumed)]
            said = (*common, __version__, time.strftime("%Y-%m-%d"))
            writer.writerow((step, line["tokens"], *losses, int(step > checkpoint), *said))
    for title, first in (("all steps", 0), (f"steps after {checkpoint}", checkpoint + 1)):
        noise, where = largest(one, two, first)
        nearer = min((largest(resumed, run, first) for run in (one, two)), key=lambda found: found[0])
        print(
            f"{title}: noise {noise:.3g} (differs_from_step {where}), resumed {nearer[0]:.3g} (differs_from_step "
            f"{nearer[1]}), loss {one[1]['loss']:.4f} -> {one[num_steps]['loss']:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
