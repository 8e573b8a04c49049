"""What all verbs share: help, missing files and output directories; errors are one line each."""

from __future__ import annotations

import ast
import functools
import importlib
import io
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from puzzle.base.errors import UserError
from puzzle.cli import main
from puzzle.run.after import After

ROOT = Path(__file__).parents[2]

SOLVE = ("--gpu", "cpu", "--input-len", 16, "--output-len", 16)


def calls(code: str) -> tuple[int, str]:
    """How many functions an interpreter calls on the way, which neither its machine nor what else is at work there changes; and what
    it prints."""
    counted = (
        "import sys\ncount = 0\ndef see(frame, event, argument):\n    global count\n    count += event == 'call'\n"
        f"sys.setprofile(see)\n{code}\nsys.setprofile(None)\nprint(count)"
    )
    done = subprocess.run([sys.executable, "-c", counted], capture_output=True, text=True, check=True)
    said, _, count = done.stdout.strip().rpartition("\n")
    return int(count), said


def test_help_is_fast_and_loads_no_torch():
    """Less than twice what the libraries of every command line take to load."""
    help = "from puzzle.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    shown, said = calls(help)
    assert said.endswith("False")
    assert shown < 2 * calls("import click, rich.console, rich.table, rich.progress")[0]


@pytest.mark.parametrize("verb", ["build-library", "score", "profile", "solve", "export", "evaluate", "run"])
def test_every_verb_shows_an_example(puzzle, verb):
    done = puzzle(verb, "--help")
    assert done.exit_code == 0
    assert f"puzzle {verb} " in done.output
    assert "--json" in done.output


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (("--nosuch",), "No such option '--nosuch'. See puzzle --help."),
        (("nosuch",), "No such command 'nosuch'. See puzzle --help."),
        (("solve", "lib", "--throughputs", "2x"), "No such option '--throughputs'. Did you mean '--throughput'? See puzzle solve --help."),
        (("solve", "lib", "--throughput"), "Option '--throughput' requires an argument."),
        (("solve", "lib", "--input-len", "x"), "Invalid value for '--input-len': 'x' is not a valid integer. See puzzle solve --help."),
        (("heal",), "Missing argument 'CHILD'. See puzzle heal --help."),
    ],
)  # fmt: skip
def test_what_is_mistyped_is_told_in_one_line(puzzle, typed, told):
    done = puzzle(*typed)
    assert (done.exit_code, done.stdout) == (2, "")
    told = told.replace("See puzzle", "See main")  # its name as a function
    # the oldest click has colons in place of quotes, and no full stop
    assert re.sub(r"[^a-z]", "", done.stderr.lower()) == re.sub(r"[^a-z]", "", f"error: {told}".lower()), done.stderr
    assert done.stderr.count("\n") == 1


def test_no_word_at_all_shows_the_help(puzzle):
    done = puzzle()
    assert "The road:" in done.output
    assert "error" not in done.stderr


def test_unknown_gpu(puzzle, one_line_error, own_library):
    one_line_error(
        puzzle("solve", own_library, "--throughput", "2x", "--gpu", "cpo"), "--gpu cpo", "did you mean 'cpu'"
    )
    one_line_error(puzzle("profile", own_library, "--gpu", "b9000"), "--gpu b9000")


def test_missing_artefacts_name_the_verb_that_makes_them(puzzle, one_line_error, own_library, tmp_path):
    one_line_error(
        puzzle("solve", tmp_path / "x", "--throughput", "2x", *SOLVE), "does not exist", "puzzle build-library"
    )
    one_line_error(puzzle("export", own_library, tmp_path, "--out", tmp_path / "c"), "does not exist", "puzzle solve")
    shutil.rmtree(own_library / "scores")
    one_line_error(puzzle("solve", own_library, "--throughput", "2x", *SOLVE), "does not exist", "puzzle score")
    shutil.rmtree(own_library / "costs")
    one_line_error(puzzle("solve", own_library, "--throughput", "2x", *SOLVE), "no cost table", "puzzle profile")


def test_output_directories(puzzle, one_line_error, own_library, parent, corpus, tmp_path):
    puzzle("solve", own_library, "--throughput", "2x", *SOLVE)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious").write_text("mine")
    done = puzzle("export", own_library, own_library / "solution", "--out", tmp_path / "full")
    one_line_error(done, "is not empty", "--force")
    assert (tmp_path / "full/precious").read_text() == "mine"
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file/below"):
        done = puzzle("build-library", parent, "--data", corpus, "--out", out, "--seq-len", 32)
        assert done.exit_code == 2, done.output
        assert f"error: --out {tmp_path}/file is a file: give a directory" in done.stderr


