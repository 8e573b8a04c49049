"""Recipe files: sections are the stages' own option classes, and whatever is wrong is told in one line that names its key."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import yaml

from puzzle.base.errors import UserError
from puzzle.base.workload import Workload
from puzzle.choose.goal import GoalOptions
from puzzle.choose.options import SolveOptions
from puzzle.fuse.verb import FuseOptions
from puzzle.heal.settings import HealOptions
from puzzle.library.build import BuildOptions
from puzzle.library.score import ScoreOptions
from puzzle.measure.evaluate import EvaluateOptions
from puzzle.profile.profile import ProfileOptions
from puzzle.run.recipe import OF_THE_RUN, OPTIONAL, SHARED, Recipe, naming, read_recipe

SECTIONS = {
    "build": BuildOptions,
    "score": ScoreOptions,
    "profile": ProfileOptions,
    "goal": GoalOptions,
    "workload": Workload,
    "solve": SolveOptions,
    "fuse": FuseOptions,
    "heal": HealOptions,
    "evaluate": EvaluateOptions,
}
RIGHT = {
    int: 3,
    float: 0.5,
    bool: True,
    str: "3",
    tuple: [1, 2],
    Path: "/x/y",
    Literal: "last",
}  # a value of every type that sections hold
NO_KEYS = (*SHARED, *OF_THE_RUN)
KEYS = [
    (section, field.name) for section, cls in SECTIONS.items() for field in fields(cls) if field.name not in NO_KEYS
]


def type_of(section: str, key: str) -> type:
    """int of `int | None`, tuple of `tuple[int, ...] | None`."""
    hint = get_type_hints(SECTIONS[section])[key]
    if get_origin(hint) is UnionType:
        (hint,) = (one for one in get_args(hint) if one is not NoneType)
    return get_origin(hint) or hint


@pytest.fixture
def write(tmp_path):
    def recipe(**values):
        path = tmp_path / "r.yaml"
        path.write_text(yaml.safe_dump({"parent": "p"} | values))
        return path

    return recipe


def test_sections_are_the_stages_option_classes():
    hints = get_type_hints(Recipe)
    assert {name: hints[name] for name in SECTIONS} == SECTIONS | {n: SECTIONS[n] | None for n in OPTIONAL}
    assert hints.keys() == {"parent", "data", "text_field", "device", "export", "steps", "after", "here", *SECTIONS}


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_every_field_is_a_key(write, section, key):
    """And its value reaches the stage's options as it is; of another type it is refused."""
    right = RIGHT[type_of(section, key)]
    found = getattr(read_recipe(write(**{section: {key: right}})), section)
    assert type(found) is SECTIONS[section]
    if isinstance(right, list):
        each = get_args(get_type_hints(SECTIONS[section])[key])
        right = tuple(map(str if str in each else int, right))
    assert getattr(found, key) == (Path(right) if type_of(section, key) is Path else right)
    for wrong in ({"a": 1}, [[1]]):
        with pytest.raises(UserError, match=rf"^recipe .*r\.yaml: {section}\.{key} is .*, it must be [a-z ]+$"):
            read_recipe(write(**{section: {key: wrong}}))


@pytest.mark.parametrize("section", SECTIONS)
def test_unknown_keys_are_refused(write, section):
    """Also those that all stages share, which stand outside the sections."""
    shared = [field.name for field in fields(SECTIONS[section]) if field.name in NO_KEYS]
    for key in ("nonsense", *shared):
        with pytest.raises(UserError, match=f"unknown key '{section}.{key}'; (known: |did you mean )"):
            read_recipe(write(**{section: {key: "x"}}))
    for wrong in (2, [], "x", False):
        with pytest.raises(UserError, match=f"'{section}' is .*, it must be a section of keys and values"):
            read_recipe(write(**{section: wrong}))
    assert getattr(read_recipe(write(**{section: None})), section) == getattr(read_recipe(write()), section)


