"""Sequences: the same for the same texts, wherever they lie and whichever version reads them."""

from __future__ import annotations

import hashlib
import json

import torch

from puzzle.data.packing import TokenData, load_tokens


def test_epochs_visit_everything():
    data = TokenData(train=torch.arange(10)[:, None].int(), validation=torch.zeros(1, 1), num_documents=1, hash="")
    first = torch.cat([data.train_batch(s, 5) for s in range(2)]).flatten().tolist()
    second = torch.cat([data.train_batch(s, 5) for s in range(2, 4)]).flatten().tolist()
    assert first == list(range(10))
    assert sorted(second) == first
    assert second != first


def test_documents_keep_their_split_wherever_they_lie(corpus, parent, tmp_path):
    """Same texts under other names: same sequences in validation; and .jsonl and .parquet read alike."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [p.read_text() for p in sorted(corpus.glob("*.py"))]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": t}) for t in texts))
    pq.write_table(pa.table({"body": texts}), tmp_path / "a.parquet")
    sizes = {"seq_len": 16, "num_train": 20, "num_validation": 5, "text_field": "body"}
    one = load_tokens([str(tmp_path / "a.jsonl")], parent, **sizes)
    two = load_tokens([str(tmp_path / "a.parquet")], parent, **sizes)
    assert torch.equal(one.train, two.train)
    assert torch.equal(one.validation, two.validation)
    assert one.hash == two.hash


def test_sequences_are_the_same_in_every_version(byte_model, texts, tmp_path):
    """Ids and hash are fixed: content keys of libraries and scores hang on them."""
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    data = load_tokens([str(tmp_path)], byte_model, seq_len=24, num_train=500, num_validation=16, seed=3)
    assert data.hash == "7e4b754b000414c3953b307cdb739b155b26fabf7f031a387dd9645136c03159"
    sums = [hashlib.sha256(ids.numpy().tobytes()).hexdigest() for ids in (data.train, data.validation)]
    assert sums[0] == "b4e97d257fb702dc4ce7737e062b7097ec1acf27ce509d5cce41be230e69162d"
    assert sums[1] == "781ac0fb7122c4fc40e4bc1e42297c43793b7e582593512cdc17fc97cded7f2e"
    assert (data.train.shape, data.validation.shape, data.num_documents) == ((500, 24), (16, 24), 180)
    assert data.train.dtype == data.validation.dtype == torch.int32


def test_few_documents_lend_their_last_to_validation(byte_model, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": letter * 20}) for letter in "abcd"))
    data = load_tokens([str(tmp_path / "a.jsonl")], byte_model, seq_len=21, num_train=9, num_validation=3)
    assert data.train[:, 0].tolist() == data.validation[:, 0].tolist() * 3 == [256] * 3
    assert (data.train[:, 1] != data.validation[0, 1]).all()
    assert len(data.validation) == 1
