"""The same numbers as Hugging Face's transformers; needs the ``peers`` extra."""

import functools

import numpy as np
import pytest

pytest.importorskip("torch", reason="parity needs pip install -e .[peers]")
pytest.importorskip("transformers", reason="parity needs pip install -e .[peers]")

import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from sparsejax.bench import interop
from sparsejax.interop import FAMILIES
from sparsejax.interop.mxfp4 import unpacked

pytestmark = pytest.mark.filterwarnings("ignore:::(torch|transformers)")


def test_numbers_of_four_bits_are_those_of_transformers():
    draw = np.random.default_rng(0).integers
    blocks = draw(0, 256, (3, 5, 4, 16), np.uint8)
    scales = draw(100, 150, (3, 5, 4), np.uint8)
    given = map(torch.tensor, (blocks, scales))
    expected = convert_moe_packed_tensors(*given, dtype=torch.float32)
    found = unpacked(blocks, scales).astype(np.float32)
    np.testing.assert_array_equal(found, expected.numpy())


@functools.cache
def compared(model):
    return next(interop.rows([model]))


def test_every_family_is_compared():
    assert {name.partition(",")[0] for name in interop.MODELS} == set(FAMILIES)


@pytest.mark.parametrize("model", interop.MODELS)
@pytest.mark.parametrize(
    "what", ["prefill", "padded", "decode", "scores", "router", "export"]
)
def test_numbers_are_those_of_transformers(model, what):
    # 2e-5 of the largest: float32 on both sides, sums in other orders
    assert float(compared(model)[what] or 0) <= 2e-5


@pytest.mark.parametrize("model", interop.MODELS)
def test_all_tokens_visit_the_same_experts(model):
    assert compared(model)["same"] in ("yes", "")


@pytest.mark.parametrize("model", interop.MODELS)
def test_gradients_are_those_of_transformers(model):
    # 1e-4 of each parameter's largest: sums over all tokens, backwards
    assert float(compared(model)["gradient"]) <= 1e-4
