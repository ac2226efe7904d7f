"""The study of routers: equal budgets, runs that are kept, equivalence."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from sparsejax.bench import routers
from sparsejax.bench.equivalence import tost
from sparsejax.bench.routers import STUDY, TABLES, overrides_of, summary
from sparsejax.config import convert, override, read
from sparsejax.moe import ROUTERS
from sparsejax.moe.routers import LEAKS
from sparsejax.train.config import Config
from tests.sources import ROOT


def test_two_one_sided_tests_are_those_of_scipy():
    generator = np.random.default_rng(0)
    a, b = generator.normal(3.0, 0.02, 5), generator.normal(3.01, 0.05, 5)
    lower = stats.ttest_rel(a + 0.1, b, alternative="greater").pvalue
    upper = stats.ttest_rel(a - 0.1, b, alternative="less").pvalue
    found = tost(list(a - b), margin=0.1)
    np.testing.assert_allclose(found, max(lower, upper), rtol=1e-6)


def test_near_and_certain_is_equivalent_and_far_or_uncertain_is_not():
    assert tost([0.01, -0.01, 0.0], margin=0.05) < 0.05
    assert tost([0.1, 0.11, 0.09], margin=0.05) > 0.95
    assert tost([-0.5, 0.0, 0.5], margin=0.05) > 0.3
    assert tost([0.0, 0.0], margin=0.1) == 0
    with pytest.raises(ValueError, match=r"1 differences.*run more seeds"):
        tost([1.0], margin=0.1)


def ffn_of(router):
    values = read(ROOT / "configs" / "moe.py")
    for flag in overrides_of(router):
        path, _, text = flag.removeprefix("--config.").partition("=")
        override(Config, values, path, text)
    return convert(Config, values).model.ffn


@pytest.fixture
def tables(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    routers.PLACE.mkdir(parents=True)
    for kind in TABLES.values():
        np.save(routers.PLACE / f"{kind}.npy", np.arange(258) % 4)


def test_every_router_of_a_causal_model_is_studied():
    assert {name.partition(":")[0] for name in STUDY} == set(ROUTERS) - set(LEAKS)


@pytest.mark.parametrize("router", STUDY)
def test_a_router_is_studied_at_an_equal_budget(router, tables):
    ffn = ffn_of(router)
    matrices = 3 if ffn.gated else 2
    whole = matrices * (ffn.experts * ffn.hidden + ffn.shared)
    active = matrices * (ffn.hops * ffn.per_token * ffn.hidden + ffn.shared)
    assert (whole, active) == (3 * 8 * 192, 3 * 2 * 192)


def test_tables_are_made_once_of_a_dense_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    @contextlib.contextmanager
    def trained(name, seed, overrides):
        asked.append(name)
        yield Path("run")

    def write(workdir, out, *, kind, experts, batches):
        np.save(out, np.zeros(3, int))

    monkeypatch.setattr(routers, "trained", trained)
    monkeypatch.setattr(routers, "write_table", write)
    routers.write_tables([])
    routers.write_tables(["balanced", "clustered"])
    routers.write_tables(["clustered", "balanced"])
    assert asked == ["dense"]
    assert {x.name for x in routers.PLACE.iterdir()} == {
        "balanced.npy",
        "clustered.npy",
    }


def test_a_study_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sparsejax.bench.table.RESULTS", tmp_path)
    ran = []

    def run(router, seed, more):
        ran.append((router, seed))
        row = {"router": router, "seed": seed}
        loss = 2 + 0.001 * seed + 0.1 * (router == "hash_random")
        return row | {"eval_loss": loss, "load_violation": 0.5, "visits": 1}

    monkeypatch.setattr(routers, "run", run)
    few = ["--routers", "softmax_top_k", "hash_random", "switch"]
    routers.main([*few[:2], "--seeds", "2"])
    routers.main([*few, "--seeds", "3"])
    assert len(ran) == len(set(ran)) == 9
    table = capsys.readouterr().out
    assert "| `hash_random` | 2.101 | 0.50 |  | 1.00 | +0.100 | 1.000 |" in table


def test_a_summary_of_one_seed_tests_nothing():
    row = {"seed": "0", "eval_loss": 2.0, "load_violation": 0, "dead_experts": 0}
    lines = summary([row | {"router": "switch"}, row | {"router": "softmax_top_k"}])
    assert all(line["p"] == "" for line in lines)
