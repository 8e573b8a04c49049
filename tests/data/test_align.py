"""Two tokenizers over odd text: what is called the same against a twin that compares all pairs of tokens by the bytes up to them."""

from __future__ import annotations

import itertools
import unicodedata

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from puzzle.base.errors import UserError
from puzzle.data.align import Aligner
from puzzle.data.mixture import Mixture, Piece, Stage, Stream

ODD = [
    "plain words, and then some more words that repeat words",
    " leading space; naïve café — “quotes” … ﬁ ligature, e\u0301 and é, \u200bzero width\u200d",
    "中文字符和日本語の文章、한국어 🎉👩‍👩‍👧 \U0001f600 emoji\n\n\ttabs\r\nand lines   with   spaces  ",
    "<|endoftext|> in the text, <|pad|> too, <0x41> and <unk>",
    "ı İ ß ſ ǆ \u00a0 no-break \ufeff mark " + "x" * 40 + " 0123456789 3.14159 __init__(self, *args)",
    "\x00\x01\x7f control \x85 next",
]


def byte_level(words: int, text: list[str], eos: str = "<|endoftext|>", **settings) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, **settings)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"special_tokens": [eos, "<|pad|>"], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(vocab_size=words, show_progress=False, **special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token="<|pad|>")


def sentence_piece(words: int, text: list[str]) -> PreTrainedTokenizerFast:
    """As Llama-2's: spaces are ▁, one is put before the text, and bytes serve for characters that are no words."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=words, show_progress=False, special_tokens=special[:3], limit_alphabet=40)
    tokenizer.train_from_iterator(text, trainer)
    learnt = tokenizer.get_vocab()
    vocabulary = {w: n for n, w in enumerate(special)}
    vocabulary |= {w: len(special) + n for n, w in enumerate(sorted(set(learnt) - set(special), key=learnt.get))}
    import json

    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokenizer.model = models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Directories by name."""
    found = {
        "few": byte_level(300, ODD[:2]),
        "many": byte_level(420, ODD, use_regex=False),
        "other end": byte_level(360, ODD[2:], eos="<end>"),
        "pieces": sentence_piece(400, ODD),
    }
    composed = byte_level(330, ODD)
    composed.backend_tokenizer.normalizer = normalizers.NFC()
    root = tmp_path_factory.mktemp("tokenizers")
    for name, tokenizer in (found | {"composed": composed}).items():
        tokenizer.save_pretrained(root / name)
        (root / name / "config.json").write_text('{"model_type": "llama"}')
    return root


SHOWN = {letter: byte for byte, letter in bytes_to_unicode().items()}


def stands_for(tokenizer, name: str, number: int) -> bytes:
    word = tokenizer.convert_ids_to_tokens(number)
    if number in tokenizer.all_special_ids:
        return word.encode()
    if name != "pieces":
        return bytes(SHOWN[letter] for letter in word)
    byte = word.startswith("<0x") and len(word) == 6
    return bytes.fromhex(word[3:5]) if byte else word.replace("▁", " ").encode()


