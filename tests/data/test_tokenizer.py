"""Tokenizers give back what they were given, byte for byte."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.data import ByteTokenizer, PairTokenizer
from sparsejax.data.tokenizer import trained_pairs

TEXTS = [b"the cat sat on the mat. " * 50, "naïve 東京 → don't".encode() * 20]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    return trained_pairs(
        TEXTS, vocab_size=300, fingerprint="t", folder=tmp_path_factory.mktemp("bpe")
    )


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request):
    if request.param == "bytes":
        return ByteTokenizer()
    return request.getfixturevalue("pairs")


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_come_back_exactly(text):
    assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_pairs_come_back_exactly(pairs, text):
    assert pairs.decode(pairs.encode(text)) == text
    np.testing.assert_array_equal(pairs.encode(text), pairs.encode(text.encode()))


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_token_bytes_add_up_to_the_text(pairs, text):
    for tokenizer in (pairs, ByteTokenizer()):
        total = tokenizer.token_bytes[tokenizer.encode(text)].sum()
        assert total == len(text.encode())


def test_specials_are_the_last_ids_and_stand_for_no_text(tokenizer):
    specials = [tokenizer.bos, tokenizer.pad]
    assert specials == [tokenizer.vocab_size - 2, tokenizer.vocab_size - 1]
    ids = [tokenizer.bos, *tokenizer.encode("ox").tolist(), tokenizer.pad]
    assert tokenizer.decode(ids) == "ox"
    assert (tokenizer.token_bytes[specials] == 0).all()
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)


def test_an_empty_text_has_no_tokens(tokenizer):
    assert tokenizer.encode("").shape == (0,)
    assert tokenizer.encode("").dtype == np.int32
    assert tokenizer.decode([]) == ""


def test_half_a_character_decodes_to_a_replacement(tokenizer):
    first = ByteTokenizer().encode("é")[:1]
    assert ByteTokenizer().decode(first) == "\ufffd"


def test_pairs_that_were_frequent_are_one_token(pairs):
    assert len(pairs.encode(" the cat")) < len(" the cat") / 2


def test_pairs_refuse_bytes_that_are_not_text(pairs):
    with pytest.raises(UnicodeDecodeError):
        pairs.encode(b"\xff\xfe")


def test_a_vocabulary_is_learned_once_and_equal_when_learned_again(tmp_path):
    def learn(texts, folder):
        return trained_pairs(
            texts, vocab_size=300, fingerprint="t", folder=tmp_path / folder
        )

    first = learn(TEXTS, "a")
    again = learn(iter([]), "a")  # read from the cache: no text is asked for
    other = learn(TEXTS, "b")
    assert first.fingerprint == again.fingerprint == other.fingerprint
    assert [p.name for p in (tmp_path / "a").glob("*draft*")] == []


def test_a_vocabulary_of_other_texts_or_size_is_another(tmp_path):
    def fingerprint(name, size):
        return trained_pairs(
            TEXTS, vocab_size=size, fingerprint=name, folder=tmp_path
        ).fingerprint

    assert fingerprint("t", 300) != fingerprint("t", 280)
    assert len(list(tmp_path.glob("bpe-*.json"))) == 2
    fingerprint("u", 300)
    assert len(list(tmp_path.glob("bpe-*.json"))) == 3


def test_bpe_batches_hold_the_text(open_small):
    data = open_small(tokenizer="bpe", vocab_size=400)
    batch = next(data.train)
    assert data.tokenizer.vocab_size == 400
    assert batch.tokens.max() == data.tokenizer.bos
    assert "cat" in data.tokenizer.decode(batch.tokens[0])


def test_the_pair_tokenizer_joins_the_most_frequent_pair_first(tmp_path):
    texts = [b"abab abab abab cd"] * 3
    one_merge = trained_pairs(
        texts, vocab_size=256 + 2 + 1, fingerprint="t", folder=tmp_path
    )
    assert isinstance(one_merge, PairTokenizer)
    assert [len(one_merge.encode(x)) for x in (b"ab", b"cd")] == [1, 2]
