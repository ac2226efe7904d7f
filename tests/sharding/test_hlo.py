import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sparsejax.sharding.hlo import collective_bytes
from sparsejax.sharding.mesh import MeshConfig, make_mesh


def program(rounds):
    """All-gathers 4 floats over 2 devices, ``rounds`` times in a loop, then sums 8."""

    def piece(x):
        def body(total, _):
            whole = jax.lax.all_gather(x + total.sum(), "tensor", tiled=True)
            return total + whole.reshape(2, -1).sum(0), None

        total = jax.lax.scan(body, x, None, length=rounds)[0]
        return jax.lax.psum(total, "data")

    mesh = make_mesh(MeshConfig(tensor=2), jax.devices()[:4])
    spec = P(("data", "tensor"))
    run = jax.shard_map(
        piece, mesh=mesh, in_specs=spec, out_specs=P("tensor"), check_vma=False
    )
    return jax.jit(run).lower(jnp.ones(16)).compile().as_text()


def test_a_collective_in_a_loop_counts_as_often_as_it_runs():
    moved = collective_bytes(program(rounds=7))
    assert moved["all-gather"] == 7 * 8 * 4
    assert moved["all-reduce"] == 4 * 4


def test_a_program_without_collectives_moves_nothing():
    text = jax.jit(lambda x: x @ x).lower(jnp.ones((4, 4))).compile().as_text()
    assert collective_bytes(text) == {}
