"""Rows of large_parents.csv from what `speed/bench_score.py` printed: a line of JSON for each part.

    python benchmarks/lib/large_rows.py LOG RUN CSV          # RUN: what these rows are of, such as whole

Rows that the CSV has already are left as they are; of models that were made there is none.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from pathlib import Path
from typing import Any

COLUMNS = (
    "run,parent,layers,what,sequences,seq_len,num_candidates,seconds,planned_device_bytes,peak_bytes,reserved_bytes,planned_host_bytes,"
    "host_bytes,pinned_bytes,streamed,device,torch,date"
)


def row_of(run: str, said: dict[str, Any]) -> dict[str, str]:
    plan = said["planned"]["plan"]
    found = {
        "run": run,
        "parent": said["name"],
        **{k: said[k] for k in ("layers", "what", "sequences", "seq_len", "seconds", "peak_bytes", "reserved_bytes")},
        "num_candidates": said["planned"].get("missing", ""),
        "planned_device_bytes": plan["device_bytes"],
        "planned_host_bytes": plan["host_bytes"],
        "host_bytes": said["anonymous_bytes"],
        "pinned_bytes": said["pinned_bytes"],
        "streamed": plan["streamed"],
        "device": said["device"],
        "torch": said["torch"],
        "date": time.strftime("%Y-%m-%d"),
    }
    return {column: str(found[column]) for column in COLUMNS.split(",")}


def main(log: Path, run: str, out: Path) -> None:
    rows = []
    if out.is_file():
        with open(out, newline="", encoding="utf-8") as handle:
            rows = list(csv.DictReader(handle))
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.startswith('{"name"') or (said := json.loads(line))["what"] == "make":
            continue
        new = row_of(run, said)
        if not any(old | {"date": ""} == new | {"date": ""} for old in rows):
            rows.append(new)
            print(*(f"{k}={new[k]}" for k in ("run", "parent", "what", "seconds", "peak_bytes", "host_bytes")))
    with open(out, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, COLUMNS.split(","), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
