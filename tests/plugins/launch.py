"""What a started process runs: `setup`, then `puzzle ARGUMENTS`, with an environment and a file of output of its own; all
given by whoever starts it."""

import os

import torch

os.environ.update(environment)  # type: ignore[name-defined]  # noqa: F821
torch.set_num_threads(1)
for stream in (1, 2):
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)  # type: ignore[name-defined]  # noqa: F821

from puzzle.cli import main  # noqa: E402

exec(setup)  # type: ignore[name-defined]  # noqa: F821
main(arguments, prog_name="puzzle")  # type: ignore[name-defined]  # noqa: F821
