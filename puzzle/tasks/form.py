"""What the values in a task file must be. A key that is named with another one's before it lies within that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple


class Form(NamedTuple):
    """null: nothing may stand there too."""

    words: str
    fits: Callable[[Any], bool]
    null: bool = False


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _are_mappings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)


def _is_whole(value: Any, least: int | None = None) -> bool:
    return type(value) is int and (least is None or value >= least)


def _are_files(value: Any) -> bool:
    splits = value.values() if isinstance(value, dict) else [value]
    return all(one and (_is_text(one) or _are_texts(one)) for one in splits)


TEXT, FLAG = Form("a text", _is_text), Form("true or false", lambda value: isinstance(value, bool))
FORMS = {
    "test_split": TEXT,
    "target_delimiter": TEXT,
    "fewshot_delimiter": TEXT,
    "num_fewshot": Form("a whole number, 0 or more", lambda value: _is_whole(value, 0), null=True),
    "fewshot_config samples": Form("a list of rows", _are_mappings, null=True),
    "dataset_kwargs data_files": Form("a file's name or a list of names, of each split or of all", _are_files, null=True),
    "generation_kwargs until": Form("a text or a list of texts", lambda v: _is_text(v) or _are_texts(v), null=True),
    "generation_kwargs max_gen_toks": Form("a whole number, 1 or more", lambda value: _is_whole(value, 1)),
    "metric_list regexes_to_ignore": Form("a list of texts", _are_texts, null=True),
    "metric_list ignore_case": FLAG,
    "metric_list ignore_punctuation": FLAG,
    "filter_list name": TEXT,
    "filter_list filter": Form("a list of steps", _are_mappings),
    "step function": TEXT,
    "step regex_pattern": TEXT,
    "step group_select": Form("a whole number", _is_whole),
    "step fallback": TEXT,
}  # fmt: skip
NEEDED = {"filter_list": ("name", "filter"), "step": ("function",), "metric_list": ("metric",)}


def entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What lies within another key, one or several, each by that key."""
    for name in ("dataset_kwargs", "fewshot_config", "generation_kwargs", "metric_list", "filter_list"):
        inside = config.get(name) or []
        yield from ((name, one) for one in (inside if isinstance(inside, list) else [inside]))


def wrong_form(config: Mapping[str, Any]) -> str | None:
    """The first value that is of no form that is read, and what it must be; None: there is none."""
    return next(_wrong(config), None)


def _wrong(config: Mapping[str, Any]) -> Iterator[str]:
    """Nobody may ask for more than the first: what comes after it takes it as right."""
    yield from _wrong_values("", config)
    for name, one in entries(config):
        yield from _wrong_values(name, one)
        for step in one.get("filter", ()) if name == "filter_list" else ():
            yield from _wrong_values("step", step)
            if step["function"] == "regex" and "regex_pattern" not in step:
                yield "a step regex has no regex_pattern: write what it looks for"
    for name, key in (("metric_list", "metric"), ("filter_list", "name")):
        given = [one[key] for one in config.get(name) or []]
        yield from (f"{name} has {one} twice: leave one out" for one in given if given.count(one) > 1)


def _wrong_values(place: str, values: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"{place} has an entry without {one}: write it" for one in NEEDED.get(place, ()) if one not in values)
    for name, value in values.items():
        told = f"{place} {name}".strip()
        form = FORMS.get(told)
        if form is not None and not form.fits(value) and not (form.null and value is None):
            yield f"{told} is {value!r}: give {form.words}"
