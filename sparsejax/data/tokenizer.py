"""Tokenizers: text in, ids out, and back exactly; they know no BOS that text can spell.

The last two of ``vocab_size`` ids are specials: ``bos`` opens a document, ``pad`` fills
what holds none. Neither comes out of ``encode``, and ``decode`` drops both.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import tokenizers
from jaxtyping import Int, Int32

from sparsejax.data.cache import locked, write_atomically

__all__ = ["ByteTokenizer", "PairTokenizer", "Tokenizer", "trained_pairs"]

TRAINING_BYTES = 64 << 20  # text beyond this changes no merge that matters


@runtime_checkable
class Tokenizer(Protocol):
    """What a model and a metric need to know of a tokenizer."""

    @property
    def fingerprint(self) -> str:
        """Name that is equal for tokenizers that give equal ids only."""
        ...

    @property
    def vocab_size(self) -> int:
        """Count of ids, specials included."""
        ...

    @property
    def bos(self) -> int:
        """Id that opens a document."""
        ...

    @property
    def pad(self) -> int:
        """Id where there is no text."""
        ...

    @property
    def ends(self) -> frozenset[int]:
        """Ids after which a text is over."""
        ...

    @property
    def token_bytes(self) -> Int32[np.ndarray, " v"]:
        """How many bytes of text each id stands for; specials stand for none."""
        ...

    def encode(self, text: str | bytes) -> Int32[np.ndarray, " n"]:
        """Give the ids of a text, without specials."""
        ...

    def prompt(self, text: str) -> Int32[np.ndarray, " n"]:
        """Give the ids of a text that is to be continued, from its opening on."""
        ...

    def decode(self, ids: Iterable[int] | Int[np.ndarray, " n"]) -> str:
        """Give the text of ids; specials are dropped."""
        ...


class ByteTokenizer:
    """Every byte of the UTF-8 text is its own id.

    >>> ByteTokenizer().encode("né").tolist()
    [110, 195, 169]
    """

    fingerprint = "bytes"
    vocab_size = 258
    bos = 256
    pad = 257
    ends = frozenset({256, 257})

    @property
    def token_bytes(self) -> Int32[np.ndarray, " v"]:
        """One byte each, but for the two specials."""
        return (np.arange(self.vocab_size) < self.bos).astype(np.int32)

    def encode(self, text: str | bytes) -> Int32[np.ndarray, " n"]:
        """Give the bytes of a text."""
        data = text if isinstance(text, bytes) else text.encode()
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def prompt(self, text: str) -> Int32[np.ndarray, " n"]:
        """Give the bytes of a text behind a BOS."""
        return np.insert(self.encode(text), 0, self.bos)

    def decode(self, ids: Iterable[int] | Int[np.ndarray, " n"]) -> str:
        """Give the text of bytes; a character cut in half becomes a question mark."""
        return bytes(i for i in map(int, ids) if i < self.bos).decode(errors="replace")


class PairTokenizer:
    """Byte-pair encoding: bytes, and the pairs of tokens that were frequent.

    Source: Sennrich et al. 2015, arXiv:1508.07909, Alg. 1. Departure: starts from bytes
    and merges within words only, so any text is encoded and comes back exactly.
    """

    def __init__(self, merges: str, vocab_size: int):
        digest = hashlib.sha256(merges.encode()).hexdigest()[:16]
        self.fingerprint = f"bpe-{vocab_size}-{digest}"
        self.vocab_size = vocab_size
        self.bos = vocab_size - 2
        self.pad = vocab_size - 1
        self.ends = frozenset({self.bos, self.pad})
        self.merges = merges
        self._pairs = tokenizers.Tokenizer.from_str(merges)

    @property
    def token_bytes(self) -> Int32[np.ndarray, " v"]:
        """Bytes per id; 0 for specials, and for ids a small text left unused."""
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, i in self._pairs.get_vocab().items():
            lengths[i] = len(token)  # this alphabet spells a byte as one character
        return lengths

    def encode(self, text: str | bytes) -> Int32[np.ndarray, " n"]:
        """Give the ids of a text; of bytes, they must be UTF-8."""
        text = text.decode() if isinstance(text, bytes) else text
        encoded = self._pairs.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoded[0].ids, np.int32)

    def prompt(self, text: str) -> Int32[np.ndarray, " n"]:
        """Give the ids of a text behind a BOS."""
        return np.insert(self.encode(text), 0, self.bos)

    def decode(self, ids: Iterable[int] | Int[np.ndarray, " n"]) -> str:
        """Give the text of ids; a character cut in half becomes a question mark."""
        return self._pairs.decode([i for i in map(int, ids) if i < self.bos])


def trained_pairs(
    texts: Iterable[bytes], *, vocab_size: int, fingerprint: str, folder: Path
) -> PairTokenizer:
    """Learn a byte-pair vocabulary from texts, or read the one learned before.

    Args:
        texts: the training documents; read only if there is no such vocabulary yet.
        vocab_size: ids, the two specials included.
        fingerprint: name of the texts, equal for equal texts only.
        folder: where vocabularies are kept.
    """
    digest = hashlib.sha256(f"1 {TRAINING_BYTES} {fingerprint}".encode())
    path = folder / f"bpe-{vocab_size}-{digest.hexdigest()[:16]}.json"
    if not path.exists():
        with locked(folder / ".lock"):
            if not path.exists():
                write_atomically(path, _learn(texts, vocab_size - 2))
    return PairTokenizer(path.read_text(encoding="utf-8"), vocab_size)


def _learn(texts: Iterable[bytes], tokens: int) -> str:
    level = tokenizers.pre_tokenizers.ByteLevel
    pairs = tokenizers.Tokenizer(tokenizers.models.BPE())
    pairs.pre_tokenizer = level(add_prefix_space=False)
    pairs.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=tokens,
        initial_alphabet=sorted(level.alphabet()),
        show_progress=False,
    )
    pairs.train_from_iterator(_first(texts, TRAINING_BYTES), trainer)
    return pairs.to_str()


def _first(texts: Iterable[bytes], budget: int) -> Iterator[str]:
    for text in texts:
        if budget <= 0:
            return
        budget -= len(text)
        yield text.decode()
