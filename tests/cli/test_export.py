"""`puzzle export` on the tiny parent: the child on disk is the child in memory."""

from __future__ import annotations

import pytest
import torch

from puzzle.library.manifest import Library
from puzzle.measure.architecture import read_architecture

SOLVE = ("--gpu", "cpu", "--input-len", 16, "--output-len", 16)


def test_export_equals_the_child_in_memory(puzzle, one_line_error, own_library, tmp_path):
    """from_pretrained + generate of the exported child: the same logits and the same greedy tokens, cache or none."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from puzzle.library.assemble import assemble, open_parent

    assert puzzle("solve", own_library, "--throughput", "2x", *SOLVE).exit_code == 0
    done = puzzle("export", own_library, own_library / "solution", "--out", tmp_path / "child", "--max-shard", "40kB")
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "child").glob("model-*.safetensors"))) > 1
    solved = read_architecture(own_library / "solution")
    opened = Library.open(own_library)
    child = assemble(opened, solved.variants, open_parent(opened, None))
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "child", trust_remote_code=True, dtype=torch.float32
    ).eval()
    ids = torch.randint(2, 384, (2, 23))
    with torch.no_grad():
        assert (theirs(ids).logits - child(ids)).abs().max() <= 1e-4
        cached = theirs.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=1)
        plain = theirs.generate(
            ids, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=1, use_cache=False
        )
        expected = ids
        for _ in range(64):
            expected = torch.cat((expected, child(expected)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(cached, plain)
    assert torch.equal(cached, expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "child", trust_remote_code=True).eos_token_id == 0
    card = (tmp_path / "child/README.md").read_text()
    assert "predicted" in card
    assert "Recipe" in card
    one_line_error(puzzle("export", own_library, own_library / "solution", "--out", tmp_path / "child"), "--force")
    done = puzzle("export", own_library, own_library / "solution", "--out", tmp_path / "child", "--force")
    assert done.exit_code == 0


@pytest.mark.parametrize("damage", ["truncated", "tampered", "missing"])
def test_damaged_library_files(puzzle, one_line_error, own_library, tmp_path, damage):
    assert puzzle("solve", own_library, "--throughput", "2x", *SOLVE).exit_code == 0
    for path in own_library.glob("blocks/*/*/*.safetensors"):
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[:-1])
        elif damage == "tampered":
            path.write_bytes(path.read_bytes()[:-1] + b"!")
        else:
            path.unlink()
    done = puzzle("export", own_library, own_library / "solution", "--out", tmp_path / "child")
    one_line_error(done, ".safetensors", "missing" if damage == "missing" else "truncated or changed", "build-library")
    assert [p.name for p in tmp_path.iterdir()] == ["lib"], "nothing half-written is left"
