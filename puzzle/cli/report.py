"""What people read on the terminal: the architecture and its table, evaluations, results. Predicted is never mixed
with measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from puzzle.base.console import console, say
from puzzle.base.units import bytes_text, count_text, seconds_text
from puzzle.blocklib.variant import PARENT
from puzzle.choose.frontier import terminal_plot
from puzzle.export.picture import picture
from puzzle.library.manifest import Library, score_name, scores_path
from puzzle.measure.architecture import Architecture, Prediction
from puzzle.profile.engine import SHARES

if TYPE_CHECKING:
    from puzzle.choose.refine import Refined
    from puzzle.measure.evaluate import Evaluated, Evaluation
    from puzzle.measure.serve import Served

# Figures of a stage.
ROAD = (("tokens", count_text), ("seconds", seconds_text), ("memory_bytes", bytes_text), ("disk_bytes", bytes_text))
COMPARED = ("", "parent", "child")
FIT_ERROR = 0.05  # of an engine's fit, above which it is said
Row = tuple[str, Any, Any]  # of these columns


def print_table(title: str | None, columns: Sequence[str], rows: Iterable[Sequence[Any]], words: int = 1) -> None:
    """words: how many columns, from the left, hold words and not figures."""
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < words else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table)


def _told(value: Any, text: Callable[[Any], str], missing: str = "–") -> str:
    return missing if value is None else text(value)


def _speed_rows(parent: Prediction | Served, child: Prediction | Served, *speedups: tuple[str, float]) -> list[Row]:
    return [
        ("batch", parent.batch, child.batch),
        ("tokens/s", f"{parent.tokens_per_second:.5g}", f"{child.tokens_per_second:.5g}"),
        *((name, "1x", f"{speedup:.3g}x") for name, speedup in speedups),
        ("time to first token", f"{parent.ttft_seconds:.4g} s", f"{child.ttft_seconds:.4g} s"),
        ("time per output token", f"{parent.tpot_seconds:.4g} s", f"{child.tpot_seconds:.4g} s"),
        ("memory", bytes_text(parent.memory_bytes), bytes_text(child.memory_bytes)),
    ]


def print_solution(solved: Architecture) -> None:
    """The picture, the solver's certificate and the predicted figures of parent and child."""
    for line in picture(solved.sub_blocks, solved.parent.layers):
        say(line)
    if solved.synthetic_scores:
        say("the scores are synthetic: speed and size are what counts here, not quality")
    for one in solved.points or ():
        score = _told(one["objective"], "{:.5g} nats/token".format, "no child that meets the goal was found")
        begun = (
            f", of which slicing {one['base']:.5g} (measured)" if one["base"] and one["objective"] is not None else ""
        )
        say(f"{one['sizes']}: {score}{begun} ({one['library']})")
    slack = ", ".join(f"{name} {_amount(name, value, '.4g')}" for name, value in solved.slack.items())
    say(
        f"{solved.status}: sum of scores {solved.objective:.5g} nats/token, {solved.certificate}, "
        f"slack: {slack} ({solved.solver}, {solved.seconds:.2f} s)"
    )
    told = "" if solved.tp == 1 else "; memory and KV bytes of each"
    print_table(f"predicted on {solved.costs['device']} ({solved.precision}{told})", COMPARED, _predicted_rows(solved))
    limit = solved.goal["memory"]
    if isinstance(limit, float) and (needed := solved.parent_predicted.memory_bytes) > limit:
        say(
            f"the parent itself needs {bytes_text(needed)}: its figures are what it would do with that much "
            "memory, at its smallest batch"
        )
    for line in (*solved.extrapolated, *(line for also in solved.also for line in also.extrapolated)):
        say(f"extrapolated: {line}")
    if (error := solved.costs.get("left_out") or 0) > FIT_ERROR:
        say(
            f"the fit itself misses {100 * error:.1f} % of the tokens/s of architectures that are left out of it, on average: hold the "
            "promise for no more exact, or measure the child with `puzzle bench --engine`"
        )
    if (pace := solved.host_pace) is not None:
        say(
            f"the engine's own Python sets the child's pace from batch {pace['from_batch']} on: at {pace['batch']} its share of a step is "
            f"{pace['host_ms']:.3g} ms, the device's {pace['device_ms']:.3g} ms (the longer one counts)",
        )
    for also in solved.also:
        work, mine, own = also.workload, also.predicted, also.parent_predicted
        say(
            f"also {work.input_len}/{work.output_len} at batch {mine.batch}, predicted: "
            f"{mine.tokens_per_second:.5g} tokens/s ({also.speedup:.3g}x), first token {mine.ttft_seconds:.4g} s, "
            f"then {mine.tpot_seconds:.4g} s each; parent {own.tokens_per_second:.5g} at batch {own.batch}, "
            f"{own.ttft_seconds:.4g} s, {own.tpot_seconds:.4g} s",
        )


