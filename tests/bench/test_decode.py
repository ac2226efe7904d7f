import importlib.util

import numpy as np
import pytest
from flax import nnx

from sparsejax.attention import AttentionConfig
from sparsejax.bench import decode as bench
from sparsejax.nn.config import GatedConfig, ModelConfig
from sparsejax.nn.transformer import Transformer


@pytest.fixture(scope="module")
def found():
    config = ModelConfig(
        depth=2,
        width=32,
        heads=4,
        kv_heads=2,
        attention=AttentionConfig(block_q=8, block_kv=8, qk_norm=False),
        ffn=GatedConfig(hidden=32),
        embedding_scale=1.0,
        context_length=64,
    )
    model = Transformer(config, 50_000, rngs=nnx.Rngs(0))
    size = {"tokens": 6, "more": 3}
    return model, [*bench.rows(model, 1, **size, rounds=2, seconds=0.0)]


def test_prefill_and_decoding_are_timed(found):
    _, rows = found
    assert [row["work"] for row in rows] == ["prefill", "decode"]
    assert all(float(row["ours"]) > 0 for row in rows)


@pytest.mark.filterwarnings("ignore")  # of PyTorch
def test_both_programs_do_the_same_work(found):
    _, rows = found
    if importlib.util.find_spec("transformers") is None:
        assert {row["transformers"] for row in rows} == {""}
        pytest.skip("transformers is an extra")
    assert max(float(row["difference"]) for row in rows) <= 2e-5


def test_decoding_starts_where_the_prompt_ended_each_time(found):
    model, _ = found
    ours = bench.Ours(model, np.arange(6, dtype=np.int32)[None], more=3)
    ours.prefill()
    np.testing.assert_array_equal(ours.decode(), ours.decode())