def test_numbers_as_people_write_them(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "parent: p\nbuild: {tokens: 1e3, lr: 3e-3, ffn: 0.5, layers: 0}\nprofile: {batches: 4}\ngoal: {throughput: 2}"
    )
    found = read_recipe(tmp_path / "r.yaml")
    assert (found.build.tokens, found.build.lr, found.build.ffn, found.build.layers) == (1000, 0.003, "0.5", "0")
    assert found.profile.batches == (4,)
    assert found.goal.goal().limits["throughput"].value == 2.0
    assert found.evaluate.seq_len == found.build.seq_len


def test_names_as_a_list(write):
    found = read_recipe(write(build={"ffn": [0.5, "none"], "layers": [0, "2-3"]})).build
    assert (found.ffn, found.layers) == ("0.5,none", "0,2-3")


def test_paths_are_relative_to_the_recipe(write, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "p").mkdir()
    found = read_recipe(write(data=["text", "org/set"]))
    assert found.data == [str(tmp_path / "text"), "org/set"]
    assert found.parent == str(tmp_path / "p")
    assert read_recipe(write(data="text", parent="org/model")).parent == "org/model"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("build: {}", "names no parent"),
        ("parent:", "names no parent"),
        ("parent: p\nbuld: {}", "unknown key 'buld'; did you mean 'build'"),
        ("parent: p\nheal: {old_lr: 0}", "unknown key 'heal.old_lr'"),  # no child of a library is grown
        ("parent: p\nbuild: {ffns: x}", "unknown key 'build.ffns'; did you mean 'ffn'"),
        ("parent: p\nbuild: {tokens: many}", "build.tokens is 'many', it must be a whole number"),
        ("parent: p\nbuild: {tokens: 12.7}", "build.tokens is 12.7, it must be a whole number"),
        ("parent: p\nbuild: {tokens: true}", "build.tokens is True, it must be a whole number"),
        ("parent: p\nbuild: {tokens: .inf}", "build.tokens is inf, it must be a whole number"),
        ("parent: p\nbuild: {tokens: null}", "build.tokens is None, it must be a whole number"),
        ("parent: p\nbuild: {lr: fast}", "build.lr is 'fast', it must be a number"),
        ("parent: p\nbuild: {ffn: [0.5, true]}", "build.ffn is True, it must be text"),
        ("parent: p\nbuild: {ffn: []}", "build.ffn is [], it must be text"),
        ("parent: 3", "parent is 3, it must be text"),
        ("parent: p\ndevice: 0", "device is 0, it must be text"),
        ("parent: p\ndata: [3]", "data is [3], it must be a path, or a list of paths"),
        ("parent: p\nscore: {joint: maybe}", "score.joint is 'maybe', it must be true or false"),
        ("parent: p\nprofile: {batches: [1, two]}", "profile.batches is 'two', it must be a whole number"),
        ("parent: p\ndata: 5", "data is 5, it must be a path, or a list of paths"),
        ("parent: p\ndata: {a: b}", "data is {'a': 'b'}, it must be a path, or a list of paths"),
        ("parent: [p]", "parent is ['p'], it must be text"),
        ("parent: p\ndevice: null", "device is None, it must be text"),
        ("parent: [", "not valid YAML"),
        ("parent: 2020-99-99", "not valid YAML"),
        ("parent: " + "[" * 3000, "not valid YAML (it is nested too deeply"),
        ("parent: p\ngoal: 2x", "'goal' is '2x'"),
        (
            "parent: p\nheal: {stages: '32:1k', tokens: 5}",
            "heal.tokens 5 is not used with heal.stages 32:1k, which say both: leave it out, or set heal.stages to null",
        ),
        (
            "parent: p\nheal: {stages: '32:1k'}\nsteps: [{goal: {params: 90%}, heal: {seq_len: 32}}]",
            "steps.1: heal.seq_len 32 is not used with heal.stages 32:1k",
        ),
        (
            "parent: p\nafter: {more: {heal: {stages: '32:1k', tokens: 10000000}}}",
            "after.more.heal.tokens 10000000 is not used with after.more.heal.stages 32:1k",
        ),
    ],
)
def test_bad_recipes(puzzle, one_line_error, tmp_path, text, wanted):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    one_line_error(puzzle("run", recipe, "--out", tmp_path / "run"), f"recipe {recipe}", wanted)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("section", "key", "value", "told"),
    [
        ("build", "seq_len", 0, "0: must be above 0"),
        ("build", "batch_size", -4, "-4: must be above 0"),
        ("build", "lr", 0, "0: must be above 0"),
        ("build", "lr", float("nan"), "nan: must be above 0"),
        ("build", "tokens", -1, "-1: must be 0 or more"),
        ("build", "calibration_sequences", 0, "0: must be above 0"),
        ("build", "validation_sequences", 0, "0: must be above 0"),
        ("build", "group_size", 0, "0: must be above 0"),
        ("build", "memory_limit", 0, "0: must be above 0"),
        ("score", "sequences", 0, "0: must be above 0"),
        ("score", "seq_len", 0, "0: must be above 0"),
        ("score", "batch_size", 0, "0: must be above 0"),
        ("profile", "batches", [1, 0], "0: must be above 0"),
        ("profile", "batches", [], "is empty"),
        ("profile", "prefill", [-1], "-1: must be above 0"),
        ("profile", "contexts", [0], "0: must be above 0"),
        ("profile", "seconds", 0, "0: must be above 0"),
        ("profile", "rounds", 0, "0: must be above 0"),
        ("goal", "throughput", "0x", "0x: write "),
        ("goal", "memory", "-3GB", "'-3GB' is no amount of memory"),
        ("goal", "params", "few", "few: write a count"),
        ("goal", "cached_tokens", "few", "few: write a count"),
        ("goal", "stage_tolerance", "-1", "-1: write a share"),
        ("workload", "input_len", 0, "0: a workload has at least 1 token"),
        ("workload", "output_len", 0, "0: a workload has at least 1 token"),
        ("evaluate", "sequences", 0, "0: must be above 0"),
        ("evaluate", "seq_len", 0, "0: must be above 0"),
        ("evaluate", "repeats", 0, "0: must be above 0"),
    ],
)
def test_impossible_values(puzzle, one_line_error, write, tmp_path, section, key, value, told):
    recipe = write(**{section: {key: value}})
    done = puzzle("run", recipe, "--data", tmp_path, "--out", tmp_path / "run")
    one_line_error(done, f"error: recipe {recipe}: {section}.{key} {told}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("build", "told"),
    [
        ({"ffn": "1.5"}, "build.ffn 1.5: FFN variant '1.5'"),
        ({"attention": "kv1,kvv1"}, "build.attention kv1,kvv1: unknown attention variant 'kvv1'"),
        ({"layers": "2-9"}, "build.layers 2-9: '2-9' is outside the parent's layers 0-3"),
        ({"seq_len": 4096}, "build.seq_len 4096 is longer than the parent's context of 256"),
        ({"seq_len": 32, "memory_limit": 1000}, "use a smaller build.batch_size or build.seq_len"),
    ],
)
def test_values_that_the_parent_refuses(puzzle, one_line_error, write, parent, corpus, tmp_path, build, told):
    recipe = write(parent=str(parent), data=str(corpus), goal={"throughput": "2x"}, build={"seq_len": 32} | build)
    for extra in ((), ("--dry-run",)):
        one_line_error(puzzle("run", recipe, "--out", tmp_path / "run", *extra), told)


def test_what_the_command_line_gives_keeps_its_flags(puzzle, one_line_error, write, tmp_path):
    recipe = write()
    given = ("run", recipe, "--throughput", "2x", "--out", tmp_path / "run")
    one_line_error(puzzle(*given), "no data", "pass --data")
    bad = puzzle("run", recipe, "--throughput", "0x", "--out", tmp_path / "run")
    one_line_error(bad, "error: --throughput 0x: ")
    none = puzzle("run", recipe, "--data", tmp_path, "--out", tmp_path / "run")
    one_line_error(none, "no goal", "goal.throughput", "goal.memory")


def test_a_later_stage_speaks_of_its_own_section():
    """Of two that know a field, the first counts; what is in neither, or shared by all, stays."""
    said = "`seq_len` 9 and `sequences` 0 with `repeats` 1 of `data`, `throughput`"
    with pytest.raises(UserError) as caught, naming("score", "evaluate"):
        raise UserError(said)
    assert str(caught.value) == (
        "score.seq_len 9 and score.sequences 0 with evaluate.repeats 1 of `data`, `throughput`"
    )
