import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from sparsejax.train.checksum import checksum, checksums

M = 2**32
DTYPES = ["float32", "bfloat16", "float16", "bool", "int8", "int32", "uint32"]


def slow_checksum(x):
    """Word by word in Python integers, which never overflow."""

    def mix(h):
        h = ((h ^ (h >> 16)) * 0x85EBCA6B) % M
        h = ((h ^ (h >> 13)) * 0xC2B2AE35) % M
        return h ^ (h >> 16)

    bits = np.asarray(x)
    if bits.dtype != bool:
        bits = bits.view(f"uint{8 * bits.dtype.itemsize}")
    if np.issubdtype(x.dtype, np.signedinteger):
        bits = bits.view(x.dtype).astype(np.int64) % M  # narrow integers are extended
    return sum(mix(int(w) ^ mix(i)) for i, w in enumerate(bits.reshape(-1))) % M


def example(dtype, shape=(8, 4, 3)):
    noise = jax.random.normal(jax.random.key(0), shape) * 3
    return (noise > 0) if dtype == "bool" else noise.astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_checksum_equals_its_slow_twin(dtype):
    if dtype == "uint32":
        x = jax.random.bits(jax.random.key(1), (8, 4, 3))
    else:
        x = example(dtype)
    assert int(checksum(x)) == slow_checksum(np.asarray(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("devices", [1, 4, 8])
def test_checksum_does_not_see_the_mesh(dtype, devices):
    x = example(dtype)
    mesh = jax.make_mesh(
        (devices,),
        ("data",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:devices],
    )
    rows = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    columns = jax.device_put(x, jax.NamedSharding(mesh, jax.P()))
    assert int(checksum(rows)) == int(checksum(columns)) == int(checksum(x))


def test_checksum_is_equal_however_two_axes_are_cut():
    x = example("float32")
    mesh = jax.make_mesh(
        (4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    cuts = [jax.P("a", "b"), jax.P("b", "a"), jax.P(("a", "b")), jax.P(None, "a")]
    sums = {
        int(checksum(jax.device_put(x, jax.NamedSharding(mesh, cut)))) for cut in cuts
    }
    assert sums == {int(checksum(x))}


@given(index=st.integers(0, 95), bit=st.integers(0, 31))
def test_checksum_sees_any_flipped_bit(index, bit):
    x = np.array(example("float32")).view(np.uint32).reshape(-1)
    flipped = x.copy()
    flipped[index] ^= np.uint32(1 << bit)
    whole = checksum(jnp.asarray(x.view(np.float32)))
    assert int(whole) != int(checksum(jnp.asarray(flipped.view(np.float32))))


@given(index=st.integers(0, 95), bit=st.integers(0, 15))
def test_checksum_sees_any_flipped_bit_of_half_a_word(index, bit):
    x = np.array(example("bfloat16")).view(np.uint16).reshape(-1)
    flipped = x.copy()
    flipped[index] ^= np.uint16(1 << bit)
    whole = checksum(jnp.asarray(x.view(jnp.bfloat16)))
    assert int(whole) != int(checksum(jnp.asarray(flipped.view(jnp.bfloat16))))


def test_checksum_tells_plus_zero_from_minus_zero():
    assert int(checksum(jnp.float32(0.0))) != int(checksum(jnp.float32(-0.0)))


@given(i=st.integers(0, 30), j=st.integers(32, 62))
def test_checksum_sees_a_swap_of_two_values(i, j):
    x = np.arange(64, dtype=np.float32)
    x[j] = -x[i]  # differs in the top bit alone: even weights would not see it
    swapped = x.copy()
    swapped[[i, j]] = x[[j, i]]
    assert x[i] == 0 or int(checksum(jnp.asarray(x))) != int(
        checksum(jnp.asarray(swapped))
    )


def test_checksum_reads_typed_keys():
    a, b = jax.random.key(1), jax.random.key(2)
    assert int(checksum(a)) == int(checksum(jax.random.key_data(a)))
    assert int(checksum(a)) != int(checksum(b))


def test_checksum_reads_both_halves_of_complex_numbers():
    z = jnp.array([1 + 2j, 3 - 1j], jnp.complex64)
    assert int(checksum(z)) != int(checksum(jnp.conj(z)))
    assert int(checksum(z)) != int(checksum(-jnp.conj(z)))


def test_checksum_of_nothing_is_zero():
    assert int(checksum(jnp.zeros((0, 3)))) == 0


def test_checksums_are_keyed_by_path():
    state = {"b": jnp.arange(3), "a": [jnp.ones(2), jnp.int32(7)]}
    sums = checksums(state)
    assert list(sums) == ["a/0", "a/1", "b"]
    assert sums["b"] == int(checksum(jnp.arange(3)))
    assert all(type(s) is int and 0 <= s < M for s in sums.values())


def test_checksums_name_a_leaf_that_is_no_array():
    with pytest.raises(TypeError, match=r"params/x: .* got float; wrap it"):
        checksums({"params": {"x": 1.0}})


def test_checksum_compiles_once_for_one_shape():
    x = jnp.arange(13.0)
    checksum(x)
    compiled = checksum._cache_size()
    checksum(x + 1)
    assert checksum._cache_size() == compiled
