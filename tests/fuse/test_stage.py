"""Fusing a child on disk keeps its architecture.json true."""

from __future__ import annotations

from dataclasses import replace

from puzzle.base.workload import Workload
from puzzle.choose.goal import GoalOptions
from puzzle.choose.problem import Request
from puzzle.choose.solve import open_costs, solve_library
from puzzle.export.sources import child_of_checkpoint
from puzzle.export.write import export, open_source
from puzzle.fuse.stage import fuse_child
from puzzle.library.manifest import Library
from puzzle.measure.architecture import Choice, read_architecture, write_architecture


def free_child(root, out, ffns):
    """A child of the library at `root` without any attention, and its architecture."""
    library = Library.open(root)
    request = Request(work=Workload(input_len=16, output_len=16), goal=GoalOptions(throughput="1x").goal())
    solved = solve_library(library, open_costs(library, "cpu", None), request)
    names = [{"attention": "none", "ffn": ffn} for ffn in ffns]
    layers = tuple(
        {
            slot: Choice(variant=n, sub_block=library.spaces[i][slot][n], precision="float32")
            for slot, n in layer.items()
        }
        for i, layer in enumerate(names)
    )
    write_architecture(out.with_suffix(".json"), replace(solved, layers=layers))
    export(open_source(root, out.with_suffix(".json")), out)
    return out


def test_an_architecture_describes_the_child_after_every_fusion(own_library, tmp_path):
    """One fusion after the other, the first over a layer without FFN: runs are told in the parent's layers."""
    source = free_child(own_library, tmp_path / "child", ["0.5", "none", "0.25", "parent"])
    for name, runs, told in (("once", [(0, 2)], ((0, 2),)), ("twice", [(0, 1)], ((0, 3),))):
        out = tmp_path / name
        fuse_child(source, out, runs)
        child, solved = child_of_checkpoint(out), read_architecture(out)
        assert solved.fused == told
        assert solved.structure() == child.structure
        source = out


def test_two_runs_one_after_the_other(own_library, tmp_path):
    source = free_child(own_library, tmp_path / "child", ["0.5", "0.25", "0.5", "0.25"])
    fuse_child(source, tmp_path / "once", [(2, 3)])
    fuse_child(tmp_path / "once", tmp_path / "twice", [(0, 1)])
    solved = read_architecture(tmp_path / "twice")
    assert solved.fused == ((0, 1), (2, 3))
    assert solved.structure() == child_of_checkpoint(tmp_path / "twice").structure
