"""Row-sparse training of a whole model, against the dense step."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparsejax.config import ConfigError, FieldError, convert
from sparsejax.masked import masks_of
from sparsejax.memory import PEER, PEERConfig
from sparsejax.memory.rows import Rows
from sparsejax.train.config import Config
from sparsejax.train.optim import OptimConfig
from sparsejax.train.step import Step
from sparsejax.train.tables import Tables, split
from sparsejax.tree import leaves
from tests.train import toy

SLOTS = 128**2  # more than a step reads, which is 2 layers * 512 tokens * 8
POOL = {"kind": "memory_plus", "sub_keys": 128, "heads": 2, "per_head": 4}
MODEL = {
    **toy.TOY["model"],
    "ffn": {"kind": "gated", "hidden": 32},
    "memory": {**POOL, "key_width": 8},
    "memory_layers": (0, 1),
}
# Decay that can be seen, clipping that bites, a rate of the values' own.
OPTIM = {"name": "sgd", "learning_rate": 0.3, "weight_decay": 0.5, "clip": 0.5}
OPTIM |= {"rates": {"pool/values": 3.0}}
PLAIN = {"model": MODEL, "masked": None}
ROWS = {**OPTIM, "tables": "sgd", "accumulate": 2}


def trained(config, steps, devices=None):
    """Metrics and weights of a short run; on one device the evaluation too."""
    step, state, train, evaluate, mesh = toy.start(config, devices)
    found = []
    with jax.set_mesh(mesh):
        for index in range(steps):
            state, metrics = train(state, toy.batch(index))
            found.append([float(metrics[x]) for x in ("loss", "gradient_norm")])
        _, params = jax.tree.flatten(state.params)
        weights = leaves(jax.tree.map(np.asarray, settled(step, state)))
        nll = float(evaluate(state, toy.batch())[0].nll) if devices else None
        return found, weights, nll, params


def settled(step, state):
    """The parameters that the model computes with."""
    tables = step.tables
    return state.params if tables is None else tables.settled(*state_of(state))


def state_of(state):
    return state.params, state.opt.tables


@pytest.mark.slow
def test_rows_of_a_shared_pool_are_the_dense_step():
    dense = trained(toy.toy(**PLAIN, optim=OPTIM), 3, toy.one_device())
    rows = trained(toy.toy(**PLAIN, optim=ROWS), 3, toy.one_device())
    np.testing.assert_allclose(rows[0], dense[0], rtol=1e-5)
    np.testing.assert_allclose(rows[2], dense[2], rtol=1e-5)
    table = "pool/values"
    np.testing.assert_allclose(rows[1][table], dense[1][table], rtol=1e-5, atol=1e-6)
    assert rows[3] == dense[3]  # the trees: checkpoints and exports see no difference


@pytest.mark.slow
def test_rows_under_a_mesh_are_those_of_one_device():
    alone = trained(toy.toy(**PLAIN, optim=ROWS), 3, toy.one_device())
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    found = trained(toy.toy(**PLAIN, optim=ROWS, mesh=mesh), 3)
    np.testing.assert_allclose(found[0], alone[0], rtol=1e-5)
    table = "pool/values"
    np.testing.assert_allclose(found[1][table], alone[1][table], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", ["sgd", "adagrad", "adam"])
def test_nothing_of_the_size_of_the_table_is_computed(rule):
    config = toy.toy(**PLAIN, optim=ROWS | {"tables": rule})
    _, state, train, _, mesh = toy.start(config, toy.one_device())
    with jax.set_mesh(mesh):
        text = train.lower(state, toy.batch()).compile().as_text()
    width = toy.TOY["model"]["width"]  # or one number a row: when it was last read
    rank = rf"[fs]32\[(?:1,)?{SLOTS},(?:{width}|1)\]\S* "
    operations = set(re.findall(rank + r"([a-z-]+)\(.*", text))
    found = operations - {"parameter", "get-tuple-element", "bitcast", "scatter"}
    wrapped = re.findall(rank + r"fusion\((.*)", text)
    assert all('body/scatter"' in line for line in wrapped)
    assert found <= {"fusion"}
    assert operations >= {"parameter"}


@pytest.fixture(scope="module")
def everything():
    """Rows by Adam, under masks."""
    ffn = {"kind": "gated", "hidden": 16}
    return toy.toy(model={"ffn": ffn}, optim={"tables": "adam", "weight_decay": 0.1})


def test_a_restored_state_goes_on_with_the_same_bits(everything, tmp_path):
    straight, resumed = toy.interrupted(everything, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)


def test_rows_learn_under_masks(everything):
    losses, state = toy.losses(everything, 12, toy.one_device())
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    moments = state.opt.tables.moments["stacks/1/blocks/0/memory/values"]
    assert int(np.max(moments["last"][...])) == 12


def sum_of(graph, params, x):
    return jnp.sum(nnx.merge(graph, params)(x).value)


def moved_rows(rows, rare=None):
    """The rows of each table that a step of a layer moves, and what it has read."""
    config = PEERConfig(sub_keys=4, heads=2, per_head=2, key_width=4)
    graph, params = nnx.split(PEER(config, 8, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (1, 6, 8))
    optim = OptimConfig(learning_rate=0.1, tables="sgd", table_rows=rows)
    tables = Tables(optim, 10, params)
    state = tables.init(params)
    if rare is not None:
        kept = {path: old.replace(rare) for path, old in state.rarity.items()}
        state = state._replace(rarity=kept)

    def loss(sinks):
        armed = tables.armed(params, state, sinks)
        return sum_of(graph, nnx.merge_state(armed, split(params)[1]), x)

    told = jax.grad(loss)(tables.sinks(params, 6))
    about = {"step": jnp.zeros((), "int32"), "factor": jnp.ones(())}
    found = tables.gradients(params, state, told)
    after, before = leaves(tables.update(params, state, found, **about)[0]), params
    before = {path: np.asarray(y) for path, y in leaves(before).items()}
    moved = {p: (np.asarray(y) != before[p]).any(-1) for p, y in after.items()}
    return moved, tables.counts(params, told)


def test_a_step_moves_the_rows_that_are_specific_and_no_others():
    every, counts = moved_rows(None)
    assert len(every) == 2
    for path, moved in every.items():
        assert moved.sum() > 5
        np.testing.assert_array_equal(moved, counts[path][0] > 0)
    common = next(iter(counts.values()))[0] > 1
    rare = jnp.where(common, 0.0, 1.0)[:, None]
    few, _ = moved_rows(1, rare)
    for path, moved in few.items():
        assert moved.sum() == 1
        assert not (moved & np.asarray(common)).any()
        assert (every[path] | ~moved).all()
    again, _ = moved_rows(16, rare)
    for path, moved in again.items():
        np.testing.assert_array_equal(moved, every[path])


DIRECTIONS = {
    "sgd": optax.identity(),
    "adagrad": optax.scale_by_rss(0.1, 1e-7),
    "adam": optax.scale_by_adam(),
}


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("rule", sorted(DIRECTIONS))
def test_decay_reaches_every_row_at_every_step(rule, share):
    """Beside it rows move as the dense rule has it; by Adam, those that are read."""
    config = PEERConfig(sub_keys=4, heads=2, per_head=2, key_width=4)
    params = nnx.state(PEER(config, 8, rngs=nnx.Rngs(0)))
    about = {"weight_decay": 2.0, "rates": {"up": 3.0}, "tables": rule}
    tables = Tables(OptimConfig(learning_rate=0.1, **about), 8, params)
    update, state = jax.jit(tables.update), tables.init(params)
    direct, rng = DIRECTIONS[rule], np.random.default_rng(0)
    dense = {path: np.asarray(x) for path, x in leaves(split(params)[0]).items()}
    moments = direct.init(dense)
    params = split(params)[0]
    for step in range(8):
        asked = {path: rng.random(len(x)) < share for path, x in dense.items()}
        slopes = {
            path: rng.normal(size=x.shape).astype("float32") * asked[path][:, None]
            for path, x in dense.items()
        }
        rows = {path: rows_of(slopes[path], asked[path]) for path in dense}
        count = {"step": jnp.int32(step), "factor": jnp.ones(())}
        params, state, _ = update(params, state, rows, **count)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 and float
            moved, moments = direct.update(slopes, moments)
        for path, x in dense.items():
            rate = float(tables.schedule(step)) * tables.rates[path]
            rests = (rule == "adam") & ~asked[path][:, None]
            dense[path] = (1 - 2 * rate) * x - np.where(rests, 0, rate * moved[path])
    found = leaves(tables.settled(params, state))
    for path, x in dense.items():
        np.testing.assert_allclose(found[path], x, rtol=2e-5, atol=2e-5)


def rows_of(slopes, asked):
    """The rows that are asked for, ascending, then padding."""
    ids = np.flatnonzero(asked)
    rest = len(asked) - len(ids)
    values = np.pad(slopes[ids], [(0, rest), (0, 0)])
    return Rows(
        jnp.asarray(np.pad(ids, (0, rest), constant_values=len(asked)), jnp.int32),
        jnp.asarray(values),
    )


@pytest.mark.parametrize("name", ["lion", "muon", "adafactor", "momentum"])
def test_a_rule_that_moves_unread_rows_is_refused(name):
    with pytest.raises(FieldError, match=f"tables={name!r}.*take one of adagrad"):
        OptimConfig(learning_rate=0.1, tables=name)


@pytest.mark.parametrize(
    ("tables", "arguments", "message"),
    [
        ("adm", {}, "did you mean 'adam'"),
        ("adam", {"momentum": 0.9}, "table_arguments.momentum"),
        ("adam", {"b1": 1.0}, r"b1=1\.0"),
        ("adagrad", {"eps": 0.0}, "eps=0.0"),
        (None, {"b1": 0.5}, "no argument of None"),
    ],
)
def test_arguments_that_no_rule_takes_are_refused(tables, arguments, message):
    with pytest.raises(FieldError, match=message):
        OptimConfig(learning_rate=0.1, tables=tables, table_arguments=arguments)


@pytest.mark.parametrize("changes", [{"table_rows": 3}, {"table_rows": 0}])
def test_rows_that_may_move_need_a_rule_and_a_number(changes):
    tables = None if changes["table_rows"] else "sgd"
    with pytest.raises(FieldError, match=r"table_rows=\d: must be positive"):
        OptimConfig(learning_rate=0.1, tables=tables, **changes)


def refused(values, message):
    with pytest.raises(ConfigError, match=message):
        toy.start(convert(Config, values), toy.one_device())


def test_rows_without_a_table_to_read_are_refused():
    values = {**toy.TOY, "optim": {**toy.TOY["optim"], "tables": "adam"}}
    soft = {"kind": "fff", "depth": 2, "leaf_width": 4}
    model = {**toy.TOY["model"], "memory": soft}
    refused({**values, "model": model}, "optim.tables='adam'.*set it to none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_decay": 0.1, "table_rows": 3}, "weight_decay=0.1: would move every"),
        (
            {"weight_decay": 1.0, "learning_rate": 1.0},
            r"values would shrink by e\^-inf",
        ),
        ({"weight_decay": 60.0, "learning_rate": 0.1}, "would shrink by e"),
    ],
)
def test_decay_that_rows_cannot_follow_is_refused(changes, message):
    optim = {"learning_rate": 3e-3, "schedule": "constant", "tables": "sgd"}
    refused({**toy.TOY, "masked": None, "optim": optim | changes}, message)


@pytest.mark.slow  # two programs to compile
def test_a_step_of_specific_rows_moves_no_state_of_a_router():
    routed = {"router": "sigmoid_top_k", "bias_rate": 0.1}
    model = {**toy.TOY["model"], "ffn": {**toy.TOY["model"]["ffn"], **routed}}
    optim = {"tables": "sgd", "weight_decay": 0.0}
    for rows in (None, 3):
        changes = {**optim, "table_rows": rows}
        config = toy.toy(model=model, masked=None, optim=changes)
        _, state, train, _, mesh = toy.start(config, toy.one_device())
        before = jax.tree.map(np.array, leaves(state.variables))
        with jax.set_mesh(mesh):
            after = leaves(train(state, toy.batch())[0].variables)
        moved = [(after[name] != x).any() for name, x in before.items()]
        assert moved == [rows is None]


def test_masks_that_rewind_are_refused_beside_rows():
    values = {**toy.TOY, "optim": {**toy.TOY["optim"], "tables": "adam"}}
    masks = {**toy.TOY["masked"], "rewind": 2}
    refused({**values, "masked": masks}, "masked.rewind=2: tables whose rows")


def test_masks_on_a_table_that_is_trained_by_rows_are_refused():
    values = {**toy.TOY, "optim": {**toy.TOY["optim"], "tables": "adam"}}
    masks = {**toy.TOY["masked"], "include": ("memory/values",)}
    remedy = r"memory/values.*masked\.exclude, or .*optim\.tables to none"
    refused({**values, "masked": masks}, remedy)


def test_a_table_that_is_trained_by_rows_can_be_left_out_of_the_masks():
    """By the remedy that refusing its masks names."""
    optim = {"tables": "adam", "weight_decay": 0.1}
    plan = {"include": ("memory",), "exclude": ("memory/values",)}
    config = toy.toy(optim=optim, masked=plan)
    step = Step(config, toy.VOCABULARY, np.ones(toy.VOCABULARY, np.int32))
    state = jax.eval_shape(step.init, jax.random.key(0))
    masks = masks_of(state.opt)
    assert masks
    assert all("memory" in path and "values" not in path for path in masks)
    jax.eval_shape(step.train, state, toy.batch())
    jax.eval_shape(lambda x: nnx.state(step.model(x)), state)
    wrong = {**toy.TOY["masked"], "exclude": ("memory/valeus",)}
    values = {**toy.TOY, "optim": {**toy.TOY["optim"], "tables": "adam"}}
    with pytest.raises(ValueError, match="exclude='memory/valeus' matches no parame"):
        toy.start(convert(Config, {**values, "masked": wrong}), toy.one_device())
