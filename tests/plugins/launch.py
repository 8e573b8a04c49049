"""What a forked process runs: `setup`, then `python WORDS`, with an environment and files of output of its own; all given by whoever
starts it."""

import os
import runpy
import sys

import torch

os.environ.update(environment)  # type: ignore[name-defined]  # noqa: F821
torch.set_num_threads(1)
for stream, path in ((1, out), (2, err)):  # type: ignore[name-defined]  # noqa: F821
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)

first, *others = words  # type: ignore[name-defined]  # noqa: F821
sys.argv[:] = words if first.endswith(".py") else ["-c", *others[1:]] if first == "-c" else others  # type: ignore[name-defined]  # noqa: F821
exec(setup)  # type: ignore[name-defined]  # noqa: F821
if first == "-m":
    runpy.run_module(others[0], run_name="__main__", alter_sys=True)
elif first == "-c":
    exec(compile(others[0], "<string>", "exec"), {"__name__": "__main__"})
else:
    sys.path.insert(0, os.path.dirname(first))
    runpy.run_path(first, run_name="__main__")
