"""One corpus as a TFDS data set of array records, which no TensorFlow reads or writes.

The name of its config ends in a digest of the corpus, so a changed text, split or
version of this code never meets data prepared before.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from sparsejax.data.corpora import Corpus, digest, group_hash, held_out

__all__ = ["TextBuilder", "text_builder"]


@dataclasses.dataclass(eq=False)
class TextConfig(tfds.core.BuilderConfig):
    """A corpus, under a name that says exactly which."""

    corpus: Corpus = dataclasses.field(kw_only=True, repr=False)


class TextBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Write a corpus as the splits ``train`` and ``validation``."""

    name = "sparsejax_text"
    VERSION = tfds.core.Version("1.0.0")
    builder_config: TextConfig

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, _: Any) -> dict[str, Any]:
        held = held_out(self.builder_config.corpus)
        return {
            "train": self._generate_examples(held, False),
            "validation": self._generate_examples(held, True),
        }

    def _generate_examples(self, held: frozenset[int], validation: bool) -> Iterator:
        for number, document in enumerate(self.builder_config.corpus.documents()):
            if (group_hash(document.group) in held) == validation:
                yield number, {"text": document.text}


def text_builder(corpus: Corpus, data_dir: str) -> TextBuilder:
    """Build the data set of one corpus; nothing is written yet."""
    config = TextConfig(name=f"{corpus.name}-{digest(corpus)}", corpus=corpus)
    return TextBuilder(config=config, data_dir=data_dir, file_format="array_record")
