"""A teacher with another tokenizer: the loss against the plain formula, and a healing that falls together with the ordinary one where they agree."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from puzzle.data.mixture import IGNORE
from puzzle.heal import aligned_loss
from puzzle.heal.aligned_loss import Aligned, aligned_losses
from puzzle.heal.aligned_teacher import AlignedTeacher
from puzzle.heal.log import read_log
from puzzle.heal.loss import Teacher
from puzzle.parents.opened import open_model
from puzzle.runtime.model import load_model

ALIGNED = ("--align-tokens", "--cosine-weight", 0)


@pytest.fixture
def rows():
    """(teacher [R, H'], head [V', H'], child [R, H], its head [V, H], labels [R], there [R]) in float64"""
    generator = torch.Generator().manual_seed(0)
    shapes = ((13, 20), (50, 20), (13, 12), (40, 12))
    drawn = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    labels = torch.randint(40, (13,), generator=generator)
    labels[::4] = IGNORE
    return *drawn, labels, torch.rand(13, generator=generator) < 0.6


@pytest.mark.parametrize("reverse", [0.0, 0.3])
@pytest.mark.parametrize("both", [25, 40])
def test_the_loss_is_the_plain_formula(rows, reverse, both, monkeypatch):
    """Values and gradients, in chunks; where the child knows no word alone, both are taken among the common ones."""
    teacher, head, child, own, labels, there = rows
    words = torch.stack((torch.randperm(40)[:both], torch.randperm(50)[:both]))
    child.requires_grad_(True)
    own.requires_grad_(True)
    p, q = F.softmax(teacher @ head.T / 1.5, -1), F.softmax(child @ own.T / 1.5, -1)
    p, q = p[:, words[1]], q[:, words[0]]
    if both == 40:
        p, q = (one / one.sum(-1, keepdim=True) for one in (p, q))
    else:
        p, q = (torch.cat((one, 1 - one.sum(-1, keepdim=True)), -1) for one in (p, q))
    gap = p.log() - q.log()
    wanted = torch.where(there, ((1 - reverse) * p * gap - reverse * q * gap).sum(-1), 0)
    gradients = torch.autograd.grad(wanted.square().sum(), (child, own))
    monkeypatch.setattr(aligned_loss, "MOST_LOGITS", 200)
    shown = Aligned(normed=teacher, there=there, head=head, words=words)
    kl, loss = aligned_losses(shown, child, own, labels, 1.5, reverse)
    torch.testing.assert_close(kl, wanted)
    for mine, theirs in zip(torch.autograd.grad(kl.square().sum(), (child, own)), gradients, strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(loss, F.cross_entropy(child @ own.T, labels, ignore_index=IGNORE, reduction="none"))


def test_a_row_of_which_the_teacher_reads_nothing(child, parent):
    """Of a document that its tokenizer changes, say: nothing is compared, beside a row that is."""
    lessons = AlignedTeacher(open_model(child), open_model(parent))
    lessons.taught_by(Teacher(load_model(parent), []), torch.device("cpu"))
    nothing = np.array([], dtype=np.int64), np.full(8, -1)
    shown = lessons.show([nothing])
    assert not shown.there.any()
    some = np.arange(5), np.array([-1, 0, -1, 2, 3, -1, -1, -1])
    shown = lessons.show([nothing, some])
    assert shown.there.tolist() == [False] * 9 + [True, False, True, True] + [False] * 3
    wanted = load_model(parent)(torch.arange(5)[None])[0]
    found = shown.normed @ shown.head.T
    torch.testing.assert_close(found[[9, 11, 12]], wanted[[0, 2, 3]], rtol=1e-4, atol=1e-4)


def lines(out):
    return [line for line in read_log(out / "heal.jsonl") if "loss" in line]


@pytest.mark.parametrize(
    "more", [(), ("--temperature", 2, "--reverse-kl", 0.5, "--train-embeddings", "--accumulate", 2)]
)
def test_the_same_tokenizer_gives_the_ordinary_healing(puzzle, parent, child, small, tmp_path, more):
    for name, options in (("plain", ALIGNED[1:]), ("aligned", ALIGNED)):
        done = puzzle("heal", child, "--teacher", parent, *options, *more, *small, "--out", tmp_path / name)
        assert done.exit_code == 0, (done.output, done.exception)
    assert "compared at 100.0% of the held-out tokens, over 384 words" in done.stderr
    for mine, theirs in zip(lines(tmp_path / "aligned"), lines(tmp_path / "plain"), strict=True):
        assert mine["compared"] == 1
        for name in ("loss", "kl", "grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3), (mine["step"], name)
    mine, theirs = (json.loads((tmp_path / name / "heal.json").read_text()) for name in ("aligned", "plain"))
    for when in ("before", "after"):
        assert mine[when]["kl_aligned"] == pytest.approx(theirs[when]["kl"], rel=1e-3)
        assert mine[when]["loss"] == pytest.approx(theirs[when]["loss"], rel=1e-4)
    assert mine["aligned"] == {"tokens": 1.0, "words": 384}


@pytest.fixture(scope="module")
def other(make_parent, corpus, tmp_path_factory):
    """A teacher with another tokenizer, another width and another number of words, padded."""
    root = tmp_path_factory.mktemp("other")
    (root / "text").mkdir()
    for path in sorted(corpus.glob("*.py"))[10:22]:
        (root / "text" / path.name).write_text(path.read_text().replace("self", "this").upper())
    return make_parent(root / "teacher", root / "text", hidden_size=48, num_hidden_layers=2, vocab_size=400)


def test_it_heals_from_another_tokenizer_and_goes_on(puzzle, launch, ended, other, child, small, tmp_path, monkeypatch):
    """Stopped and typed again: the same bits; in two processes the same curve; what was compared is said."""
    from puzzle.heal import run

    command = ("heal", child, "--teacher", other, *ALIGNED, *small)
    done = puzzle(*command, "--out", tmp_path / "whole", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    record = json.loads(done.stdout)
    assert 0.1 < record["aligned"]["tokens"] < 0.95
    assert 250 < record["aligned"]["words"] < 384
    assert record["after"]["kl_aligned"] < record["before"]["kl_aligned"]
    assert record["after"]["loss"] < record["before"]["loss"]
    shares = [line["compared"] for line in lines(tmp_path / "whole")]
    assert sum(shares) / len(shares) == pytest.approx(record["aligned"]["tokens"], abs=0.1)
    assert "teacher_loss" not in record["after"]
    assert "where the teacher's tokenizer comes to the same" in (tmp_path / "whole/README.md").read_text()
    after = run.Run._after

    def stop(self, done, bar):
        after(self, done, bar)
        if done == 5:
            raise KeyboardInterrupt

    command = (*command, "--save-every", 3)
    with monkeypatch.context() as patched:
        patched.setattr(run.Run, "_after", stop)
        assert puzzle(*command, "--out", tmp_path / "again").exit_code != 0
    assert puzzle(*command, "--out", tmp_path / "again").exit_code == 0
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    for parallel in ("replicas", "shards"):
        group = launch((*command, "--parallel", parallel, "--out", tmp_path / parallel), processes=2)
        assert ended(group) == [0, 0], [process.log.read_text() for process in group]
        one, two = ([line["loss"] for line in lines(tmp_path / name)] for name in ("whole", parallel))
        assert two == pytest.approx(one, rel=1e-4)
    done = puzzle(*command, "--out", tmp_path / "planned", "--dry-run", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    assert json.loads(done.stdout)["predicted"]["seconds"] > 0


def test_what_does_not_go_together_is_refused(puzzle, one_line_error, other, child, corpus, small, tmp_path):
    run = ("heal", child, "--teacher", other, *small, "--out", tmp_path / "out")
    for options, words in (
        ((), ("another tokenizer", "--align-tokens", "--cosine-weight 0")),
        (ALIGNED[:1], ("--align-tokens compares words", "--cosine-weight 0")),
        ((*ALIGNED, "--teacher-logits", tmp_path / "said"), ("--align-tokens asks the teacher while", "leave one out")),
        ((*ALIGNED, "--on-policy", 0.5), ("--on-policy with --align-tokens", "leave one out")),
        ((*ALIGNED, "--kl-weight", 0, "--lm-weight", 1), ("--align-tokens is not used",)),
    ):
        one_line_error(puzzle(*run, *options), *words)
    (tmp_path / "chats.jsonl").write_text("{}\n")
    blend = tmp_path / "blend.yaml"
    blend.write_text("sources: [{path: chats.jsonl, messages: messages}]")
    given = [x for x in small if x not in ("--data", corpus)]
    for dry in ((), ("--dry-run",)):
        done = puzzle(
            "heal", child, "--teacher", other, *ALIGNED, *given, "--data-blend", blend, "--out", tmp_path / "out", *dry
        )
        one_line_error(done, "source 'chats.jsonl' has chats", "let the teacher write the answers")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.heal").exists()
