import pytest

from sparsejax.bench import bits as bench
from sparsejax.config import ConfigError


def test_documents_are_taken_until_they_are_long_enough():
    texts = ["a" * 10, "b" * 5, "c" * 7]
    assert bench.first(iter(texts), size=10) == texts[:1]
    assert bench.first(iter(texts), size=11) == texts[:2]
    assert bench.first(iter(texts), size=100) == texts


def test_every_kind_of_text_has_documents():
    try:
        found = {name: next(documents) for name, documents in bench.texts().items()}
    except ConfigError as error:
        pytest.skip(str(error))
    assert set(found) == {"speeches", "encyclopedia", "bibles", "language reference"}
    assert found["speeches"].startswith("Fellow-Citizens")
    assert all(len(text) > 100 for text in found.values())
