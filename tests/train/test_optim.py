import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparsejax.config import ConfigError, FieldError, convert
from sparsejax.train.optim import OPTIMIZERS, OptimConfig, make_optimizer, make_schedule
from sparsejax.tree import leaves, map_with_path

STEPS = 40
RATES = {"adamw": 0.1, "lion": 0.05, "muon": 0.1, "adafactor": 0.3, "sgd": 0.3}


def shapes_and_axes():
    return {
        "embedding": ((6, 4), "v d"),
        "stack": {
            "gate": ((3, 4, 8), "l d f"),
            "query": ((3, 4, 2, 5), "l d h c"),
            "norm": {"scale": ((3, 4), "l d")},
            "bias": ((3, 8), "l f"),
            "router": ((3, 4, 2), "l d e"),
        },
        "values": ((9, 4), "m d"),
    }


def state_of(fill):
    """An ``nnx.State`` with axes, its arrays made by ``fill(shape)``."""
    return nnx.State(
        jax.tree.map(
            lambda pair: nnx.Param(fill(pair[0]), axes=pair[1]),
            shapes_and_axes(),
            is_leaf=lambda x: isinstance(x, tuple),
        )
    )


def dict_of(fill):
    return jax.tree.map(
        lambda pair: fill(pair[0]),
        shapes_and_axes(),
        is_leaf=lambda x: isinstance(x, tuple),
    )


def noise(shape):
    return jax.random.normal(jax.random.key(sum(shape)), shape)


def config(**fields):
    return OptimConfig(**({"learning_rate": 0.1, "warmup": 3} | fields))


def quadratic(params):
    return sum(0.5 * jnp.sum(x * x) for x in jax.tree.leaves(params))


def run(cfg, params, loss=quadratic, steps=STEPS):
    """Take the steps of a run; the parameters, the optimiser's state, the traces."""
    tx = make_optimizer(cfg, STEPS, params)
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(1)
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state, traces


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("name", "make"),
    [*((name, state_of) for name in sorted(OPTIMIZERS)), ("muon", dict_of)],
)
def test_optimizer_descends_a_quadratic_and_compiles_once(name, make):
    params = make(noise)
    cfg = config(name=name, learning_rate=RATES[name], clip=None)
    after, state, traces = run(cfg, params)
    assert float(quadratic(after)) < 0.2 * float(quadratic(params))
    assert len(traces) == 1
    for path, leaf in leaves((after, state)).items():
        assert leaf.dtype in (jnp.float32, jnp.int32), path
        assert not leaf.weak_type, path


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_optimizer_keeps_the_tree_of_the_parameters(name):
    params = state_of(noise)
    tx = make_optimizer(config(name=name), STEPS, params)
    updates = jax.eval_shape(lambda p: tx.update(p, tx.init(p), p)[0], params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_optimizer_is_built_from_shapes_alone(name):
    shapes = jax.eval_shape(lambda: state_of(noise))
    tx = make_optimizer(config(name=name), STEPS, shapes)
    state = jax.eval_shape(tx.init, state_of(noise))
    again = jax.eval_shape(tx.init, shapes)
    assert jax.tree.structure(again) == jax.tree.structure(state)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_no_decay_leaves_the_listed_parameters_alone_to_the_bit(name):
    params = state_of(noise)
    cfg = config(name=name, weight_decay=0.5)
    after, _, _ = run(cfg, params, loss=lambda p: 0.0 * quadratic(p), steps=3)
    before = leaves(params)
    for path, leaf in leaves(after).items():
        spared = path in ("embedding", "stack/norm/scale", "stack/bias")
        assert spared == bool((leaf == before[path]).all()), path


def test_decay_is_decoupled_and_follows_the_schedule():
    cfg = config(weight_decay=0.5, no_decay=())
    params = dict_of(noise)
    after, _, _ = run(cfg, params, loss=lambda p: 0.0 * quadratic(p), steps=4)
    schedule = make_schedule(cfg, STEPS)
    kept = np.prod([1 - 0.5 * float(schedule(step)) for step in range(4)])
    for path, leaf in leaves(after).items():
        np.testing.assert_allclose(leaf, kept * leaves(params)[path], rtol=2e-6)


def test_adamw_is_that_of_optax():
    cfg = config(
        weight_decay=0.1, no_decay=(), clip=None, arguments={"b2": 0.95, "eps": 1e-6}
    )
    params = dict_of(noise)
    after, _, _ = run(cfg, params, steps=5)
    tx = optax.adamw(make_schedule(cfg, STEPS), b2=0.95, eps=1e-6, weight_decay=0.1)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(quadratic)(params), state, params)
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"):
        state = jax.jit(tx.init)(params)
        for _ in range(5):
            params, state = step(params, state)
    for path, leaf in leaves(after).items():
        np.testing.assert_allclose(leaf, leaves(params)[path], rtol=1e-5, atol=1e-6)


