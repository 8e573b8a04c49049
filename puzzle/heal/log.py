"""heal.jsonl: a line per step and per evaluation; and, where asked for, TensorBoard or Weights & Biases."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from puzzle.base.errors import UserError, writing
from puzzle.base.files import json_text, parse_json, write_text


class Log:
    """Appends lines; only the first rank has one that writes."""

    def __init__(self, path: Path | None, trackers: list[Any]):
        self._path, self._trackers = path, trackers

    def truncate(self, step: int) -> None:
        """Forget what came after `step`: it will be computed again."""
        if self._path is not None and self._path.is_file():
            write_text(self._path, _text([line for line in read_log(self._path) if line["step"] <= step]))

    def write(self, lines: list[dict[str, Any]]) -> None:
        if self._path is None:
            return
        with writing(self._path), open(self._path, "a", encoding="utf-8") as handle:
            handle.write(_text(lines))
        for tracker in self._trackers:
            for line in lines:
                tracker(line)


def _text(lines: list[dict[str, Any]]) -> str:
    return "".join(json_text(line, indent=None) + "\n" for line in lines)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a heal.jsonl; a last line cut short by a killed process is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(parse_json(line))
        except ValueError:
            break
    return found


def _scalars(line: dict[str, Any]) -> dict[str, float]:
    flat = {"held_out/" + k: v for k, v in line["held_out"].items()} if "held_out" in line else line
    return {k: v for k, v in flat.items() if k != "step" and isinstance(v, int | float)}


def trackers(tensorboard: Path | None, wandb: str | None, facts: dict[str, Any]) -> list[Any]:
    """Functions that take a line of the log. Raises UserError when a package is missing."""
    found: list[Any] = []
    if tensorboard is not None:
        writer = _needed("tensorboard", "torch.utils.tensorboard").SummaryWriter(str(tensorboard))

        def to_tensorboard(line: dict[str, Any]) -> None:
            for name, value in _scalars(line).items():
                writer.add_scalar(name, value, line["step"])
            writer.flush()

        found.append(to_tensorboard)
    if wandb is not None:
        run = _needed("wandb", "wandb").init(project=wandb, config=facts)
        found.append(lambda line: run.log(_scalars(line), step=line["step"]))
    return found


def _needed(package: str, module: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise UserError(f"`{package}` needs the package {package}: pip install {package}") from None
