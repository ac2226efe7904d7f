"""What memories never hold: scores of all slots, or rows of all tokens."""

import jax
import jax.numpy as jnp
import pytest

from sparsejax.memory import tiles
from sparsejax.memory.bag import embedding_bag, row_products
from sparsejax.memory.lookup import product_key_top_k


def equations(function, *operands):
    """Every equation that a function traces to, those of inner jaxprs included."""
    stack = [jax.make_jaxpr(function)(*operands).jaxpr]
    while stack:
        for equation in stack.pop().eqns:
            yield equation
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                stack += [inner] if hasattr(inner, "eqns") else []


def largest(function, *operands):
    """Elements of the largest array that is computed."""
    found = list(equations(function, *operands))
    assert any(e.primitive.name in ("sort", "scan") for e in found)
    return max(v.aval.size for e in found for v in e.outvars)


@pytest.mark.parametrize(("r", "k"), [(64, 8), (256, 16)])
def test_lookup_holds_no_array_of_all_slots(r, k):
    def loss(queries, keys):
        return product_key_top_k(queries, keys, k=k).scores.sum()

    operands = jnp.zeros((1, 1, 2)), jnp.zeros((1, 2, r, 1))
    assert largest(jax.grad(loss, (0, 1)), *operands) <= max(2 * r, k * k) < r * r


def test_lookup_compares_about_k_log_k_pairs():
    operands = jnp.zeros((1, 1, 2)), jnp.zeros((1, 2, 64, 1))
    found = equations(lambda *x: product_key_top_k(*x, k=64), *operands)
    sort = next(e for e in found if e.primitive.name == "sort")
    assert sort.invars[0].aval.size == 280  # of 64 * 64 = 4096


@pytest.mark.parametrize(("function", "width"), [(embedding_bag, 4), (row_products, 6)])
def test_bags_hold_the_rows_of_a_tile_of_tokens(function, width, monkeypatch):
    tokens, k, d = 64, 4, 6
    monkeypatch.setattr(tiles, "TILE", 2 * k * d)
    table, ids = jnp.zeros((9, d)), jnp.zeros((tokens, k), jnp.int32)

    def loss(table, other):
        return (function(table, ids, other) ** 2).sum()

    size = largest(jax.grad(loss, (0, 1)), table, jnp.zeros((tokens, width)))
    assert size <= tokens * max(k, d) < tokens * k * d
