"""Sections of what was trained: scores of all blocks, block-local distillation, healing."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import Any

from puzzle.base.files import read_any
from puzzle.base.units import layer_name
from puzzle.blocklib.variant import PARENT
from puzzle.heal.log import read_log
from puzzle.library.manifest import Library, score_name, scores_path
from puzzle.page.found import Found, numbers, understood
from puzzle.page.sections import MEASURED, figure, say, table
from puzzle.page.svg import NUM_SHADES, Cell, Point, Series, chart, grid

MOST_POINTS = 240  # of a curve
LEAST_SHADE = 1e-5  # of the largest score: what is below has the lightest shade


def scores(run: Found) -> str:
    """A row a variant, a column a layer; "" where no layer has been scored."""
    if (library := run.library) is None:
        return ""
    found: dict[tuple[int, str], tuple[float, float]] = {}
    screened: set[tuple[int, str]] = set()
    for layer in library.layers:
        path = scores_path(library.root, layer)
        if path.is_file():
            with understood(path):
                for name, score in library.scores(layer).items():
                    numbers(score["kl"], score["kl_stderr"])
                    error = score["kl_stderr"]  # None: of a single sequence, which says none
                    found[layer, name] = float(score["kl"]), math.inf if error is None else float(error)
                screened |= {(layer, name) for name in library.screened(layer)}
    names = [score_name({slot: variant}) for slot, variant in _offered(library)]
    if not names or not found:
        return ""
    drawn = [kl for (_, name), (kl, _) in found.items() if name in names and kl > 0]
    high = max(drawn, default=1.0)
    low = min(max(min(drawn, default=1.0), high * LEAST_SHADE), high / 1.001)
    layers = enumerate(run.solved.variants if run.solved else ())
    chosen = {(n, score_name({slot: name})) for n, layer in layers for slot, name in layer.items()}

    def cell(layer: int, name: str) -> Cell | None:
        slot, variant = name.split("/", 1)
        if layer not in library.layers or variant not in library.spaces[layer].get(slot, ()):
            return None
        here, ring = f"{layer_name(layer)} {name}:", (layer, name) in chosen
        if (layer, name) not in found:
            out = (layer, name) in screened
            return Cell(f"{here} {'screened out' if out else 'not scored'}", ring=ring, mark="×" if out else "")
        kl, error = found[layer, name]
        place = math.log(max(kl, low) / low) / math.log(high / low)
        told = f"KL {kl:.3g}" + (f" ± {error:.2g}" if math.isfinite(error) else ", of one sequence")
        return Cell(f"{here} {told}", min(NUM_SHADES - 1, int(place * NUM_SHADES)), ring=ring)

    rows = [(name, [cell(layer, name) for layer in range(library.num_layers)]) for name in names]
    edges = [low * (high / low) ** (n / NUM_SHADES) for n in range(NUM_SHADES)]
    shades = "".join(f'<span><i class="h{n}"></i>{edge:.2g}</span>' for n, edge in enumerate(edges))
    more = sum(name not in names for _, name in found)
    words = "Synthetic, measured by nobody" if library.facts.get("synthetic_scores") else "Measured"
    words += ": KL to the parent when one block alone is replaced; the stronger the shade, the worse, on a logarithmic scale."
    words += " Ringed: chosen." * bool(chosen) + " ×: screened out, no score." * bool(screened)
    words += f" {more} scores of pairs or in fp8 are not drawn." * bool(more)
    return f'<p class="key">KL, nats/token, from {shades} to {high:.2g}</p>' + figure(
        grid("scores", rows, 18, "layer"), words
    )


def _offered(library: Library) -> list[tuple[str, str]]:
    """(slot, variant), slot by slot."""
    spaces = [library.spaces[n] for n in library.layers]
    slots = dict.fromkeys(slot for space in spaces for slot in space)
    return list(dict.fromkeys((s, v) for s in slots for space in spaces for v in space.get(s, ()) if v != PARENT))


def distillation(run: Found) -> str:
    """Of every variant, medians over layers of the held-out losses."""
    if (library := run.library) is None:
        return ""
    drawn: dict[str, list[Series]] = {}
    rows: list[tuple[Any, ...]] = []
    missing = 0
    for slot, name in _offered(library):
        ends, layers = [], [n for n in library.layers if name in library.spaces[n].get(slot, ())]
        curves: dict[int, list[float]] = {}
        for path in (library.root / "blocks" / layer_name(n) / slot / f"{name}.json" for n in layers):
            if path.is_file():
                with understood(path):
                    both, kept, curve = _record(path)
                    ends.append((*both, kept))
                    for tokens, loss in curve:
                        curves.setdefault(int(tokens), []).append(math.inf if loss is None else float(loss))
        missing += len(layers) - len(ends)
        if ends:
            medians = (f"{median(one[n] for one in ends):.4f}" for n in (0, 1))
            rows.append((f"{slot}/{name}", len(ends), *medians, sum(one[2] for one in ends)))
        if len(curves) > 1:
            places = [(tokens, median(losses)) for tokens, losses in sorted(curves.items())]
            drawn.setdefault(slot, []).append(Series(name, places, len(drawn.get(slot, ())), mark="filled"))
    words = "Measured on held-out text, medians over layers: 0 is the parent's own sub-block, 1 is one that contributes nothing."
    charts = {s: chart(s, "training tokens", f"nMSE of {s} variants", some, log_y=True) for s, some in drawn.items()}
    heads = ("variant", "layers", f"{MEASURED} nMSE at start", f"{MEASURED} nMSE trained", "kept as initialised")
    told = f"{missing} blocks are not built yet: the same `puzzle build-library` goes on."
    made = "".join(figure(one, words) for one in charts.values()) + (say(told, "missing") if missing else "")
    return made + (table(heads, rows) if rows else "")


def _record(path: Path) -> tuple[tuple[float, float], int, list[tuple[int, float | None]]]:
    """Losses before and after; 1 where it was kept as initialised; losses at numbers of tokens on the way."""
    record = read_any(path, "puzzle build-library")
    both = record["validation_loss_before"], record["validation_loss_after"]
    curve = record.get("validation_curve") or {"num_tokens": [0, record["num_tokens"]], "losses": both}
    numbers(*both, *curve["num_tokens"], *curve["losses"])
    places = list(zip(curve["num_tokens"], curve["losses"], strict=True))
    return (float(both[0]), float(both[1])), int(record["status"] == "kept as initialised"), places


def healing(run: Found) -> str:
    def drawn(name: str, path: Any) -> str:
        lines, made = read_log(path), ""
        numbers(*(line["tokens"] for line in lines))
        steps, looks = ([line for line in lines if ("held_out" in line) == look] for look in (False, True))
        held = [{"tokens": line["tokens"]} | line["held_out"] for line in looks]
        for label, trained, key in (("KL to the teacher, nats/token", "kl", "kl"), ("loss, nats/token", "lm", "loss")):
            training, own = _thinned(_curve(steps, trained)), _curve(held, key)
            teacher = _curve(held, "teacher_loss") if key == "loss" else []
            series = [Series("training", training), Series("held out", own, 0, mark="filled")]
            series = [one for one in (*series, Series("teacher, held out", teacher, 1)) if one.points]
            if series:
                words = f"{name}, measured." + f" Training: means over {-(-len(steps) // MOST_POINTS)} steps." * bool(
                    training
                )
                made += figure(chart("healing", "training tokens", label, series), words)
        beside = path.with_name("heal.json")
        if not beside.is_file():
            return made + say(f"{name}: this healing has not ended; the same `puzzle heal` goes on.", "missing")
        with understood(beside):
            before, after = (read_any(beside, "puzzle heal")[when] for when in ("before", "after"))
            rows = [(key.replace("_", " "), before[key], after[key]) for key in before if key in after]
        return made + table(("held out", f"{MEASURED} before", f"{MEASURED} after"), rows)

    return "".join(run.each("heal", drawn))


def _curve(lines: list[dict[str, Any]], key: str) -> list[Point]:
    return [(float(line["tokens"]), float(line[key])) for line in lines if line.get(key) is not None]


def _thinned(points: list[Point]) -> list[Point]:
    """Means of as many neighbours as leave MOST_POINTS."""
    step = -(-len(points) // MOST_POINTS) or 1
    groups = [points[n : n + step] for n in range(0, len(points), step)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
