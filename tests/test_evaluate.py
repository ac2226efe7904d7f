"""Every token is scored once, with the context that its window gives it."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import evaluate
from sparsejax.data import ByteTokenizer
from sparsejax.data.tokenizer_file import files_of
from sparsejax.interop import load_model, open_source
from tests.interop.checkpoints import config_of, tensors_of, write_folder


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

    def knows(model, tokens, weights):
        del model
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
    command += ["--window=12", "--stride=5", "--batch=3"]
    assert evaluate.main([*command, f"--json={tmp_path}/report.json"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["text"]["documents"] == 1
    assert 0 < report["text"]["bits_per_byte"] < 20
    assert "bits_per_byte" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to measure"),
        (["--tasks", "needles"], "did you mean 'needle'"),
        (["--tasks", "needle"], "256 tokens at a time: the model is made for 64"),
    ],
)
def test_what_cannot_be_measured_is_named(folder, capsys, flags, message):
    command = [f"--checkpoint={folder}", "--documents=0", *flags]
    assert evaluate.main(command) == 2
    assert message in capsys.readouterr().err


def test_a_model_has_to_be_given(capsys):
    assert evaluate.main([]) == 2
    assert "give one of --workdir=RUN and --checkpoint" in capsys.readouterr().err