def _predicted_rows(solved: Architecture) -> list[Row]:
    parent, child = solved.parent_predicted, solved.predicted
    speedups = [("speed-up", solved.speedup)]
    if parent.batch != child.batch:
        speedups = [("speed-up, each at its best batch", solved.speedup)]
        speedups += [("speed-up at the child's batch", solved.speedup_at_same_batch)]
    rows = [
        *_speed_rows(parent, child, *speedups),
        ("KV bytes per token", parent.kv_bytes_per_token, child.kv_bytes_per_token),
        *_state_row(parent, child),
        ("parameters", f"{parent.num_parameters:,}", f"{child.num_parameters:,}"),
    ]
    if parent.active_parameters and child.active_parameters and parent.active_parameters < parent.num_parameters:
        rows.append(("of which a token uses", f"{parent.active_parameters:,}", f"{child.active_parameters:,}"))
    if (tokens := solved.cached_tokens(solved.structure(), child)) is not None:
        rows.append(("tokens that its cache holds", solved.cached_tokens(solved.reference, parent), tokens))
    return rows


def _state_row(parent: Prediction | Evaluated, child: Prediction | Evaluated) -> list[Row]:
    """What a sequence keeps whatever its length, where one of them keeps something."""
    ours, theirs = bytes_text(parent.state_bytes), bytes_text(child.state_bytes)
    return [("state of a sequence", ours, theirs)] if parent.state_bytes or child.state_bytes else []


def print_evaluation(result: Evaluation) -> None:
    parent, child = result.parent, result.child
    rows: list[Row] = [
        ("held-out loss, nats/token", f"{parent.loss:.4f}", f"{child.loss:.4f}"),
        ("KL(parent‖child), nats/token", "0", f"{child.kl:.4f} ± {child.kl_stderr:.4f}"),
        ("top-1 agreement", "1", f"{child.top1_agreement:.4f}"),
        ("parameters", f"{parent.num_parameters:,}", f"{child.num_parameters:,}"),
        ("weights", bytes_text(parent.weight_bytes), bytes_text(child.weight_bytes)),
        ("KV bytes per token", parent.kv_bytes_per_token, child.kv_bytes_per_token),
        *_state_row(parent, child),
    ]
    if parent.speed is not None and child.speed is not None and result.speedup is not None:
        rows += _speed_rows(parent.speed, child.speed, ("speed-up", result.speedup))
    print_table(f"measured on {result.device} ({result.precision}), {result.num_tokens:,} tokens", COMPARED, rows)
    if result.continuations is not None:
        print_continuations(result.continuations)


def print_continuations(found: dict[str, Any]) -> None:
    """Prompts in bold, and how both models go on."""
    title = f"sampled at temperature {found['temperature']}, seed {found['seed']}"
    table = Table(title=title, title_justify="left", show_lines=True)
    for who in ("parent", "child"):
        table.add_column(who, overflow="fold")
    for text in found["texts"]:
        table.add_row(*(Text.assemble((text["prompt"], "bold"), text[who]) for who in ("parent", "child")))
    console.print(table)


