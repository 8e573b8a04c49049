"""What a verb would ignore in one of its modes is refused by name; every mode of every verb is in the list below."""

from __future__ import annotations

import click
import pytest

from puzzle.cli import main
from puzzle.cli.modes import Verb

# (verb, what puts it into the mode, the mode's words)
CASES = [
    ("build-library", ("p", "--out", "x", "--no-score"), "with --no-score"),
    ("build-library", ("p", "--out", "x", "--inputs-from", "y"), "with --inputs-from"),
    ("build-library", ("p", "--out", "x", "--data", "y"), "without --inputs-from"),
    ("profile", ("--gpu", "h100", "--engine", "vllm", "--fit", "x.csv"), "with --engine and --fit"),
    ("profile", ("--gpu", "h100", "--engine", "vllm", "--run"), "with --run"),
    ("profile", ("lib", "--gpu", "h100"), "without --run"),
    ("profile", ("--gpu", "h100", "--tp", 2, "--all-reduce"), "with --all-reduce"),
    ("bench", ("child", "--gpu", "h100"), "without --engine"),
    ("bench", ("child", "--gpu", "h100", "--engine", "vllm"), "with --engine"),
    ("profile", ("--gpu", "h100", "--shapes", "reference"), "with --shapes"),
    ("profile", ("lib", "--gpu", "cpu"), "with --gpu cpu and no --run"),
    ("solve", ("--problem", "x.json"), "with --problem"),
    ("solve", ("lib", "--gpu", "cpu", "--pareto", "throughput"), "with --pareto"),
    ("solve", ("lib", "--gpu", "cpu", "--pareto", "throughput"), "with --pareto throughput"),
    ("solve", ("lib", "--gpu", "cpu", "--pareto", "latency"), "with --pareto latency"),
    ("solve", ("lib", "--gpu", "cpu", "--pareto", "memory"), "with --pareto memory"),
    ("solve", ("lib", "--gpu", "cpu"), "without --pareto"),
    ("solve", ("lib", "--gpu", "cpu", "--diverse", 2), "with --diverse"),
    ("solve", ("lib", "--gpu", "cpu"), "without --diverse or --finalists"),
    ("solve", ("lib", "--gpu", "cpu", "--finalists", 4), "with --finalists"),
    ("solve", ("lib", "--gpu", "cpu", "--rounds", 1), "with --rounds"),
    ("solve", ("lib", "--gpu", "cpu"), "without --finalists"),
    ("solve", ("lib", "--gpu", "cpu"), "without --finalists or --rounds, which measure children"),
    ("solve", ("lib", "--gpu", "cpu", "--baseline", "greedy"), "with --baseline"),
    ("solve", ("lib", "--gpu", "cpu"), "without --fusion"),
    ("solve", ("lib", "--gpu", "h100", "--precision", "bf16,fp8"), "with --precision"),
    ("solve", ("lib", "--gpu", "cpu", "--hidden", 24), "with --hidden or --depth"),
    ("solve", ("lib", "--gpu", "cpu"), "without --stages"),
    ("export", ("child", "--out", "x"), "without --kv-dtype"),
    ("export", ("lib", "sol", "--out", "x", "--engine", "llama.cpp"), "with --format gguf"),
    ("export", ("child", "--out", "x.gguf", "--format", "gguf"), "with a file as --out, which has no card"),
    ("fuse", ("child", "--dependency-only", "--data", "x", "--out", "d.json"), "with --dependency-only"),
    (
        "fuse",
        ("child", "--runs", "1-2", "--out", "x"),
        "with runs that are named or were solved for (--runs auto chooses others)",
    ),
    ("fuse", ("child", "--runs", "auto", "--out", "x"), "without --data"),
    ("heal", ("child", "--data-blend", "x", "--out", "x"), "with --data-blend, whose sources name their own"),
    ("heal", ("child", "--stages", "8k:1M", "--out", "x"), "with --stages, which say both"),
    ("heal", ("child", "--out", "x"), "by one process, without torchrun"),
    ("heal", ("child", "--kl-weight", 0, "--out", "x"), "with --kl-weight 0"),
    ("heal", ("child", "--out", "x"), "without --teacher-logits"),
    (
        "heal",
        ("child", "--kl-weight", 0, "--cosine-weight", 0, "--lm-weight", 1, "--out", "x"),
        "with --kl-weight 0 and --cosine-weight 0",
    ),
    ("evaluate", ("p", "c", "--no-speed"), "with --no-speed"),
    ("evaluate", ("p", "c", "--tasks", "gsm8k"), "with --tasks"),
    ("evaluate", ("p", "c"), "without --tasks"),
]


def refused_by(verb: str, told: str) -> list[click.Parameter]:
    (mode,) = (m for m in main.commands[verb].modes if main.in_flags(m.told, verb) == told)
    return [p for p in main.commands[verb].params if mode.ignores(p.name)]


def typed(parameter: click.Parameter) -> list[str]:
    """The parameter on the command line, away from its default."""
    if isinstance(parameter, click.Argument):
        return ["lib"]
    if parameter.is_flag:
        return [
            parameter.secondary_opts[0] if parameter.default is True and parameter.secondary_opts else parameter.opts[0]
        ]
    flag = next(opt for opt in parameter.opts if opt.startswith("--"))
    return [flag, parameter.type.choices[0] if isinstance(parameter.type, click.Choice) else "3"]


ALL = [
    pytest.param(verb, given, told, p, id=f"{verb} {told}: {p.name}")
    for verb, given, told in CASES
    for p in refused_by(verb, told)
]


@pytest.mark.parametrize(("verb", "given", "told", "parameter"), ALL)
def test_what_a_mode_ignores_is_refused(puzzle, one_line_error, monkeypatch, tmp_path, verb, given, told, parameter):
    if any(word in given for word in typed(parameter)[:1]):
        pytest.skip("it is what puts the verb into the mode")
    monkeypatch.chdir(tmp_path)
    done = puzzle(verb, *given, *typed(parameter))
    flags = (
        parameter.human_readable_name
        if isinstance(parameter, click.Argument)
        else main.in_flags(f"`{parameter.name}`", verb)
    )
    one_line_error(done, f"error: {flags} is not used ", ": leave it out")
    if sum(verb == other and given == same for other, same, _ in CASES) == 1:
        assert f"{flags} is not used {told}: leave it out" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_every_mode_is_tried():
    verbs = {name: command for name, command in main.commands.items() if isinstance(command, Verb)}
    every = {(name, main.in_flags(mode.told, name)) for name, verb in verbs.items() for mode in verb.modes}
    assert every == {(verb, told) for verb, _, told in CASES}


def test_tables_name_parameters_that_there_are():
    for name, command in main.commands.items():
        for mode in command.modes if isinstance(command, Verb) else ():
            words = (mode.unused if mode.uses is None else mode.uses).split()
            assert set(words) <= {p.name for p in command.params} | set(), (name, mode.told)
