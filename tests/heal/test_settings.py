"""What healing was asked for, and what is refused."""

from __future__ import annotations

import importlib.util

import pytest

from puzzle.heal.settings import parse_stages


def test_stages():
    assert parse_stages("8k:100M, 64k:20M") == [(8192, 100_000_000), (65536, 20_000_000)]


@pytest.mark.parametrize(
    ("extra", "wanted"),
    [
        (("--lr", 0), ["--lr 0", "above 0"]),
        (("--kl-weight", -1), ["--kl-weight -1", "must not be negative"]),
        (("--kl-weight", 0, "--cosine-weight", 0), ["nothing to learn from"]),
        (("--dtype", "fp8"), ["--dtype fp8", "bf16"]),
        (("--batch-size", 7, "--accumulate", 2), ["7 sequences", "another --batch-size"]),
        (("--seq-len", 512), ["512 tokens", "at most 256"]),
        (("--stages", "8k-100M"), ["'8k-100M' is no stage", "8k:100M"]),
        (("--tokens", "many"), ["--tokens many"]),
        (("--wandb", "project"), ["--wandb needs the package wandb"]),
        (("--tensorboard", "logs"), ["--tensorboard needs the package tensorboard"]),
        (("--data-blend", "blend.yaml"), ["--data-blend blend.yaml and --data together"]),
    ],
)
def test_bad_options_get_one_line(puzzle, one_line_error, child, parent, small, tmp_path, extra, wanted):
    if extra[0] in ("--wandb", "--tensorboard") and importlib.util.find_spec(extra[0][2:]):
        pytest.skip(f"{extra[0][2:]} is installed")
    if extra[0] == "--stages":
        small = small[:2]
    done = puzzle("heal", child, "--teacher", parent, *small, *extra, "--out", tmp_path / "out")
    one_line_error(done, *wanted)
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_was_made_for_shorter_text(puzzle, one_line_error, make_parent, corpus, child, small, tmp_path):
    """Is refused, as a child is; with another tokenizer it teaches as far as it reads."""
    teacher = make_parent(tmp_path / "teacher", corpus, max_position_embeddings=16)
    command = ("heal", child, "--teacher", teacher, *small, "--cosine-weight", 0, "--out", tmp_path / "out")
    one_line_error(puzzle(*command), "32 tokens: --teacher", "made for at most 16", "smaller --seq-len")
    done = puzzle(*command, "--align-tokens")
    assert done.exit_code == 0, (done.output, done.exception)
    assert "compared at 50" in done.stderr or "compared at 51" in done.stderr
