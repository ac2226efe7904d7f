"""Plans: wrong ones die early and say why; right ones find their layers."""

import re

import jax.numpy as jnp
import pytest
from flax import nnx

from sparsejax.config import ConfigError, FieldError, convert
from sparsejax.masked import MaskedConfig, sparse
from sparsejax.masked.plan import targets
from tests.masked.networks import DOWN, EXPERTS, TX, UP, network, plan
from tests.train.toy import toy

# Kind, member and its other arguments; the argument, its value and the rule it breaks.
WRONG = [
    ("estimator", "top_kast", {}, "backward", 1.5, r"in \[0, 1\]"),
    ("estimator", "top_kast", {"backward": 0.5}, "decay", -1.0, "at least 0"),
    ("estimator", "sr_ste", {}, "decay", -0.1, "at least 0; the default is 0.0002"),
    ("estimator", "sr_ste", {}, "decay", float("nan"), "at least 0"),
    ("estimator", "exponential_mask_decay", {}, "rate", -1.0, "at least 0"),
    ("updater", "learned", {}, "rate", -1.0, "at least 0"),
    ("updater", "learned", {}, "prior", -1.0, "at least 0"),
    ("updater", "learned", {}, "reward", -1.0, "at least 0"),
    ("updater", "srigl", {}, "salient", 2.0, r"in \[0, 1\]"),
    ("updater", "srigl", {}, "salient", {"up": 2.0}, r"in \[0, 1\]"),
    ("updater", "learned", {}, "rate", {"up": 2.0}, "of type float"),
    ("allocation", "erk", {}, "power", -1.0, "at least 0"),
    ("allocation", "erk", {}, "power", ("up",), "of type float"),
    ("allocation", "erk", {}, "dense", 0.5, r"of type tuple\[str, ...\]"),
    ("allocation", "by_path", {}, "densities", 0.5, "of type .*Mapping"),
    ("structure", "n_of_m", {}, "m", 0, "at least 1"),
    ("structure", "n_of_m", {}, "m", "d", "of type int"),
    ("structure", "coarse_to_fine", {"m": 4}, "frames", 1, "at least 2; .* is 4"),
    ("structure", "transposable", {}, "m", 8, r"in \[1, 4\]"),
    ("structure", "block", {"tile": (2, 2)}, "power", 0, "at least 1"),
    ("structure", "block", {}, "tile", 2, r"of type tuple\[int, ...\]"),
    ("structure", "butterfly", {}, "block", (2, 2), "of type int"),
]

