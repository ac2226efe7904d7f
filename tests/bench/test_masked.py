import csv
import time

import pytest

from sparsejax.bench import masked as bench
from sparsejax.bench import table
from sparsejax.config import convert
from sparsejax.masked import MaskedConfig


def test_the_table_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    for name, size in (("ROWS", 64), ("WIDTH", 32), ("BLOCK", 8)):
        monkeypatch.setattr(bench, name, size)
    monkeypatch.setattr(bench, "LAYER", (16, 16, 16))
    for name in ("step", "blast"):
        monkeypatch.setattr(bench, name, lambda _: lambda: time.sleep(1e-4))
    assert bench.main(["--rounds=1", "--densities", "0.25"]) == 0
    with (tmp_path / "masked.csv").open() as file:
        rows = list(csv.DictReader(file))
    works = [(row["work"], row["pass"]) for row in rows]
    products = [("product", name) for name in bench.PASSES]
    layers = [("feed-forward", name) for name in bench.PASSES]
    steps = [(f"step, {x}", "step") for x in (*bench.STEPS, "live blocks")]
    assert works == [*products, ("fan-in", "forward"), *layers, *steps]
    assert all(float(row["dense_ratio"]) > 0 for row in rows)
    assert "| product | 0.25 | forward |" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(bench.STEPS))
def test_the_plans_of_the_steps_are_ones_that_run(name):
    plan = convert(MaskedConfig, bench.STEPS[name])
    assert (plan.begin == 0) == ("RigL" in name)


@pytest.mark.parametrize("products", ["blocks", "dense"])
def test_the_step_with_live_blocks_has_the_masks_of_the_end(products, monkeypatch):
    seen = []

    def step(plan, values):
        seen.append(plan)
        return lambda: None

    monkeypatch.setattr(bench, "step", step)
    bench.blast(products)
    plan = convert(MaskedConfig, seen[0])
    assert plan.products == products
    assert plan.initial == plan.density == bench.FEW
