"""Real text as batches: reproducible, split over processes, resumable to the bit.

``open_data`` is the whole interface. The global batch is a function of config, seed and
batch number alone, however many processes read it. Nothing here imports TensorFlow.
"""

from sparsejax.data.config import DataConfig
from sparsejax.data.reader import Batch, Data, TrainIterator, merge_states
from sparsejax.data.tokenizer import ByteTokenizer, PairTokenizer, Tokenizer

__all__ = [
    "Batch",
    "ByteTokenizer",
    "Data",
    "DataConfig",
    "PairTokenizer",
    "Tokenizer",
    "TrainIterator",
    "merge_states",
    "open_data",
]


def open_data(
    config: DataConfig, *, seed: int, process_index: int = 0, process_count: int = 1
) -> Data:
    """Open the text that a config names, preparing it on first use.

    Args:
        config: which text, tokenizer and batch shape.
        seed: of the order of documents, in ``0..2**32-1``.
        process_index: which part of every batch is read here.
        process_count: into how many parts a batch is divided; it must divide
            ``batch_size`` and 64.

    Raises:
        ConfigError: if the text cannot be had, or not divided so.
    """
    # Grain and TFDS take a second to import, which reading a config should not.
    from sparsejax.data import pipeline  # noqa: PLC0415

    return pipeline.assemble(
        config, seed=seed, process_index=process_index, process_count=process_count
    )
