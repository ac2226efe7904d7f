"""Tokenizers of other programs are read as they are, and ours are written for them."""

import json

import numpy as np
import pytest
import tokenizers

from sparsejax.config import ConfigError
from sparsejax.data import ByteTokenizer, DataConfig
from sparsejax.data.tokenizer import trained_pairs
from sparsejax.data.tokenizer_file import FileTokenizer, files_of, read_tokenizer

TEXT = "naïve 東京 → don't\n stop"


def byte_level(specials=("<|endoftext|>", "<s>"), opening=None):
    pairs = tokenizers.Tokenizer(tokenizers.models.BPE())
    pairs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(specials),
        show_progress=False,
    )
    pairs.train_from_iterator(["the cat sat on the mat " * 20, TEXT * 9], trainer)
    if opening:
        pairs.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{opening} $A", special_tokens=[(opening, specials.index(opening))]
        )
    return pairs.to_str()


def spelled_by_words():
    """As sentencepiece models are: words behind a mark, bytes by their number."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocabulary |= {"▁": 256, "a": 257, "▁a": 258, "é": 259, "<s>": 260}
    model = tokenizers.models.BPE(
        vocabulary, [("▁", "a")], byte_fallback=True, fuse_unk=True
    )
    pairs = tokenizers.Tokenizer(model)
    pairs.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    pairs.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    pairs.add_special_tokens(["<s>"])
    return pairs.to_str()


@pytest.mark.parametrize("text", [byte_level(), spelled_by_words()])
@pytest.mark.parametrize("said", [TEXT, " a é a", ""])
def test_text_comes_back_and_its_bytes_add_up(text, said):
    tokenizer = FileTokenizer(text)
    ids = tokenizer.encode(said)
    assert tokenizer.decode(ids) == said
    assert tokenizer.token_bytes[ids].sum() == len(said.encode())
    np.testing.assert_array_equal(ids, tokenizer.encode(said.encode()))


def test_a_prompt_opens_as_the_file_says():
    tokenizer = FileTokenizer(byte_level(opening="<s>"))
    assert tokenizer.prompt("the").tolist() == [1, *tokenizer.encode("the")]
    assert tokenizer.bos == 1
    bare = FileTokenizer(byte_level())
    assert bare.prompt("the").tolist() == bare.encode("the").tolist()
    assert bare.bos == 0  # what stood between documents


def test_specials_are_those_that_the_file_beside_names():
    about = {"eos_token": {"content": "<s>"}, "pad_token": None}
    tokenizer = FileTokenizer(byte_level(), about)
    assert tokenizer.pad == 1
    assert tokenizer.ends == {0, 1}
    assert tokenizer.token_bytes[[0, 1]].tolist() == [0, 0]
    assert tokenizer.decode([0, *tokenizer.encode("cat").tolist(), 1]) == "cat"


def test_a_model_may_have_more_ids_than_the_file_and_not_fewer():
    tokenizer = FileTokenizer(byte_level(), vocab_size=400)
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size == 400
    assert tokenizer.decode([399]) == ""
    with pytest.raises(ConfigError, match=r"of another vocabulary.*model 100"):
        FileTokenizer(byte_level(), vocab_size=100)


def test_ids_past_a_hole_in_the_vocabulary_are_text():
    tokenizer = FileTokenizer(spelled_by_words().replace('"é":259', '"é":999'))
    assert tokenizer.vocab_size == 1000
    assert tokenizer.encode("éa").tolist() == [999, 257]
    assert tokenizer.decode([999, 400, 257]) == "éa"


def test_what_is_no_tokenizer_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such tokenizer file"):
        read_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"tokenizer_config.json: is no JSON object"):
        read_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("name", ["bytes", "bpe", "file"])
def test_a_tokenizer_that_is_written_gives_the_same_ids(name, tmp_path):
    made = {
        "bytes": ByteTokenizer,
        "bpe": lambda: trained_pairs(
            [TEXT.encode() * 9], vocab_size=300, fingerprint="t", folder=tmp_path
        ),
        "file": lambda: FileTokenizer(byte_level(opening="<s>"), {"x": 1}),
    }
    tokenizer = made[name]()
    for file, text in files_of(tokenizer).items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    again = read_tokenizer(tmp_path / "tokenizer.json")
    assert again.vocab_size == tokenizer.vocab_size
    assert (again.bos, again.pad) == (tokenizer.bos, tokenizer.pad)
    np.testing.assert_array_equal(again.prompt(TEXT), tokenizer.prompt(TEXT))
    np.testing.assert_array_equal(again.token_bytes, tokenizer.token_bytes)
    assert again.decode(again.encode(TEXT)) == TEXT
    json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_a_config_that_names_no_file_is_refused():
    with pytest.raises(ValueError, match="must be given exactly if tokenizer='file'"):
        DataConfig(seq_len=8, batch_size=1, tokenizer="file")
