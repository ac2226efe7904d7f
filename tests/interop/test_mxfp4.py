"""Packed experts are read as the numbers that a slow twin makes of their bytes."""

import jax
import numpy as np
import pytest
from flax import nnx

from sparsejax import tree
from sparsejax.interop import CheckpointFileError, load_model, open_source
from tests.interop.checkpoints import config_of, tensors_of, write_folder

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
QUANTIZED = {"quantization_config": {"quant_method": "mxfp4"}}
DOWN = "model.layers.0.mlp.experts.down_proj"


def number(bits):
    """One number of four bits: sign, two of exponent, one of mantissa."""
    sign = -1.0 if bits & 8 else 1.0
    exponent, mantissa = (bits & 6) >> 1, bits & 1
    if exponent == 0:
        return sign * mantissa * 0.5
    return sign * (1 + mantissa / 2) * 2.0 ** (exponent - 1)


def twin(blocks, scales):
    experts, outputs, groups, _ = blocks.shape
    whole = np.zeros((experts, groups * 32, outputs), np.float32)
    for (e, o, g, byte), packed in np.ndenumerate(blocks):
        scale = 2.0 ** (int(scales[e, o, g]) - 127)
        whole[e, g * 32 + 2 * byte, o] = number(int(packed) & 15) * scale
        whole[e, g * 32 + 2 * byte + 1, o] = number(int(packed) >> 4) * scale
    return whole


@pytest.fixture(scope="module")
def both():
    """A checkpoint packed, and with the numbers written out."""
    config, draw = config_of("gpt_oss", **SIZES), np.random.default_rng(0).integers
    plain = tensors_of("gpt_oss", config)
    packed = dict(plain)
    for name in [n for n in plain if n.endswith("_proj") and "experts" in n]:
        experts, inputs, outputs = packed.pop(name).shape
        shape = experts, outputs, inputs // 32
        blocks = packed[f"{name}_blocks"] = draw(0, 256, (*shape, 16), np.uint8)
        scales = packed[f"{name}_scales"] = draw(118, 129, shape, np.uint8)
        plain[name] = twin(blocks, scales)
    return config, packed, plain


def test_packed_experts_are_the_numbers_of_a_slow_twin(both, tmp_path):
    config, packed, plain = both
    one = write_folder(tmp_path / "packed", config | QUANTIZED, packed)
    two = write_folder(tmp_path / "plain", config, plain)
    found, expected = (load_model(open_source(x)) for x in (one, two))
    assert found.config == expected.config
    jax.tree.map(
        np.testing.assert_array_equal,
        *(tree.leaves(nnx.state(m)) for m in (found, expected)),
    )


@pytest.mark.parametrize(
    ("change", "about", "words"),
    [
        ({f"{DOWN}_scales": None}, QUANTIZED, "down_proj_scales is missing"),
        ({f"{DOWN}_scales": np.zeros((4, 32, 1), np.uint8)}, QUANTIZED, r"32 numbers"),
        ({}, {}, "kind U8, and quantization_config does not say that they are mxfp4"),
    ],
)
def test_packed_experts_that_cannot_be_read_are_named(
    both, change, about, words, tmp_path
):
    config, packed, _ = both
    tensors = {k: v for k, v in (packed | change).items() if v is not None}
    folder = write_folder(tmp_path / "hf", config | about, tensors)
    with pytest.raises(CheckpointFileError, match=words):
        open_source(folder)
