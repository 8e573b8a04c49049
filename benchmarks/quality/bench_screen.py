"""How well the screen before the scores orders blocks: Spearman's correlation with the exact scores, and what it would have left out.

Protocol: `score --sub-block-screen 0` of a library: every block is estimated from one backward pass over 16 sequences (`puzzle/library/screen.py`),
and none is left out; what has no exact score gets one. A row a share of all blocks: of `dropped`, those with the largest estimates,
`among_worst` are among as many with the largest scores; least_rank is the best place by score, from 1, that one of them has.
screen_seconds: of the estimates, the parent's loading included; score_seconds: of exact scores, if any were missing.

    PYTHONPATH=. python benchmarks/quality/bench_screen.py LIBRARY --data text.jsonl --csv screen.csv
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from puzzle.base.device import pick_device, short_name
from puzzle.library.manifest import Library
from puzzle.library.results import LayerScores
from puzzle.library.score import ScoreOptions, Scorer, Scoring, score_library
from puzzle.library.screen import SEQUENCES, spearman
from write_rows import write_rows

FRACTIONS = (0.1, 0.2, 0.3, 0.5)


def timed(owner: type, name: str, found: dict[str, float]) -> None:
    """Count the seconds of a method, to what a GPU has done."""
    plain = getattr(owner, name)

    def wrapped(*given: Any) -> Any:
        begin = time.monotonic()
        result = plain(*given)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found[name] = found.get(name, 0.0) + time.monotonic() - begin
        return result

    setattr(owner, name, wrapped)


@click.command()
@click.argument("library", type=click.Path(path_type=Path))
@click.option("--parent", help="Where it is now.")
@click.option("--data", required=True, help="Text.")
@click.option("--sequences", type=int, default=64, show_default=True)
@click.option("--seq-len", type=int)
@click.option("--device", default="auto", show_default=True)
@click.option("--csv", "path", type=click.Path(path_type=Path), default=Path("benchmarks/results/screen.csv"))
def main(
    library: Path, parent: str | None, data: str, sequences: int, seq_len: int | None, device: str, path: Path
) -> None:
    seconds: dict[str, float] = {}
    layers: dict[int, LayerScores] = {}
    tokens: list[torch.Tensor] = []
    compare = Scoring.compare

    def compared(self: Scoring) -> None:
        layers.update({n: self.results.layers[n] for n in self.library.layers})
        tokens.append(self.tokens.validation)
        compare(self)

    timed(Scoring, "screen", seconds)
    timed(Scorer, "run", seconds)
    Scoring.compare = compared  # type: ignore[method-assign]
    options = ScoreOptions(sequences=sequences, seq_len=seq_len, device=device, sub_block_screen=0.0)
    score_library(library, [data], options, parent=parent)
    both = [
        (name.split("/")[0], estimate, one.scores[name]["kl"])
        for one in layers.values()
        for name, estimate in one.estimates.items()
        if name in one.scores
    ]

    def told(slot: str | None) -> str:
        some = [(e, s) for own, e, s in both if slot in (None, own)]
        found = spearman([e for e, _ in some], [s for _, s in some])
        return "" if found is None else f"{found:.4f}"

    by_estimate = sorted(range(len(both)), key=lambda n: -both[n][1])
    by_score = sorted(range(len(both)), key=lambda n: -both[n][2])
    rank = {n: len(both) - at for at, n in enumerate(by_score)}  # 1: the smallest score
    rows = []
    for fraction in FRACTIONS:
        count = int(fraction * len(both))
        dropped = set(by_estimate[:count])
        rows.append(
            {
                "parent": Path(Library.open(library).facts["parent"]["source"]).name,
                "blocks": len(both),
                "screen_tokens": tokens[0][:SEQUENCES].numel(),
                "score_tokens": tokens[0].numel(),
                "screen_seconds": f"{seconds['screen']:.2f}",
                "score_seconds": f"{seconds['run']:.2f}" if "run" in seconds else "",
                "spearman": told(None),
                **{f"spearman_{slot}": told(slot) for slot in ("attention", "ffn")},
                "fraction": fraction,
                "dropped": count,
                "among_worst": len(dropped & set(by_score[:count])),
                "least_rank": min((rank[n] for n in dropped), default=""),
                "device": short_name(pick_device(device)),
                "versions": f"torch {torch.__version__}",
                "date": time.strftime("%Y-%m-%d"),
            }
        )
    write_rows(path, rows)
    print(f"Spearman {told(None)} over {len(both)} blocks; the screen took {seconds['screen']:.1f} s")


if __name__ == "__main__":
    main()
