"""BiFormer: regions choose regions, and values see their neighbours."""

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.attention.selectors.biformer import BiFormer, biformer
from tests.attention.selecting import (
    CLOSE,
    WIDTH,
    T,
    arrays,
    layer,
    unconvolved,
    value,
)


def test_regions_choose_by_their_means(key):
    q, k, _ = arrays(key, b=1)
    kinds = np.asarray(biformer(q, k, block_kv=4, top=2).kinds())[0, 0] > 0
    ours = np.asarray(q)[0].reshape(6, 4, 4, 8).mean(1)
    theirs = np.asarray(k)[0].reshape(6, 4, 2, 8).mean(1).repeat(2, 1)
    scores = np.einsum("ihc,jhc->ij", ours, theirs)
    for region in range(6):
        assert set(np.flatnonzero(kinds[region])) == set(
            np.argsort(-scores[region])[:2]
        )


def test_the_convolution_adds_the_neighbours_values(key):
    x = jax.random.normal(key, (1, T, WIDTH))
    model = layer("biformer", {"taps": 3})
    assert isinstance(model.mixer, BiFormer)
    v = model._project(x, jnp.arange(T, dtype="int32")[None], None, None)[2]
    taps = model.mixer.taps[...]
    both = value(model, x)
    alone = value(unconvolved(model), x)
    line = np.pad(v[0], [(1, 1), (0, 0), (0, 0)])
    near = np.stack([(line[t : t + 3] * taps).sum(0) for t in range(T)])
    expected = np.einsum("thc,hcd->td", near.repeat(2, 1), model.out[...])
    np.testing.assert_allclose((both - alone)[0], expected, **CLOSE)
