"""Preparing text once, and refusing at once what cannot be had."""

import dataclasses
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from sparsejax.config import ConfigError, FieldError, convert
from sparsejax.data import DataConfig, open_data, sources
from sparsejax.data.cache import cache_root, locked, write_atomically
from sparsejax.data.corpora import from_files

ROOT = Path(__file__).parents[2]


class SmallTextForTests(tfds.core.GeneratorBasedBuilder):
    """A text data set of TFDS that needs no download."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        text, label = tfds.features.Text(), tfds.features.Text()
        features = tfds.features.FeaturesDict({"content": text, "label": label})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(100),
            "test": self._generate_examples(7),
        }

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"content": f"document {i} of {count}", "label": "x"}


class OneSplitForTests(SmallTextForTests):
    """The same, with nothing held out."""

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(100)}


@pytest.fixture
def config(tmp_path):
    return DataConfig(seq_len=16, batch_size=4, cache_dir=str(tmp_path))


def named(config, name, field="text"):
    return dataclasses.replace(config, name=name, text_field=field)


def files_under(folder):
    return sorted(p for p in Path(folder).rglob("*") if p.is_file())


def test_a_tfds_text_is_read_by_name_and_field(config):
    data = open_data(named(config, "small_text_for_tests", "content"), seed=0)
    assert data.documents == {"train": 100, "validation": 7}
    text = data.tokenizer.decode(next(data.train).tokens.reshape(-1))
    assert text.startswith("document ")
    assert " of 1" in text
    held = data.tokenizer.decode(data.evaluation(1)[0].tokens.reshape(-1))
    assert "of 7" in held
    data.close()
    again = open_data(named(config, "small_text_for_tests", "content"), seed=0)
    assert again.fingerprint == data.fingerprint


def test_a_tfds_text_without_a_second_split_holds_out_a_twentieth(config):
    data = open_data(named(config, "one_split_for_tests", "content"), seed=0)
    assert data.documents == {"train": 95, "validation": 5}


@pytest.mark.parametrize(
    ("name", "field", "message"),
    [
        ("englihs", "text", r"data.name='englihs': no such data set; .* 'english'"),
        ("lm2b", "text", "did you mean .*'lm1b'"),
        ("zzzzzzzzzz", "text", "no such data set; 'english' needs no download"),
        ("huggingface:some/thing", "text", "no such data set"),
        ("lm1b/nope", "text", "data.name='lm1b/nope': "),
        ("lm1b", "words", "data.text_field='words': not in 'lm1b'.*text"),
        ("small_text_for_tests", "contents", "did you mean 'content'"),
    ],
)
def test_a_wrong_name_is_refused_before_anything_is_written(
    config, name, field, message
):
    start = time.monotonic()
    with pytest.raises(ConfigError, match=message):
        open_data(named(config, name, field), seed=0)
    assert time.monotonic() - start < 5
    assert not list(Path(config.cache_dir).rglob("*.array_record*"))


@pytest.fixture(params=["refuses", "hangs"])
def no_network(request, monkeypatch):
    def refuse(*args, **kwargs):
        if request.param == "hangs":
            time.sleep(4)
        raise socket.gaierror("no such host")

    monkeypatch.setattr(sources, "NETWORK_SECONDS", 0.5)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in [n for n in os.environ if n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("lm1b", "text"),
        ("wikipedia/20230601.en", "text"),
        ("gigaword", "document"),
        ("pg19", "book_text"),  # the catalogue does not list its files
    ],
)
def test_a_download_without_a_network_is_refused_in_seconds(
    config, no_network, name, field
):
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"cannot be reached; data.name='english'"):
        open_data(named(config, name, field), seed=0)
    assert time.monotonic() - start < 5


def test_a_data_set_that_fails_to_prepare_says_which(config, monkeypatch):
    def fail(self, count):
        raise RuntimeError("no Beam here\nsecond line")

    monkeypatch.setattr(SmallTextForTests, "_generate_examples", fail)
    with pytest.raises(ConfigError, match=r"small_text_for_tests.*no Beam here$"):
        open_data(named(config, "small_text_for_tests", "content"), seed=0)


def test_every_document_is_in_one_split_and_comes_back_whole(make_config):
    config = make_config()
    splits = sources.open_documents(config)
    corpus = from_files(config.files, text_field="body", validation_every=4)
    expected = sorted(document.text.encode() for document in corpus.documents())
    found = [documents[i] for documents in splits for i in range(len(documents))]
    assert sorted(found) == expected
    assert len(expected) > 40


def test_text_is_prepared_once(open_small, cache):
    open_small()
    before = [(p, p.stat().st_mtime_ns) for p in files_under(cache) if p.suffix]
    open_small(seed=1)
    after = [(p, p.stat().st_mtime_ns) for p in files_under(cache) if p.suffix]
    assert before == after


def test_changed_text_is_prepared_again(config, tmp_path):
    def tokens_of(content):
        (tmp_path / "a.txt").write_text(content)
        (tmp_path / "b.txt").write_text(content + "!")
        files = dataclasses.replace(config, files=(str(tmp_path / "*.txt"),))
        return open_data(files, seed=0).evaluation(1)[0].tokens

    assert (tokens_of("first") != tokens_of("other")).any()


def _open(config):
    return open_data(config, seed=0).documents


def test_two_processes_prepare_at_once(make_config, tmp_path):
    config = make_config(cache_dir=str(tmp_path), tokenizer="bpe")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.map(_open, [config, config], chunksize=1)
    assert first == second
    assert not list(tmp_path.rglob("incomplete*"))
    assert not list(tmp_path.rglob("*draft*"))


def test_what_a_killed_process_left_is_cleared(open_small, make_config, tmp_path):
    config = make_config(cache_dir=str(tmp_path))
    name = Path(sources.text_builder(sources._corpus(config), str(tmp_path)).data_path)
    draft = tmp_path / "tfds" / name.parent.relative_to(tmp_path) / "incomplete.X_1.0.0"
    draft.mkdir(parents=True)
    (draft / "part").write_text("half a record")
    documents = open_small(cache_dir=str(tmp_path)).documents
    assert documents == open_small().documents
    assert not draft.exists()


def test_a_process_killed_while_preparing_does_no_harm(make_config, tmp_path):
    code = """
