"""What a verb's modes do not use is refused by name, by one mechanism: a verb in several modes has a table of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click
from click.core import ParameterSource

from puzzle.base.errors import UserError


@dataclass(frozen=True, slots=True)
class Mode:
    """told: its words in messages, such as "with `pareto`". when: of all parameters by name, whether the verb is in this mode.
    unused: names, separated by blanks, of the parameters that it does not look at; or uses: of the only ones that it does."""

    told: str
    when: Callable[[Mapping[str, Any]], bool]
    unused: str = ""
    uses: str | None = None

    def ignores(self, name: str) -> bool:
        return name in self.unused.split() if self.uses is None else name not in self.uses.split()


class Verb(click.Command):
    """A command with modes, which refuses what was typed and would have been ignored."""

    def __init__(self, *arguments: Any, modes: Sequence[Mode], **named: Any):
        super().__init__(*arguments, **named)
        self.modes = tuple(modes)

    def invoke(self, ctx: click.Context) -> Any:
        """Raises UserError for a parameter from the command line that one of the verb's modes ignores."""
        typed = [p for p in self.params if ctx.get_parameter_source(p.name or "") is ParameterSource.COMMANDLINE]
        given = [p for p in typed if ctx.params.get(p.name or "") is not None]  # an argument left out counts as typed
        for mode in self.modes if given else ():
            refused = [p for p in given if mode.ignores(p.name or "")]
            if refused and mode.when(ctx.params):
                option = refused[0]
                name = f"`{option.name}`" if isinstance(option, click.Option) else option.human_readable_name
                raise UserError(f"{name} is not used {mode.told}: leave it out")
        return super().invoke(ctx)
