"""From a config to documents: two random-access lists of UTF-8 texts, always the same.

Everything is prepared once by TFDS under the cache and read from there: the corpora and
the user's files of ``corpora``, and any text data set in TFDS's own catalogue. What
cannot be had raises ``ConfigError`` at once, above all a download without a network.
"""

import contextlib
import difflib
import re
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.core import registered

from sparsejax.config import ConfigError, near
from sparsejax.data import corpora
from sparsejax.data.builder import text_builder
from sparsejax.data.cache import cache_root, locked
from sparsejax.data.config import DataConfig

__all__ = ["Documents", "Splits", "open_documents"]

NETWORK_SECONDS = 3.0  # how long a host may take to answer before it counts as absent


class Documents:
    """A random-access list of texts, as UTF-8 bytes."""

    def __init__(self, source: Any, field: str, fingerprint: str):
        self.fingerprint = fingerprint  # equal for equal texts in equal order
        self._source = source
        self._field = field

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> bytes:
        text = self._source[index][self._field]
        return text if isinstance(text, bytes) else text.encode()


class Splits(NamedTuple):
    """The documents to learn from, and those held out."""

    train: Documents
    validation: Documents


def open_documents(config: DataConfig) -> Splits:
    """Find the text that a config names; prepare it on first use.

    Raises:
        ConfigError: if it is unknown, missing, empty, or needs an absent network.
    """
    root = cache_root(config.cache_dir) / "tfds"
    corpus = _corpus(config)
    if corpus is None:
        builder = _catalogue(config, root)
        field, (train, validation) = config.text_field, _splits(builder)
    else:
        builder = _prepared_corpus(corpus, root)
        field, train, validation = "text", "train", "validation"
    return Splits(_read(builder, train, field), _read(builder, validation, field))


def _corpus(config: DataConfig) -> Any:
    every = config.validation_every
    if config.files:
        return corpora.from_files(
            config.files, text_field=config.text_field, validation_every=every
        )
    make = corpora.CORPORA.get(config.name)
    return make(every) if make else None


def _prepared_corpus(corpus: Any, root: Path) -> Any:
    def prepare(builder: Any) -> None:
        builder.download_and_prepare(download_dir=str(root / "downloads"))

    with _silent():
        return _prepared(lambda: text_builder(corpus, str(root)), prepare)


def _prepared(make: Callable[[], Any], prepare: Callable[[Any], None]) -> Any:
    """Prepare unless done, one process at a time; clear what a killed one left."""
    builder = make()
    folder = Path(builder.data_path)
    if not folder.exists():
        with locked(folder.parent / ".lock"):
            builder = make()  # another process may have finished while we waited
            if not folder.exists():
                for draft in folder.parent.glob("incomplete.*"):
                    shutil.rmtree(draft)
                prepare(builder)
    return builder


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep TFDS's announcements and progress bars off the screen."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(None):
            yield
    finally:
        tfds.enable_progress_bar()
        logging.set_verbosity(verbosity)


def _catalogue(config: DataConfig, root: Path) -> Any:
    """Build a TFDS data set by name, downloading it if there is a network."""

    def prepare(builder: Any) -> None:
        _check_network(config, builder)
        try:
            builder.download_and_prepare(download_dir=str(root / "downloads"))
        except Exception as error:
            raise ConfigError(
                f"config.data.name={config.name!r}: TFDS could not prepare it:"
                f" {type(error).__name__}: {_first_line(error)}"
            ) from error

    return _prepared(lambda: _named_builder(config, root), prepare)


def _named_builder(config: DataConfig, root: Path) -> Any:
    name = config.name
    dataset = re.split("[/:]", name, maxsplit=1)[0]
    for area in ("text", "summarization", "question_answering", "translate"):
        getattr(getattr(tfds, area), "touched", None)  # registers its data sets
    known = {*registered.list_imported_builders(), *corpora.CORPORA}
    if dataset not in known:
        close = difflib.get_close_matches(dataset, known, n=3, cutoff=0.6)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ConfigError(
            f"config.data.name={name!r}: no such data set{hint}; 'english' needs no"
            " download, and data.files reads your own text"
        )
    try:
        builder = tfds.builder(name, data_dir=str(root), file_format="array_record")
    except Exception as error:
        raise ConfigError(f"config.data.name={name!r}: {_first_line(error)}") from None
    features: Any = builder.info.features
    fields = list(features)
    if config.text_field not in fields:
        raise ConfigError(
            f"config.data.text_field={config.text_field!r}: not in {name!r}"
            f"{near(config.text_field, fields)}"
        )
    return builder


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def _check_network(config: DataConfig, builder: Any) -> None:
    """Find out in seconds what TFDS takes minutes to admit."""
    url = next(iter(builder.url_infos or ()), None)
    if url is None and type(builder).__module__.startswith("tensorflow_datasets."):
        url = builder.info.homepage  # a catalogue entry that does not list its files
    if not url or _reachable(url):
        return
    raise ConfigError(
        f"config.data.name={config.name!r}: must be downloaded, and {url} cannot be"
        " reached; data.name='english' needs no network, and data.files reads"
        " your own text"
    )


def _reachable(url: str) -> bool:
    """Whether a host answers at all; looking up its name can hang, so a thread asks."""
    answers: list[bool] = []

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=NETWORK_SECONDS).close()
        except urllib.error.HTTPError as refusal:
            refusal.close()  # a refusal is an answer
        except (OSError, ValueError):
            return
        answers.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(NETWORK_SECONDS)
    return bool(answers)


def _splits(builder: Any) -> tuple[str, str]:
    """Validation is the split of that name, else the test split, else a twentieth."""
    names = list(builder.info.splits)
    if "train" not in names:
        raise ConfigError(
            f"config.data.name={builder.name!r}: no split 'train' in {names}"
        )
    for name in ("validation", "test"):
        if name in names:
            return "train", name
    return "train[:95%]", "train[95%:]"


def _read(builder: Any, split: str, field: str) -> Documents:
    source = builder.as_data_source(split=split)
    if not len(source):
        raise ConfigError(f"data: {builder.info.full_name} has no document in {split}")
    return Documents(source, field, f"{builder.info.full_name}:{split}:{len(source)}")