def test_clip_bounds_the_norm_of_the_gradient():
    params = dict_of(noise)
    cfg = config(name="sgd", clip=0.01, warmup=0, schedule="constant")
    tx = make_optimizer(cfg, STEPS, params)
    updates = jax.jit(lambda p: tx.update(p, tx.init(p), p)[0])(params)
    assert float(optax.tree.norm(updates)) == pytest.approx(0.1 * 0.01, rel=1e-5)


def test_rates_multiply_the_updates_of_the_paths_they_match():
    params = state_of(noise)
    plain = config(name="sgd", clip=None)
    rated = config(
        name="sgd",
        clip=None,
        rates={"": 1.0, "stack": 0.5, "stack/(gate|bias)": 0.0, "values": 4.0},
    )
    one, two = (make_optimizer(c, STEPS, params) for c in (plain, rated))
    base = leaves(one.update(params, one.init(params), params)[0])
    updates = leaves(two.update(params, two.init(params), params)[0])
    factors = {"embedding": 1.0, "values": 4.0, "stack/gate": 0.0, "stack/bias": 0.0}
    for path, update in updates.items():
        factor = factors.get(path, 0.5)  # the longest pattern that matches decides
        np.testing.assert_array_equal(update, base[path] * factor)


def orthogonalised(gradients):
    """Muon as its authors write it, for one matrix and one step, in float64."""
    g = np.asarray(gradients, np.float64)
    # First step: the bias-corrected Nesterov mean of equal gradients points along g.
    x = (g if g.shape[0] <= g.shape[1] else g.T) / np.linalg.norm(g)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = x if g.shape[0] <= g.shape[1] else x.T
    return 0.2 * np.sqrt(max(g.shape)) * x


def muon_updates(params):
    cfg = config(name="muon", warmup=0, schedule="constant", clip=None)
    tx = make_optimizer(cfg, STEPS, params)
    updates = jax.jit(lambda p: tx.update(p, tx.init(p), p)[0])(params)
    return {path: -10.0 * np.asarray(u) for path, u in leaves(updates).items()}


def test_muon_takes_each_matrix_of_a_stack_for_itself():
    params = state_of(noise)
    stacked = muon_updates(params)["stack/gate"]
    for layer in range(3):
        matrix = params["stack"]["gate"][...][layer]
        np.testing.assert_allclose(stacked[layer], orthogonalised(matrix), atol=1e-5)
        alone = muon_updates({"gate": matrix})["gate"]
        np.testing.assert_allclose(stacked[layer], alone, atol=1e-5)


def test_muon_sees_the_heads_of_a_projection_as_one_matrix():
    params = state_of(noise)
    stacked = muon_updates(params)["stack/query"]
    for layer in range(3):
        matrix = params["stack"]["query"][...][layer].reshape(4, 10)
        np.testing.assert_allclose(
            stacked[layer].reshape(4, 10), orthogonalised(matrix), atol=1e-5
        )


