"""Imports go down one ordered list of rooms, no files import each other in a circle, and `solve` needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = (  # from the top; a file imports from its own room and from those below it
    "cli", "run", "page", "choose", "heal", "fuse", "grow", "slice", "serving", "profile", "export", "library", "tasks", "measure", "runtime", "parents",
    "data", "blocklib", "kernels", "solver", "base",
)  # fmt: skip
SHIPPED = {
    "modeling_puzzle.py",
    "modeling_puzzle_moe.py",
    "modeling_puzzle_masks.py",
    "modeling_puzzle_mamba.py",
    "modeling_puzzle_delta.py",
    "modeling_puzzle_recurrent.py",
    "modeling_decilm.py",
    "configuration_decilm.py",
    "modeling_nemotron_h_puzzle.py",
    "configuration_nemotron_h_puzzle.py",
    "worker.py",
}  # run without puzzle
SOLVER_USES = {"numpy", "ortools", "pulp"}
MAX_LINES = 500


def room_of(path: Path) -> str:
    """'choose' of puzzle/choose/goal.py, 'solver' of solver/problem.py."""
    parts = path.relative_to(ROOT).parts
    return parts[1] if parts[0] == "puzzle" else parts[0]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "puzzle" else ("puzzle", *parts)
    return ".".join(parts).removesuffix(".__init__")


FILES = sorted(p for folder in ("puzzle", "blocklib", "solver", "kernels") for p in (ROOT / folder).rglob("*.py"))
INSIDE = [p for p in FILES if p.parent != ROOT / "puzzle"]
MODULES = {module_of(p): p for p in FILES}


def imports(path: Path) -> set[str]:
    """Full dotted names of everything a file imports, at any depth of nesting."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def targets(path: Path) -> set[str]:
    """Modules of ours that a file imports."""
    found = set()
    for name in imports(path):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        if name and name != "puzzle":
            found.add(name)
    return found


def test_every_room_is_on_the_list():
    """`puzzle/` itself holds the package's face alone."""
    assert {room_of(p) for p in INSIDE} == set(ROOMS)
    assert {p.name for p in (ROOT / "puzzle").glob("*.py")} == {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("path", INSIDE, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    own = ROOMS.index(room_of(path))
    for name in sorted(targets(path)):
        room = room_of(MODULES[name])
        assert ROOMS.index(room) >= own, f"{path.relative_to(ROOT)} imports {name}, which is on a higher floor"


def test_no_circle_of_files():
    graph = {name: targets(path) - {name} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a circle: {' -> '.join((*way[way.index(name) :], name))}"
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) == "solver"], ids=lambda p: p.name)
def test_solver_is_pure_numbers(path):
    for name in imports(path):
        top = name.split(".")[0]
        assert top in SOLVER_USES | {"puzzle"} | sys.stdlib_module_names, f"{path} imports {name}"


@pytest.mark.parametrize("path", [p for p in FILES if p.name in SHIPPED], ids=lambda p: p.name)
def test_what_is_shipped_needs_no_puzzle(path):
    assert not targets(path)


def test_solving_needs_no_torch(tmp_path, own_library):
    """`puzzle solve`, for a goal, for an engine and with fusion, where torch cannot be imported."""
    lines = ["import sys", "sys.modules['torch'] = sys.modules['transformers'] = None", "from puzzle.cli import main"]
    for options in ([], ["--fusion"], ["--engine", "vllm"]):
        goal = ["--throughput", "1.1x", "--gpu", "cpu", "--input-len", "16", "--output-len", "8", *options]
        words = ["solve", str(own_library), *goal, "--out", str(tmp_path / "x")]
        lines += ["try:", f"    main({words!r})", "except SystemExit as end:", "    assert not end.code, end.code"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("registry", "folder", "modules"),
    [
        ("puzzle.blocklib.sub_block.kinds", "puzzle.blocklib", "OURS"),
        ("puzzle.parents.opened.families", "puzzle.parents", "MODULES"),
    ],
)
def test_a_registry_has_one_order(registry, folder, modules):
    """Its own, whichever of its modules was imported first: it is the order of variants in a library, and of messages."""
    module, _, name = registry.rpartition(".")
    code = [
        "import importlib, sys",
        f"own = importlib.import_module('{module}')",
        f"names = list(own.{modules})[:: int(sys.argv[1])]",
        f"for name in names: importlib.import_module(f'{folder}.{{name}}')",
        f"print(*own.{name}())",
    ]
    said = [
        subprocess.run([sys.executable, "-c", "\n".join(code), step], capture_output=True, text=True, check=True).stdout
        for step in ("1", "-1")
    ]
    assert said[0].split()
    assert said[0] == said[1]


def test_no_importable_kernels_package():
    """transformers probes for a package of this name (docs/architecture.md, "Packaging")."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_no_file_holds_two_ideas():
    for path in FILES:
        count = len(path.read_text(encoding="utf-8").splitlines())
        assert count <= MAX_LINES, f"{path} has {count} lines: split it"
