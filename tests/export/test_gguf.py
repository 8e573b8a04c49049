"""`--format gguf`: per-layer arrays, stored types, tokenizers, and nothing half written."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from puzzle.base.errors import UserError
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.none import NO_OP
from puzzle.export.child import with_dtype
from puzzle.export.gguf import export_gguf, permute
from puzzle.export.gguf_tokenizer import tokenizer_metadata
from puzzle.export.lower import lower
from puzzle.serving.reference import find_export, load_reference, read_gguf

LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.fixture
def written(tiny, tmp_path):
    def write(name, dtype="f32", tokenizer=None):
        child, _ = lower(tiny.tiny_child(name, tokenizer), "llama.cpp", "gguf")
        return child, export_gguf(child, tmp_path / f"{name}-{dtype}.gguf", dtype=dtype, force=True)

    return write


def test_arrays_say_what_a_layer_is(name, written):
    if name == "window":
        return  # refused: test_lower.py
    child, path = written(name)
    values, tensors = read_gguf(path)
    wanted = {"head_count": [], "head_count_kv": [], "feed_forward_length": []}
    for layer in child.layers:
        kv = layer.attention.num_key_value_heads if isinstance(layer.attention, Gqa) else 0
        wanted["head_count"].append(0 if layer.attention == NO_OP else 8)
        wanted["head_count_kv"].append(kv)
        wanted["feed_forward_length"].append(layer.ffn.intermediate_size)  # lowered: every layer has an FFN
    assert values["deci.attention.head_count"] == wanted["head_count"]
    assert values["deci.attention.head_count_kv"] == wanted["head_count_kv"]
    assert values["deci.feed_forward_length"] == wanted["feed_forward_length"]
    assert values["deci.block_count"] == len(child.layers)
    assert ("output.weight" in tensors) == (not child.tied)
    assert ("rope_freqs.weight" in tensors) == (name == "llama3-rope")
    assert all(tensor.tensor_type.name == "F32" for tensor in tensors.values())
    for index, layer in enumerate(child.layers):
        assert (f"blk.{index}.attn_norm.weight" in tensors) == (layer.attention != NO_OP)
        assert (f"blk.{index}.attn_q.weight" in tensors) == isinstance(layer.attention, Gqa)
        assert (f"blk.{index}.attn_output.weight" in tensors) == (layer.attention != NO_OP)


@pytest.mark.parametrize(
    ("dtype", "error"), [("f32", 1e-5), ("f16", 5e-3), ("bf16", 4e-2), ("q8_0", 1e-1)], ids=lambda x: str(x)
)
def test_stored_types(dtype, error, written, tiny, child_logits):
    _, path = written("no-attention-first", dtype)
    _, tensors = read_gguf(path)
    kinds = {tensor.tensor_type.name for tensor in tensors.values() if len(tensor.shape) == 2}
    assert kinds == {dtype.upper()}
    assert {t.tensor_type.name for t in tensors.values() if len(t.shape) == 1} == {"F32"}
    export = find_export(path)
    assert export.dtype == {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "q8_0": "q8_0"}[dtype]
    ids = torch.randint(0, tiny.VOCAB, (1, 32), generator=torch.Generator().manual_seed(0))
    wanted = child_logits(tiny.tiny_child("no-attention-first"), ids)
    found = load_reference(export)(ids).double()
    assert (found - wanted).abs().mean() / wanted.std() <= error
    assert (found - wanted).abs().mean() / wanted.std() > (0 if dtype == "f32" else 1e-4)


def test_rows_that_q8_0_has_no_block_for(written, tiny, tmp_path):
    child = tiny.build("narrow", tiny.Tiny(layers=(tiny.BLOCK, (tiny.FULL, tiny.width(48)))))
    _, tensors = read_gguf(export_gguf(child, tmp_path / "narrow.gguf", dtype="q8_0", force=False))
    assert tensors["blk.1.ffn_down.weight"].tensor_type.name == "F16"
    assert tensors["blk.1.ffn_up.weight"].tensor_type.name == "Q8_0"


def test_permutation_and_back():
    weight = torch.randn(64, 16)
    assert torch.equal(permute(permute(weight, 4), 4, inverse=True), weight)
    first = permute(torch.arange(8.0)[:, None], 1)[:, 0]
    assert first.tolist() == [0, 4, 1, 5, 2, 6, 3, 7]  # pairs of llama.cpp's rotation stand side by side


def test_overflow_and_wrong_names(tiny, tmp_path):
    child = tiny.tiny_child("kv-heads")
    large = with_dtype(child, torch.float32)
    head = large.read_head
    with pytest.raises(
        UserError, match=r"output.weight has values beyond 65504, the largest float16: use `dtype` bf16"
    ):
        export_gguf(replace(large, read_head=lambda: head() * 1e6), tmp_path / "large.gguf", dtype="f16", force=False)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="`dtype` q4 with `format` gguf"):
        export_gguf(child, tmp_path / "child.gguf", dtype="q4", force=False)
    with pytest.raises(UserError, match=r"give a name that ends in \.gguf"):
        export_gguf(child, tmp_path / "child.bin", dtype="f32", force=False)
    (tmp_path / "there.gguf").write_bytes(b"old")
    with pytest.raises(UserError, match="exists: choose another name, or pass `force`"):
        export_gguf(child, tmp_path / "there.gguf", dtype="f32", force=False)
    assert (tmp_path / "there.gguf").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (lambda t: ((t.FULL, t.LINEAR), t.BLOCK), "layer 0 of bad: llama.cpp has no linear FFN"),
        (lambda t: (t.BLOCK, (t.FULL, NO_OP)), "layer 1 of bad: without an FFN llama.cpp loses"),
        (lambda t: ((NO_OP, t.FFN), t.BLOCK), "layer 0 of bad: llama.cpp does not load .* no attention"),
    ],
)
def test_what_was_not_lowered_is_refused(layers, message, tiny, tmp_path):
    with pytest.raises(UserError, match=message):
        export_gguf(tiny.build("bad", tiny.Tiny(layers=layers(tiny))), tmp_path / "bad.gguf", dtype="f32", force=False)
    assert list(tmp_path.iterdir()) == []


def save(tokenizer, directory, **settings):
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def bpe(splits):
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "<s>": 3}, merges=[("a", "b")]))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.pre_tokenizer = splits
    return tokenizer


def test_both_kinds_of_tokenizer(tmp_path):
    plain = save(bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)), tmp_path / "gpt2", bos_token="<s>")
    found = tokenizer_metadata(plain, 6, {"bos": 9, "eos": [3, 4], "pad": None})
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert found["tokenizer.ggml.tokens"] == ["a", "b", "ab", "<s>", "[PAD4]", "[PAD5]"]
    assert found["tokenizer.ggml.token_type"] == [1, 1, 1, 3, 5, 5]
    assert found["tokenizer.ggml.merges"] == ["a b"]
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (3, 3)
    assert "tokenizer.ggml.padding_token_id" not in found
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    llama = save(bpe(split), tmp_path / "llama3", chat_template="{{ messages }}")
    settings = json.loads((llama / "tokenizer.json").read_text())
    settings["model"]["ignore_merges"] = True
    (llama / "tokenizer.json").write_text(json.dumps(settings))
    found = tokenizer_metadata(llama, 4, {"bos": 3, "eos": 3, "pad": 3})
    assert found["tokenizer.ggml.pre"] == "llama-bpe"
    assert found["tokenizer.chat_template"] == "{{ messages }}"
    assert tokenizer_metadata(None, 4, {}) == {"tokenizer.ggml.model": "none"}


def test_tokenizers_that_llama_cpp_would_not_reproduce(tmp_path):
    other = save(bpe(pre_tokenizers.Whitespace()), tmp_path / "other")
    with pytest.raises(UserError, match=r"splits text by a rule that llama.cpp has no name for"):
        tokenizer_metadata(other, 4, {})
    pieces = save(Tokenizer(models.Unigram([("a", 0.0)])), tmp_path / "unigram")
    with pytest.raises(UserError, match="is a Unigram tokenizer: `format` gguf writes byte-level BPE only"):
        tokenizer_metadata(pieces, 4, {})
    plain = save(bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)), tmp_path / "gpt2")
    with pytest.raises(UserError, match=r"has token id 3, but config\.json says vocab_size 2"):
        tokenizer_metadata(plain, 2, {})


KILLED = """
import sys, time
sys.path.insert(0, {benchmarks!r})
from pathlib import Path
import torch
from tiny_children import tiny_child
from puzzle.export.gguf import export_gguf
from dataclasses import replace
child = tiny_child("kv-heads")
def slowly():
    print("here", flush=True)
    time.sleep(3600)