def _amount(limit: str, value: float, form: str) -> str:
    """Of a limit, by its name, which that of a further workload begins with too."""
    return bytes_text(value) if limit.startswith("memory") else f"{value:{form}}"


def print_prices(solved: Architecture) -> None:
    """What 1 % more of each limit buys; nothing without --explain."""
    for price in solved.prices or ():
        change = price["objective"] - solved.objective
        share = f" ({100 * change / solved.objective:+.2f} %)" if solved.objective else ""
        moved = (
            "1 % less throughput"
            if price["limit"] == "throughput"
            else f"{price['limit']} {_amount(price['limit'], price['moved'], '.6g')}"
        )
        say(f"{moved}: sum of scores {change:+.4g}{share}")


def print_frontier(rows: list[dict[str, Any]], axis: str) -> None:
    if not rows:
        say("no point of the frontier can be met")
        return
    for line in terminal_plot(rows, axis):
        say(line)


def print_diverse(found: list[Architecture]) -> None:
    for number, solved in enumerate(found, 1):
        say(f"{number}: sum of scores {solved.objective:.5g}, {solved.speedup:.3g}x (predicted)")
        for line in picture(solved.sub_blocks, solved.parent.layers)[:-1]:
            say(line)


def print_finalists(refined: Refined) -> None:
    """Every measured child, what is told of interactions, and the best one."""
    rows = [
        (
            one.method,
            one.solved.predicted.batch,
            f"{one.solved.speedup:.3g}x",
            one.changed,
            f"{one.solved.objective:.5f}",
            f"{one.kl:.5f}"
            + (f" ± {one.kl_stderr:.5f}" if math.isfinite(one.kl_stderr) else "")
            + (" best" if one is refined.best else ""),
        )
        for one in refined.candidates
    ]
    columns = ("chosen by", "batch", "speed-up (predicted)", "layers changed", "sum of scores", "KL (measured)")
    print_table("children, nats/token", columns, rows)
    if (fit := refined.fit) is not None:
        say(
            f"interactions from {fit.num_children} measured children: the KL of one left out is missed by {100 * fit.error:.1f} %, by the "
            f"sum of scores by {100 * fit.error_before:.1f} % (root of the mean square)"
        )
    print_solution(refined.best.solved)


def print_solutions(value: dict[str, Any]) -> None:
    """What `puzzle solve --problem` found."""
    for number, solution in enumerate(value["solutions"], 1):
        objective = _told(solution["objective"], "{:.9g}".format, "none")
        gap = _told(solution["gap"], ", gap {:.1e}".format, "")
        say(f"{number}: {solution['status']}, objective {objective}{gap} ({solution['seconds']:.2f} s)")


def print_result(result: dict[str, Any]) -> None:
    """Promise against delivery."""
    told = partial(_told, missing="not measured")
    predicted, measured = result["predicted"], result["measured"]
    parent, child = result["parent"], result["child"]
    of_the_last = ", of the last step alone" if "steps" in result else ""
    parents = f"{parent['predicted_tokens_per_second']:.5g}", told(parent["tokens_per_second"], "{:.5g}".format)
    rows = [
        ("speed-up", f"{predicted['speedup']:.3g}x", told(measured["speedup"], "{:.3g}x".format)),
        ("tokens/s", f"{predicted['tokens_per_second']:.5g}", told(measured["tokens_per_second"], "{:.5g}".format)),
        ("the parent's tokens/s", *parents),
        ("weights and KV cache", bytes_text(predicted["memory_bytes"]), told(measured["memory_bytes"], bytes_text)),
        ("KV bytes per token", predicted["kv_bytes_per_token"], measured["kv_bytes_per_token"]),
        (
            "KL to the parent, nats/token",
            f"{child['sum_of_scores']:.4f} (sum of scores{of_the_last})",
            f"{child['kl']:.4f}",
        ),
        ("held-out loss", f"parent {parent['loss']:.4f}", f"{child['loss']:.4f}"),
    ]
    print_table("promised and delivered", ("", "predicted", "measured"), rows)
    if "continuations" in result:
        print_continuations(result["continuations"])
    for name, path in result["exports"].items():
        say(f"export {name}: {path}")


