import jax
import numpy as np
import pytest
from flax import nnx

from sparsejax.attention import AttentionConfig, LatentConfig
from sparsejax.memory import MemoryConfig
from sparsejax.moe import MoEConfig
from sparsejax.nn.config import GatedConfig, ModelConfig
from sparsejax.nn.cost import attention_masks, cost, live_pairs, peak_bytes
from sparsejax.nn.transformer import Transformer

D, F, H, G, C = 32, 48, 4, 2, 8
LENGTH = 64


def counted(**changes):
    fields = {
        "depth": 2,
        "width": D,
        "heads": H,
        "kv_heads": G,
        "attention": AttentionConfig(block_q=16, block_kv=16, qk_norm=False),
        "ffn": GatedConfig(hidden=F),
    }
    live = changes.pop("live", None)
    config = ModelConfig(**{**fields, **changes})
    model = nnx.eval_shape(lambda: Transformer(config, 64, rngs=nnx.Rngs(0)))
    return cost(config, nnx.state(model, nnx.Param), length=LENGTH, live=live)


ATTENTION = D * H * C * 2 + D * G * C * 2
NORMS = 2 * 2 * D + D
DENSE = 2 * (ATTENTION + 3 * D * F) + NORMS + 64 * D


def test_a_dense_model_uses_every_parameter():
    found = counted()
    assert found.total == found.nonzero == DENSE
    assert found.active == pytest.approx(DENSE)


def test_useful_flops_are_six_a_parameter_and_those_of_attention():
    pairs = LENGTH * (LENGTH + 1) / 2
    attention = 3 * 2 * 4 * H * C * pairs / LENGTH
    assert counted().useful_flops == pytest.approx(6 * DENSE + attention)


def test_latent_attention_costs_its_narrow_products_and_pairs_of_two_widths():
    latent = LatentConfig(
        kv_rank=10, query_rank=6, plain_width=5, rotated_width=4, value_width=7
    )
    attention = AttentionConfig(block_q=16, block_kv=16, qk_norm=False, latent=latent)
    found = counted(attention=attention, kv_heads=H)
    queries, keys = D * 6 + 6 * H * (5 + 4), D * (10 + 4) + 10 * H * (5 + 7)
    total = 2 * (queries + keys + H * 7 * D + 3 * D * F) + NORMS + 64 * D
    assert found.total == total
    assert found.active == pytest.approx(total)
    pairs = LENGTH * (LENGTH + 1) / 2
    meeting = 3 * 2 * 2 * H * (5 + 4 + 7) * pairs / LENGTH
    assert found.useful_flops == pytest.approx(6 * total + meeting)


def test_a_token_uses_its_experts_only():
    found = counted(ffn=MoEConfig(experts=8, per_token=2, hidden=F))
    expert = 3 * D * F
    common = 2 * (ATTENTION + 8 * D) + NORMS + 64 * D
    assert found.total == common + 2 * 8 * expert
    assert found.active == pytest.approx(common + 2 * 2 * expert)


def test_a_token_reads_a_few_rows_of_a_memory():
    memory = MemoryConfig(sub_keys=16, heads=2, per_head=4, key_width=8)
    found = counted(memory=memory, memory_layers=(1,))
    lookup = D * 2 * 8 + 2 * 2 * 16 * 4
    common = 2 * ATTENTION + 3 * D * F + NORMS + 64 * D + lookup
    assert found.total == common + 256 * D
    assert found.active == pytest.approx(common + 8 * D)


def test_masked_weights_are_neither_stored_nor_used():
    found = counted(live={"stacks/0/blocks/0/ffn/up": 0.25})
    lost = round(0.75 * 2 * D * F)
    assert found.nonzero == DENSE - lost
    assert counted().useful_flops - found.useful_flops == pytest.approx(6 * lost)


def test_an_embedding_that_is_only_read_costs_no_flops():
    tied, untied = counted(), counted(tied=False)
    assert untied.total == tied.total + 64 * D
    assert untied.active == pytest.approx(tied.active + D)
    assert untied.useful_flops == pytest.approx(tied.useful_flops)


@pytest.mark.parametrize("window", [1, 9, 40])
def test_live_pairs_are_those_of_the_dense_mask(window):
    attention = AttentionConfig(
        pattern="streaming_llm",
        arguments={"sinks": 3, "window": window},
        block_q=16,
        block_kv=8,
    )
    config = ModelConfig(
        depth=1,
        width=D,
        heads=H,
        kv_heads=G,
        attention=attention,
        ffn=GatedConfig(hidden=F),
    )
    (mask,) = attention_masks(config, 50).values()
    assert live_pairs(mask) == int(np.asarray(mask.to_dense()).sum())


def test_each_different_mask_is_named_after_its_layers():
    attention = AttentionConfig(
        pattern="sliding_window", arguments={"window": 8}, dense_every=2
    )
    config = ModelConfig(
        depth=4,
        width=D,
        heads=H,
        kv_heads=G,
        attention=attention,
        ffn=GatedConfig(hidden=F),
    )
    assert list(attention_masks(config, 128)) == [
        "sliding_window, layers 0, 2",
        "causal, layers 1, 3",
    ]


def test_peak_memory_is_at_least_what_an_array_needs():
    x = jax.numpy.ones(2**20)
    assert peak_bytes() > x.nbytes
