"""`make test-versions`: what touches moving parts, with the oldest and the newest of every dependency, in each Python.

    python tests/versions/run.py                        oldest and newest in Python 3.11, 3.12 and 3.13
    python tests/versions/run.py --torch                the same with torch's oldest and newest: 3 GB from PyPI for each
    python tests/versions/run.py 3.11-oldest 3.13-newest
    python tests/versions/run.py --export               CI: transformers' oldest and newest, and only what they can break

Oldest is what pyproject.toml names, newest what pip finds. Environments stay in .versions/ and lie over the packages of the
Python that runs this script, so that torch is not installed again; another Python needs --torch, else it runs what needs no
torch. Then children that one environment exported generate in every other one, and so do children of commit BEFORE, whose
model code is older than the name that transformers 5.24 gave to the cache. Exit code 1 when anything fails.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
WORK = ROOT / ".versions"
CHILDREN, COMPILE = (Path(__file__).with_name(name) for name in ("children.py", "compile_kernels.py"))
PYTHONS = ("3.11", "3.12", "3.13")
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
BEFORE = "ca70475"
RENAMED = (5, 24)  # transformers in which children of BEFORE generate wrong text
TOOLS = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "pyarrow")
SHOWN = (
    "torch",
    "transformers",
    "triton",
    "numpy",
    "ortools",
    "pulp",
    "safetensors",
    "click",
    "rich",
    "pyyaml",
    "gguf",
)
PARTS = {
    "export, engines": ("tests/export", "tests/serving"),
    "loading": ("tests/runtime", "tests/parents"),
    "solver": ("tests/solver",),
    "command line": ("tests/cli",),
    "kernels": ("tests/kernels",),
}
FROM_TRANSFORMERS = tuple(
    f"tests/export/test_{name}.py"
    for name in (
        "generation",
        "generic_config",
        "modeling",
        "packed",
        "matrix",
        "before",
        "nemotron_nas",
        "nemotron_h",
        "qwen3_moe",
        "gpt_oss",
    )
)
COMPILED = "kernels compiled for sm_90"
NEED_TORCH = {"torch", "transformers", "triton", "safetensors", "gguf"}
# The first release with a wheel, where a Python is younger than the oldest release that pyproject.toml allows.
FIRST_WHEEL = {"3.13": {"numpy": "2.1.0", "pyyaml": "6.0.2"}}


@dataclass(kw_only=True)
class Environment:
    """torch: "below" (of the Python that runs this script), "own" or "none". results: "passed/all" by part."""

    name: str
    python: str
    torch: str
    directory: Path
    results: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    @cached_property
    def versions(self) -> dict[str, str]:
        code = """if True:
            import importlib.metadata, json, sys
            found = {d.name.lower(): d.version for d in reversed(list(importlib.metadata.distributions()))}
            print(json.dumps({name: found.get(name, "-") for name in sys.argv[1:]}))"""
        return json.loads(self.run("-c", code, *SHOWN))

    @property
    def transformers(self) -> tuple[int, ...]:
        return tuple(int(part) for part in self.versions["transformers"].split(".")[:2])

    def run(self, *arguments: object, check: bool = True) -> str:
        """Standard output of this environment's Python in the checkout; ends the script when it fails (with `check`)."""
        caches = {"HF_MODULES_CACHE": f"{WORK}/modules/{self.name}", "TRITON_CACHE_DIR": f"{WORK}/triton/{self.name}"}
        done = subprocess.run(
            [str(self.directory / "bin" / "python"), *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, **caches, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
            check=False,
        )
        if check and done.returncode:
            sys.exit(
                f"{self.name}: {' '.join(map(str, arguments[:3]))} failed\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
            )
        return done.stdout


def requirements(which: str, python: str, torch: str, only: str | None = None) -> list[str]:
    """What pip is asked for: the oldest or the newest of what pyproject.toml names; tools as in constraints.txt."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = {}
    for line in (*project["dependencies"], *project["optional-dependencies"]["gguf"]):
        name, rest = re.match(r"([\w-]+)([^;]*)", line).groups()  # type: ignore[union-attr]
        oldest = FIRST_WHEEL.get(python, {}).get(name) or re.search(r">=([\d.]+)", rest)[1]  # type: ignore[index]
        bounds[name] = name + (f"=={oldest}" if which == "oldest" else rest.strip())
    if only is not None:
        return [bounds[only]]
    left_out = {"below": {"torch"}, "none": NEED_TORCH, "own": set()}[torch]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    tools = [] if torch == "below" else [f"{tool}=={pins[tool]}" if tool in pins else tool for tool in TOOLS]
    return [bound for name, bound in bounds.items() if name not in left_out] + tools


def interpreter(python: str) -> str | None:
    """A Python of that version: this one, one on the path, or pyenv's."""
    if python == HERE:
        return sys.executable
    on_path = shutil.which(f"python{python}")
    of_pyenv = sorted(map(str, (Path.home() / ".pyenv" / "versions").glob(f"{python}.*/bin/python")))
    for found in ([on_path] if on_path else []) + of_pyenv:
        if (
            subprocess.run([found, "--version"], capture_output=True, check=False).returncode == 0
        ):  # a shim may lead nowhere
            return found
    return None


def make(name: str, torch: str, only: str | None = None) -> Environment:
    """The environment `3.11-oldest` or `3.13-newest`, made or brought up to date."""
    python, which = name.split("-")
    environment = Environment(name=name, python=python, torch=torch, directory=WORK / f"{name}-{only or torch}")
    if not (environment.directory / "bin" / "python").exists():
        print(f"making {environment.directory.relative_to(ROOT)}", flush=True)
        subprocess.run([interpreter(python) or "", "-m", "venv", environment.directory], check=True)
    site = environment.directory / "lib" / f"python{python}" / "site-packages"
    if torch == "below":  # a .pth file's line goes behind the environment's own packages on the path
        (site / "zz_below.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    wanted = requirements(which, python, torch, only)
    environment.run("-m", "pip", "install", "-q", "--disable-pip-version-check", "--only-binary=:all:", "-U", *wanted)
    return environment


def test(environment: Environment, parts: dict[str, tuple[str, ...]]) -> None:
    """Run the tests and keep what passed of each part."""
    report = environment.directory / "report.xml"
    report.unlink(missing_ok=True)
    paths = [path for folders in parts.values() for path in folders if (ROOT / path).exists()]
    bare = ["--noconftest"] if environment.torch == "none" else []  # tests/conftest.py imports torch
    workers = ("-n", "logical", "--dist", "loadfile")
    output = environment.run(
        "-m", "pytest", "-q", *bare, *workers, "-p", "no:cacheprovider", f"--junitxml={report}", *paths, check=False
    )
    if not report.exists():
        sys.exit(f"{environment.name}: pytest did not run\n{output[-3000:]}")
    passed, every = Counter[str](), Counter[str]()
    for case in ElementTree.parse(report).iter("testcase"):
        test_file = case.get("classname", "").replace(".", "/")
        part = next(
            name for name, found in parts.items() if test_file.startswith(tuple(p.split(".")[0] for p in found))
        )
        if case.find("skipped") is None:
            every[part] += 1
            bad = case.find("failure") is not None or case.find("error") is not None
            passed[part] += not bad
            environment.failed += [f"{test_file}::{case.get('name')}"] * bad
    environment.results = {part: f"{passed[part]}/{every[part]}" for part in every}


def compile_kernels(environment: Environment) -> None:
    """Tests of kernels interpret them; a compiler refuses more."""
    found = json.loads(environment.run(COMPILE).splitlines()[-1])
    num_compiled, failed = len(found["compiled"]), found["failed"]
    environment.results[COMPILED] = f"{num_compiled}/{num_compiled + len(failed)}"
    environment.failed += [f"{kernel}: {error}" for kernel, error in failed.items()]


def exchange(environments: list[Environment]) -> tuple[list[list[str]], list[str]]:
    """(table of children against environments, what went wrong that should not)."""
    readers = [e for e in environments if e.torch != "none"]
    children = WORK / "children"
    shutil.rmtree(children, ignore_errors=True)
    rows: dict[str, str] = {}  # what the table says -> the directory in `children`
    for writer in readers:
        rows[f"this checkout, {label(writer)}"] = f"today-{writer.name}"
        writer.run(CHILDREN, "write", children / f"today-{writer.name}", ROOT)
    if checkout := checkout_before():
        rows |= {f"commit {BEFORE}, {label(readers[0])}": "before", f"commit {BEFORE}, exported again there": "again"}
        readers[0].run(CHILDREN, "write", children / "before", checkout)
    found: dict[str, list[dict[str, list[str]]]] = {}  # by reader, a dictionary for each row
    for reader in readers:
        if checkout:
            reader.run(CHILDREN, "again", children / "before", children / f"again-{reader.name}")
        directories = [children / (f"again-{reader.name}" if name == "again" else name) for name in rows.values()]
        lines = [line for line in reader.run(CHILDREN, "check", *directories).splitlines() if line.startswith("{")]
        found[reader.name] = [json.loads(line) for line in lines]

    table, wrong = [["children exported by", *(label(reader) for reader in readers)]], []
    for index, (name, directory) in enumerate(rows.items()):
        cells = []
        for reader in readers:
            every = found[reader.name][index]
            bad = {child: ways for child, ways in every.items() if ways}
            known = directory == "before" and reader.transformers >= RENAMED
            cells.append(f"{len(every) - len(bad)}/{len(every)}" + (" (as known)" if bad and known else ""))
            wrong += [f"{name}, in {reader.name}: {c}: {', '.join(w)}" for c, w in bad.items() if not known]
        table.append([name, *cells])
    return table, wrong


def checkout_before() -> Path | None:
    """The files of commit BEFORE; None, and a word about it, in a clone without it."""
    archive = subprocess.run(["git", "archive", BEFORE], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        print(f"children of {BEFORE} are left out: this clone does not have the commit")
        return None
    shutil.rmtree(WORK / "before", ignore_errors=True)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(WORK / "before", filter="data")
    return WORK / "before"


def label(environment: Environment) -> str:
    return f"{environment.name} (transformers {environment.versions['transformers']})"


def markdown(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def overview(environments: list[Environment], parts: list[str]) -> list[list[str]]:
    rows = [["", *(e.name for e in environments)]]
    rows += [[name, *(e.versions[name] for e in environments)] for name in SHOWN]
    rows += [[part, *(e.results.get(part, "-") for e in environments)] for part in parts]
    return rows


def chosen(names: list[str], torch: bool) -> list[Environment]:
    """Environments by name; says which are left out, or run less, and why."""
    found = []
    for name in names or [f"{python}-{which}" for python in PYTHONS for which in ("oldest", "newest")]:
        python, _, which = name.partition("-")
        if python not in PYTHONS or which not in ("oldest", "newest"):
            sys.exit(f"{name}: name an environment like {PYTHONS[0]}-oldest; Pythons are {', '.join(PYTHONS)}")
        if interpreter(python) is None:
            print(f"{name} is left out: no Python {python} on the path or in ~/.pyenv")
            continue
        kind = "own" if torch else "below" if python == HERE else "none"
        if kind == "none":
            print(f"{name} runs what needs no torch: --torch installs torch for it")
        found.append(make(name, kind))
    return found


def only_transformers() -> tuple[list[Environment], list[Environment]]:
    """(oldest and newest transformers over this Python's packages, those of them that have not been tested here)."""
    oldest, newest = (make(f"{HERE}-{which}", "below", "transformers") for which in ("oldest", "newest"))
    this = Environment(name=f"{HERE}-newest", python=HERE, torch="below", directory=Path(sys.prefix))
    if this.versions["transformers"] == newest.versions["transformers"]:
        print(f"transformers {newest.versions['transformers']} is the newest, and the one of `make test`")
        return [oldest, this], [oldest]
    return [oldest, newest], [oldest, newest]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="environments such as 3.11-oldest (default: all)")
    parser.add_argument("--torch", action="store_true", help="install torch too, several GB for each environment")
    parser.add_argument("--export", action="store_true", help="transformers alone, and what it can break")
    arguments = parser.parse_args()
    WORK.mkdir(exist_ok=True)
    if arguments.export:
        environments, untested = only_transformers()
        parts = {"export": FROM_TRANSFORMERS}
    else:
        environments = untested = chosen(arguments.names, arguments.torch)
        parts = PARTS
    for environment in untested:
        print(f"testing {environment.name}", flush=True)
        test(environment, {"solver": parts["solver"]} if environment.torch == "none" else parts)
        if parts is PARTS and environment.torch != "none":
            compile_kernels(environment)
        print(", ".join(f"{part} {count}" for part, count in environment.results.items()), flush=True)
    table, wrong = exchange(environments) if any(e.torch != "none" for e in environments) else ([], [])
    print(f"\n{markdown(overview(environments, [*parts, COMPILED] if parts is PARTS else list(parts)))}\n")
    if table:
        print(f"{markdown(table)}\n")
    failed = [f"{e.name}: {test}" for e in environments for test in e.failed] + wrong
    print("\n".join(f"FAILED {line}" for line in failed) or "all passed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
