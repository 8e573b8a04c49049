"""Tokenizers: what joins documents, and a directory without one."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from puzzle.base.errors import UserError
from puzzle.data.tokenizer import load_tokenizer, separator_id, tokenizer_hash


@pytest.mark.parametrize(
    ("tokens", "wanted"), [(["eos_token"], 256), (["bos_token"], 256), (["bos_token", "eos_token"], 256), ([], None)]
)
def test_documents_are_joined_by_an_end_or_a_begin(byte_model, tmp_path, tokens, wanted):
    copy = tmp_path / "model"
    shutil.copytree(byte_model, copy)
    facts = {"tokenizer_class": "PreTrainedTokenizerFast"} | dict.fromkeys(tokens, "<|endoftext|>")
    (copy / "tokenizer_config.json").write_text(json.dumps(facts))
    if wanted is not None:
        assert separator_id(load_tokenizer(copy)) == wanted
    else:
        with pytest.raises(UserError, match=f"the tokenizer in {copy} has neither an end nor a begin token"):
            separator_id(load_tokenizer(copy))


def test_the_hash_is_that_of_the_file(byte_model, tmp_path):
    assert tokenizer_hash(byte_model) == hashlib.sha256((byte_model / "tokenizer.json").read_bytes()).hexdigest()
    (tmp_path / "vocab.json").write_text("{}")
    first = tokenizer_hash(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    assert tokenizer_hash(tmp_path) != first  # two tokenizers without tokenizer.json are told apart


def test_a_directory_without_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match=f"no tokenizer can be loaded from {tmp_path} .*put tokenizer.json beside"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("told", ["README.md", "puzzle/export/card.py"])
def test_a_childs_tokenizer_loads_as_told_without_a_question(child, monkeypatch, told):
    """Unasked, transformers wants the child's own config first and waits 15 s for a yes."""
    line = re.search(r"AutoTokenizer\.from_pretrained\(.*?\)", (Path(__file__).parents[2] / told).read_text())[0]
    asked = []
    monkeypatch.setattr("builtins.input", asked.append)
    loaded = eval(re.sub('"(child|PATH)"', "child", line), {"AutoTokenizer": AutoTokenizer, "child": child})
    assert not asked
    assert loaded.get_vocab() == load_tokenizer(child).get_vocab()
