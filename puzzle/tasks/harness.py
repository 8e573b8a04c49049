"""Tasks of lm-eval, which asks our models through its own interface. It is not needed for the tasks that are read here."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from puzzle.base.errors import UserError, first_line, nearest
from puzzle.tasks.model import Model
from puzzle.tasks.request import Answer, Request

NEEDS = "needs lm-eval: pip install 'puzzle-nas[eval]'"
RUNS_CODE = "lm-eval would run generated code in this very process; humaneval with `task_data` runs it in a sandbox"
TAKEN = {"until", "max_gen_toks", "do_sample", "temperature"}
NO_CHANGE = {"top_p": (1, 1.0), "top_k": (0, 1, -1), "num_beams": (1,)}  # of generation settings that we lack


def installed() -> bool:
    """Whether lm-eval can be imported."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        return False
    return True


def load(names: Sequence[str]) -> dict[str, Any]:
    """lm-eval's own tasks by name (groups and tags become their tasks), or from files of its form. Raises UserError for an unknown name,
    for one that runs code in this process, and for data that cannot be had."""
    if not installed():
        raise UserError(f"`tasks` {names[0]} {NEEDS}")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    # The list of its own takes seconds.
    manager = TaskManager(include_defaults=not all(Path(name).is_file() for name in names))
    for name in names:
        if name not in manager.all_tasks and not Path(name).is_file():
            raise UserError(f"`tasks` {name}: lm-eval has no such task; {nearest(name, manager.all_tasks)[:200]}")
        if _runs_code(manager.task_index.get(name)):
            raise UserError(f"`tasks` {name}: {RUNS_CODE}")
    try:
        found = manager.load(list(names))["tasks"]
    except Exception as error:  # of the hub, of datasets, of the task's own code
        raise UserError(
            f"`tasks` {', '.join(names)}: lm-eval cannot load it ({first_line(error)}): where the hub cannot be reached, give task files whose "
            f"data are here, or a shipped task with `task_data`"
        ) from error
    for name, task in found.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"`tasks` {name}: {RUNS_CODE}")
    return found


def evaluate(
    model: Model, tasks: Mapping[str, Any], options: Mapping[str, Any], sample: Mapping[str, Any]
) -> dict[str, dict]:
    """{task: {"metric,filter": a value of each document, or lm-eval's own {"value", "stderr"} where documents have none}}.

    options: of simple_evaluate. sample: fields of the requests for generated text.
    """
    import lm_eval

    asking = _asking(model, sample)
    found = lm_eval.simple_evaluate(
        asking, tasks=list(tasks.values()), log_samples=True, bootstrap_iters=0 if model.dry else 1000, **options
    )
    assert found is not None
    scores: dict[str, dict[str, Any]] = {}
    for name, summary in found["results"].items():
        if name not in tasks:
            continue
        own = scores.setdefault(name, {})
        for key, value in summary.items():
            metric, _, chosen = key.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or not chosen:
                continue
            rows = [row for row in found["samples"][name] if row["filter"] == chosen]
            each = [row.get(metric) for row in sorted(rows, key=lambda row: row["doc_id"])]
            error = summary.get(f"{metric}_stderr,{chosen}")
            plain = (
                all(isinstance(one, bool | int | float) for one in each) and abs(sum(each) / len(each) - value) < 1e-6
            )
            own[key] = (
                [float(one) for one in each]
                if plain
                else {"value": float(value), "stderr": error if error != "N/A" else None}
            )
    return scores


def _runs_code(entry: Any) -> bool:
    return bool(getattr(entry, "cfg", None) and entry.cfg.get("unsafe_code"))


def _asking(model: Model, sample: Mapping[str, Any]) -> Any:
    """lm-eval's face of a model. A class of its own base, which is only there where lm-eval is."""
    from lm_eval.api.model import LM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Asking(LM):
        tokenizer_name = model.opened.name

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            asked = [Request(context=one.args[0], continuation=one.args[1]) for one in requests]
            return [(value, same) for value, same in model.answer(asked)]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            asked = []
            for one in requests:
                windows = get_rolling_token_windows(
                    model.ids(one.args[0]),
                    prefix_token=model.prefix,
                    max_seq_len=model.opened.structure.max_length,
                    context_len=1,
                )
                pairs = map(make_disjoint_window, windows)
                asked.append([Request(context=tuple(before), continuation=tuple(after)) for before, after in pairs])
            answers = iter(model.answer([window for windows in asked for window in windows]))
            return [sum(next(answers)[0] for _ in windows) for windows in asked]

        def generate_until(self, requests: list[Any]) -> list[Answer]:
            return model.answer([_generation(one.args[0], one.args[1], sample) for one in requests])

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return model.chat(chat_history, add_generation_prompt)

        def chat_template(self, chat_template: bool | str = False) -> str:
            return str(model.tokenizer.chat_template)

    return Asking()


def _generation(context: str, settings: Mapping[str, Any], sample: Mapping[str, Any]) -> Request:
    """Raises UserError for a setting that our runtime does not have."""
    for name, value in settings.items():
        if name not in TAKEN and value not in NO_CHANGE.get(name, ()):
            raise UserError(
                f"`tasks` asks for generation with {name} {value}, which is not supported: {', '.join(sorted(TAKEN))} are"
            )
    until = settings.get("until") or []
    own = {
        "context": context,
        "until": (until,) if isinstance(until, str) else tuple(until),
        "max_tokens": settings.get("max_gen_toks", 256),
        "temperature": float(settings.get("temperature") or 1.0) if settings.get("do_sample") else 0.0,
    }
    return Request(**own | {name: value for name, value in sample.items() if value is not None})
