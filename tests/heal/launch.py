"""What a started process runs: `puzzle ARGUMENTS` with an environment of its own (both given by whoever starts it)."""

import os

import torch

os.environ.update(environment)  # type: ignore[name-defined]  # noqa: F821
torch.set_num_threads(1)

from puzzle.cli import main  # noqa: E402

main(arguments, prog_name="puzzle")  # type: ignore[name-defined]  # noqa: F821