def twin(aligner: Aligner, names: tuple[str, str], text: str) -> set[tuple[int, int]]:
    """(place of the child's token, of the teacher's) of all pairs with the same bytes before them and in them. The separator stands first."""
    sides = []
    for tokenizer, name in zip(aligner.tokenizers, names, strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        words = [stands_for(tokenizer, name, n) for n in ids]
        before = [b"".join(words[:n]) for n in range(len(words))]
        if name == "pieces":  # the space that was put before
            before, words = [one[1:] for one in before], [words[0][1:], *words[1:]]
        special = [n in tokenizer.all_special_ids for n in ids]
        sides.append((before, words, ids, special))
    found = {(0, 0)}
    (before, words, ids, special), (others, other_words, other_ids, other_special) = sides
    if before[-1] + words[-1] != others[-1] + other_words[-1]:
        return found
    for j, k in itertools.product(range(len(words)), range(len(other_words))):
        same = before[j] == others[k] and words[j] == other_words[k] != b""
        whole = [
            stands_for(t, n, one) for t, n, one in zip(aligner.tokenizers, names, (ids[j], other_ids[k]), strict=True)
        ]
        role = ids[j] == aligner.separators[0] and other_ids[k] == aligner.separators[1]
        pad = [t.pad_token_id == one for t, one in zip(aligner.tokenizers, (ids[j], other_ids[k]), strict=True)]
        if same and (role or all(pad) or (whole[0] == whole[1] and not special[j] and not other_special[k])):
            found.add((j + 1, k + 1))
    return found


@pytest.mark.parametrize(
    "names", [*itertools.permutations(("few", "many", "other end", "pieces", "composed"), 2)], ids="-".join
)
def test_what_is_the_same_is_what_a_plain_twin_finds(tokenizers, names):
    aligner = Aligner(*(tokenizers / name for name in names), (600, 600))
    total = 0
    for text in ODD:
        ids = aligner.tokenizers[0](text, add_special_tokens=False)["input_ids"]
        found = aligner.document(np.array([aligner.separators[0], *ids], dtype=np.int32))
        pairs = {(j, int(k)) for j, k in enumerate(found.same) if k >= 0}
        wanted = twin(aligner, names, unicodedata.normalize("NFC", text) if names[0] == "composed" else text)
        assert pairs == wanted, (text, pairs ^ wanted)
        total += len(pairs)
    assert total > 3 * len(ODD)


def test_a_tokenizer_and_itself_are_the_same_everywhere(tokenizers):
    """In whole documents and in rows cut anywhere, inside characters too; also of a document that begins inside one."""
    for name in ("few", "many", "pieces"):
        place = tokenizers / name
        aligner = Aligner(place, place, (700, 700))
        assert aligner.words.tolist() == [list(range(700))] * 2
        documents = [
            np.array([aligner.separators[0], *aligner.tokenizers[0](t, add_special_tokens=False)["input_ids"]])
            for t in ODD
        ]
        stream = Stream("odd", documents, seed=0)
        mixture = Mixture([stream], [Stage(seq_len=7, batch_size=5, num_steps=12)], seed=0)
        for step in range(12):
            batch = mixture.batch(0, step)[0]
            for ids, pieces in zip(batch, mixture.documents(0, step), strict=True):
                other, before = aligner.row(pieces, 7, 100)
                assert other[:7].tolist() == ids.tolist()
                assert before.tolist() == list(range(7))
                assert aligner.row(pieces, 7, 4)[1].tolist() == [0, 1, 2, 3, -1, -1, -1]


def test_a_part_of_a_document_that_begins_and_ends_inside_a_character(tokenizers):
    aligner = Aligner(tokenizers / "few", tokenizers / "many", (600, 600))
    ids = np.array(aligner.tokenizers[0]("日本 words and words 日", add_special_tokens=False)["input_ids"])
    cut = aligner.document(ids[1:-1])
    assert (cut.same >= 0).sum() > 3
    mine = [aligner.bytes[0][n] for n in ids[1:-1]]
    for place, (word, k) in enumerate(zip(mine, cut.same, strict=True)):
        if k >= 0:
            assert aligner.bytes[1][int(cut.other[k])] == word, place
    empty = aligner.document(np.array([aligner.separators[0]]))
    assert empty.same.tolist() == [0]


def test_rows_end_where_the_child_ends(tokenizers):
    """A row's tokens of the teacher lie within it, whole, and a token is compared where both have come to it."""
    aligner = Aligner(tokenizers / "few", tokenizers / "pieces", (600, 700))
    ids = np.array([aligner.separators[0], *aligner.tokenizers[0](ODD[0], add_special_tokens=False)["input_ids"]])
    whole = aligner.document(ids)
    for start, stop in itertools.combinations(range(0, len(ids) + 1, 5), 2):
        other, before = aligner.row([Piece((0, 0), ids, slice(start, stop))], stop - start - 1, 100)
        first, last = (whole.ends[n - 1] if n else 0 for n in (start, stop))
        inside = (whole.other_begins >= first) & (whole.other_ends <= last)
        assert other.tolist() == whole.other[inside].tolist()
        for place, k in enumerate(before):
            same = whole.same[start + place + 1]
            expected = same - int(inside.argmax()) - 1 if same >= 0 and inside[same] else -1
            assert k == max(-1, expected)


def test_other_tokenizers_are_refused_by_name(tokenizers, tmp_path):
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[UNK]").save_pretrained(tmp_path / "pieces")
    (tmp_path / "pieces/config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match=rf"`align_tokens`: the tokenizer in {tmp_path}/pieces is neither a byte-level"):
        Aligner(tokenizers / "few", tmp_path / "pieces", (300, 3))
