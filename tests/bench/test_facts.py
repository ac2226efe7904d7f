"""The study of facts: how they are cut, asked for, and compared at equal FLOPs."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.attention import AttentionConfig
from sparsejax.bench import facts
from sparsejax.bench.facts import COMMON, STUDY, Fact, cut, interval, recall
from sparsejax.config import convert, override, read
from sparsejax.nn.config import GatedConfig, ModelConfig
from sparsejax.nn.cost import cost
from sparsejax.nn.generate import generate
from sparsejax.nn.transformer import Transformer
from sparsejax.train.config import Config

TOKENIZER = types.SimpleNamespace(
    bos=256, pad=257, encode=lambda text: np.frombuffer(text.encode("latin-1"), "uint8")
)


def test_sentences_are_cut_before_what_they_tell():
    cases = {
        "The capital of Peru is Lima.\n": ("The capital of Peru is ", "Lima.\n"),
        "More precisely, Peru is in South America.\n": (
            "More precisely, Peru is in ",
            "South America.\n",
        ),
        "A person from Peru is called Peruvian.\n": (
            "A person from Peru is called ",
            "Peruvian.\n",
        ),
    }
    for sentence, parts in cases.items():
        assert cut(sentence) == parts
    with pytest.raises(ValueError, match="'Lima\\\\n' has no ' is '"):
        cut("Lima\n")


@pytest.mark.slow
def test_what_a_model_says_is_recalled_and_one_other_byte_is_not():
    config = ModelConfig(
        depth=1,
        width=16,
        heads=2,
        kv_heads=1,
        attention=AttentionConfig(block_q=32, block_kv=32),
        ffn=GatedConfig(hidden=16),
    )
    model = Transformer(config, 258, rngs=nnx.Rngs(0))
    starts = [f"The number of {x} is " for x in ("one", "five", "fifteen")]
    asked = []
    for start in starts:
        ids = jnp.array([[256, *TOKENIZER.encode(start)]], jnp.int32)
        end = generate(model, ids, tokens=6, key=jax.random.key(0), temperature=0.0)
        assert (end < 256).all()
        asked.append(Fact(start, bytes(np.asarray(end[0], "uint8")).decode("latin-1")))
    assert recall(model, TOKENIZER, asked) == 1
    first = asked[0]
    other = first._replace(end=first.end[:3] + chr(ord(first.end[3]) ^ 1) + "rest")
    assert recall(model, TOKENIZER, [other, *asked[1:]]) == pytest.approx(2 / 3)


def test_models_are_compared_at_equal_flops():
    flops = {}
    for name, (config, overrides) in STUDY.items():
        values = read(f"configs/{config}.py")
        for flag in (*COMMON, *overrides):
            path, _, text = flag.removeprefix("--config.").partition("=")
            override(Config, values, path, text)
        model = convert(Config, values).model
        make = lambda model=model: Transformer(model, 258, rngs=nnx.Rngs(0))  # noqa: E731
        params = nnx.state(nnx.eval_shape(make), nnx.Param)
        flops[name] = cost(model, params, length=256).useful_flops
    assert max(flops.values()) < 1.05 * min(flops.values()), flops


def test_an_interval_is_students():
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert np.isnan(interval([1.0])[1])


def test_a_study_goes_on_where_it_was_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sparsejax.bench.table.RESULTS", tmp_path)
    ran = []

    def run(name, seed, more):
        ran.append((name, seed))
        row = {"model": name, "seed": seed, "guessed": 0.05}
        row["recalled"] = 0.5 + 0.1 * seed + 0.2 * (name == "dense")
        return row | {"parameters_total": 1000, "useful_flops_per_token": 10**6}

    monkeypatch.setattr(facts, "run", run)
    facts.main(["--models", "dense", "--seeds", "2"])
    facts.main(["--models", "dense", "peer, 1k", "--seeds", "2"])
    assert len(ran) == len(set(ran)) == 4
    rows = [x for x in capsys.readouterr().out.splitlines() if x.startswith("| ")]
    assert rows[-2].startswith("| dense | 75.0 ± 63.5 | 5.0 | 1,000 | 1.00 |")
    assert rows[-1].startswith("| peer, 1k | 55.0 ±")
    assert (tmp_path / "facts.png").stat().st_size > 1000
