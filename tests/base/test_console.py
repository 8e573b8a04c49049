"""What people read on the terminal."""

from __future__ import annotations

from pathlib import Path

from puzzle.base import console

ROOM = Path(console.__file__).parents[1]


def test_a_line_is_said_as_it_is(capsys):
    line = f"continuing /runs/[a] {'long' * 40} after step 7"
    console.say(line)
    assert capsys.readouterr().err == f"{line}\n"


def test_lines_are_said_and_tables_printed():
    """A path in a line that is printed would be broken at the terminal's width, and its brackets taken for markup."""
    for path in sorted(ROOM.rglob("*.py")):
        printed = [line.strip() for line in path.read_text().splitlines() if "console.print(" in line]
        if path != Path(console.__file__):
            assert set(printed) <= {"console.print(table)"}, path
