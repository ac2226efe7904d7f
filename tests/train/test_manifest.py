import json

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.config import ConfigError
from sparsejax.train.manifest import (
    ManifestError,
    check_same,
    describe,
    open_sealed,
    sealed,
)

BODY = {"step": 3, "loss": 0.1, "data": {"next": [1, 2]}, "config": {"name": "é"}}
TEXT = json.dumps(sealed(BODY))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
).filter(lambda x: "inf" not in repr(x))


@given(value=VALUES)
def test_a_body_comes_back_through_text(value):
    assert open_sealed(json.dumps(sealed({"value": value}))) == {"value": value}


def test_white_space_and_order_do_not_break_a_seal():
    document = json.loads(TEXT)
    document["body"] = dict(reversed(document["body"].items()))
    assert open_sealed(json.dumps(document, indent=4)) == BODY


@given(position=st.integers(0, len(TEXT.encode()) - 1), bit=st.integers(0, 6))
def test_a_flipped_bit_breaks_the_seal_or_changes_nothing(position, bit):
    content = bytearray(TEXT.encode())
    content[position] ^= 1 << bit
    try:
        body = open_sealed(content.decode(errors="replace"))
    except ManifestError:
        body = BODY
    assert body == BODY


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"body": {}}', "null"])
def test_what_is_no_manifest_cannot_be_read(text):
    with pytest.raises(ManifestError, match="the manifest cannot be read"):
        open_sealed(text)


def test_a_changed_body_is_refused():
    with pytest.raises(ManifestError, match="the manifest was changed"):
        open_sealed(TEXT.replace('"step": 3', '"step": 4'))


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_number_that_json_lacks_is_refused(loss):
    with pytest.raises(ValueError, match="JSON"):
        sealed({"loss": loss})


def test_describe_says_dtype_and_shape_of_arrays_and_of_shapes():
    arrays = {"a": jnp.ones((2, 3)), "k": jax.random.key(0), "s": jnp.int32(1)}
    told = {"a": "float32[2,3]", "k": "key<fry>[]", "s": "int32[]"}
    assert describe(arrays) == describe(jax.eval_shape(lambda: arrays)) == told


def test_check_same_accepts_equal_descriptions_in_any_order():
    check_same("here", {"a": "x", "b": "y"}, {"b": "y", "a": "x"})


def test_check_same_lists_differences_and_counts_the_rest():
    saved = {str(i): "float32[1]" for i in range(10)}
    with pytest.raises(ConfigError) as error:
        check_same("here", saved, {})
    message = str(error.value)
    assert message.startswith("checkpoint here is of another model: 0 is float32[1]")
    assert "7 is float32[1], not absent; and 2 more; use the config" in message
