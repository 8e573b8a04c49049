"""`python -m puzzle.cli`, for launchers that start modules, such as torchrun."""

from puzzle.cli import main

main(prog_name="puzzle")