export_gguf(replace(child, read_final_norm=slowly), Path(sys.argv[1]), dtype="f32", force=True)
"""


def test_killed_in_the_middle(tiny, tmp_path):
    out = tmp_path / "child.gguf"
    out.write_bytes(b"old")
    script = KILLED.format(benchmarks=os.path.dirname(tiny.__file__))
    process = subprocess.Popen([sys.executable, "-c", script, out], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"here\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(list(tmp_path.iterdir())) == 2  # what it had begun has another name
    assert out.read_bytes() == b"old"
    export_gguf(tiny.tiny_child("kv-heads"), out, dtype="f32", force=True)  # what was left is no obstacle
    assert [path.name for path in tmp_path.iterdir()] == ["child.gguf"]
    assert read_gguf(out)[0]["deci.block_count"] == 4


def test_a_directory_with_card_and_tokenizer(tiny_checkpoint, tmp_path, puzzle):
    source = tiny_checkpoint("kv-heads")
    done = puzzle("export", source, "--engine", "llama.cpp", "--dtype", "q8_0", "--out", tmp_path / "child")
    assert done.exit_code == 0, done.output
    files = sorted(path.name for path in (tmp_path / "child").iterdir())
    assert files == ["README.md", "child-q8_0.gguf", "manifest.json", "tokenizer.json", "tokenizer_config.json"]
    values, _ = read_gguf(tmp_path / "child" / "child-q8_0.gguf")
    tokens = json.loads((source / "tokenizer.json").read_text())["model"]["vocab"]
    assert [values["tokenizer.ggml.tokens"][number] for number in tokens.values()] == list(tokens)
    assert numpy.array(values["tokenizer.ggml.token_type"])[:2].tolist() == [3, 3]
    shutil.rmtree(tmp_path / "child")