def print_plan(facts: dict[str, Any]) -> None:
    """The --dry-run report; every figure is predicted."""
    groups, predicted = facts["groups"], facts["predicted"]
    figures = {
        "device": facts["device"],
        **{slot: ", ".join(names) for slot, names in facts["variants"].items()},
        "layers": f"{sum(map(len, groups))} in {len(groups)} group(s) of up to {max(map(len, groups))}",
        "trained": f"{facts['num_trained_parameters']:,} parameters",
        "device memory": f"{bytes_text(predicted['peak_memory_bytes'])} at the peak (predicted)",
        "host memory": f"{bytes_text(predicted['host_memory_bytes'])} besides (predicted)",
        "disk": f"{bytes_text(predicted['disk_bytes'])}: library and one snapshot (predicted)",
        "compute": f"{predicted['flops']:.2e} FLOPs over {predicted['num_tokens']:,} tokens (predicted)",
        "training time": f"{seconds_text(predicted['seconds'])} (predicted from timed steps of one layer)",
    }
    for name, text in figures.items():
        say(f"{name:<17} {text}")


def print_road(facts: dict[str, Any]) -> None:
    """The --dry-run of a road; every figure is predicted."""
    print_plan(facts["build"])
    rows = [(name, *(_told(row[key], text) for key, text in ROAD)) for name, row in facts["stages"].items()]
    print_table("stages (predicted; –: next to nothing)", ("stage", "tokens", "time", "memory", "disk"), rows)


def print_shapes(facts: dict[str, Any]) -> None:
    """The --dry-run of a road whose parent is known by its shapes alone; every figure is computed."""
    rows = [
        (
            name,
            _told(row["tokens"], count_text),
            _told(row["gpu_hours"], "{:,.2f}".format),
            "none" if row["gpus"] is None and row["memory_bytes"] else row["gpus"] or "–",
            _told(row.get("passes"), str),
            *(_told(row[key], bytes_text) for key in ("memory_bytes", "disk_bytes")),
        )
        for name, row in facts["stages"].items()
    ]
    total = sum(row["gpu_hours"] or 0.0 for row in facts["stages"].values())
    columns = ("stage", "tokens", f"{facts['gpu']}-hours", "GPUs", "readings", "their memory", "disk")
    print_table(f"{facts['shapes']} by its shapes alone: computed, nothing measured here", columns, rows)
    say(
        f"{total:,.{0 if total >= 100 else 2}f} GPU-hours in all, at {facts['mfu']} of the datasheet's bf16 FLOPs (see docs/scale.md)"
    )
    if told := [name for name, row in facts["stages"].items() if row.get("told")]:
        say(f"{', '.join(told)}: hours as the recipe says them, not computed")
    if drawn := [name for name, row in facts["stages"].items() if row.get("sampled") and not row["told"]]:
        say(f"{', '.join(drawn)}: tokens that are sampled count as read ones: sampling takes longer, at least as long")
    say(
        "GPUs: the least that run it; readings: of models that pass layer by layer, from disk, with "
        f"{bytes_text(facts['host_bytes'])} of host memory a GPU"
    )
    if facts["stages"]["build-library"]["gpus"] is None:
        say(
            f"one layer with its variants does not fit a GPU's {bytes_text(facts['card_bytes'])}, and no two share one: fewer variants at a "
            "time, or a smaller build.batch_size or build.seq_len"
        )
    if facts["activation_bytes"]:
        say(f"between layers the build keeps {bytes_text(facts['activation_bytes'])} of activations in host memory")


