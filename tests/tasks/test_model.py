"""Answers against transformers and against one request at a time, on the plain runtime and on the kernels' twins."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from puzzle.base.errors import UserError
from puzzle.measure.measurable import of_checkpoint
from puzzle.runtime import open as opening
from puzzle.runtime.fast import FastRuntime
from puzzle.tasks import model as models
from puzzle.tasks.model import Model
from puzzle.tasks.request import Answers, Request

TEXTS = ["def", "import os\n", "class Stack:\n    def push(self, x):\n        self.items.append(x)\n", ""]
CPU = torch.device("cpu")


def opened(directory, tmp_path, name="a") -> Model:
    source = of_checkpoint(str(directory))
    return Model(
        name="parent", opened=source, device=CPU, precision="float32", answers=Answers(tmp_path / f"{name}.jsonl")
    )


@pytest.fixture(params=["plain", "fast"])
def runtime(request, monkeypatch):
    """The fast one as a GPU has it, and small batches on both."""
    monkeypatch.setitem(models.MOST, "cpu", 3)
    if request.param == "fast":
        make = lambda model, batch, length, *_, **__: FastRuntime(model, batch, length)  # noqa: E731
        monkeypatch.setattr(models, "open_runtime", make)
    return request.param


def test_likelihoods_are_those_of_transformers(chatting, cut, tmp_path, runtime):
    from transformers import AutoModelForCausalLM

    pairs = [Request(context=text, continuation=more) for text in TEXTS for more in (" x = 1", "return", "\n    pass")]
    for directory in (chatting, cut):
        theirs = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval().requires_grad_(False)
        model = opened(directory, tmp_path, directory.name)
        for request, (value, greedy) in zip(pairs, model.answer(pairs), strict=True):
            one = model.encode(request)
            logits = theirs(torch.tensor([one.ids[:-1]])).logits[0, -one.scored :].log_softmax(-1)
            wanted = torch.tensor(one.ids[-one.scored :])
            assert value == pytest.approx(float(logits.gather(1, wanted[:, None]).sum()), abs=1e-4)
            assert greedy == bool((logits.argmax(-1) == wanted).all())


def test_text_does_not_depend_on_its_neighbours(chatting, cut, tmp_path, runtime):
    """Prompts of several lengths together are prompts one by one: greedy as transformers has it, sampled with the same numbers."""
    from transformers import AutoModelForCausalLM

    greedy = [Request(context=text, max_tokens=20) for text in TEXTS]
    sampled = [Request(context=t, max_tokens=20, temperature=1.0, sample=n) for t in TEXTS[:3] for n in (0, 1)]
    for directory in (chatting, cut):
        theirs = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
        model = opened(directory, tmp_path, directory.name)
        together = model.answer(greedy + sampled)
        for request, text in zip(greedy, together, strict=False):
            ids = torch.tensor([model.encode(request).ids])
            said = theirs.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=1)[0, ids.shape[1] :]
            assert text == model.tokenizer.decode(said, skip_special_tokens=True)
        alone = opened(directory, tmp_path, f"{directory.name}-alone")
        assert [alone.answer([request])[0] for request in sampled] == together[len(greedy) :]
        assert len(set(together[len(greedy) :])) == len(sampled)


@pytest.mark.parametrize(
    "request_",
    [
        Request(context="x", continuation="y"),
        Request(context="x", max_tokens=4),
        Request(context="x", max_tokens=4, temperature=1.0),
    ],
)
def test_what_is_no_number_answers_nothing(chatting, tmp_path, runtime, poison, request_):
    """Weights that are numbers, and logits that are none: nothing is kept, nor of the sound requests beside it."""
    broken = shutil.copytree(chatting, tmp_path / "broken")
    poison(broken, "model.norm.weight", lambda scale: torch.full_like(scale, 3e38))
    with pytest.raises(UserError, match="broken in float32 gives logits that are no numbers"):
        opened(broken, tmp_path).answer([request_])
    assert not (tmp_path / "a.jsonl").exists()
    assert opened(chatting, tmp_path).answer([request_])


def test_what_ends_an_answer(chatting, tmp_path):
    model = opened(chatting, tmp_path)
    text = model.answer([Request(context=TEXTS[2], max_tokens=40)])[0]
    stop = text[10:13]
    assert model.answer([Request(context=TEXTS[2], max_tokens=40, until=(stop,))])[0] == text[: text.index(stop)]
    for said, wanted, thinking, context in (
        ("<think>a Q: b</think>\n\nc Q: d", "c ", False, "x"),
        ("a Q: b</think> c Q: d", "c ", True, "x<think>"),
        ("a Q: b", "", True, "x<think>\n"),  # still thinking
        ("<think>a Q: b", "", True, "x"),
        ("<think>a Q: b", "", False, "x"),
        ("a Q: b", "a ", True, "say <think>why</think> and x"),  # it does not think
        ("a Q: b", "a ", True, (4, 5)),
        ("a Q: b", "a ", False, "x<think>"),
    ):
        request = Request(context=context, until=("Q:",), max_tokens=99, thinking=thinking)
        one = models.Encoded(request=request, ids=[2], new=99)
        assert model._said(one, model.tokenizer(said)["input_ids"])[0] == wanted


def test_answers_belong_to_what_ends_them_and_to_the_whole_tokenizer(chatting, tmp_path):
    """Weights and vocabulary are not all that an answer depends on."""
    other = shutil.copytree(chatting, tmp_path / "other")
    keys = {opened(chatting, tmp_path).key, opened(other, tmp_path).key}
    assert len(keys) == 1
    for name, field, value in (
        ("generation_config.json", "eos_token_id", [3, 4]),
        ("tokenizer_config.json", "bos_token", "x"),
    ):
        path = other / name
        told = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(told | {field: value}))
        keys.add(opened(other, tmp_path).key)
    assert len(keys) == 3


def test_long_contexts_lose_their_begin_and_are_counted(chatting, tmp_path):
    model = opened(chatting, tmp_path)
    long = Request(context="x = 1\n" * 3000, continuation="y")
    model.answer([long])
    again = opened(chatting, tmp_path)
    again.answer([long])  # from the file
    assert len(model.cut) == len(again.cut) == 1


def test_fp8_and_bf16_have_the_devices_runtime():
    assert models.MOST.keys() == models.TOKENS.keys() == models.ROUND.keys() == opening.RUN_HERE.keys()
