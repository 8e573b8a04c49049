"""Recipe files for `puzzle run`: one YAML with a section per stage; unknown keys are refused."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from puzzle.base.errors import UserError, nearest


@dataclass(kw_only=True, slots=True)
class BuildSection:
    attention: str | None = None
    ffn: str | None = None
    layers: str | None = None
    tokens: float = 1e6
    seq_len: int = 1024
    batch_size: int = 8
    lr: float = 3e-3
    seed: int = 0
    calibration_sequences: int = 64
    validation_sequences: int = 16


@dataclass(kw_only=True, slots=True)
class ScoreSection:
    sequences: int = 64
    joint: bool = False


@dataclass(kw_only=True, slots=True)
class ProfileSection:
    gpu: str = "cpu"
    batches: list[int] = field(default_factory=lambda: [1, 4, 16, 64])


@dataclass(kw_only=True, slots=True)
class GoalSection:
    throughput: str | None = None
    latency: str | None = None
    memory: str | None = None
    params: str | None = None


@dataclass(kw_only=True, slots=True)
class WorkloadSection:
    input_len: int = 128
    output_len: int = 128


@dataclass(kw_only=True, slots=True)
class EvaluateSection:
    sequences: int = 64
    repeats: int = 3


@dataclass(kw_only=True, slots=True)
class Recipe:
    """parent and data: paths relative to the recipe file, or absolute; a parent may be a hub id."""

    parent: str
    data: list[str] = field(default_factory=list)
    text_field: str = "text"
    device: str = "auto"
    build: BuildSection = field(default_factory=BuildSection)
    score: ScoreSection = field(default_factory=ScoreSection)
    profile: ProfileSection = field(default_factory=ProfileSection)
    goal: GoalSection = field(default_factory=GoalSection)
    workload: WorkloadSection = field(default_factory=WorkloadSection)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)


_SECTIONS = {
    "build": BuildSection,
    "score": ScoreSection,
    "profile": ProfileSection,
    "goal": GoalSection,
    "workload": WorkloadSection,
    "evaluate": EvaluateSection,
}


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
    values: dict[str, Any] = {}
    for key, value in _known(raw, Recipe, path, "").items():
        if key in _SECTIONS:
            section = value or {}
            if not isinstance(section, dict):
                raise UserError(f"recipe {path}: '{key}' is {section!r}, it must be a section of keys and values")
            values[key] = _SECTIONS[key](
                **_typed(_known(section, _SECTIONS[key], path, f"{key}."), _SECTIONS[key], path, key)
            )
        else:
            values[key] = value
    recipe = Recipe(**values)
    here = path.parent
    recipe.data = [recipe.data] if isinstance(recipe.data, str) else list(recipe.data or [])
    recipe.data = [str(here / d) if (here / d).exists() else d for d in recipe.data]
    if (here / str(recipe.parent)).exists():
        recipe.parent = str(here / recipe.parent)
    return recipe


def _known(section: dict, cls: type, path: Path, prefix: str) -> dict[str, Any]:
    known = [f.name for f in fields(cls)]
    for key in section:
        if key not in known:
            raise UserError(f"recipe {path}: unknown key '{prefix}{key}'; {nearest(str(key), known)}")
    return section


def _typed(values: dict[str, Any], cls: type, path: Path, section: str) -> dict[str, Any]:
    """YAML reads 1e6 as text and 2 as a number where we want the other: convert by the field's declared type."""
    found = dict(values)
    for f in fields(cls):
        if f.name not in found or found[f.name] is None:
            continue
        value = found[f.name]
        try:
            if f.type == "int":
                found[f.name] = int(float(value))
            elif f.type == "float":
                found[f.name] = float(value)
            elif "str" in str(f.type):
                found[f.name] = str(value)
            elif str(f.type).startswith("list"):
                found[f.name] = [int(v) for v in (value if isinstance(value, list) else [value])]
        except (TypeError, ValueError):
            raise UserError(f"recipe {path}: {section}.{f.name} is {value!r}, it must be a number") from None
    return found
