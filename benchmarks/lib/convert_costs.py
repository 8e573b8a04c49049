"""Convert cost tables and engine fits of the first version, where free text stood for a sub-block, to keys.

    python benchmarks/lib/convert_costs.py LIB/costs/cpu/NAME.csv ... architectures.json ... fit.json ...

Files are rewritten in place; what is converted already is left as it is. A linear map was measured twice, for attention and for
the FFN: its rows become one with the mean of both times. The shipped tables under `puzzle/profile/` were converted by this script.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

from puzzle.base.errors import UserError
from puzzle.base.files import write_json
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.linear import Linear
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.profile.cost_table import CostRow, write_costs
from puzzle.profile.parts import priced_as

PRECISIONS = {"bfloat16": "bf16", "fp8": "fp8", "float32": "float32", "float16": "float16"}


def key_of(kind: str, shape: str) -> str:
    """("attention", "h4096 q32 kv8 d128 window1024+qknorm") -> "gqa h4096 q32 kv8 d128 window1024 qk_norm=head" """
    if kind in ("embedding", "head", "model"):
        return f"{kind} {shape}"
    words, *flags = shape.split("+")
    size = {name: int(value) for name, value in re.findall(r"\b([a-z]+)(\d+)", words)}
    if unknown := sorted(set(flags) - {"qknorm"} - ({"bias"} if kind == "ffn" else set())):
        raise UserError(f"{kind} '{shape}': '{unknown[0]}' does not tell which matrices have biases: profile again")
    if words.endswith(" linear"):
        return priced_as(Linear(hidden_size=size["h"]))
    if kind == "ffn":
        return priced_as(SwiGLU(hidden_size=size["h"], intermediate_size=size["f"], bias="bias" in flags))
    return priced_as(
        Gqa(
            hidden_size=size["h"],
            num_attention_heads=size["q"],
            num_key_value_heads=size["kv"],
            head_dim=size["d"],
            window=size.get("window"),
            qk_norm="head" if "qknorm" in flags else None,
        )
    )


def convert_table(path: Path) -> None:
    with open(path, newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    if not rows or "shape" not in rows[0]:
        return
    found: dict[tuple[Any, ...], list[dict[str, str]]] = {}
    for row in rows:
        part, precision = key_of(row["kind"], row["shape"]), PRECISIONS[row["dtype"]]
        found.setdefault((part, precision, row["phase"], int(row["batch"]), int(row["context"])), []).append(row)
    write_costs(path, [_row(key, same) for key, same in sorted(found.items())])


def _row(key: tuple[Any, ...], same: list[dict[str, str]]) -> CostRow:
    part, precision, phase, batch, context = key
    measured = [row for row in same if int(row["num_samples"]) > 0] or same
    times: dict[str, Any] = {name: mean(float(row[name]) for row in measured) for name in ("p20_s", "p50_s", "p80_s")}
    facts: dict[str, Any] = {name: same[0][name] for name in ("device", "versions", "date")}
    return CostRow(
        part=part,
        precision=precision,
        phase=phase,
        batch=batch,
        context=context,
        num_samples=sum(int(row["num_samples"]) for row in measured),
        workspace_bytes=max(int(row.get("workspace_bytes") or 0) for row in measured),
        **times,
        **facts,
    )


def convert_json(path: Path) -> None:
    """architectures.json or fit.json of an engine, or the NAME.json beside a table."""
    value = json.loads(path.read_text(encoding="utf-8"))
    if "dtype" in value:
        value = {"precision" if k == "dtype" else k: PRECISIONS[v] if k == "dtype" else v for k, v in value.items()}
    for name, parts in value.get("architectures", {}).items():
        if "sub_blocks" not in parts:
            counts: Counter[str] = Counter()
            for kind in ("attention", "ffn"):
                for shape, number in parts[kind].items():
                    counts[key_of(kind, shape)] += number
            value["architectures"][name] = {"sub_blocks": dict(counts), "head": key_of("head", parts["head"])}
    write_json(path, value)


def main() -> None:

    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for name in sys.argv[1:]:
        path = Path(name)
        convert_table(path) if path.suffix == ".csv" else convert_json(path)
        print(f"converted {path}")


if __name__ == "__main__":
    main()
