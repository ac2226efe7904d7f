import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.attention import AttentionConfig
from sparsejax.nn.config import GatedConfig, ModelConfig
from sparsejax.nn.decoder import Decoder, Whole
from sparsejax.nn.generate import draw, generate, nucleus, stream
from sparsejax.nn.transformer import Transformer

VOCABULARY = 30


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        depth=2,
        width=32,
        heads=4,
        kv_heads=2,
        attention=AttentionConfig(block_q=8, block_kv=8),
        ffn=GatedConfig(hidden=32),
    )
    return Transformer(config, VOCABULARY, rngs=nnx.Rngs(0))


def test_greedy_sampling_is_the_argmax_of_the_whole_sequence(model):
    prompt = jax.random.randint(jax.random.key(0), (2, 5), 0, VOCABULARY)
    chosen = generate(model, prompt, tokens=4, key=jax.random.key(0), temperature=0.0)
    whole = jnp.concatenate([prompt, chosen], 1)
    logits = nnx.jit(lambda model, ids: model.logits(model(ids).value))(model, whole)
    np.testing.assert_array_equal(chosen, logits[:, 4:-1].argmax(-1))


def test_sampled_tokens_are_real_ones(model):
    prompt = jnp.zeros((1, 3), jnp.int32)
    chosen = generate(model, prompt, tokens=8, key=jax.random.key(1), temperature=9.0)
    assert chosen.max() < VOCABULARY


def test_the_nucleus_is_the_smallest_set_that_reaches_the_share():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    kept = [np.isfinite(nucleus(logits, top_p=p)).sum() for p in (0.4, 0.6, 0.8, 1.0)]
    assert kept == [1, 2, 2, 4]


def test_a_nucleus_of_everything_keeps_what_rounding_would_lose():
    logits = jnp.concatenate([jnp.zeros((1, 9)), jnp.full((1, 9), -30.0)], axis=1)
    assert np.isfinite(nucleus(logits, top_p=1.0)).all()
    assert np.isfinite(nucleus(logits[:, 8:], top_p=1e-50)).sum() == 1


@pytest.mark.parametrize("temperature", [1e-45, 1e-37, 1e38])
def test_draws_at_extreme_temperatures_are_real_tokens(temperature):
    logits = jnp.broadcast_to(jnp.array([0.0, 9.0, 60.0, -jnp.inf]), (64, 4))
    how = {"temperature": temperature, "top_p": 0.99}
    drawn = draw(logits, jax.random.key(0), **how)
    assert set(drawn.tolist()) == ({2} if temperature < 1 else {0, 1, 2})


def test_the_nucleus_does_not_depend_on_the_order():
    logits = jnp.log(jnp.array([[0.05, 0.3, 0.5, 0.15]]))
    np.testing.assert_array_equal(
        np.isfinite(nucleus(logits, top_p=0.6)), [[False, True, True, False]]
    )


def test_draws_follow_the_probabilities():
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.7, 0.2, 0.1])), (4000, 3))
    drawn = draw(logits, jax.random.key(2), temperature=1.0, top_p=1.0)
    share = np.bincount(drawn, minlength=3) / 4000
    # Four standard deviations of a share of 4000 draws.
    np.testing.assert_allclose(share, [0.7, 0.2, 0.1], atol=4 * 0.5 / 4000**0.5)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": 1e39},
        {"top_p": 0.0},
        {"tokens": -1},
    ],
)
def test_impossible_options_are_refused(model, options):
    with pytest.raises(ValueError, match="must not be negative"):
        generate(
            model,
            jnp.zeros((1, 2), jnp.int32),
            key=jax.random.key(0),
            **{"tokens": 1, **options},
        )


def streamed(model, prompts, **options):
    rows = [[] for _ in prompts]
    drawn = stream(model, prompts, tokens=4, key=jax.random.key(0), **options)
    for tokens in drawn:
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.extend([token] * (token >= 0))
    return rows


def test_prompts_of_several_lengths_continue_as_they_do_alone(model):
    ids = np.arange(9, dtype=np.int32) % VOCABULARY
    together = streamed(model, [ids[:5], ids[2:9]], temperature=0.0)
    for prompt, found in zip((ids[:5], ids[2:9]), together, strict=True):
        alone = generate(
            model,
            jnp.asarray(prompt[None]),
            tokens=4,
            key=jax.random.key(0),
            temperature=0.0,
        )
        assert found == alone[0].tolist()


def test_a_row_is_over_after_an_end(model):
    ids = np.arange(5, dtype=np.int32)
    whole = streamed(model, [ids], temperature=0.0)[0]
    cut = streamed(model, [ids], temperature=0.0, ends=frozenset({whole[1]}))[0]
    assert cut == whole[: whole.index(whole[1]) + 1]


def test_more_tokens_than_the_model_is_made_for_are_refused(model):
    short = Transformer(
        dataclasses.replace(model.config, context_length=8),
        VOCABULARY,
        rngs=nnx.Rngs(0),
    )
    with pytest.raises(ValueError, match=r"9 tokens .* made for 8"):
        streamed(short, [np.zeros(5, np.int32)])
    with pytest.raises(ValueError, match="at least one"):
        streamed(model, [np.zeros(0, np.int32)])


def test_layers_one_by_one_are_the_whole_model(model):
    window = {"pattern": "sliding_window", "arguments": {"window": 3}}
    attention = AttentionConfig(block_q=8, block_kv=8, dense_every=2, **window)
    config = dataclasses.replace(model.config, depth=4, attention=attention)
    model = Transformer(config, VOCABULARY, rngs=nnx.Rngs(1))
    ids = jax.random.randint(jax.random.key(3), (2, 7), 0, VOCABULARY)
    found = []
    for reader in (Decoder(model), Whole(model)):
        logits, caches = reader(ids[:, :5], reader.empty_caches(2, 8))
        rows = [logits]
        for t in (5, 6):
            previous = ids[:, t - 1]
            logits, caches = reader(ids[:, t : t + 1], caches, previous=previous)
            rows.append(logits)
        found.append(np.stack(rows)[..., :VOCABULARY])
    # Sums in another order, of numbers near one.
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-5)


def test_a_decoder_holds_no_weights_of_its_own_and_overwrites_its_caches(model):
    decoder = Decoder(model)
    stack = model.stacks[0].blocks[0].ffn.down[...]
    first = decoder.layers[0].ffn.down[...]
    assert first.unsafe_buffer_pointer() == stack.unsafe_buffer_pointer()
    caches = decoder.empty_caches(2, 8)
    place = caches[1].keys.unsafe_buffer_pointer()
    _, longer = decoder(jnp.zeros((2, 1), jnp.int32), caches)
    assert longer[1].keys.unsafe_buffer_pointer() == place
