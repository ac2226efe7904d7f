"""States like those of a run, each known from its step alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sparsejax import tree

CONFIG = {"model": {"width": 8}, "name": "é"}


class Mask(nnx.Variable):
    pass


def mesh_of(devices):
    return jax.make_mesh(
        (devices,),
        ("data",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:devices],
    )


def build(step, width=8):
    """A state like that of a run: parameters, masks, moments, keys and counts."""
    key = jax.random.fold_in(jax.random.key(7), step)
    w = jax.random.normal(key, (16, width))
    params = nnx.State(
        {
            "w": nnx.Param(w, axes="m d"),
            "layers": [{"b": nnx.Param(w[0].astype(jnp.bfloat16), axes="d")}],
        }
    )
    return {
        "step": jnp.asarray(step, jnp.int32),
        "params": params,
        "masks": nnx.State({"w": Mask(w > 0, axes="m d")}),
        "opt": optax.adam(0.1).init(params),
        "table": jax.random.normal(key, (64, 64)),  # too big to be stored inline
        "key": key,
        "keys": jax.random.split(key, 8),
        "empty": jnp.zeros((0, 3)),
    }


def shardings(state, mesh):
    """Cut every leading axis of 16 or 8 over the mesh, and keep the rest whole."""

    def one(x):
        cut = x.ndim > 0 and x.shape[0] in (8, 16)
        return jax.NamedSharding(mesh, jax.P("data") if cut else jax.P())

    return jax.tree.map(one, state)


def abstract(mesh, **fields):
    state = jax.eval_shape(lambda: build(0, **fields))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        shardings(state, mesh),
    )


def state_at(step, mesh):
    state = build(step)
    return jax.device_put(state, shardings(state, mesh))


def bits(x):
    x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return np.asarray(x).tobytes()


def assert_equal(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for path, x in tree.leaves(one).items():
        y = tree.leaves(two)[path]
        assert (x.dtype, x.shape) == (y.dtype, y.shape), path
        assert bits(x) == bits(y), path


def save(checkpoints, *steps, mesh=None, losses=(), **options):
    for index, step in enumerate(steps):
        checkpoints.save(
            step,
            state_at(step, mesh or mesh_of(4)),
            data={"next_index": step, "files": ["a", "b"]},
            config=CONFIG,
            loss=losses[index] if losses else None,
            **options,
        )
    checkpoints.wait()