FINER = {
    "structure": "coarse_to_fine",
    "schedule": "constant",
    "updater": "select",
    "estimator": "straight_through",
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"structure": "blocks"}, r"structure='blocks'.*did you mean 'block'"),
        ({"criterion": "size"}, "criterion='size'"),
        ({"initial_criterion": "rand"}, "did you mean 'random'"),
        ({"allocation": "erks"}, "did you mean 'erk'"),
        ({"schedule": "cubik"}, "did you mean 'cubic'"),
        ({"updater": "rigle"}, "did you mean 'rigl'"),
        ({"estimator": "ste"}, "estimator='ste'"),
        (
            {"structure": "n_of_m", "structure_arguments": {"n": 4}},
            "structure_arguments.n=4: no argument of NOfM; .*m",
        ),
        ({"structure": "block"}, "structure_arguments={}: Block needs tile"),
        (
            {"allocation": "erk", "allocation_arguments": {"pwer": 4.0}},
            "did you mean 'power'",
        ),
        (
            {"estimator": "sr_ste", "estimator_arguments": {"lambda": 4.0}},
            "estimator_arguments.lambda=4.0: no argument of sr_ste",
        ),
        *(
            (
                {kind: member, f"{kind}_arguments": {**more, name: value}},
                rf"{kind}_arguments\.{name}={re.escape(repr(value))}: must be {rule}",
            )
            for kind, member, more, name, value, rule in WRONG
        ),
        ({"density": 0.0}, r"density=0.0: must be in \(0, 1\]"),
        ({"density": 1.5}, "density=1.5"),
        (
            {
                "updater": "select",
                "estimator": "top_kast",
                "estimator_arguments": {"backward": 0.1},
            },
            r"arguments\.backward=0\.1: must be at least density=0\.25",
        ),
        ({"initial": 0.1}, "initial=0.1: must be at least density=0.25"),
        (
            {"initial": 0.5, "schedule": "constant"},
            r"initial=0\.5: schedule='constant' has density=0\.25 from the first step",
        ),
        ({"moved": 0.0}, "moved=0.0"),
        ({"begin": -2}, "begin=-2: must not be negative"),
        ({"end": 0}, "end=0: must be at least begin=2"),
        ({"every": 0}, "every=0: must be positive"),
        ({"end": 9}, "end=9: must be begin=2 plus a multiple of every=2"),
        ({"seed": -1}, "seed=-1"),
        (
            {"criterion": "grasp"},
            "criterion='grasp': works only with updater 'static', not 'prune'",
        ),
        (
            {"structure": "coarse_to_fine", "structure_arguments": {"m": 2}},
            "structure='coarse_to_fine': works only with updater 'select', not 'prune'",
        ),
        ({"allocation": "grasp"}, "allocation='grasp': works only with updater"),
        ({"include": ("(",)}, r"include='\(': must be a regular expression"),
        ({"exclude": ("(",)}, r"exclude='\(': must be a regular expression"),
        ({"updater": "static"}, "nothing would follow schedule='cubic'"),
        (
            {"updater": "rigl", "estimator": "sr_ste"},
            "updater='rigl': starts grown weights at 0",
        ),
    ],
)
def test_a_plan_that_cannot_be_run_names_the_fault(changes, message):
    with pytest.raises(FieldError, match=message):
        plan(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"include": ("attn",)}, r"include='attn' matches no parameter.*ffn/up"),
        ({"exclude": ("stack/",)}, r"exclude='stack/' matches no parameter"),
        ({"exclude": ("stacks", "moe")}, "leave nothing to mask; there are embedding"),
        (
            {"structure": "n_of_m", "structure_arguments": {"m": 5}},
            r"n_of_m\(m=5, axis=0\) needs that axis to be divisible",
        ),
        (
            FINER | {"structure_arguments": {"m": 2}},
            r"begins with groups of 16: n_of_m\(m=16, .* or take fewer frames",
        ),
        (
            {"structure": "n_of_m", "structure_arguments": {"m": 4, "axis": "h"}},
            "structure_arguments.axis='h' is no axis of moe/up, which has d f",
        ),
        (
            {"structure": "block", "structure_arguments": {"tile": (5, 5)}},
            r"block\(tile=\(5, 5\)\) must divide the last axes",
        ),
        (
            {
                "structure": "constant_fan_in",
                "updater": "srigl",
                "updater_arguments": {"salient": {"upp": 0.5}},
            },
            "'upp' matches no masked path; one of moe/up",
        ),
        ({"density": 0.001}, r"density=0.001 of .* rounds to no weight at all"),
        (
            {"moved": 0.001, "updater": "rigl"},
            "moved=0.001 of the 16 weights that moe/up keeps is less than the 1",
        ),
        (
            {"schedule": "constant", "initial_criterion": "gradient"},
            "no gradient before the first step",
        ),
    ],
)
def test_a_plan_that_does_not_fit_the_parameters_says_so(changes, message, key):
    with pytest.raises(ValueError, match=message):
        sparse(TX["sgd"], plan(**changes)).init(network(key))


def test_embeddings_norms_and_routers_stay_dense(key):
    assert set(targets(network(key), plan())) == {UP, DOWN, EXPERTS}


def test_names_decide_where_there_are_no_axes():
    tree = {
        name: jnp.ones((4, 4))
        for name in ("token_embedding", "router", "query_norm", "keys", "key", "gate")
    }
    assert set(targets(tree, plan())) == {"key", "gate"}


