"""From documents to rows with Grain: shuffled, tokenized, packed end to end."""

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np

from sparsejax.config import ConfigError
from sparsejax.data.cache import cache_root
from sparsejax.data.config import DataConfig
from sparsejax.data.reader import Batch, Data, TrainIterator
from sparsejax.data.sources import Documents, Splits, open_documents
from sparsejax.data.tokenizer import ByteTokenizer, Tokenizer, trained_pairs
from sparsejax.data.tokenizer_file import read_tokenizer

__all__ = ["assemble"]

MOST_STREAMS = 64  # processes that can share a batch
KEPT_BYTES = 512 << 20  # tokens of a split that are kept in memory


def assemble(
    config: DataConfig, *, seed: int, process_index: int, process_count: int
) -> Data:
    """Build what ``sparsejax.data.open_data`` promises."""
    count = math.gcd(config.batch_size, MOST_STREAMS)
    _check(config, count, seed, process_index, process_count)
    splits = open_documents(config)
    tokenizer = TOKENIZERS[config.tokenizer](config, splits.train)
    fingerprint = _fingerprint(config, splits, tokenizer, seed)
    train = TokenDocuments(splits.train, tokenizer)
    share = count // process_count
    streams = {
        i: RowStream(
            shuffled(train, seed)[i::count],
            rows=config.batch_size // count,
            tokens=config.seq_len + 1,
        )
        for i in range(process_index * share, (process_index + 1) * share)
    }
    return Data(
        tokenizer=tokenizer,
        train=TrainIterator(
            streams,
            fingerprint=fingerprint,
            prefetch=config.prefetch,
            threads=config.threads,
        ),
        documents={split: len(d) for split, d in splits._asdict().items()},
        fingerprint=fingerprint,
        evaluation=functools.partial(
            evaluation,
            TokenDocuments(splits.validation, tokenizer),
            config,
            pad=tokenizer.pad,
            process_index=process_index,
            process_count=process_count,
        ),
    )


class TokenDocuments:
    """Documents as tokens behind a BOS; those that fit in memory are read once."""

    def __init__(self, documents: Documents, tokenizer: Tokenizer):
        self._documents = documents
        self._tokenizer = tokenizer
        self._dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
        self._kept: dict[int, np.ndarray] = {}
        self._room = KEPT_BYTES

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        tokens = self._kept.get(index)
        if tokens is None:
            text = self._tokenizer.encode(self._documents[index])
            tokens = np.insert(text, 0, self._tokenizer.bos).astype(self._dtype)
            if tokens.nbytes <= self._room:
                self._room -= tokens.nbytes
                self._kept[index] = tokens
        return {"tokens": tokens.astype(np.int32)}


def shuffled(
    documents: grain.sources.RandomAccessDataSource, seed: int
) -> grain.MapDataset:
    """Every document once per epoch, in an order of that epoch's own, forever."""
    return grain.MapDataset.source(documents).seed(seed).shuffle().repeat(None)


class RowStream:
    """Rows of packed documents; a ``reader.Stream``."""

    def __init__(self, documents: grain.MapDataset, *, rows: int, tokens: int):
        packed = packed_rows(documents, tokens)
        self._batches = iter(packed.batch(rows, drop_remainder=True))

    def __next__(self) -> Batch:
        return _batch(next(self._batches))

    def get_state(self) -> dict[str, Any]:
        """Give the position after the last rows."""
        return self._batches.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a position."""
        # Grain compares these pairs with tuples: as lists, a document would be lost.
        slices = {k: tuple(v) for k, v in state["remainder_slices"].items()}
        self._batches.set_state({**state, "remainder_slices": slices})


def packed_rows(documents: grain.MapDataset, tokens: int) -> grain.IterDataset:
    """Lay documents end to end and cut rows of ``tokens``."""
    # Reading where we are is faster than Grain's threads; ``reader`` has its own.
    here = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return grain.experimental.ConcatThenSplitIterDataset(
        documents.to_iter_dataset(here), length_struct={"tokens": tokens}
    )


def evaluation(
    documents: TokenDocuments,
    config: DataConfig,
    batches: int,
    *,
    pad: int,
    process_index: int,
    process_count: int,
) -> list[Batch]:
    """Pack validation documents in their own order; give one process's rows."""
    if batches < 1:
        raise ValueError(f"evaluation(batches={batches}): must be at least 1")
    packed = packed_rows(grain.MapDataset.source(documents), config.seq_len + 1)
    rows = itertools.islice(iter(packed), batches * config.batch_size)
    share = config.batch_size // process_count
    mine = slice(process_index * share, (process_index + 1) * share)
    return [Batch(*(x[mine] for x in batch)) for batch in _padded(rows, pad, config)]


def _padded(rows: Iterator[Any], pad: int, config: DataConfig) -> Iterator[Batch]:
    """Stack rows into batches; the last one is filled up with empty rows."""
    shape = (config.batch_size, config.seq_len + 1)
    while some := list(itertools.islice(rows, config.batch_size)):
        batch = Batch(*(np.zeros(shape, np.int32) for _ in Batch._fields))
        for filled, row in enumerate(some):
            for target, values in zip(batch, _batch(row), strict=True):
                target[filled] = values
        batch.tokens[batch.segments == 0] = pad
        yield batch


def _batch(packed: dict[str, np.ndarray]) -> Batch:
    return Batch(
        packed["tokens"], packed["tokens_segment_ids"], packed["tokens_positions"]
    )


def _bytes(_: DataConfig, __: Documents) -> Tokenizer:
    return ByteTokenizer()


def _pairs(config: DataConfig, train: Documents) -> Tokenizer:
    return trained_pairs(
        (train[i] for i in range(len(train))),
        vocab_size=config.vocab_size,
        fingerprint=train.fingerprint,
        folder=cache_root(config.cache_dir) / "tokenizers",
    )


def _file(config: DataConfig, _: Documents) -> Tokenizer:
    path = Path(config.tokenizer_file or "")
    return read_tokenizer(path, vocab_size=config.vocab_size)


TOKENIZERS = {"bytes": _bytes, "bpe": _pairs, "file": _file}


def _fingerprint(
    config: DataConfig, splits: Splits, tokenizer: Tokenizer, seed: int
) -> str:
    parts = (
        splits.train.fingerprint,
        tokenizer.fingerprint,
        config.seq_len,
        config.batch_size,
        seed,
    )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _check(
    config: DataConfig, streams: int, seed: int, process_index: int, process_count: int
) -> None:
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed}: must be in 0..2**32-1")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process {process_index} of {process_count}: no such process")
    if streams % process_count:
        raise ConfigError(
            f"config.data.batch_size={config.batch_size}: its rows come from"
            f" {streams} streams (the common divisor with {MOST_STREAMS}), which"
            f" {process_count} processes cannot share; their number must divide both"
        )