import os, sys, tensorflow_datasets as tfds
from sparsejax.data import DataConfig, open_data
from sparsejax.data.builder import TextBuilder
whole = TextBuilder._generate_examples
def half(self, *args):
    for i, example in enumerate(whole(self, *args)):
        if i == 5: os.kill(os.getpid(), 9)
        yield example
TextBuilder._generate_examples = half
open_data(DataConfig(**eval(sys.argv[1])), seed=0)
"""
    config = make_config(cache_dir=str(tmp_path))
    arguments = repr(dataclasses.asdict(config))
    done = subprocess.run(
        [sys.executable, "-c", code, arguments], cwd=ROOT, check=False
    )
    assert done.returncode == -9
    assert list(tmp_path.rglob("incomplete*"))
    assert sum(open_data(config, seed=0).documents.values()) > 40
    assert not list(tmp_path.rglob("incomplete*"))


def test_the_cache_is_where_it_was_asked_to_be(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEJAX_CACHE", str(tmp_path / "env"))
    assert cache_root(str(tmp_path)) == tmp_path
    assert cache_root(None) == tmp_path / "env"
    monkeypatch.delenv("SPARSEJAX_CACHE")
    assert cache_root(None) == Path.home() / ".cache/sparsejax"


def test_a_lock_is_held_by_one_at_a_time(tmp_path):
    code = "from sparsejax.data.cache import *; import sys, pathlib\n"
    code += "with locked(pathlib.Path(sys.argv[1])): print('held')"
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with locked(tmp_path / "lock"):
        waiting = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.communicate(timeout=1.5)
    assert waiting.communicate(timeout=60)[0] == b"held\n"


def test_a_file_appears_whole(tmp_path):
    write_atomically(tmp_path / "deep" / "a.json", "é")
    assert (tmp_path / "deep" / "a.json").read_text(encoding="utf-8") == "é"
    assert len(files_under(tmp_path)) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 0}, "seq_len=0: must be at least 1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"threads": 0}, "threads=0"),
        ({"prefetch": -1}, "prefetch=-1: must not be negative"),
        ({"validation_every": 1}, "validation_every=1: must be at least 2"),
        ({"vocab_size": 257}, "vocab_size=257: must be at least 258"),
        ({"vocab_size": 8000}, "vocab_size=8000: has no effect with tokenizer='bytes'"),
        ({"name": ""}, "name='': must not be empty"),
        ({"name": "lm1b", "files": ("a.txt",)}, "name='lm1b': contradicts files"),
        ({"name": "files"}, r"files=\(\): must name at least one"),
    ],
)
def test_a_config_that_cannot_be_read_is_refused(config, changes, message):
    with pytest.raises(FieldError, match=message):
        dataclasses.replace(config, **changes)


def test_a_config_file_may_give_one_glob_for_many():
    values = {"seq_len": 8, "batch_size": 2, "files": "a/*.txt"}
    assert convert(DataConfig, values).files == ("a/*.txt",)


def test_an_unknown_tokenizer_is_refused():
    values = {"seq_len": 8, "batch_size": 2, "tokenizer": "words"}
    with pytest.raises(ConfigError, match=r"tokenizer='words': expected 'bytes' or"):
        convert(DataConfig, values)


def test_reading_imports_no_tensorflow_warns_of_nothing_and_exits_clean(make_config):
    code = """
import sys
from sparsejax.data import DataConfig, open_data
assert not {"grain", "tensorflow_datasets"} & set(sys.modules), "import is not lazy"
data = open_data(DataConfig(**eval(sys.argv[1])), seed=0)
next(data.train), data.evaluation(1)
assert "tensorflow" not in sys.modules
"""
    arguments = repr(dataclasses.asdict(make_config()))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
