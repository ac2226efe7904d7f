"""A small text of files, prepared once, and ways to open it."""

import json

import numpy as np
import pytest

from sparsejax.data import DataConfig, open_data

WORDS = ["naïve", "cat", "→", "of", "東京", "sat\tmat", "and\nnear", "don't", "42"]


def words(seed, count):
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Forty short documents in two formats, and one long enough to be cut."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(20):
        (folder / f"{i}.txt").write_text(words(i, 5 + 7 * i), encoding="utf-8")
    (folder / "long.txt").write_text(
        "\n\n".join(words(100 + i, 300) for i in range(20)), encoding="utf-8"
    )
    lines = [json.dumps({"body": words(200 + i, 30), "id": i}) for i in range(20)]
    (folder / "more.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def make_config(folder, cache):
    def make(**changes):
        defaults = {
            "files": (str(folder / "*.txt"), str(folder / "*.jsonl")),
            "text_field": "body",
            "seq_len": 32,
            "batch_size": 8,
            "validation_every": 4,
            "cache_dir": str(cache),
        }
        return DataConfig(**{**defaults, **changes})

    return make


@pytest.fixture
def open_small(make_config):
    """Open the small text; whatever was opened is closed after the test."""
    opened = []

    def small(*, seed=0, process_index=0, process_count=1, **changes):
        data = open_data(
            make_config(**changes),
            seed=seed,
            process_index=process_index,
            process_count=process_count,
        )
        opened.append(data)
        return data

    yield small
    for data in opened:
        data.close()
