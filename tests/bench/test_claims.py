"""The study of claims: its runs are what it says, and verdicts follow intervals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.bench import claims, perceptron
from sparsejax.bench.perceptron import Data, Run
from sparsejax.bench.table import read_rows
from sparsejax.config import FieldError
from sparsejax.masked import SCHEDULES

RATES = {"digits": 1e-2, "bytes": 3e-3}


def test_methods_of_a_comparison_keep_equally_many_weights():
    found = claims.settings(RATES)
    assert len({claims.mark(run, 0) for run in found.values()}) >= len(found) - 2
    for task in perceptron.TASKS:
        for names in (("static", "set", "rigl"), ("ste", "sr_ste", "mask_decay")):
            size = "5%" if "set" in names else "1:16"
            plans = [found[f"{name}, {size}, {task}"].masked for name in names]
            assert len({plan.density for plan in plans}) == 1
            assert len({plan.allocation for plan in plans}) == 1


@pytest.mark.parametrize("density", claims.AVERAGES)
def test_dense_networks_have_the_average_weights_of_pruned_ones(density):
    plan = claims.settings(RATES)[f"journey to {density:.0%}"].masked
    last, total = 1.0, 0.0
    for step in range(claims.STEPS["bytes"]):
        due = plan.begin <= step <= plan.end and (step - plan.begin) % plan.every == 0
        if due:
            last = float(SCHEDULES["geometric"](step, plan.ramp))
        total += last / claims.STEPS["bytes"]
    assert claims._average(density) == pytest.approx(total, rel=1e-3)
    width = claims.settings(RATES)[f"dense for {density:.0%}"].hidden
    share = perceptron.weights("bytes", width) / perceptron.weights("bytes", 256)
    assert share == pytest.approx(total, rel=5e-3)


@pytest.mark.parametrize(
    ("mean", "half", "margin", "verdict"),
    [
        (1.0, 0.5, None, "holds"),
        (-1.0, 0.5, None, "is contradicted"),
        (0.2, 0.5, None, "open"),
        (0.3, 0.5, 1.0, "holds"),
        (-0.7, 0.5, 1.0, "open"),
        (1.7, 0.5, 1.0, "is contradicted"),
    ],
)
def test_a_verdict_is_what_the_interval_allows(mean, half, margin, verdict):
    assert (
        claims.Found("rigl", "claim", mean, half, "points", margin).verdict == verdict
    )


def test_claims_are_tested_seed_by_seed_where_there_are_two(key):
    rows = {name: {} for name in claims.settings(RATES)}
    assert list(claims.findings(rows)) == []
    for name, accuracy in (("rigl", 0.97), ("set", 0.95)):
        rows[f"{name}, 5%, digits"] = {
            seed: {"task": "digits", "accuracy": str(accuracy + 0.01 * seed)}
            for seed in range(3)
        }
        rows[f"{name}, 5%, bytes"] = {
            seed: {"task": "bytes", "loss": str(3 - accuracy)} for seed in range(3)
        }
    digits, text = claims.findings(rows)
    assert digits.method == "rigl"
    assert digits.claim == "`rigl` above `set`, 5%, digits"
    assert digits.mean == pytest.approx(2.0)
    assert text.mean == pytest.approx(100 * (2.05 / 2.03 - 1))
    assert {digits.verdict, text.verdict} == {"holds"}


def test_a_run_counts_its_weights_and_is_a_function_of_its_key():
    plan = claims.settings(RATES)["sr_ste, 1:8, digits"].masked
    run = Run(task="digits", hidden=16, steps=3, learning_rate=1e-2, masked=plan)
    x = jax.random.normal(jax.random.key(0), (32, 64))
    y = jnp.arange(32, dtype="int32") % 10
    train = perceptron.trainer(run)
    first, again = (train(jax.random.key(1), Data(x, y, x, y)) for _ in range(2))
    assert first.nonzero == first.average == (64 * 16 + 16 * 16) // 8 + 160
    assert first.loss == again.loss
    assert 0 <= first.accuracy <= 1


def test_each_seed_holds_out_another_third_of_the_digits():
    pytest.importorskip("sklearn")
    one, other = (perceptron.digits(seed) for seed in (0, 1))
    assert one.inputs.shape == (1198, 64)
    assert one.held_inputs.shape == (599, 64)
    assert np.unique(one.labels).tolist() == [*range(10)]
    assert (one.held_labels != other.held_labels).any()


def test_the_study_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr("sparsejax.bench.table.RESULTS", tmp_path)
    ran = []

    def train(key, data):
        ran.append(key)
        return perceptron.Trained(*map(jnp.float32, (0.5, 0.9, 10, 12)))

    monkeypatch.setattr(claims, "_data", lambda task, seed: None)
    run = claims.settings(RATES)["dense"]
    for seed in (0, 1, 0, 1, 2):
        claims.measured("dense", run, seed, train)
    assert len(ran) == 3
    rows = claims.by_setting(claims.read_rows("claims"), {"dense": run}, range(3))
    (line,) = claims.summary(rows)
    assert line["accuracy"] == "90 ± 0"
    assert (line["weights"], line["average"]) == ("10", "12")


def test_a_run_of_no_steps_is_refused():
    with pytest.raises(FieldError, match="steps=0"):
        Run(task="digits", hidden=16, steps=0, learning_rate=1e-2)
    with pytest.raises(FieldError, match=r"task='digit'.*did you mean 'digits'"):
        Run(task="digit", hidden=16, steps=1, learning_rate=1e-2)


def test_the_verdicts_that_are_kept_are_those_of_the_rows():
    kept = [
        {k: row[k] for k in ("method", *claims.COLUMNS)}
        for row in read_rows("verdicts")
    ]
    assert kept == claims.verdicts(read_rows("claims"))