OPTION_CLASSES: dict[str, tuple[str, ...]] = {  # of each verb: what its options fill
    "slice": ("slice.verb.SliceOptions",),
    "build-library": ("library.build.BuildOptions",),
    "score": ("library.score.ScoreOptions",),
    "profile": ("profile.profile.ProfileOptions",),
    "solve": ("choose.goal.GoalOptions", "choose.options.SolveOptions", "base.workload.Workload"),
    "rescore": ("library.score.ScoreOptions",),
    "export": (),
    "fuse": ("fuse.verb.FuseOptions", "fuse.runs.Rule"),
    "grow": ("grow.rewrite.Growth", "grow.verb.GrowOptions"),
    "heal": ("heal.settings.HealOptions",),
    "serve-check": (),
    "evaluate": ("measure.evaluate.EvaluateOptions", "base.workload.Workload"),
    "bench": ("base.workload.Workload",),
    "run": (),
    "report": (),
}
NO_FLAG = {  # fields that no option fills
    "build-library": {"snapshot_seconds"},
    "score": {"batch_size"},
    "rescore": {"seq_len", "batch_size", "joint", "fp8", "sub_block_screen"},  # text and device alone
    "profile": {"precision"},  # --fp8 says it
    "heal": {"child", "max_skipped"},
}
SAID_IN = {  # verbs whose user may see the messages of these files; the longest beginning of a path counts
    "puzzle/heal/": ("heal",),
    "puzzle/data/align.py": ("heal",),
    "puzzle/fuse/": ("fuse",),
    "puzzle/page/": ("report",),
    "puzzle/grow/": ("grow",),
    "puzzle/slice/": ("slice",),
    "puzzle/tasks/": ("evaluate",),
    "puzzle/choose/": ("solve",),
    "puzzle/export/": ("export",),
    "puzzle/profile/": ("profile",),
    "puzzle/profile/all_reduce.py": ("profile", "solve"),
    "puzzle/profile/cost_table.py": ("solve",),
    "puzzle/serving/": ("profile",),
    "puzzle/serving/check.py": ("serve-check",),
    "puzzle/serving/engine_bench.py": ("bench",),
    "puzzle/measure/": ("evaluate",),
    "puzzle/measure/bench.py": ("bench",),
    "puzzle/measure/measurable.py": ("evaluate", "bench"),
    "puzzle/library/": ("build-library",),
    "puzzle/library/assemble.py": ("score", "evaluate"),
    "puzzle/library/manifest.py": ("score", "evaluate", "export"),
    "puzzle/library/score.py": ("score",),
    "puzzle/runtime/parallel.py": ("profile", "bench"),
    "puzzle/runtime/residency.py": ("score", "fuse", "evaluate"),  # and build-library, by other names
    "puzzle/data/blend.py": ("heal",),
    "puzzle/data/mixture.py": ("heal",),
    "puzzle/data/": ("build-library", "score", "fuse", "heal", "evaluate"),
    "puzzle/base/": (),  # words of many verbs; each reads its own options
    "puzzle/cli/": (),
    "puzzle/run/": (),  # keys of a recipe
    "puzzle/parents/": (),
    "blocklib/": (),
}
KEYS_OF_FILES = {
    "sources",
    "name",
    "path",
    "messages",
    "doc_to_text",
    "doc_to_choice",
    "doc_to_target",
    *(f.name for f in fields(After)),
}  # of blends, task files and recipes, not options


def flags_of(verb: str) -> set[str]:
    return {flag for option in main.commands[verb].params for flag in (*option.opts, *option.secondary_opts)}


def fields_of(verb: str) -> set[str]:
    found = set()
    for path in OPTION_CLASSES[verb]:
        module, _, name = path.rpartition(".")
        found |= {field.name for field in fields(getattr(importlib.import_module(f"puzzle.{module}"), name))}
    return found


@functools.cache
def messages() -> dict[str, str]:
    """Where a UserError is raised: the words of its text."""
    found = {}
    for path in [p for room in ("puzzle", "blocklib") for p in (ROOT / room).rglob("*.py")]:
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            if isinstance(call.func, ast.Name) and call.func.id == "UserError":
                constants = [node.value for node in ast.walk(call) if isinstance(node, ast.Constant)]
                found[f"{path.relative_to(ROOT)}:{call.lineno}"] = "".join(c for c in constants if isinstance(c, str))
    return found


def fields_in_messages() -> dict[str, set[str]]:
    """Every `field` in the text of a UserError, and where it is raised."""
    found: dict[str, set[str]] = {}
    for place, text in messages().items():
        for name in re.findall(r"`([a-z][a-z0-9_]*)`", text):
            found.setdefault(name, set()).add(place)
    return found


def test_every_verb_has_its_option_classes_listed():
    assert OPTION_CLASSES.keys() == main.commands.keys()


