"""Recipe files for `puzzle run`: one YAML whose sections are the stages' own option classes; unknown keys are refused."""

from __future__ import annotations

import types
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from puzzle.base.errors import UserError, nearest
from puzzle.base.workload import Workload
from puzzle.choose.goal import GoalOptions
from puzzle.library.build import BuildOptions
from puzzle.library.score import ScoreOptions
from puzzle.measure.evaluate import EvaluateOptions
from puzzle.profile.profile import ProfileOptions

SHARED = ("data", "out", "text_field", "device")  # one value for all stages, outside the sections


@dataclass(kw_only=True, slots=True)
class Recipe:
    """parent and data: paths relative to the recipe file, or absolute; a parent may be a hub id."""

    parent: str
    data: list[str] = field(default_factory=list)
    text_field: str = "text"
    device: str = "auto"
    build: BuildOptions = field(default_factory=lambda: BuildOptions(data=[], out=Path()))
    score: ScoreOptions = field(default_factory=ScoreOptions)
    profile: ProfileOptions = field(default_factory=ProfileOptions)
    goal: GoalOptions = field(default_factory=GoalOptions)
    workload: Workload = field(default_factory=lambda: Workload(input_len=128, output_len=128))
    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)


SECTIONS = ("build", "score", "profile", "goal", "workload", "evaluate")


def read_recipe(path: Path) -> Recipe:
    """Raises UserError for a missing file, broken YAML, an unknown key (with the nearest known one) or a wrong type."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} cannot be read ({error}): see examples/quickstart.yaml") from error
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path} is not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(raw, dict) or "parent" not in raw:
        raise UserError(f"recipe {path} names no parent: add a line such as 'parent: path/to/model'")
    _refuse_unknown(raw, [f.name for f in fields(Recipe)], path, "")
    values = {name: value for name, value in raw.items() if name not in SECTIONS}
    recipe = Recipe(**values)
    for name in SECTIONS:
        section = raw.get(name) or {}
        if not isinstance(section, dict):
            raise UserError(f"recipe {path}: '{name}' is {section!r}, it must be a section of keys and values")
        usual = getattr(recipe, name)
        _refuse_unknown(section, [f.name for f in fields(usual) if f.name not in SHARED], path, f"{name}.")
        types_of = get_type_hints(type(usual))
        typed = {key: _typed(value, types_of[key], path, f"{name}.{key}") for key, value in section.items()}
        setattr(recipe, name, replace(usual, **typed))
    if "seq_len" not in (raw.get("evaluate") or {}):
        recipe.evaluate = replace(recipe.evaluate, seq_len=recipe.build.seq_len)
    here = path.parent
    recipe.data = [recipe.data] if isinstance(recipe.data, str) else list(recipe.data or [])
    recipe.data = [str(here / d) if (here / d).exists() else d for d in recipe.data]
    if (here / str(recipe.parent)).exists():
        recipe.parent = str(here / recipe.parent)
    return recipe


def _refuse_unknown(section: dict[str, Any], known: list[str], path: Path, prefix: str) -> None:
    for key in section:
        if key not in known:
            raise UserError(f"recipe {path}: unknown key '{prefix}{key}'; {nearest(str(key), known)}")


def _typed(value: Any, wanted: Any, path: Path, key: str) -> Any:
    """YAML reads 1e6 as text and 2 as a number where we want the other: convert to the field's declared type."""
    if get_origin(wanted) in (Union, types.UnionType):
        if value is None:
            return None
        wanted = next(one for one in get_args(wanted) if one is not type(None))
    try:
        if wanted is int:
            return int(float(value))
        if wanted is float:
            return float(value)
        if wanted is bool:
            if not isinstance(value, bool):
                raise TypeError
            return value
        if wanted is str:
            return str(value)
        if get_origin(wanted) is tuple:
            return tuple(int(one) for one in (value if isinstance(value, list) else [value]))
    except (TypeError, ValueError):
        kind = {bool: "true or false"}.get(wanted, "a number")
        raise UserError(f"recipe {path}: {key} is {value!r}, it must be {kind}") from None
    raise UserError(f"recipe {path}: {key} cannot be given in a recipe")