def test_a_filter_may_ask_for_what_is_dense_by_default(key):
    chosen = plan(include=("embedding", "ffn"), exclude=("up$",))
    assert set(targets(network(key), chosen)) == {"embedding", DOWN}


def test_stacked_layers_and_experts_are_layers_of_their_own(key):
    found = targets(network(key), plan())
    assert (found[UP].stack, found[UP].shape) == ((2,), (8, 12))
    assert (found[EXPERTS].stack, found[EXPERTS].shape) == ((3,), (8, 8))


def test_an_axis_may_be_named_by_its_letter(key):
    arguments = {"m": 4, "axis": "d"}
    found = targets(
        network(key), plan(structure="n_of_m", structure_arguments=arguments)
    )
    assert (found[UP].structure.axis, found[DOWN].structure.axis) == (0, 1)


def test_an_axis_may_be_any_of_several_letters():
    heads = {"query": "d h c", "key": "d g c"}
    tree = nnx.State(
        {p: nnx.Param(jnp.ones((8, 4, 6)), axes=a) for p, a in heads.items()}
    )
    chosen = plan(structure="heads", structure_arguments={"axis": "hg"})
    assert all(x.structure.axis == 1 for x in targets(tree, chosen).values())


def test_erk_gives_every_path_its_density(key):
    found = targets(network(key), plan(allocation="erk"))
    counts = {p: x.count(x.ramp.final) for p, x in found.items()}
    assert counts[EXPERTS] / 64 > counts[UP] / 96
    total = 2 * counts[UP] + 2 * counts[DOWN] + 3 * counts[EXPERTS]
    # each of seven layers rounds by at most half a weight
    assert abs(total - 0.25 * (4 * 96 + 3 * 64)) <= 3.5


def test_heads_and_their_width_are_one_side_of_a_matrix():
    tree = nnx.State(
        {
            "query": nnx.Param(jnp.ones((2, 8, 4, 6)), axes="l d h c"),
            "out": nnx.Param(jnp.ones((2, 4, 6, 8)), axes="l h c d"),
            "up": nnx.Param(jnp.ones((2, 8, 24)), axes="l d f"),
        }
    )
    found = targets(tree, plan(allocation="erk"))
    assert found["query"].shape == (8, 4, 6)
    # all three are 8 by 24
    assert [x.ramp.final for x in found.values()] == pytest.approx([0.25] * 3)


def test_by_path_reaches_the_masks(key):
    chosen = plan(
        allocation="by_path", allocation_arguments={"densities": {"down": 0.5}}
    )
    found = targets(network(key), chosen)
    assert (found[UP].ramp.final, found[DOWN].ramp.final) == (0.25, 0.5)


def test_a_density_given_by_path_is_the_end_of_a_gradual_schedule(key):
    chosen = plan(
        schedule="cubic",
        initial=1.0,
        end=10,
        allocation="by_path",
        allocation_arguments={"densities": {"down": 0.5}},
    )
    ramp = targets(network(key), chosen)[DOWN].ramp
    assert (ramp.initial, ramp.final) == (1.0, 0.5)


@pytest.mark.parametrize(("field", "value"), [("end", 20), ("dense_from", 24)])
def test_a_plan_that_outlasts_its_run_is_refused(field, value):
    message = rf"masked\.{field}={value}: must be one of the steps 0 to 19"
    with pytest.raises(ConfigError, match=message):
        toy(masked={field: value})


def test_a_plan_comes_from_a_config_file():
    given = {
        "density": 0.5,
        "structure": "block",
        "structure_arguments": {"tile": [2, 2]},
        "allocation": "by_path",
        "allocation_arguments": {"densities": {"up": 0.5}},
        "include": "ffn",
    }
    made = convert(MaskedConfig, given)
    assert made.structure_arguments["tile"] == (2, 2)
    assert made.include == ("ffn",)
    with pytest.raises(ConfigError, match="densty: no such field"):
        convert(MaskedConfig, {"densty": 0.5})
