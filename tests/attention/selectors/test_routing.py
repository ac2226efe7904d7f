"""Routing: keys of the own cluster, and centroids that follow their members."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.attention import SELECTORS, Centroids, Segments, moved
from sparsejax.attention.context import Place
from sparsejax.config import FieldError
from tests.attention.selecting import (
    SOME,
    WIDTH,
    T,
    arrays,
    config,
    layer,
    positions,
    run,
    selected,
)


def clusters_of(x):
    """Number of the nearest centroid of ``call_routing``, token by token and head."""
    centroids = np.asarray(jax.random.normal(jax.random.key(7), (1, 3, 8)))[0]
    return (np.asarray(x)[0] @ centroids.T).argmax(-1)


@pytest.mark.parametrize("documents", [False, True])
def test_a_query_reads_itself_and_the_latest_keys_of_its_cluster(documents, key):
    q, k, _ = arrays(key, b=1)
    numbers = jnp.where(jnp.arange(T) < 11, 1, 2)[None].astype("int32")
    place = Place(segments=Segments(numbers, numbers) if documents else None)
    mask = np.asarray(selected("routing", q, k, top=4, place=place).to_dense())[0]
    ours, theirs = clusters_of(q), clusters_of(k)
    for h in range(4):
        for t in range(T):
            begin = 11 if documents and t >= 11 else 0
            same = [j for j in range(begin, t) if theirs[j, h // 2] == ours[t, h]]
            assert set(np.flatnonzero(mask[h, t])) == {t, *same[::-1][:3]}


def test_heads_of_one_cluster_read_a_window(key):
    q, k, _ = arrays(key, b=1)
    select = functools.partial(SELECTORS["routing"], centroids=jnp.zeros((2, 3, 8)))
    mask = jax.jit(functools.partial(select, top=5))(q, k)
    i, j = np.arange(T)[:, None], np.arange(T)[None]
    window = (j <= i) & (i - j < 5)
    np.testing.assert_array_equal(mask.to_dense(), np.tile(window, (1, 4, 1, 1)))


def test_centroids_become_the_directions_of_their_members():
    centroids = jnp.eye(4)[None]
    sums = jnp.zeros((1, 4, 4)).at[0, :2].set(jnp.array([[0.0, 3, 4, 0], [0, 6, 0, 0]]))
    members = jnp.array([[5.0, 6.0, 0.0, 0.0]])
    found = np.asarray(moved(centroids, sums, members, decay=0.5))[0]
    towards = np.array([0.5, 0.3, 0.4, 0.0])
    np.testing.assert_allclose(found[0], towards / np.linalg.norm(towards), rtol=1e-6)
    np.testing.assert_array_equal(found[1:], centroids[0, 1:])
    still = moved(0 * centroids, sums, members, decay=0.5)
    np.testing.assert_array_equal(still, 0)


def test_online_means_find_the_clusters_of_the_data():
    rng = np.random.default_rng(0)
    truth = np.linalg.qr(rng.normal(size=(8, 8)))[0][:3].astype("float32")
    centroids = jnp.asarray(truth[None] + 0.6 * rng.normal(size=(1, 3, 8)), "float32")
    points = truth[rng.integers(0, 3, 300)] + 0.1 * rng.normal(size=(300, 8))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    points = jnp.asarray(points, "float32")
    for _ in range(40):
        hits = jax.nn.one_hot((points @ centroids[0].T).argmax(1), 3)
        centroids = moved(centroids, (hits.T @ points)[None], hits.sum(0)[None], 0.8)
    np.testing.assert_allclose((centroids[0] * truth).sum(-1), 1, atol=0.01)


def test_no_gradient_reaches_centroids_and_padding_is_no_member(key):
    model = layer("routing")
    graph, state = nnx.split(model)
    x = jax.random.normal(key, (2, T, WIDTH))
    numbers = jnp.where(positions(2) < 20, 1, 0)

    def loss(state):
        out, _ = nnx.merge(graph, state)(x, positions=positions(2), segments=numbers)
        total = jnp.square(out.value).sum() + sum(out.losses.values())
        return total, out.metrics

    slopes, metrics = jax.jit(jax.grad(loss, has_aux=True))(state)
    centroids = nnx.split(nnx.merge(graph, slopes), Centroids, ...)[1]
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(centroids))
    # Two query heads and one key head in each of two groups, 20 tokens, batch of 2.
    np.testing.assert_array_equal(metrics["members"].sum(-1), [3 * 2 * 20] * 2)


def test_the_commitment_loss_is_the_distance_to_the_centroids(key):
    selection = SOME["routing"] | {"commitment": 2.0, "local": 0}
    model, x = layer("routing", selection), jax.random.normal(key, (1, T, WIDTH))
    found = run(model, x, positions(1))[0].losses["commitment"]
    q, k, *_ = model._project(x, positions(1), None, None)
    centroids, squares = model.mixer.centroids[...], []
    for x in (q, k):
        unit = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
        each = centroids.repeat(x.shape[2] // 2, axis=0)
        best = jnp.einsum("bthc,hmc->bthm", unit, each).argmax(-1)
        squares.append(jnp.square(unit - each[jnp.arange(x.shape[2]), best]).ravel())
    np.testing.assert_allclose(found, 2 * jnp.concatenate(squares).mean(), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"clusters": 0}, "clusters=0: must be >= 1"),
        ({"decay": 1.5}, "decay=1.5: must be between 0 and 1"),
        ({"local": -1}, "local=-1: must not be negative"),
    ],
)
def test_options_name_what_is_wrong(change, words):
    with pytest.raises(FieldError, match=words):
        config("routing", change)


def test_local_heads_are_at_most_the_key_heads():
    with pytest.raises(ValueError, match=r"selection.local=3: there are only 2 key"):
        layer("routing", {"local": 3})
