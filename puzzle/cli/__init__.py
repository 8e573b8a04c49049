"""`puzzle`: one thin command per verb. Stages are imported inside the commands, so that --help never loads torch."""

from __future__ import annotations

import os
import re
import sys
from typing import Any, NoReturn

import click

from puzzle import __version__
from puzzle.cli.assess import evaluate_command, score_command
from puzzle.cli.bench import bench_command
from puzzle.cli.build_library import build_library_command
from puzzle.cli.export import export_command
from puzzle.cli.fuse import fuse_command
from puzzle.cli.grow import grow_command
from puzzle.cli.heal import heal_command
from puzzle.cli.options import alone
from puzzle.cli.page import report_command
from puzzle.cli.profile import profile_command
from puzzle.cli.rescore import rescore_command
from puzzle.cli.run import run_command
from puzzle.cli.serve_check import serve_check_command
from puzzle.cli.slice import slice_command
from puzzle.cli.solve import solve_command

# Verbs that several processes do together, under torchrun.
TOGETHER = ("build-library", "score", "profile", "heal", "evaluate", "bench")


class _Cli(click.Group):
    """Shows user errors as one line and exits with 2; keeps verbs in the order of the road. Of several processes under torchrun
    only the first that fails says why."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        from puzzle.base.errors import UserError

        try:
            found = super().invoke(ctx)
            if not alone():
                _end(0)
            return found
        except click.ClickException as error:
            _fail(_of_click(error))
        except UserError as error:
            _fail(self.in_flags(str(error), ctx.invoked_subcommand))
        except OSError as error:  # what the system says of a path that no stage has looked at before
            if error.filename is None:
                raise
            _fail(f"{error.filename}: {error.strerror}; give another path, or change what is there")

    def make_context(self, info_name: str | None, args: list[str], *more: Any, **named: Any) -> click.Context:
        asked = bool(args)  # without a word click shows the help
        try:
            return super().make_context(info_name, args, *more, **named)
        except click.UsageError as error:
            if not asked:
                raise
            _fail(_of_click(error))

    def in_flags(self, message: str, verb: str | None) -> str:
        """The message with fields, which stages write as `seq_len`, as this verb's flags; those that it has no flag for stay."""
        command = self.commands.get(verb or "")
        flags: dict[str, str] = {}
        for option in [] if command is None else command.params:
            for flag in (*option.opts, *option.secondary_opts):
                if flag.startswith("--"):
                    for name in (flag[2:].replace("-", "_"), option.name if flag in option.opts else None):
                        flags.setdefault(name or "", flag)
        return re.sub(r"`([a-z][a-z0-9_]*)`", lambda found: flags.get(found[1], found[0]), message)


def _of_click(error: click.ClickException) -> str:
    """What click says in three lines, in one."""
    context = getattr(error, "ctx", None)
    return error.format_message() + ("" if context is None else f" See {context.command_path} --help.")


def _fail(told: str) -> NoReturn:
    """The one line of an error, and exit code 2; of several processes the first that fails has it."""
    if alone():
        click.echo(f"error: {told}", err=True)
        sys.exit(2)
    from puzzle.base.ranks import is_first_to_fail

    if is_first_to_fail():
        click.echo(f"error: {told}", err=True)
    _end(2)


def _end(code: int) -> NoReturn:
    """At once: the communication libraries' own end would wait for the other processes, and now and then their threads abort in it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@click.group(
    cls=_Cli, context_settings={"show_default": True, "help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="puzzle")
@click.pass_context
def main(ctx: click.Context) -> None:
    """From a parent LLM and a deployment budget to the cheapest child that keeps the parent's behaviour.

    \b
    The road:
      puzzle build-library PARENT --data TEXT --out LIB        train and score alternatives of every layer
      puzzle profile LIB --gpu cpu                             measure what each of them costs
      puzzle solve LIB --gpu cpu --throughput 2x --out SOL     choose one per layer
      puzzle export LIB SOL --out CHILD                        write a Hugging Face checkpoint
      puzzle heal CHILD --teacher PARENT --data TEXT --out C2  train it as a whole until it is like its parent
      puzzle serve-check CHILD --engine vllm                   compare an engine with ours
      puzzle evaluate PARENT CHILD --data TEXT                 measure parent and child side by side
    or all of it, and a page of what came out:
      puzzle run examples/quickstart.yaml --data TEXT --out RUN
      puzzle report RUN
    """
    verb = ctx.invoked_subcommand
    if not alone() and verb not in TOGETHER:
        from puzzle.base.errors import UserError

        raise UserError(
            f"`puzzle {verb}` runs in one process: start it without torchrun, which {', '.join(TOGETHER)} take"
        )


for _command in (  # in the order of the road
    slice_command, build_library_command, score_command, profile_command, solve_command, rescore_command, export_command, fuse_command,
    grow_command, heal_command, serve_check_command, evaluate_command, bench_command, run_command, report_command,
):  # fmt: skip
    main.add_command(_command)