def library_summary(root: Path) -> dict[str, Any]:
    """Per variant, medians over layers of what training and scoring measured."""
    library = Library.open(root)
    from puzzle.library.store import BlockStore  # torch, which `solve` does without

    store, rows = BlockStore(root), []
    offered = dict.fromkeys(
        (slot, name)
        for layer in library.layers
        for slot, space in library.spaces[layer].items()
        for name in space
        if name != PARENT
    )
    scored = all(scores_path(root, layer).is_file() for layer in library.layers)
    for slot, name in offered:
        having = [layer for layer in library.layers if name in library.spaces[layer].get(slot, ())]
        records = [store.record(layer, slot, name) for layer in having]
        row: dict[str, Any] = {"slot": slot, "variant": name}
        for key in ("validation_loss_before", "validation_loss_after"):
            row[key] = median(r[key] for r in records)
        if scored:
            told = score_name({slot: name})
            kls = [library.scores(n)[told]["kl"] for n in having if told not in library.screened(n)]
            row |= {"kl": median(kls) if kls else None} | (
                {"screened": len(having) - len(kls)} if len(kls) < len(having) else {}
            )
        rows.append(row)
    return {"library": str(root), "num_layers": library.num_layers, "layers": library.layers, "variants": rows}


def _score(row: dict[str, Any]) -> str:
    """The median of a variant's scores, and in how many layers it was screened out."""
    if "kl" not in row:
        return "not scored"
    out = f" ({row['screened']} screened out)" if "screened" in row else ""
    return _told(row["kl"], "{:.5f}".format, "") + out


def print_library(summary: dict[str, Any]) -> None:
    title = f"{summary['library']}: medians over {len(summary['layers'])} layers, measured on held-out text"
    rows = []
    for row in summary["variants"]:
        losses = f"{row['validation_loss_before']:.4f}", f"{row['validation_loss_after']:.4f}"
        rows.append((row["slot"], row["variant"], *losses, _score(row)))
    print_table(title, ("slot", "variant", "nMSE at start", "nMSE trained", "KL, nats/token"), rows, words=2)


def print_runs(solved: Architecture) -> None:
    """Which layers `puzzle fuse` will fuse, and how they were priced; nothing without --fusion."""
    if solved.fusion is None or solved.fuse is None:
        return
    priced = solved.fusion
    runs = ", ".join(f"{first}-{last}" for first, last in solved.fuse) or "none: nothing is gained by it here"
    after = " (after `puzzle export`, by `puzzle fuse CHILD --out FUSED`)" if solved.fuse else ""
    say(f"to be fused: layers {runs}{after}")
    ways = {
        "cost table": "interpolated between the widths of the cost table",
        "affine fit": "an affine fit over the widths of the cost table, which has none beyond the parent's",
        "engine model": "the engine model's",
    }
    say(
        f"time of wide FFNs: {ways[priced['wide_ffn']]}; fusion saves {priced['saved_seconds']:.4g} s of the workload "
        f"(predicted); the solver's sum over pairs of neighbours says {priced['pairwise_error_seconds']:+.2g} s more"
    )
    if priced["missed"]:
        say(f"fused, the child misses {', '.join(priced['missed'])} by that difference: ask for a little more")
    if priced["dependency"] is None:
        say("fusion is charged no score: pass --fusion-dependency for the parent's dependency between FFNs")
    else:
        say(
            f"charged for dependency ({priced['dependency']}): {priced['charge']:.4g} nats/token over neighbours, "
            f"{priced['charge_all']:.4g} over all pairs of the runs"
        )