@pytest.mark.parametrize("verb", OPTION_CLASSES)
def test_a_verbs_fields_are_shown_as_its_flags(verb):
    """As long as it has an option for the field; one that it lacks is never shown as a flag."""
    own = flags_of(verb)
    for name in fields_of(verb):
        shown = main.in_flags(f"`{name}` 0: must be above 0", verb)
        if name in NO_FLAG.get(verb, ()):
            assert shown == f"`{name}` 0: must be above 0"
        else:
            assert shown.removesuffix(" 0: must be above 0") in own, name
    options = {option.name for command in main.commands.values() for option in command.params}
    others = {
        flag[2:].replace("-", "_") for other in main.commands for flag in flags_of(other) if flag.startswith("--")
    }
    for name in {*options, *others, *fields_in_messages(), *(f for other in OPTION_CLASSES for f in fields_of(other))}:
        shown = main.in_flags(f"`{name}`", verb)
        assert shown in own | {f"`{name}`"}
        assert shown != f"`{name}`" or f"--{name.replace('_', '-')}" not in own


@pytest.mark.parametrize("verb", OPTION_CLASSES)
def test_a_stages_error_ends_in_one_line(puzzle, one_line_error, monkeypatch, verb):
    """Raised with fields in backticks, shown with this verb's flags, exit code 2."""
    options = [option for option in main.commands[verb].params if option.opts[0].startswith("--")]

    def stage(*arguments, **values):
        raise UserError(" ".join(f"`{option.name}`" for option in options) + " and `no_such_field`")

    monkeypatch.setattr(main.commands[verb], "make_context", stage)
    flags = " ".join(next(f for f in option.opts if f.startswith("--")) for option in options)
    one_line_error(puzzle(verb), f"error: {flags} and `no_such_field`")


def test_what_is_no_field_stays_as_it_is():
    for text in ("run `puzzle solve --fusion`", "`- path: text/`", "`build.seq_len` 0", "`Seq_len`", "seq_len", "``"):
        assert main.in_flags(text, "build-library") == text
    assert main.in_flags("`seq_len`", None) == "`seq_len`"


def test_a_message_asks_for_no_option_that_its_verbs_lack():
    lacking = {}
    for name, places in fields_in_messages().items():
        for place in sorted(places) if name not in KEYS_OF_FILES else ():
            for verb in SAID_IN[max((start for start in SAID_IN if place.startswith(start)), key=len)]:
                known = {option.name for option in main.commands[verb].params}
                if name not in known and f"--{name.replace('_', '-')}" not in flags_of(verb):
                    lacking[place] = (name, verb)
    assert lacking == {}


def test_commands_in_messages_have_their_flags():
    verbs = rf"puzzle ({'|'.join(main.commands)})\b([^`]*)`"
    found = [(place, *one) for place, text in messages().items() for one in re.findall(verbs, text)]
    assert len(found) > 20
    for place, verb, rest in found:
        assert set(re.findall(r"--[a-z][a-z0-9-]*", rest)) <= flags_of(verb), place


def test_scores_of_a_build_have_flags_of_their_own(puzzle, one_line_error, monkeypatch, parent, corpus, tmp_path):
    def refused(*arguments, **values):
        raise UserError("use fewer `sequences`, a smaller `seq_len` or a larger `memory_limit`")

    monkeypatch.setattr("puzzle.library.score.score_library", refused)
    sizes = ("--layers", 0, "--attention", "none", "--ffn", "none", "--tokens", 0, "--seq-len", 32, "--device", "cpu")
    done = puzzle("build-library", parent, "--data", corpus, "--out", tmp_path / "lib", *sizes)
    one_line_error(done, "use fewer --score-sequences, a smaller --seq-len or a larger --memory-limit")


def test_errors_name_fields_that_there_are():
    """Every one is an option of some verb."""
    known = {name for verb in main.commands for option in main.commands[verb].params if (name := option.name)}
    known |= {flag[2:].replace("-", "_") for verb in main.commands for flag in flags_of(verb) if flag.startswith("--")}
    found = fields_in_messages()
    assert len(found) > 40
    assert {name: places for name, places in found.items() if name not in known | KEYS_OF_FILES} == {}


def test_names_in_a_narrow_table_are_whole(monkeypatch):
    """Cut off, variants of one kind would look the same."""
    from rich.console import Console

    from puzzle.cli import report

    monkeypatch.setattr(report, "console", Console(file=(out := io.StringIO()), width=30))
    report.print_table("t", ("slot", "variant"), [("attention", "gdn-16x128-32x128-nogate")])
    assert "gdn-16x128-32x128-nogate" in "".join(out.getvalue().replace("│", " ").split())
