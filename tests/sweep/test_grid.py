"""Axes and points: what is combined, what is derived, what is refused."""

import pytest

from sparsejax.config import ConfigError
from sparsejax.sweep import (
    Choice,
    Sweep,
    axis,
    iso_flops,
    iso_parameters,
    planned_cost,
    points,
    product,
    token_budgets,
    variants,
    zipped,
)
from tests.sweep.small import base, get_sweep

WIDTHS, DEPTHS = axis("model.width", [16, 32]), axis("model.depth", [1, 2])


def sweep(axes, **options):
    return points(Sweep(base=base(), axes=axes, **options))


def test_a_product_has_every_pair_and_a_zip_has_partners():
    every = [c.changes for c in product(WIDTHS, DEPTHS)]
    assert [(*c.values(),) for c in every] == [(16, 1), (16, 2), (32, 1), (32, 2)]
    partners = [c.labels for c in zipped(WIDTHS, DEPTHS)]
    assert partners == [{"width": 16, "depth": 1}, {"width": 32, "depth": 2}]


def test_points_have_their_own_configs_seeds_and_fingerprints():
    found = sweep(product(WIDTHS, DEPTHS), seeds=(0, 1))
    assert len({p.fingerprint for p in found}) == len(found) == 8
    assert {p.config.model.width for p in found} == {16, 32}
    assert [p.config.seed for p in found[:2]] == [0, 1]
    assert [p.fingerprint for p in sweep(product(WIDTHS, DEPTHS))] == [
        p.fingerprint for p in found[::2]
    ]


def test_a_variant_sets_several_fields_under_a_name():
    experts = {"kind": "moe", "experts": 4, "per_token": 2, "hidden": 8}
    axes = variants("kind", {"dense": {}, "routed": {"model.ffn": experts}})
    dense, routed = sweep(axes)
    assert dense.labels == {"kind": "dense"}
    assert dense.config.model.ffn.kind == "gated"
    assert routed.config.model.ffn.experts == 4


def test_rules_follow_last_and_see_what_the_axes_set():
    def rate(values):
        return {"optim.learning_rate": 0.16 / values["model"]["width"]}

    found = sweep(WIDTHS, rules=(rate,))
    assert [p.config.optim.learning_rate for p in found] == [0.01, 0.005]


def test_token_budgets_set_steps():
    assert [p.config.train.steps for p in points(get_sweep())] == [10, 20, 10, 20]


def test_equal_flops_are_spent_whatever_the_size():
    found = sweep(product(WIDTHS, iso_flops([1e9])))
    spent = [
        planned_cost(p.values).useful_flops * 32 * p.config.train.steps for p in found
    ]
    assert spent == pytest.approx([1e9, 1e9], rel=1e-2)
    assert found[0].config.train.steps > found[1].config.train.steps


def test_equal_parameters_are_found_whatever_the_depth():
    found = sweep(product(DEPTHS, iso_parameters([30_000], multiple=4)))
    sizes = [planned_cost(p.values).active for p in found]
    assert sizes == pytest.approx([30_000, 30_000], rel=0.1)
    assert found[0].config.model.width > found[1].config.model.width


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (
            axis("model.dept", [1]),
            r"config\.model\.dept: no such field; did you mean 'depth'\? \(at the poi",
        ),
        (axis("modle.depth", [1]), r"config\.modle: no such section, so 'modle\.dept"),
        (axis("masked.density", [0.5]), r"config\.masked: no such section"),
        (
            axis("model.width", [16, 16]),
            r"two points are the same run: .*seed 0",
        ),
        (token_budgets([40]), r"a budget of 40 tokens: cannot be reached, .* is 32"),
        (
            iso_flops([10.0]),
            "a budget of 10 FLOPs: cannot be reached, .* is 0",
        ),
        (iso_parameters([5.0]), r"a size of 5 parameters: cannot be reached"),
        (
            axis("model.width", [16]) + axis("model.depth", [16], label="width"),
            r"two points are named \{'width': 16\}, and are different runs; give one",
        ),
        (axis("seed", [5]), r"config\.seed: set by an axis .*, and then by seeds=\(0"),
        ([], "the sweep has no points"),
        (axis("model.heads", [3]), r"config\.model\..*at the point \{'heads': 3\}"),
    ],
)
def test_a_sweep_that_cannot_be_run_says_why(axes, message):
    with pytest.raises(ConfigError, match=message):
        sweep(axes)


def test_axes_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match=r"config\.model\.width: set by two axes"):
        product(WIDTHS, WIDTHS)
    with pytest.raises(ConfigError, match=r"label 'width': of two axes; give one of"):
        product(WIDTHS, axis("model.depth", [1], label="width"))
    with pytest.raises(ConfigError, match=r"\[2, 1\] choices: must be equally long"):
        zipped(WIDTHS, [Choice({}, {})])
