"""`python -m puzzle`, the same as the command `puzzle`."""

from puzzle.cli import main

main(prog_name="puzzle")
