"""The study of forgetting: what is asked, what has moved, how rows become a table."""

import json

import pytest
from flax import nnx

from sparsejax.bench import forgetting
from sparsejax.bench.facts import Fact
from sparsejax.bench.forgetting import WAYS, flags_of, moved, sentences
from sparsejax.bench.runs import fingerprint_of


def test_new_facts_are_asked_for_but_the_one_that_is_held_out(tmp_path):
    new = [Fact(f"The number of {x} is ", f"{x}.\n") for x in range(20)]
    path, asked = sentences(tmp_path, new)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(x)["text"] for x in lines] == ["".join(fact) for fact in new]
    assert len(asked) == 19
    assert set(asked) < set(new)


def test_what_has_moved_is_counted_in_weights():
    class Two(nnx.Module):
        def __init__(self, value):
            self.one = nnx.Param(nnx.initializers.ones(None, (3, 4)))
            self.two = nnx.Param(self.one[...].at[0, :2].set(value))
            self.rest = nnx.BatchStat(nnx.initializers.ones(None, (5,)) * value)

    assert moved(Two(1.0), Two(1.0)) == 0
    assert moved(Two(1.0), Two(2.0)) == 2 / 24


@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_a_config_and_every_rate_another(way, tmp_path):
    file = tmp_path / "new.jsonl"
    marks = {
        fingerprint_of("memory", 0, [*forgetting.BASE, *flags_of(way, rate, file)])
        for rate in WAYS[way].rates
    }
    assert len(marks) == len(WAYS[way].rates)


def test_a_study_goes_on_where_it_was_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sparsejax.bench.table.RESULTS", tmp_path)
    ran = []

    def run(base, name, rate, seed):
        ran.append((name, rate, seed))
        row = {"way": name, "rate": rate, "seed": seed, "moved": 0.25}
        row |= {"new_before": 0.0, "old_before": 0.8, "new_after": 0.9}
        return row | {"old_after": 0.5 + 0.1 * seed}

    monkeypatch.setattr(forgetting, "run", run)
    forgetting.main(["--seeds", "1"])
    forgetting.main(["--seeds", "2"])
    count = sum(len(way.rates) for way in WAYS.values())
    assert len(ran) == len(set(ran)) == 2 * count
    rows = [x for x in capsys.readouterr().out.splitlines() if x.startswith("| ")]
    rows = rows[-count - 1 :]
    assert rows[0].startswith("| nothing |  | 0.0 ± 0.0 | 80.0 ± 0.0 | 0.00 | 2 |")
    assert rows[1].startswith(f"| {next(iter(WAYS))} | ")
    assert rows[1].endswith("| 90.0 ± 0.0 | 55.0 ± 63.5 | 25.00 | 2 |")
    assert (tmp_path / "forgetting.png").stat().st_size > 1000
