"""Every family: the forward pass of a slow twin, and there and back to the bit."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax import tree
from sparsejax.interop import FAMILIES, export, load_model, open_source
from sparsejax.interop.files import read
from sparsejax.interop.folder import SINGLE
from sparsejax.interop.load import abstract
from sparsejax.sharding import MeshConfig, make_mesh
from tests.interop.checkpoints import CONFIGS, config_of, tensors_of, write_folder
from tests.interop.twin import Twin
from tests.slowly import slowly

TOKENS = np.random.default_rng(7).integers(0, 70, (2, 12)).astype(np.int32)


@functools.cache
def drawn(family):
    config = config_of(family)
    return config, tensors_of(family, config)


def densely(model):
    """Run all experts on all tokens: the same sums, and a program that is soon made."""
    ffn = model.config.ffn
    if ffn.kind != "moe":
        return model
    config = dataclasses.replace(
        model.config, ffn=dataclasses.replace(ffn, dispatcher="dense")
    )
    graph = nnx.graphdef(abstract(config, model.vocabulary))
    return nnx.merge(graph, nnx.state(model))


@nnx.jit
def logits(model, tokens):
    return model.logits(model(tokens).value)


def test_every_family_has_a_checkpoint_here():
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.few(4)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_computes_what_its_twin_does(family, tmp_path):
    config, tensors = drawn(family)
    model = load_model(open_source(write_folder(tmp_path / "hf", config, tensors)))
    model = model if family == "mixtral" else densely(model)
    found = np.asarray(logits(model, jnp.asarray(TOKENS)))[..., :70]
    expected = np.stack([Twin(config, tensors).logits(row) for row in TOKENS])
    # 2e-5 of the largest: float32 through two layers, against float64
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.few(9)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_and_out_again_changes_no_bit(family, dtype, tmp_path):
    config = config_of(family)
    tensors = tensors_of(family, config, dtype=dtype)
    first = write_folder(tmp_path / "in", config, tensors, shard_bytes=4000)
    model = load_model(open_source(first))
    export(model, tmp_path / "out", family=family, dtype=dtype)
    back = read(tmp_path / "out" / SINGLE)
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        assert back[name].dtype == value.dtype
        assert back[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_out_and_in_again_gives_the_same_model(family, tmp_path):
    config, tensors = drawn(family)
    model = load_model(open_source(write_folder(tmp_path / "in", config, tensors)))
    export(model, tmp_path / "out", family=family, shard_bytes=4000)
    again = load_model(open_source(tmp_path / "out"))
    assert again.config == model.config
    assert again.vocabulary == model.vocabulary
    jax.tree.map(
        np.testing.assert_array_equal,
        *(tree.leaves(nnx.state(m)) for m in (model, again)),
    )


def test_parameters_land_on_the_mesh_that_is_asked_for(tmp_path):
    config, tensors = drawn("mixtral")
    source = open_source(write_folder(tmp_path / "hf", config, tensors))
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    cut, whole = (load_model(source, mesh=m) for m in (mesh, None))
    up = cut.stacks[0].blocks[0].moe.up[...]
    assert up.sharding.shard_shape(up.shape) == (2, 2, 8, 12)
    jax.tree.map(
        np.testing.assert_array_equal,
        *(tree.leaves(nnx.state(m)) for m in (cut, whole)),
    )


def test_parameters_have_the_dtype_that_is_asked_for(tmp_path):
    config, tensors = drawn("mistral")
    source = open_source(write_folder(tmp_path / "hf", config, tensors))
    model = load_model(source, dtype="bfloat16", compute="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {
        jnp.dtype("bfloat16")
    }
    found = np.asarray(logits(model, jnp.asarray(TOKENS)))[..., :70]
    expected = np.stack([Twin(config, tensors).logits(row) for row in TOKENS])
    # 0.1: eight bits of mantissa through two layers
    assert np.abs(found - expected).max() <= 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("family", slowly(["mistral", "deepseek_v2"], but={"mistral"}))
def test_padded_rows_and_cached_tokens_score_as_they_do_alone(family, tmp_path):
    config, tensors = drawn(family)
    model = load_model(open_source(write_folder(tmp_path / "hf", config, tensors)))
    model = densely(model)
    whole = np.asarray(logits(model, jnp.asarray(TOKENS)))
    left = jnp.asarray(np.pad(TOKENS, [(0, 0), (4, 0)]))
    at = jnp.maximum(jnp.arange(16) - 4, 0)[None].repeat(2, axis=0)
    real = (jnp.arange(16) >= 4).astype(jnp.int32)[None].repeat(2, axis=0)
    padded = nnx.jit(
        lambda m, *x: m.logits(m(x[0], positions=x[1], segments=x[2]).value)
    )
    # 2e-5: the same sums, in another order
    close = {"rtol": 2e-5, "atol": 2e-5}
    np.testing.assert_allclose(padded(model, left, at, real)[:, 4:], whole, **close)
    caches = model.empty_caches(2, 128)
    hidden = nnx.jit(lambda m, t, c: m(t, caches=c))
    first = hidden(model, jnp.asarray(TOKENS[:, :8]), caches)
    found, caches = [model.logits(first.value)], first.caches
    for t in range(8, 12):
        step = hidden(model, jnp.asarray(TOKENS[:, t : t + 1]), caches)
        found, caches = [*found, model.logits(step.value)], step.caches
    np.testing.assert_allclose(np.concatenate(found, 1), whole, **close)


def test_a_written_config_is_the_one_that_was_read(tmp_path):
    config, tensors = drawn("gpt_oss")
    model = load_model(open_source(write_folder(tmp_path / "in", config, tensors)))
    export(model, tmp_path / "out", family="gpt_oss")
    back = json.loads((tmp_path / "out" / "config.json").read_text())
    scaling = config["rope_scaling"] | {"beta_slow": 1.0}
    assert back["rope_scaling"] == scaling
    assert back["layer_types"] == config["layer_types"]
    same = back.keys() & config.keys() - {"rope_scaling"}
    assert {k: back[k] for k in same} == {k: config[k] for k in same}
