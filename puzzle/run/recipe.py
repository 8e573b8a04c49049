"""Recipe files for `puzzle run`: one YAML whose sections are the stages' own option classes; unknown keys are refused."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from puzzle.base.errors import UserError, nearest, renaming
from puzzle.base.workload import Workload
from puzzle.base.yaml_text import parse_yaml
from puzzle.choose.goal import BY_OPTION, GoalOptions
from puzzle.choose.options import SolveOptions
from puzzle.export.engines import ENGINES, ExportOptions
from puzzle.fuse.verb import FuseOptions
from puzzle.heal.settings import HealOptions
from puzzle.library.build import BuildOptions
from puzzle.library.score import ScoreOptions
from puzzle.measure.evaluate import EvaluateOptions
from puzzle.profile.profile import ProfileOptions
from puzzle.run.after import After

Options = TypeVar("Options")
KINDS = {bool: "true or false", str: "text", int: "a whole number", float: "a number"}  # of values
# Names or ranges.
LISTS = ("build.attention", "build.ffn", "build.layers", "goal.pinned", "goal.alike", "solve.precision")
SHARED = ("data", "out", "text_field", "device")  # one value for all stages, outside the sections
# What the road itself says.
OF_THE_RUN = ("child", "origin", "inputs_from", "mix", "library", "force", "dry_run", "dependency_only", "old_lr")


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A child on the way: solved for this goal, of blocks that were built so, healed so, and the parent of what comes next."""

    build: BuildOptions
    goal: GoalOptions
    heal: HealOptions


@dataclass(kw_only=True, slots=True)
class Recipe:
    """parent and data: paths relative to the recipe file, or absolute; a parent may be a hub id. fuse, heal: None leaves the stage
    stage out. export: what is written of the child at the end of the road. steps: children on the way to it. after: stages between the
    healing and the exports, by name. here: the recipe's directory."""

    parent: str
    data: list[str] = field(default_factory=list)
    text_field: str = "text"
    device: str = "auto"
    build: BuildOptions = field(default_factory=lambda: BuildOptions(data=[], out=Path()))
    score: ScoreOptions = field(default_factory=ScoreOptions)
    profile: ProfileOptions = field(default_factory=ProfileOptions)
    goal: GoalOptions = field(default_factory=GoalOptions)
    workload: Workload = field(default_factory=lambda: Workload(input_len=128, output_len=128))
    solve: SolveOptions = field(default_factory=SolveOptions)
    fuse: FuseOptions | None = None
    heal: HealOptions | None = None
    export: tuple[ExportOptions, ...] = (ExportOptions(format="hf"),)
    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)
    steps: tuple[Step, ...] = ()
    after: dict[str, After] = field(default_factory=dict)
    here: Path = Path()

    @property
    def roads(self) -> dict[str, Recipe]:
        """What is gone one after another, by what is put before the names of its stages: every step up to its healing, then the rest."""
        usual: dict[str, Any] = {"steps": (), "after": {}, "fuse": None, "export": (ExportOptions(format="hf"),)}
        steps = [replace(self, build=s.build, goal=s.goal, heal=s.heal, **usual) for s in self.steps]  # type: ignore[arg-type]
        return {f"step {n} ": one for n, one in enumerate(steps, 1)} | {"": replace(self, steps=())}

    @property
    def trains(self) -> bool:
        """Whether the child is trained, so that nothing of it is rounded before."""
        return self.heal is not None or any(
            one.heal is not None or one.result is not None for one in self.after.values()
        )

    @property
    def scoring(self) -> ScoreOptions:
        """What is scored: a choice of fp8 asks for what that costs."""
        return replace(self.score, fp8=self.score.fp8 or "fp8" in self.solve.precisions)


SECTIONS = ("build", "score", "profile", "goal", "workload", "solve", "fuse", "heal", "evaluate")
# Stages that a recipe without them leaves out.
OPTIONAL = {"fuse": FuseOptions(), "heal": HealOptions(child="", out=Path())}


def read_recipe(path: Path, size: str | None = None) -> Recipe:
    """size: the one of the recipe's `sizes` whose values stand in place of the others. Raises UserError, in one line that names the key,
    for a missing file, broken YAML, an unknown key (with the nearest known one), a wrong type, an impossible value or a size that is not
    there."""
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} cannot be read ({error}): see examples/quickstart.yaml") from error
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path} is not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(raw, dict) or raw.get("parent") is None:
        raise UserError(f"recipe {path} names no parent: add a line such as 'parent: path/to/model'")
    try:
        sizes = raw.pop("sizes", None) or {}
        if not isinstance(sizes, dict) or not all(isinstance(one, dict) for one in sizes.values()):
            raise UserError("'sizes' must be sections by name, each with what it says in place of the recipe")
        found: dict[str | None, Recipe] = {None: _recipe(raw, path.parent)}
        for name, over in sizes.items():
            try:
                found[str(name)] = _recipe(_over(raw, over), path.parent)
            except UserError as error:
                raise UserError(f"sizes.{name}: {error}") from error
        if size not in found:
            raise UserError(
                f"no `size` {size}; {nearest(str(size), [n for n in found if n]) if sizes else 'it has none'}"
            )
        return found[size]
    except UserError as error:
        raise UserError(f"recipe {path}: {error}") from error


