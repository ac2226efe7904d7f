"""Every token is scored once, with the context that its window gives it."""

import dataclasses
import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax import evaluate
from sparsejax.config import convert, to_dict
from sparsejax.data import ByteTokenizer
from sparsejax.data.sources import open_documents
from sparsejax.data.tokenizer_file import files_of
from sparsejax.interop import load_model, open_source
from sparsejax.nn import ModelConfig, Transformer
from tests.interop.checkpoints import config_of, tensors_of, write_folder
from tests.train import toy


@functools.cache
def tensors():
    return tensors_of("llama", config_of("llama", vocab_size=258))


@pytest.fixture
def folder(tmp_path):
    """A tiny checkpoint whose tokens are bytes."""
    config = config_of("llama", vocab_size=258)
    path = write_folder(tmp_path / "hf", config, tensors())
    for name, text in files_of(ByteTokenizer()).items():
        (path / name).write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("tokens", "window", "stride"), [(1, 8, 4), (8, 8, 4), (23, 8, 3)]
)
def test_windows_score_every_token_but_the_first_once(tokens, window, stride):
    parts = list(evaluate.windows(tokens, window=window, stride=stride))
    scored = [i for part in parts for i in range(part.first, part.stop)]
    assert scored == list(range(1, tokens))
    assert all(part.first > part.start for part in parts)
    assert all(part.stop - part.start <= window for part in parts)


@pytest.mark.parametrize("stride", [0, 8])
def test_a_stride_that_leaves_tokens_out_is_refused(stride):
    with pytest.raises(ValueError, match=f"stride={stride}: must be positive and"):
        list(evaluate.windows(20, window=8, stride=stride))


def test_bits_per_byte_are_those_of_windows_scored_one_by_one(folder):
    model, tokenizer = load_model(open_source(folder)), ByteTokenizer()
    texts = [b"the cat sat on the mat", b"a dog"]
    how = {"window": 12, "stride": 5}
    found = evaluate.score_text(model, tokenizer, texts, batch=3, **how)
    nats = 0.0
    logits = jax.jit(lambda model, ids: model.logits(model(ids).value))
    for text in texts:
        ids = np.insert(tokenizer.encode(text), 0, tokenizer.bos)
        for part in evaluate.windows(len(ids), **how):
            own = np.full(12, 257, np.int32)
            own[: part.stop - part.start] = ids[part.start : part.stop]
            scores = jax.nn.log_softmax(logits(model, jnp.asarray(own[None])))[0]
            for at in range(part.first, part.stop):
                nats -= float(scores[at - part.start - 1, ids[at]])
    size = sum(map(len, texts))
    assert found["bytes"] == found["tokens"] == size
    # 1e-5: sums of some thirty numbers in float32
    assert found["bits_per_byte"] == pytest.approx(nats / np.log(2) / size, rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(nats / size), rel=1e-5)


def test_a_model_that_knows_the_answer_is_right(folder, monkeypatch):
    model, tokenizer = load_model(open_source(folder)), ByteTokenizer()
    model.config = dataclasses.replace(model.config, context_length=None)

    def knows(model, tokens, weights, segments):
        del model, segments
        right = np.arange(len(tokens)) % 2 == 0
        nats = jnp.where(right, 0, weights.sum(axis=1))
        return evaluate.Scores(nats, jnp.asarray(right))

    monkeypatch.setattr(evaluate, "scored", knows)
    how = {"questions": 4, "batch": 2}
    rows = evaluate.score_tasks(model, tokenizer, ["needle"], [200, 300], **how)
    assert [row["accuracy"] for row in rows] == [0.5, 0.5]
    assert [row["answer_nats"] for row in rows] == [3, 3]  # half of six bytes


