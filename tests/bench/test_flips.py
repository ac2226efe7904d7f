"""Flips against a dense run's: its masks look on, and the quotient is by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.bench import flips
from sparsejax.bench.runs import _path
from sparsejax.bench.table import ROOT
from sparsejax.config import convert, override, read
from sparsejax.masked import effective, masks_of
from sparsejax.train.config import Config
from tests.masked.networks import DOWN, TX, UP, network, run


def test_a_dense_run_is_followed_by_masks_that_it_never_applies(key):
    values = read(ROOT / _path(flips.NAME))
    for flag in (*flips.OFTEN, *flips.LOOKING_ON, "--config.masked.every=2"):
        path, _, text = flag.removeprefix("--config.").partition("=")
        override(Config, values, path, text)
    plan = convert(Config, values).masked
    seen = run(TX["adamw"], plan, network(key), 6)
    for params, state in seen:
        used = effective(params, state, plan)
        jax.tree.map(np.testing.assert_array_equal, used, params)
    first, last = (masks_of(state) for _, state in (seen[0], seen[-1]))
    for path in (UP, DOWN):
        assert float(jnp.mean(last[path][...])) == 0.5
    assert any((first[p][...] != last[p][...]).any() for p in (UP, DOWN))


def test_factors_are_flips_over_those_of_the_dense_run():
    lines = [{"step": s, "masked/flip_rate": 0.01 * s} for s in (5, 90, 95)]
    assert flips.flips(lines) == pytest.approx(10 * (0.05 + 0.9) / 2)
    rows = [{"decay": d, "flips": x} for d, x in (("0.0", "0.03"), ("dense", "0.02"))]
    assert [row["factor"] for row in flips.factors(rows)] == ["1.50", "1.00"]
    assert flips.factors(rows[:1])[0]["factor"] == ""