def _over(raw: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`raw` with what `over` says, section by section."""
    both = {k: _over(raw[k], v) for k, v in over.items() if isinstance(v, dict) and isinstance(raw.get(k), dict)}
    return raw | over | both


def _recipe(raw: dict[str, Any], here: Path) -> Recipe:
    """here: what paths are relative to."""
    _refuse_unknown(raw, [f.name for f in fields(Recipe) if f.name != "here"], "")
    hints = get_type_hints(Recipe)
    apart = (*SECTIONS, "data", "export", "steps", "after")
    values: dict[str, Any] = {key: _typed(raw[key], hints[key], key) for key in raw if key not in apart}
    recipe = Recipe(**values, data=_data(raw.get("data"), here), here=here)
    if raw.get("export") is not None:
        recipe.export = _exports(raw["export"], here)
    for name in SECTIONS:
        if raw.get(name) is not None:
            setattr(recipe, name, _section(raw[name], getattr(recipe, name) or OPTIONAL[name], name, here))
    if raw.get("steps") is not None:
        recipe.steps = _steps(raw["steps"], recipe, here)
    if raw.get("after") is not None:
        recipe.after = _after(raw["after"], here)
    with naming("goal"):
        for one in recipe.roads.values():
            one.goal.read()
    if "seq_len" not in (raw.get("evaluate") or {}):
        recipe.evaluate = replace(recipe.evaluate, seq_len=recipe.build.seq_len)
    if (here / recipe.parent).exists():
        recipe.parent = str(here / recipe.parent)
    return recipe


def _section(raw: Any, usual: Options, name: str, here: Path) -> Options:
    """`usual` with what a section says."""
    if not isinstance(raw, dict):
        raise UserError(f"'{name}' is {raw!r}, it must be a section of keys and values")
    _refuse_unknown(raw, _keys(type(usual)), f"{name}.")
    hints = get_type_hints(type(usual))
    typed = {key: _typed(value, hints[key], f"{name}.{key}", here) for key, value in raw.items()}
    with renaming({key: f"{name}.{key}" for key in _keys(type(usual))}):
        found = replace(usual, **typed)  # type: ignore[type-var]
    if isinstance(found, HealOptions) and found.stages is not None:
        for key in ("tokens", "seq_len"):
            if key in raw:
                told = f"with {name}.stages {found.stages}, which say both"
                raise UserError(
                    f"{name}.{key} {raw[key]} is not used {told}: leave it out, or set {name}.stages to null"
                )
    return found


def _steps(raw: Any, recipe: Recipe, here: Path) -> tuple[Step, ...]:
    """Each has the recipe's own build, heal and goal, but for what it says, and for the recipe's limits, in place of which it names its
    own."""
    found = []
    goal = replace(recipe.goal, **dict.fromkeys(BY_OPTION))  # type: ignore[arg-type]
    usual: dict[str, Any] = {"build": recipe.build, "goal": goal, "heal": recipe.heal or OPTIONAL["heal"]}
    for number, one in enumerate(raw if isinstance(raw, list) else [raw], 1):
        prefix = f"steps.{number}"
        if not isinstance(one, dict) or not isinstance(one.get("goal"), dict):
            raise UserError(f"{prefix} names no goal: write a list of steps such as '- goal: {{throughput: 1.4x}}'")
        _refuse_unknown(one, list(usual), f"{prefix}.")
        if told := next((k for k in ("attention", "ffn", "layers") if k in (one.get("build") or {})), None):
            raise UserError(
                f"{prefix}.build.{told}: all steps choose from what build.{told} offers, whose costs are measured once: leave it out"
            )
        try:
            found.append(Step(**{name: _section(one.get(name) or {}, usual[name], name, here) for name in usual}))
        except UserError as error:
            raise UserError(f"{prefix}: {error}") from error
    return tuple(found)


def _after(raw: Any, here: Path) -> dict[str, After]:
    if not isinstance(raw, dict) or not all(re.fullmatch(r"[\w-]+", str(name)) for name in raw):
        raise UserError(f"'after' is {raw!r}, it must be sections by name, of letters, digits, '-' and '_'")
    found = {}
    for name, given in raw.items():
        told = f"after.{name}"
        if given is None:  # a size goes without it
            continue
        if not isinstance(given, dict):
            raise UserError(f"{told} is {given!r}, it must be a section with `heal` or `command`")
        heal = given.get("heal")
        stage = _section({key: value for key, value in given.items() if key != "heal"}, After(), told, here)
        if heal is not None:
            usual: Any = OPTIONAL["heal"]
            stage = replace(stage, heal=_section(heal, usual, f"{told}.heal", here))
        with stage_of(name):
            stage.check()
        if heal is not None and (more := [key for key in given if key != "heal" and given[key] is not None]):
            raise UserError(
                f"{told}.{more[0]} {given[more[0]]}: a healing's {more[0]} is known from {told}.heal: leave it out"
            )
        found[str(name)] = stage
    return found


def _exports(raw: Any, here: Path) -> tuple[ExportOptions, ...]:
    """A list of formats and engines by name, or as sections with more to say; one alone needs no list."""
    found = []
    for one in raw if isinstance(raw, list) else [raw]:
        if isinstance(one, str):
            one = {"engine" if one.partition("==")[0] in ENGINES else "format": one}
        found.append(_section(one, ExportOptions(), "export", here))
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"export has '{name}' twice: leave one out")
    if not found:
        raise UserError("export is empty: name at least one format, such as hf")
    return tuple(found)


@contextmanager
def stage_of(name: str) -> Iterator[None]:
    """Errors inside name the options of this stage of `after`, its healing's too."""
    of = f"after.{name}"
    with renaming(
        {key: f"{of}.heal.{key}" for key in _keys(HealOptions)} | {key: f"{of}.{key}" for key in _keys(After)}
    ):
        yield


@contextmanager
def naming(*sections: str) -> Iterator[None]:
    """Errors inside name the options of these sections as a recipe does: `seq_len` is build.seq_len."""
    classes = {name: _plain(hint) for name, hint in get_type_hints(Recipe).items()}
    with renaming({key: f"{name}.{key}" for name in reversed(sections) for key in _keys(classes[name])}):
        yield


def _keys(options: type[Any]) -> list[str]:
    """What a section may hold."""
    return [f.name for f in fields(options) if f.name not in (*SHARED, *OF_THE_RUN)]


def _refuse_unknown(section: dict[str, Any], known: list[str], prefix: str) -> None:
    for key in section:
        if key not in known:
            raise UserError(f"unknown key '{prefix}{key}'; {nearest(str(key), known)}")


def _data(value: Any, here: Path) -> list[str]:
    listed = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(one, str) for one in listed):
        raise UserError(f"data is {value!r}, it must be a path, or a list of paths")
    return [str(here / one) if (here / one).exists() else one for one in listed]