def test_muon_takes_the_matrices_of_stacked_experts_each_for_itself():
    down = nnx.Param(noise((2, 3, 8, 4)), axes="l e f d")
    stacked = muon_updates(nnx.State({"down": down}))["down"]
    for index in np.ndindex(2, 3):
        expected = orthogonalised(down[...][index])
        np.testing.assert_allclose(stacked[index], expected, atol=1e-5)


@pytest.mark.parametrize(
    "path", ["embedding", "values", "stack/router", "stack/norm/scale", "stack/bias"]
)
def test_muon_leaves_tables_routers_norms_and_biases_to_adamw(path):
    update = muon_updates(state_of(noise))[path]
    # Adam's first Nesterov step of size one: the sign, but for the correction.
    size = np.abs(update)
    np.testing.assert_allclose(size, size.flat[0], rtol=1e-4)


@pytest.mark.parametrize(
    ("axes", "split"),
    [
        ("d f", ((0,), (1,))),
        ("l e d f", ((2,), (3,))),
        ("l h c d", ((1, 2), (3,))),
        ("l z h c", ((1,), (2, 3))),
        ("d g c", ((0,), (1, 2))),
        ("h c", None),
        ("l g c", None),
        ("v d", None),
        ("d v", None),
        ("d e", None),
        ("h 2 r c", None),
        ("l d", None),
        ("", None),
    ],
)
def test_axes_say_which_parameters_are_matrices(axes, split):
    params = nnx.State({"w": nnx.Param(noise((2,) * len(axes.split())), axes=axes)})
    tx = make_optimizer(config(name="muon"), STEPS, params)
    moments = tx.init(params)[1].inner_states["muon"].inner_state[0].mu
    assert bool(jax.tree.leaves(moments)) == (split is not None)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "inverse_sqrt", "constant"])
@pytest.mark.parametrize("warmup", [0, 5])
def test_schedule_rises_to_its_peak_and_has_no_jump(schedule, warmup):
    falls = {"decay": 0.5} if schedule == "wsd" else {}
    cfg = config(schedule=schedule, warmup=warmup, learning_rate=2.0, **falls)
    values = np.array([make_schedule(cfg, 100)(step) for step in range(120)])
    assert values[warmup] == values.max() == 2.0
    assert values[0] == pytest.approx(2.0 / (warmup + 1))
    rise, fall = np.diff(values[: warmup + 1]), np.diff(values[warmup:])
    assert (rise > 0).all()
    assert (fall <= 0).all()
    assert np.abs(fall).max() <= (0.6 if schedule == "inverse_sqrt" else 0.05)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_schedule_ends_at_its_final_fraction_and_stays_there(schedule, final):
    cfg = config(schedule=schedule, final=final)
    at = make_schedule(cfg, 100)
    assert float(at(100)) == pytest.approx(0.1 * final, abs=1e-8)
    assert float(at(1000)) == float(at(100))
    assert float(at(99)) >= float(at(100))


def test_cosine_is_half_way_down_at_half_time():
    at = make_schedule(config(schedule="cosine", warmup=20, final=0.2), 100)
    assert float(at(60)) == pytest.approx(0.1 * 0.6)


def test_wsd_is_flat_until_its_decay():
    at = make_schedule(config(schedule="wsd", decay=0.25, final=0.0), 100)
    values = np.array([at(step) for step in range(101)])
    assert (values[3:76] == np.float32(0.1)).all()
    np.testing.assert_allclose(values[75:], np.linspace(0.1, 0.0, 26), atol=1e-8)


def test_wsd_without_decay_is_constant():
    at = make_schedule(config(schedule="wsd", decay=0.0), 100)
    assert float(at(99)) == float(at(3))


def test_inverse_sqrt_halves_in_four_times_the_steps():
    at = make_schedule(config(schedule="inverse_sqrt", warmup=9), 1000)
    assert float(at(39)) == pytest.approx(0.05)


