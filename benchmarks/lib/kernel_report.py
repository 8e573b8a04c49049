"""What the kernel benchmarks share: a CSV with device and versions on every row, printed as it grows."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from ceilings import environment
from puzzle.base.machine import GPUS, gpu_facts

HERE = environment()["device"]
# By its datasheet, as the next three; a CPU rehearses for an H100. Another card is unknown, which is said.
CARD = gpu_facts("h100" if HERE == "cpu" else next((n for n in GPUS if n.upper() in HERE), HERE))
BANDWIDTH = CARD.bandwidth  # bytes a second
BF16, FP8 = CARD.bf16_flops, 1979e12  # FLOP a second, dense


class Report:
    """Rows of one benchmark. ceiling: what this device reached in the same run, in the unit of the amounts."""

    def __init__(self, out: Path, columns: list[str], ceiling: float, datasheet: float):
        self.handle = open(out, "w", newline="", encoding="utf-8")  # noqa: SIM115 (closed when the program ends)
        self.writer = csv.writer(self.handle, lineterminator="\n")
        self.facts, self.ceiling, self.datasheet = environment(), ceiling, datasheet
        self.writer.writerow([*columns, "way", "seconds", "share_of_measured", "share_of_datasheet", *self.facts])
        print(f"{self.facts['device']}: measured ceiling {ceiling:.4g} a second, datasheet {datasheet:.4g}")

    def add(self, point: list[Any], way: str, seconds: float, amount: float) -> None:
        """amount: bytes or FLOP of one call."""
        shares = [f"{amount / seconds / self.ceiling:.3f}", f"{amount / seconds / self.datasheet:.3f}"]
        row = [*point, way, f"{seconds:.4g}", *shares]
        self.writer.writerow([*row, *self.facts.values()])
        self.handle.flush()
        print(*row, flush=True)
