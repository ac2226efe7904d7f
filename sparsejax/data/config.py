"""What a run reads: which text, in which tokens, cut into which batches."""

from dataclasses import dataclass
from typing import Literal

from sparsejax.config import require

__all__ = ["DataConfig"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Text, tokenizer and batch shape."""

    seq_len: int  # predicted tokens per row; a row holds one more
    batch_size: int  # rows per step, over all processes
    name: str = "english"  # or "facts", "countries", a TFDS set "name/config:1.0.0"
    files: tuple[str, ...] = ()  # globs of .txt and .jsonl files, read instead of name
    text_field: str = "text"  # where a TFDS or .jsonl record keeps its text
    validation_every: int = 20  # one document in how many is held out
    tokenizer: Literal["bytes", "bpe", "file"] = "bytes"
    # Ids of the "bpe" tokenizer, its two specials included, or of a model whose
    # tokenizer is a "file".
    vocab_size: int = 4096
    tokenizer_file: str | None = None  # tokenizer.json of a pretrained model
    cache_dir: str | None = None  # default: $SPARSEJAX_CACHE, or ~/.cache/sparsejax
    prefetch: int = 2  # batches read ahead by a thread; 0 reads when asked
    threads: int = 1  # threads that tokenize; more pay off for "bpe" only

    def __post_init__(self):
        for field in ("seq_len", "batch_size", "threads"):
            value = getattr(self, field)
            require(value >= 1, field, value, "must be at least 1")
        require(self.prefetch >= 0, "prefetch", self.prefetch, "must not be negative")
        require(
            self.validation_every >= 2,
            "validation_every",
            self.validation_every,
            "must be at least 2; one document in that many is held out",
        )
        require(
            self.vocab_size >= 258,
            "vocab_size",
            self.vocab_size,
            "must be at least 258: the 256 bytes and two specials",
        )
        require(
            self.tokenizer in ("bpe", "file")
            or self.vocab_size == DataConfig.vocab_size,
            "vocab_size",
            self.vocab_size,
            "has no effect with tokenizer='bytes', whose ids are given; leave it out,"
            " or set tokenizer='bpe'",
        )
        require(
            (self.tokenizer in ("bytes", "bpe")) == (self.tokenizer_file is None),
            "tokenizer_file",
            self.tokenizer_file,
            "must be given exactly if tokenizer='file'",
        )
        require(bool(self.name), "name", self.name, "must not be empty")
        require(
            not self.files or self.name in ("english", "files"),
            "name",
            self.name,
            "contradicts files, which are read instead; leave one of the two out",
        )
        require(
            self.name != "files" or bool(self.files),
            "files",
            self.files,
            "must name at least one file or glob when name is 'files'",
        )