def _plain(wanted: Any) -> Any:
    """int of `int | None`, and the class of `tuple[Class, ...]`."""
    if get_origin(wanted) in (Union, types.UnionType):
        wanted = next(one for one in get_args(wanted) if one is not type(None))
    return get_args(wanted)[0] if get_origin(wanted) is tuple else wanted


def _typed(value: Any, wanted: Any, key: str, here: Path = Path()) -> Any:
    """YAML reads 1e6 as text and 2 as a number where we want the other: convert to the field's declared type."""
    if get_origin(wanted) in (Union, types.UnionType):
        if value is None:
            return None
        wanted = next(one for one in get_args(wanted) if one is not type(None))
    if get_origin(wanted) is tuple:
        each = get_args(wanted)[0]
        return tuple(_typed(one, each, key) for one in (value if isinstance(value, list) else [value]))
    if get_origin(wanted) is Literal:
        if value not in get_args(wanted):
            raise UserError(f"{key} is {value!r}, it must be {' or '.join(get_args(wanted))}")
        return value
    if wanted is Path:
        return here / _typed(value, str, key)
    if wanted not in KINDS:
        raise UserError(f"{key} cannot be given in a recipe")
    number, inside = isinstance(value, int | float | str) and not isinstance(value, bool), "." in key
    if key in LISTS and isinstance(value, list) and value and not any(isinstance(one, list) for one in value):
        return ",".join(_typed(one, str, key) for one in value)  # as the command line has it: 0.5,none
    try:
        if wanted is bool and isinstance(value, bool):
            return value
        if wanted is str and (isinstance(value, str) or (number and inside)):  # 0.5 is a name, 3 is no parent
            return str(value)
        if wanted in (int, float) and number and (wanted is float or float(value).is_integer()):
            return wanted(float(value))
    except ValueError:
        pass
    raise UserError(f"{key} is {value!r}, it must be {KINDS[wanted]}")