def test_schedule_is_float32_under_jit_and_strict_promotion():
    at = jax.jit(make_schedule(config(), 100))
    assert at(jnp.int32(7)).dtype == jnp.float32
    assert float(at(jnp.int32(7))) == pytest.approx(
        float(make_schedule(config(), 100)(7))
    )


def test_schedule_of_one_step_is_the_peak():
    assert float(make_schedule(config(warmup=0), 1)(0)) == pytest.approx(0.1)


def test_accumulate_is_left_to_the_step():
    params = dict_of(noise)
    one, four = (run(config(accumulate=n), params, steps=2)[0] for n in (1, 4))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adam"}, "name='adam': no such name; did you mean 'adamw'"),
        ({"arguments": {"beta": 0.9}}, r"arguments\.beta=0\.9: no argument of adamw"),
        ({"arguments": {"neterov": True}}, "did you mean 'nesterov'"),
        ({"arguments": {"nesterov": 1}}, "must be of type bool"),
        ({"arguments": {"b1": "high"}}, "must be of type float"),
        ({"name": "muon", "arguments": {"ns_steps": 5.5}}, "must be of type int"),
        ({"arguments": {"weight_decay": 0.1}}, r"set optim\.weight_decay"),
        ({"arguments": {"mu_dtype": "bfloat16"}}, "moments are float32"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: must be positive"),
        ({"clip": -1.0}, "clip=-1.0: must be positive"),
        ({"warmup": -1}, "warmup=-1: must not be negative"),
        ({"decay": 1.5}, r"decay=1\.5: must be a fraction"),
        ({"decay": 0.1}, r"decay=0\.1: the fall of schedule='wsd', .* weight_decay"),
        ({"final": -0.1}, r"final=-0\.1: must be a fraction"),
        ({"accumulate": 0}, "accumulate=0: must be positive"),
        ({"no_decay": ("(",)}, r"no_decay='\(': not a regular expression"),
        ({"rates": {"[": 1.0}}, r"rates='\[': not a regular expression"),
        ({"rates": {"values": -1.0}}, r"rates\['values'\]=-1\.0: must not be negative"),
    ],
)
def test_config_names_the_fault(fields, message):
    with pytest.raises(FieldError, match=message):
        config(**fields)


def test_arguments_survive_the_way_from_a_config_file():
    values = {
        "learning_rate": 1,
        "name": "muon",
        "arguments": {"ns_steps": 4, "beta": 0.9, "nesterov": False},
        "rates": {"values": 4},
    }
    cfg = convert(OptimConfig, values)
    assert cfg.arguments == {"ns_steps": 4, "beta": 0.9, "nesterov": False}
    assert type(cfg.arguments["ns_steps"]) is int
    run(cfg, state_of(noise), steps=1)


def test_config_offers_the_schedules_there_are():
    with pytest.raises(
        ConfigError, match="schedule='cosin': expected 'cosine' or 'wsd'"
    ):
        convert(OptimConfig, {"learning_rate": 0.1, "schedule": "cosin"})


def test_warmup_must_end_before_the_run():
    with pytest.raises(ConfigError, match=r"warmup=40: must be less than the 40 steps"):
        make_schedule(config(warmup=40), 40)


def test_warmup_and_decay_must_fit_into_the_run():
    with pytest.raises(
        ConfigError, match=r"decay=0\.9: warm-up \(20 steps\) and decay"
    ):
        make_schedule(config(schedule="wsd", decay=0.9, warmup=20), 100)


def test_a_rate_that_matches_nothing_is_an_error():
    with pytest.raises(ConfigError, match=r"rates\['valeus'\].*did you mean 'values'"):
        make_optimizer(config(rates={"valeus": 2.0}), STEPS, state_of(noise))


def test_parameters_must_be_float32():
    params = map_with_path(lambda _, x: x.astype(jnp.bfloat16), state_of(noise))
    with pytest.raises(ConfigError, match="embedding: parameters are float32"):
        make_optimizer(config(), STEPS, params)
