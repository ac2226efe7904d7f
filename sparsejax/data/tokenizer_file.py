"""The tokenizer of a pretrained model, from its ``tokenizer.json``.

It is a ``Tokenizer`` like the others, but specials may be any ids. A document opens
with the token that the file itself puts before every text, or else with the one that
stood between the model's training documents.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int, Int32

from sparsejax.config import ConfigError
from sparsejax.data.tokenizer import PairTokenizer, Tokenizer

__all__ = ["FileTokenizer", "files_of", "read_about", "read_tokenizer"]

JSON = "tokenizer.json"
ABOUT = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"  # goes before that of tokenizer_config.json

SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


class FileTokenizer:
    """What a ``tokenizer.json`` does to text.

    Args:
        text: of the file.
        about: of ``tokenizer_config.json``: names of special tokens.
        vocab_size: ids of the model, if it has more than the file uses.

    Raises:
        ConfigError: if the text is no tokenizer, or one of a larger vocabulary.
    """

    def __init__(
        self,
        text: str,
        about: Mapping[str, Any] | None = None,
        *,
        vocab_size: int | None = None,
    ):
        try:
            self._tokens = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing more precise
            raise ConfigError(f"tokenizer.json: cannot be read: {error}") from None
        self._tokens.no_padding()
        self._tokens.no_truncation()
        vocabulary = self._tokens.get_vocab(with_added_tokens=True)
        ids = 1 + max(vocabulary.values(), default=0)
        if vocab_size is not None and ids > vocab_size:
            raise ConfigError(
                f"tokenizer.json: of another vocabulary: it has {ids} ids, the model"
                f" {vocab_size}; take the model's own"
            )
        self.vocab_size = ids if vocab_size is None else vocab_size
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.fingerprint = f"file-{self.vocab_size}-{digest}"
        self.about = dict(about or {})
        self.opening = self._opening()
        self.text = text
        self.bos, self.pad = self._specials(vocabulary)
        named = (vocabulary.get(x) for x in SEPARATORS)
        ends = (self.id_of("eos_token"), *named)
        self.ends = frozenset(x for x in ends if x is not None)
        self._spells_bytes = "ByteLevel" in json.dumps(json.loads(text).get("decoder"))

    @property
    def token_bytes(self) -> Int32[np.ndarray, " v"]:
        """Bytes per id; 0 for specials, and for ids that the file does not use."""
        lengths = np.zeros(self.vocab_size, np.int32)
        added = self._tokens.get_added_tokens_decoder()
        for token, i in self._tokens.get_vocab(with_added_tokens=True).items():
            if i in added:
                lengths[i] = 0 if added[i].special else len(token.encode())
            else:
                lengths[i] = self._bytes_of(token)
        return lengths

    def encode(self, text: str | bytes) -> Int32[np.ndarray, " n"]:
        """Give the ids of a text; specials only where the text spells them."""
        text = text.decode() if isinstance(text, bytes) else text
        encoded = self._tokens.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoded[0].ids, np.int32)

    def prompt(self, text: str) -> Int32[np.ndarray, " n"]:
        """Give the ids of a text that is to be continued, as the file opens it."""
        opening = np.array(self.opening, np.int32)
        return np.concatenate([opening, self.encode(text)])

    def decode(self, ids: Iterable[int] | Int[np.ndarray, " n"]) -> str:
        """Give the text of ids; specials and ids without one are dropped."""
        return self._tokens.decode([int(i) for i in ids])

    def id_of(self, name: str) -> int | None:
        """Give the id of a special, ``eos_token`` say; None if it is not named."""
        token = self.special(name)
        return None if token is None else self._tokens.token_to_id(token)

    def special(self, name: str) -> str | None:
        """Give how a special is spelled; None if it is not named."""
        token = self.about.get(name)
        token = token.get("content") if isinstance(token, Mapping) else token
        return token if isinstance(token, str) else None

    def _opening(self) -> list[int]:
        """Find what the file puts before a text."""
        bare = self._tokens.encode("a", add_special_tokens=False).ids
        full = self._tokens.encode("a", add_special_tokens=True).ids
        return full[: full.index(bare[0])] if bare and bare[0] in full else []

    def _specials(self, vocabulary: Mapping[str, int]) -> tuple[int, int]:
        between = next((vocabulary[x] for x in SEPARATORS if x in vocabulary), None)
        eos, pad = self.id_of("eos_token"), self.id_of("pad_token")
        candidates = (*self.opening[-1:], between, eos, self.id_of("bos_token"), 0)
        bos = next(x for x in candidates if x is not None)
        return bos, next(x for x in (pad, eos, bos) if x is not None)

    def _bytes_of(self, token: str) -> int:
        if self._spells_bytes:
            return len(token)  # this alphabet spells a byte as one character
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return 1
        return len(token.replace("▁", " ").encode())


def read_tokenizer(path: Path, *, vocab_size: int | None = None) -> FileTokenizer:
    """Read ``tokenizer.json``, and ``tokenizer_config.json`` beside it.

    Raises:
        ConfigError: if there is no such file, or it does not fit.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such tokenizer file")
    names = (x for x in (ABOUT, TEMPLATE) if path.with_name(x).is_file())
    beside = {name: path.with_name(name).read_text("utf-8") for name in names}
    text = path.read_text(encoding="utf-8")
    try:
        about = read_about(beside)
        return FileTokenizer(text, about, vocab_size=vocab_size)
    except ConfigError as error:
        raise ConfigError(f"{path.parent}: {error}") from None


def read_about(files: Mapping[str, str]) -> dict[str, Any]:
    """Read ``tokenizer_config.json``, and the chat template beside it.

    Raises:
        ConfigError: if it is no JSON object.
    """
    try:
        about = dict(json.loads(files.get(ABOUT, "{}")).items())
    except (ValueError, AttributeError):
        raise ConfigError(f"{ABOUT}: is no JSON object; download it again") from None
    return about | ({"chat_template": files[TEMPLATE]} if TEMPLATE in files else {})


def files_of(tokenizer: Tokenizer) -> dict[str, str]:
    """Write a tokenizer as the files that other programs read.

    Bytes become a byte-pair vocabulary without pairs.
    """
    if isinstance(tokenizer, FileTokenizer):
        return {JSON: tokenizer.text, ABOUT: json.dumps(tokenizer.about, indent=2)}
    if isinstance(tokenizer, PairTokenizer):
        pairs = tokenizers.Tokenizer.from_str(tokenizer.merges)
    else:
        spelled = {character: byte for byte, character in enumerate(_alphabet())}
        pairs = tokenizers.Tokenizer(tokenizers.models.BPE(spelled, []))
        level = tokenizers.pre_tokenizers.ByteLevel
        pairs.pre_tokenizer = level(add_prefix_space=False, use_regex=False)
        pairs.decoder = tokenizers.decoders.ByteLevel()
    first = pairs.get_vocab_size()
    unused = [f"<|unused {i}|>" for i in range(first, tokenizer.bos)]
    pairs.add_special_tokens([*unused, "<|bos|>", "<|pad|>"])
    pairs.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos)]
    )
    about = {
        "bos_token": "<|bos|>",
        "eos_token": "<|bos|>",
        "pad_token": "<|pad|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return {JSON: pairs.to_str(), ABOUT: json.dumps(about, indent=2)}


def _alphabet() -> list[str]:
    """Give the character that byte-level vocabularies spell each byte with."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    return [chr(byte if byte in shown else next(hidden)) for byte in range(256)]
