"""The wheel carries what the checkout has: every room with Python files is a listed package."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def folder(package: str) -> Path:
    """Where `package-dir` puts a package: the longest prefix that it names wins."""
    parts = package.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in SETUPTOOLS["package-dir"]:
            return ROOT / SETUPTOOLS["package-dir"][prefix] / Path(*parts[length:])
    return ROOT / Path(*parts)


def test_every_folder_with_code_is_packaged():
    listed = {folder(package) for package in SETUPTOOLS["packages"]}
    rooms = [ROOT / name for name in ("puzzle", "blocklib", "solver", "kernels")]
    holding = {path.parent for room in rooms for path in room.rglob("*.py")}
    assert holding == listed


def test_every_data_file_is_packaged():
    taken = {
        path
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    others = {p for p in (ROOT / "puzzle").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert others <= taken