def print_fusion(found: dict[str, Any]) -> None:
    """What `puzzle fuse` fused or measured."""
    if not found["dependency_only"]:
        rows = [
            (
                f"{run['first']}-{run['last']}",
                f"{' + '.join(map(str, run['widths']))} = {run['width']}",
                _told(run["dependency"], "{:.3g}".format, "not measured"),
            )
            for run in found["runs"]
        ]
        title = f"fused, each FFN through {'its own norm' if found['norm'] == 'own' else 'the last norm'}"
        print_table(title, ("layers", "channels", "largest dependency (measured)"), rows, words=0)
        layers = found["num_layers"]
        say(f"{layers['before']} layers became {layers['after']}")
    for key, title in (("pairs", "in parallel alone"), ("together", "in parallel together")):
        for row in found.get("parallel", {}).get(key, ()):
            pairs = row["pairs"] if key == "together" else [row["layers"]]
            names = ", ".join(f"{first}|{second}" for first, second in pairs)
            say(f"blocks {names} {title}: KL {row['kl']:.5f} ± {row['kl_stderr']:.5f} (measured)")


def print_sliced(found: dict[str, Any]) -> None:
    """What `puzzle slice` made, or would make of any of the layers and channels."""
    sizes = (("hidden size", "hidden_size"), ("layers", "num_layers"), ("parameters", "num_parameters"))
    rows = [(name, *(f"{value:,}" for value in found[key])) for name, key in sizes]
    rows.append(("checkpoint", *map(bytes_text, found["num_bytes"])))
    columns = ("", "parent", "sliced")
    if found["dry_run"]:
        print_table("would be (any layers and channels)", columns, rows)
        return
    parent, child = found["measured"]["parent"], found["measured"]["child"]
    rows += [
        ("LM loss (measured)", f"{parent['loss']:.4f}", f"{child['loss']:.4f}"),
        ("KL (measured)", "", f"{child['kl']:.4f} ± {child['kl_stderr']:.4f}"),
        ("same top-1 (measured)", "", f"{100 * child['top1_agreement']:.1f} %"),
    ]
    print_table(f"{found['point']['name']}, sliced", columns, rows)
    if found["dropped"]:
        say(f"layers left out: {', '.join(map(str, found['dropped']))}")


def print_grown(found: dict[str, Any]) -> None:
    """What `puzzle grow` made, or would make."""
    sizes = (("parameters", "num_parameters"), ("of a token", "active_parameters"))
    rows = [(name, *(f"{value:,}" for value in found[key])) for name, key in sizes]
    rows.append(("checkpoint", *map(bytes_text, found["num_bytes"])))
    print_table("would be" if found["dry_run"] else None, ("", "before", "grown"), rows)
    listed = ", ".join(map(str, found["layers"]))
    say(f"{found['new_parameters']:,} new parameters in layers {listed}")


def print_fit(value: dict[str, Any]) -> None:
    """Constants of an engine, and how far its predictions are from what was measured."""
    for name, constant in value["constants"].items():
        unit = "of the datasheet" if name in SHARES else "tokens" if name == "tail" else "s"
        say(f"{name:<13} {constant:.4g} {unit}")
    host, sequence = (value["constants"].get(name, 0.0) for name in ("host", "host_sequence"))
    say(
        f"the engine's own Python takes {1e3 * host:.3g} ms a step and {1e3 * sequence:.3g} ms a sequence, and sets the pace where the "
        "device takes less"
        if host
        else f"the engine's own Python sets the pace nowhere up to {value['largest_batch']} sequences, as far as was measured"
    )
    rows = []
    for what, found in value["errors"].items():
        if isinstance(found, dict):
            out = value["leave_one_out"].get(what)
            cells = (
                _told(one and 100 * one[e], "{:.2f} %".format) for one in (found, out) for e in ("mean", "largest")
            )
            rows.append((f"{what.replace('_', ' ')} ({found['num']})", *cells))
    columns = ("", "mean", "largest", "mean, left out", "largest, left out")
    print_table(f"errors of {value['engine']} on {value['device']}", columns, rows)
    left = value["leave_one_out"]
    if left["pairs"]:
        told = f"pairs of architectures ranked right when left out: {left['pairs_ranked_right']} of {left['pairs']}"
    else:
        told = "no architecture could be left out: nothing says how far the prices of others hold; measure further ones"
    say(told)
