"""Python files that are the same on every machine: what a tiny model learns from them, and which of them are held out, must not change
with the Python that is installed. Their words are drawn from few, some of them often, as in files that people write."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

LISTS = """\
value message part header name field line text data key item loop task future buffer stream reader writer policy
charset address token result error state event handler callback timeout transport protocol socket client server
payload encoding index count limit offset length parser queue lock signal process thread context option

get set read write parse add remove close open send run create call check find encode decode make start stop wait
append update handle build feed flush cancel register resolve
"""
NOUNS, VERBS = (words.split() for words in LISTS.split("\n\n"))
SENTENCES = (
    "Return the {0} of the {1}, or None if there is no {2}.",
    "{3} the {0} and the {1} before the {2} is closed.",
    "The {0} must not be used after its {1} has been set; see also the {2}.",
    "Raise ValueError if the {0} is not a valid {1}.",
    "This is called when the {0} has {3} a {1}, with its {2} as the only argument.",
)
STATEMENTS = (
    "self._{0} = {1}",
    "{0} = self._{1}.{3}_{2}({0})",
    "if {0} is None:\n            {0} = {1}.{3}({2})",
    "for {0} in self._{1}:\n            self.{3}_{2}({0}, {1}=None)",
    "if not self._{0}:\n            raise ValueError('{1} is not a {2}: %r' % ({0},))",
    "while {0} < len({1}):\n            {0} += {2}[{0}]",
    "try:\n            {0} = int({1}[{n}])\n        except (KeyError, TypeError):\n            {0} = {n}",
    "assert isinstance({0}, {2}), '{1}'",
    "self._{3}_{0}.append(({1}, {n}))",
)
LONGEST = 6000  # characters


def write_files(directory: Path, count: int) -> list[Path]:
    """`count` of them, file by file the same however many are asked for."""
    paths = [directory / f"{name_of(number)}.py" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_text(file_text(number), encoding="utf-8")
    return paths


def name_of(number: int) -> str:
    return f"{VERBS[number % len(VERBS)]}_{NOUNS[number % len(NOUNS)]}_{number}"


def file_text(number: int) -> str:
    """A docstring, imports and some classes; from 2 to 6 thousand characters."""
    chance = random.Random(number)  # whose `random()` is the same in every Python
    words = Words(chance)
    wanted = 2000 + int(chance.random() * (LONGEST - 2000))
    lines = [f'"""{words.sentence()}\n\n{words.sentence()}\n{words.sentence()}\n"""\n']
    lines += [f"import {words.noun()}" for _ in range(1 + int(chance.random() * 5))]
    text = "\n".join(lines)
    while len(text) < wanted:
        text += "\n\n\n" + class_text(words)
    return text[:wanted]


def class_text(words: Words) -> str:
    title = words.noun().title() + words.noun().title()
    text = f'class {title}:\n    """{words.sentence()}"""'
    for _ in range(2 + int(words.chance.random() * 4)):
        given = [words.noun() for _ in range(1 + int(words.chance.random() * 2))]
        text += f"\n\n    def {words.verb()}_{words.noun()}(self, {', '.join(given)}):"
        text += f'\n        """{words.sentence()}"""'
        for _ in range(1 + int(words.chance.random() * 5)):
            text += f"\n        {words.filled(STATEMENTS)}"
        text += f"\n        return {given[0]}"
    return text


class Words:
    """Draws words: the first of a list much more often than its last."""

    def __init__(self, chance: random.Random):
        self.chance = chance

    def one_of(self, some: Sequence[str]) -> str:
        return some[int(len(some) * self.chance.random() ** 2)]

    def noun(self) -> str:
        return self.one_of(NOUNS)

    def verb(self) -> str:
        return self.one_of(VERBS)

    def filled(self, some: Sequence[str]) -> str:
        nouns = [self.noun() for _ in range(3)]
        return self.one_of(some).format(*nouns, self.verb(), n=int(self.chance.random() * 10))

    def sentence(self) -> str:
        text = self.filled(SENTENCES)
        return text[0].upper() + text[1:]
