"""A teacher that runs once and writes: the losses against those over all words, and a healing that does without it."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from puzzle.data.mixture import IGNORE
from puzzle.heal import top_k
from puzzle.heal.log import read_log
from puzzle.heal.loss import head_losses
from puzzle.heal.top_k import top_k_losses, top_k_of
from puzzle.parents.checkpoint import read_header

ALL_BUT_ONE = 383  # of the tiny parent's 384 words: nothing is lost
NO_STATES = ("--cosine-weight", 0)


@pytest.fixture
def rows():
    """(teacher [R, H], head [V, H], child [R, H], its head [V, H], labels [R]) in float64"""
    generator = torch.Generator().manual_seed(0)
    shapes = ((13, 20), (50, 20), (13, 12), (50, 12))
    drawn = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    labels = torch.randint(50, (13,), generator=generator)
    labels[::4] = IGNORE
    return *drawn, labels


@pytest.mark.parametrize("reverse", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("learns", [False, True])
def test_both_ways_of_the_kl_equal_the_plain_formula(rows, reverse, learns, monkeypatch):
    """With the teacher there, and of what it has told where all words but one are kept; values and gradients, in chunks too."""
    teacher, head, child, own, labels = rows
    child.requires_grad_(True)
    own.requires_grad_(learns)
    p, q = F.log_softmax(teacher @ head.T / 1.5, -1), F.log_softmax(child @ own.T / 1.5, -1)
    wanted = (1 - reverse) * (p.exp() * (p - q)).sum(-1) + reverse * (q.exp() * (q - p)).sum(-1)
    inputs = [child, own] if learns else [child]
    gradients = torch.autograd.grad(wanted.square().sum(), inputs)
    monkeypatch.setattr(top_k, "MOST_LOGITS", 200)
    lm = F.cross_entropy(child @ own.T, labels, ignore_index=IGNORE, reduction="none")
    kept = top_k_of(teacher, head, 49, 1.5)
    there, _ = head_losses(teacher, child, head, own, labels, 1.5, reverse)
    by_rows, loss = top_k_losses(kept, child, own, labels, 1.5, reverse)
    for kl in (there, by_rows):
        torch.testing.assert_close(kl, wanted)
        for mine, theirs in zip(torch.autograd.grad(kl.square().sum(), inputs), gradients, strict=True):
            torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(loss, lm)


def test_fewer_words_see_less(rows):
    """Data processing: a coarser view of two distributions never has the larger KL; a perfect child has none in any."""
    teacher, head, child, own, labels = rows
    found = [top_k_losses(top_k_of(teacher, head, k, 1.0), child, own, labels, 1.0, 0.0)[0] for k in (1, 8, 32, 49)]
    for fewer, more in pairwise(found):
        assert (fewer <= more + 1e-12).all()
    same = top_k_losses(top_k_of(teacher, head, 8, 1.0), teacher, head, labels, 1.0, 0.5)[0]
    assert same.abs().max() < 1e-12


def curve(out):
    return [line["loss"] for line in read_log(out / "heal.jsonl") if "loss" in line]


@pytest.fixture(scope="module")
def said(puzzle, parent, child, small, tmp_path_factory):
    """(the directory of all words but one, what was healed by it)"""
    root = tmp_path_factory.mktemp("said")
    options = ("--teacher", parent, "--teacher-logits", root / "said", "--top-k", ALL_BUT_ONE, *NO_STATES)
    done = puzzle("heal", child, *options, *small, "--out", root / "out")
    assert done.exit_code == 0, (done.output, done.exception)
    return root / "said", root / "out"


def test_it_heals_as_with_the_teacher_there(puzzle, parent, child, small, said, tmp_path):
    """To what float16 leaves of log-probabilities; the second time without the teacher, to the bit, in micro-batches too."""
    directory, out = said
    done = puzzle("heal", child, "--teacher", parent, *NO_STATES, *small, "--out", tmp_path / "online")
    assert done.exit_code == 0, (done.output, done.exception)
    assert curve(out) == pytest.approx(curve(tmp_path / "online"), rel=2e-3)
    assert "step 20: held-out KL 0" in done.stderr
    mine, theirs = (json.loads((path / "heal.json").read_text()) for path in (out, tmp_path / "online"))
    assert mine["after"]["kl_top"] == pytest.approx(theirs["after"]["kl"], rel=2e-3)
    assert mine["after"]["teacher_loss"] == pytest.approx(theirs["after"]["teacher_loss"], rel=1e-5)
    assert (mine["teacher"], mine["run"]["teacher"]) == (theirs["teacher"], theirs["run"]["teacher"])
    assert f"teacher's top {ALL_BUT_ONE} words" in (out / "README.md").read_text()
    again = ("--teacher-logits", directory, "--top-k", ALL_BUT_ONE, *NO_STATES)
    done = puzzle("heal", child, *again, *small, "--out", tmp_path / "again")
    assert done.exit_code == 0, (done.output, done.exception)
    assert f"step 20: held-out KL over the top {ALL_BUT_ONE} words and the rest 0" in done.stderr
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
    done = puzzle("heal", child, *again, *small, "--accumulate", 2, "--out", tmp_path / "parts")
    assert done.exit_code == 0, (done.output, done.exception)
    assert curve(tmp_path / "parts") == pytest.approx(curve(out), rel=1e-4)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build of torch has no gloo")
@pytest.mark.parametrize("parallel", ["replicas", "shards"])
def test_two_processes_write_and_read_their_parts(launch, ended, child, parent, small, said, tmp_path, parallel):
    options = (
        "--parallel",
        parallel,
        "--teacher",
        parent,
        "--teacher-logits",
        tmp_path / "said",
        "--top-k",
        ALL_BUT_ONE,
        *NO_STATES,
    )
    setup = "import puzzle.heal.stored_teacher as s; s.SHARD_BYTES = 10**6"
    group = launch(("heal", child, *options, *small, "--out", tmp_path / "out"), processes=2, setup=setup)
    assert ended(group) == [0, 0], [process.log.read_text() for process in group]
    assert len(list((tmp_path / "said").glob("stage0-*"))) == 10
    assert curve(tmp_path / "out") == pytest.approx(curve(said[1]), rel=1e-4)


def test_a_killed_teacher_goes_on(launch, ended, held, wait, puzzle, child, parent, small, said, tmp_path):
    """What was written stays, what is cut short is written again, and the child is the same to the bit."""
    out, directory = tmp_path / "out", tmp_path / "said"
    options = ("--teacher", parent, "--teacher-logits", directory, "--top-k", ALL_BUT_ONE, *NO_STATES)
    short = "import puzzle.heal.stored_teacher as s; s.SHARD_BYTES = 10**6\n"
    setup = short + held("puzzle.heal.stored_teacher.StoredTeacher.write", 8)
    (process,) = launch(("heal", child, *options, *small, "--out", out), setup=setup)
    wait(lambda: len(list(directory.glob("stage0-*"))) >= 3, process)
    process.kill()
    process.join()
    written = sorted(directory.glob("stage0-*"))
    assert 3 <= len(written) < 10
    assert not out.exists()
    kept = written[0].stat().st_mtime_ns
    written[1].write_bytes(written[1].read_bytes()[:-100])
    (process,) = launch(("heal", child, *options, *small, "--out", out), setup=short)
    assert ended([process]) == [0], process.log.read_text()
    assert written[0].stat().st_mtime_ns == kept
    assert (out / "model.safetensors").read_bytes() == (said[1] / "model.safetensors").read_bytes()


def test_what_does_not_fit_is_refused_by_name(
    puzzle, one_line_error, said, child, parent, make_parent, corpus, small, tmp_path
):
    directory, _ = said
    given = ("--teacher-logits", directory, *NO_STATES, "--out", tmp_path / "out")
    other_text = tmp_path / "text"
    other_text.mkdir()
    for path in sorted(corpus.glob("*.py"))[5:25]:
        (other_text / path.name).write_text(path.read_text())
    another = make_parent(tmp_path / "another", corpus, num_hidden_layers=2)
    for options, words in (
        (("--data", other_text), "texts"),
        (("--seed", 1), "seed"),
        (("--seq-len", 16), "seq_len, num_steps, held_out"),
        (("--batch-size", 4), "batch_size, num_steps"),
        (("--temperature", 2), "temperature"),
        (("--teacher", another), "teacher"),
        (("--top-k", 8), "top_k"),
    ):  # fmt: skip
        plain = [x for x in small if not (options[0] == "--data" and x in ("--data", corpus))]
        top = () if "--top-k" in options else ("--top-k", ALL_BUT_ONE)
        done = puzzle("heal", child, *plain, *given, *top, *options)
        one_line_error(done, f"--teacher-logits {directory} was written with another", words, "or another directory")
    run = ("heal", child, *small, "--out", tmp_path / "out", "--teacher-logits")
    one_line_error(puzzle(*run, tmp_path / "none", *NO_STATES), "no teacher.json: pass --teacher")
    one_line_error(puzzle(*run, directory), "holds no hidden states", "--cosine-weight 0")
    one_line_error(
        puzzle(*run, directory, *NO_STATES, "--kl-weight", 0, "--lm-weight", 1), "--teacher-logits is not used"
    )
    many = (tmp_path / "many", *NO_STATES, "--teacher", parent, "--top-k", 384)
    one_line_error(puzzle(*run, *many), "--top-k 384", "share 384 words")
    one_line_error(
        puzzle("heal", child, *small, "--top-k", 8, "--out", tmp_path / "out"), "--top-k is not used without"
    )
    one_line_error(
        puzzle("heal", child, *small, "--reverse-kl", 2, "--out", tmp_path / "out"), "--reverse-kl 2: the share"
    )
    lacks = tmp_path / "lacks"
    lacks.mkdir()
    (lacks / "teacher.json").write_text((directory / "teacher.json").read_text())
    top = ("--top-k", ALL_BUT_ONE)
    one_line_error(puzzle(*run, lacks, *NO_STATES, *top), "lacks stage0-00000000.safetensors: pass --teacher")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["words", "logs"])
def test_what_was_changed_since_is_no_lesson(puzzle, one_line_error, child, small, said, tmp_path, name):
    """Numbers of words beyond the vocabulary were a traceback, log-probabilities that are none steps left out without a word."""
    directory = shutil.copytree(said[0], tmp_path / "said")
    path = sorted(directory.glob("stage0-*"))[0]
    tensors, told = load_file(path), read_header(path)["__metadata__"]
    tensors[name][0] = 60_000 if name == "words" else torch.nan
    save_file(tensors, path, told)
    given = ("--teacher-logits", directory, "--top-k", ALL_BUT_ONE, *NO_STATES)
    done = puzzle("heal", child, *given, *small, "--out", tmp_path / "out")
    one_line_error(done, f"{path} was changed after it was written: remove it, and pass --teacher")
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_overflows_is_refused(puzzle, one_line_error, parent, child, small, tmp_path):
    shutil.copytree(parent, tmp_path / "teacher")
    weights = load_file(tmp_path / "teacher/model.safetensors")
    weights["model.norm.weight"] *= 1e38  # its logits overflow
    save_file(weights, tmp_path / "teacher/model.safetensors", {"format": "pt"})
    options = ("--teacher", tmp_path / "teacher", "--teacher-logits", tmp_path / "said", "--top-k", 8, *NO_STATES)
    done = puzzle("heal", child, *options, *small, "--out", tmp_path / "out")
    one_line_error(done, "--teacher's loss on held-out text is not a number")
    assert not (tmp_path / "out").exists()


def test_the_dry_run_plans_the_disk(puzzle, said, child, parent, small, tmp_path):
    """Every byte but the files' headers; and nothing is written."""
    options = ("--teacher", parent, "--teacher-logits", tmp_path / "said", "--top-k", ALL_BUT_ONE, *NO_STATES)
    done = puzzle("heal", child, *options, *small, "--out", tmp_path / "out", "--dry-run", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    facts = json.loads(done.stdout)
    written = sum(path.stat().st_size for path in said[0].glob("*.safetensors"))
    assert 0 <= written - facts["predicted"]["teacher_logits_bytes"] < 1000
    assert f"{4 * ALL_BUT_ONE + 4} bytes a token, 8.2 MiB in {tmp_path / 'said'}" in facts["teacher"]
    assert 0 < facts["predicted"]["teacher_seconds"] < facts["predicted"]["seconds"]
    assert not list(tmp_path.iterdir())