def test_the_command_reports_text_and_tasks(folder, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("One text.\n\n" * 3)
    (tmp_path / "b.txt").write_text("Another text, which is not much longer.")
    command = [f"--checkpoint={folder}", f"--data.files={tmp_path}/*.txt"]
    command += ["--window=12", "--stride=5", "--batch=3", "--mesh.data=1"]
    assert evaluate.main([*command, f"--json={tmp_path}/report.json"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["text"]["documents"] == 1
    assert 0 < report["text"]["bits_per_byte"] < 20
    assert "bits_per_byte" in capsys.readouterr().out


@pytest.fixture
def command(folder, tmp_path):
    """Score texts of many lengths, and a task that the model is long enough for."""
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_text("a dog " * (number % 5 + 2))
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 512
    (folder / "config.json").write_text(json.dumps(config))
    flags = ["--tasks", "needle", "--lengths", "200", "220", "--questions=2"]
    return [f"--checkpoint={folder}", f"--data.files={tmp_path}/*.txt", *flags]


WINDOWS = ["--window=12", "--stride=5", "--batch=8"]


def scores(report):
    """Give all numbers but times, in order."""
    text = {k: v for k, v in report["text"].items() if k != "seconds"}
    tasks = [row[k] for row in report["tasks"] for k in ("accuracy", "answer_nats")]
    return [*text.values(), *tasks]


@pytest.mark.parametrize("cut", [["fsdp=8"], ["data=2", "fsdp=2", "tensor=2"]])
def test_eight_devices_give_the_scores_of_one(command, tmp_path, cut):
    found = []
    for number, sizes in enumerate([["data=1"], ["data=8"], ["data=1", *cut]]):
        file = tmp_path / f"{number}.json"
        mesh = [f"--mesh.{size}" for size in sizes]
        assert evaluate.main([*command, *WINDOWS, *mesh, f"--json={file}"]) == 0
        found.append(scores(json.loads(file.read_text())))
    # 1e-5: sums in float32 in other orders
    np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=1e-5)


@pytest.fixture
def calls(monkeypatch):
    """Batches that are scored; one whose number is in ``calls.deadly`` is not."""
    score, calls = evaluate.scored, SimpleNamespace(count=0, deadly=())

    def counted(*given):
        calls.count += 1
        if calls.count in calls.deadly:
            raise KeyboardInterrupt
        return score(*given)

    monkeypatch.setattr(evaluate, "scored", counted)
    monkeypatch.setattr(evaluate, "EVERY", 1)
    return calls


def test_a_killed_evaluation_goes_on_where_it_stood(command, tmp_path, calls):
    files = [tmp_path / "whole.json", tmp_path / "killed.json"]
    whole, killed = ([*command, *WINDOWS, f"--json={x}"] for x in files)
    assert evaluate.main(whole) == 0
    total, calls.count = calls.count, 0
    calls.deadly = (3, total + 1)  # in the text, and at the last task
    for _ in calls.deadly:
        with pytest.raises(KeyboardInterrupt):
            evaluate.main(killed)
        assert not json.loads(files[1].read_text())["finished"]
    assert evaluate.main(killed) == 0
    assert calls.count == total + len(calls.deadly)
    whole, killed = (json.loads(file.read_text()) for file in files)
    assert scores(whole) == scores(killed)
    assert killed["finished"]


def test_only_the_same_command_goes_on(command, folder, tmp_path, calls):
    command = [*command, *WINDOWS, f"--json={tmp_path}/report.json"]
    (folder / "more.json").write_text("{}")
    for flags in ([], ["--stride=6"], ["--documents=3"], ["--mesh.data=1"]):
        for expected in (True, False):
            calls.count = 0
            assert evaluate.main([*command, *flags]) == 0
            assert (calls.count > 0) == expected
    (folder / "more.json").write_text("{ }")  # another model, for all that is known
    assert evaluate.main([*command, *flags]) == 0
    assert calls.count


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to measure"),
        (["--tasks", "needles"], "did you mean 'needle'"),
        (["--tasks", "needle"], "256 tokens at a time: the model is made for 64"),
        (["--tasks", "needle", "--questions=0"], "--questions=0: must be at least 1"),
        (["--tasks", "needle", "--batch=0"], "--batch=0: must be at least 1"),
        (["--tasks", "needle", "--json=no/a"], "--json='no/a': must be a file in a"),
        (["--lengths", "-5"], "--lengths=-5: must be at least 1"),
        (["--documents=-1"], "--documents=-1: at least 0"),
        (["--documents=1", "--batch=12"], "--batch=12: must be divisible by data x fs"),
        (["--documents=1", "--mesh.fsdp=0"], "--mesh.fsdp=0: must be positive, or -1"),
        (["--documents=1", "--mesh.data=1", "--mesh.tensor=8"], "mesh.tensor=8: must"),
    ],
)
def test_what_cannot_be_measured_is_named(folder, capsys, flags, message):
    command = [f"--checkpoint={folder}", "--documents=0", *flags]
    assert evaluate.main(command) == 2
    assert message in capsys.readouterr().err


def test_padding_visits_no_expert():
    """Where experts drop what is too much, padding would come before later rows."""
    ffn = {"kind": "moe", "experts": 2, "per_token": 1, "hidden": 8}
    ffn |= {"capacity_factor": 0.7}
    values = {"depth": 1, "width": 16, "heads": 2, "kv_heads": 1, "ffn": ffn}
    values["attention"] = {"block_q": 8, "block_kv": 8}
    model = Transformer(convert(ModelConfig, values), 258, rngs=nnx.Rngs(0))
    weights = np.ones(4, np.float32)
    rows = [evaluate.Row(np.arange(4) + 60 * n, weights) for n in range(3)]
    how = {"length": 17, "batch": 3}
    found = [
        [nats for _, nats, _ in evaluate._score(model, rows, pad=pad, **how)]
        for pad in range(250, 258)
    ]
    assert all(nats == found[0] for nats in found)


def test_a_run_is_asked_of_what_it_has_held_out(tmp_path, monkeypatch):
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text(f"Text {number} says little.")
    data = {"files": [str(tmp_path / "*.txt")], "cache_dir": str(tmp_path / "cache")}
    config = toy.toy(data=data | {"validation_every": 3})
    (tmp_path / "config.json").write_text(json.dumps({"config": to_dict(config)}))
    read = []
    tokenizer = SimpleNamespace(fingerprint="bytes")
    monkeypatch.setattr(evaluate, "load_any", lambda *_, **__: (None, tokenizer))
    monkeypatch.setattr(evaluate, "score_text", lambda _, __, x, **how: read.extend(x))
    monkeypatch.setattr(evaluate, "_table", str)
    own = open_documents(config.data).validation
    for named in ([], [f"--data.files={tmp_path}/*.txt"]):
        assert evaluate.main([f"--workdir={tmp_path}", *named]) == 0
        assert read == [own[n] for n in range(len(own))]
        read.clear()


def test_a_model_has_to_be_given(capsys):
    assert evaluate.main([]) == 2
    assert "give one of --workdir=RUN and --checkpoint" in capsys.readouterr().err
