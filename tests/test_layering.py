"""Imports go downward only, and nothing breaks transformers by being importable."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOOR_0 = {"config", "hardware", "errors", "console", "files", "goal"}
STAGES_ABOVE = {"pipeline", "plan", "report", "recipe"}


def imports(path: Path) -> set[str]:
    """Full dotted names of everything a file imports, at any depth of nesting."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def puzzle_room(name: str) -> str | None:
    """'puzzle.blocklib.layer.Kind' -> 'blocklib'; None for other packages."""
    parts = name.split(".")
    return parts[1] if parts[0] == "puzzle" and len(parts) > 1 else None


@pytest.mark.parametrize("path", modules("solver"), ids=lambda p: p.name)
def test_solver_is_pure_numbers(path):
    allowed = {"numpy", "ortools", "pulp"}
    for name in imports(path):
        top = name.split(".")[0]
        assert top != "torch"
        assert puzzle_room(name) in (None, "solver"), f"{path} imports {name}"
        assert top in allowed | {"puzzle"} or top in __import__("sys").stdlib_module_names, f"{path} imports {name}"


@pytest.mark.parametrize("path", modules("blocklib"), ids=lambda p: p.name)
def test_blocklib_sees_no_whole_model(path):
    for name in imports(path):
        assert puzzle_room(name) in {None, "blocklib", "kernels"} | FLOOR_0, f"{path} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "puzzle").glob("*.py")), ids=lambda p: p.name)
def test_stages_do_not_import_what_calls_them(path):
    for name in imports(path):
        room = puzzle_room(name)
        assert room != "cli", f"{path} imports {name}"
        if path.stem in FLOOR_0:
            assert room in FLOOR_0 | {None}, f"{path} is on the ground floor and imports {name}"
        elif path.stem not in STAGES_ABOVE | {"build"}:  # build and rehearse use the plan they follow
            assert room not in STAGES_ABOVE - {"plan"}, f"{path} imports {name}"


@pytest.mark.parametrize("name", ["library", "costs", "solve", "goal", "files"])
def test_solving_needs_no_torch(name):
    seen, todo = set(), {f"puzzle.{name}"}
    while todo:
        module = todo.pop()
        seen.add(module)
        path = ROOT / Path(*module.split(".")).with_suffix(".py")
        if module.startswith("puzzle.solver"):
            path = ROOT / Path(*module.split(".")[1:]).with_suffix(".py")
        if not path.is_file():
            continue
        for found in imports(path):
            assert found.split(".")[0] not in ("torch", "transformers", "safetensors"), f"{module} imports {found}"
            if puzzle_room(found):
                parts = found.split(".")
                todo |= {m for m in (found, ".".join(parts[:-1])) if m not in seen and m != "puzzle"}


def test_no_importable_kernels_package():
    """transformers probes for a package of this name (docs/architecture.md, "Packaging")."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_no_file_holds_two_ideas():
    for folder in ("puzzle", "blocklib", "solver"):
        for path in modules(folder):
            count = len(path.read_text(encoding="utf-8").splitlines())
            assert count <= 500, f"{path} has {count} lines: split it"
