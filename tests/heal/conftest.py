"""A child of the tiny parent with a hole, a narrow FFN and an empty layer; and how to heal it in a few seconds."""

from __future__ import annotations

import multiprocessing
import runpy
import socket
from dataclasses import replace
from pathlib import Path

import pytest

LAUNCH = Path(__file__).with_name("launch.py")


def write_child(parent: Path, out: Path, *, drop: int | None = None) -> Path:
    """No attention in layer 1, half the FFN in layer 2, nothing in layer 3; drop: leave this layer out altogether."""
    from puzzle.export.checkpoint import write_checkpoint
    from puzzle.export.child import ABSENT, SwiGlu, no_tensors
    from puzzle.export.hf import hf_config
    from puzzle.export.sources import child_of_checkpoint

    child = child_of_checkpoint(parent)
    layers = list(child.layers)

    def half():
        whole = child.layers[2].read_ffn()
        return {
            "norm.weight": whole["norm.weight"],
            "gate_proj.weight": whole["gate_proj.weight"][:48],
            "up_proj.weight": whole["up_proj.weight"][:48],
            "down_proj.weight": whole["down_proj.weight"][:, :48].contiguous(),
        }

    layers[1] = replace(layers[1], attention=ABSENT, read_attention=no_tensors)
    layers[2] = replace(layers[2], ffn=SwiGlu(width=48), read_ffn=half)
    layers[3] = replace(layers[3], attention=ABSENT, read_attention=no_tensors, ffn=ABSENT, read_ffn=no_tensors)
    if drop is not None:
        del layers[drop]
    cut = replace(child, layers=tuple(layers))
    config = hf_config(cut, cut.dtype)
    if drop is not None:
        config["layer_origins"] = [i for i in range(4) if i != drop]
    write_checkpoint(
        out, config=config, tensors=cut.tensors(), tokenizer_from=cut.tokenizer, generation_config=None, card="card"
    )
    return out


@pytest.fixture(scope="session")
def make_child():
    return write_child


@pytest.fixture(scope="session")
def child(tmp_path_factory, parent) -> Path:
    return write_child(parent, tmp_path_factory.mktemp("heal") / "child")


@pytest.fixture(scope="session")
def small(corpus) -> tuple:
    """Options of a run of 20 steps, on the CPU: there a run is bit-reproducible."""
    return (
        "--data", corpus, "--tokens", 5120, "--seq-len", 32, "--batch-size", 8, "--lr", 0.01,
        "--validation-sequences", 16, "--eval-every", 10, "--device", "cpu",
    )  # fmt: skip


@pytest.fixture(scope="session")
def launch():
    """`launch(arguments)` starts `puzzle heal ...` in a process of its own; `processes` of them train together."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["puzzle.heal.run", "puzzle.cli.heal", "transformers", "torch.distributed.fsdp"])
    started = []

    def start(arguments: tuple, processes: int = 1) -> list:
        port = socket.create_server(("127.0.0.1", 0))
        number = port.getsockname()[1]
        port.close()
        group = []
        for rank in range(processes):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
            environment["MASTER_PORT"] = number
            given = {
                "arguments": [str(a) for a in arguments],
                "environment": {k: str(v) for k, v in environment.items()},
            }
            process = context.Process(target=runpy.run_path, args=(str(LAUNCH), given), daemon=True)
            process.start()
            group.append(process)
        started.extend(group)
        return group

    yield start
    for process in started:
        if process.is_alive():
            process.kill()
