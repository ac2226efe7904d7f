"""Patterns: what each admits, and that blocks are judged without looking inside."""

import doctest

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from sparsejax.attention import (
    PATTERNS,
    BlockMask,
    block_patterns,
    mask,
    patterns,
    video_patterns,
)
from sparsejax.attention.patterns import Span

N = 24
ROW, COLUMN = np.arange(N)[:, None], np.arange(N)[None]

NAMES = vars(patterns) | vars(block_patterns) | vars(video_patterns)

EXAMPLES = {
    "bigbird": {"length": N, "block": 2, "random": 2, "seed": 3},
    "block_diagonal": {"size": 5},
    "causal": {},
    "diagonal": {"width": 3},
    "dilated": {"window": 3, "dilation": 4},
    "fixed": {"stride": 6, "summary": 2},
    "full": {},
    "multi_diagonal": {"period": 7, "width": 2},
    "power_attention": {"block": 2, "window": 2, "sinks": 1},
    "prefix": {"length": 7},
    "sliding_window": {"window": 5},
    "streaming_llm": {"sinks": 2, "window": 4},
    "strided": {"stride": 5},
    "vertical_stripe": {"start": 3, "width": 4},
}


def bigbird_oracle(i, j):
    row, column, last = i // 2, j // 2, N // 2 - 1
    ends = {row, column} & {0, last}
    rule = block_patterns._Random(N // 2, 2, 3)
    drawn = [int(rule.column(row, pick)) for pick in (0, 1)]
    return bool(ends) or abs(row - column) < 2 or column in drawn


def power_oracle(i, j):
    distance = i // 2 - j // 2
    return j <= i and (distance in (0, 1, 2, 4, 8) or j < 2)


ORACLES = {
    "bigbird": bigbird_oracle,
    "block_diagonal": lambda i, j: i // 5 == j // 5,
    "causal": lambda i, j: j <= i,
    "diagonal": lambda i, j: abs(i - j) < 3,
    "dilated": lambda i, j: i - j in (0, 4, 8),
    "fixed": lambda i, j: j <= i and (i // 6 == j // 6 or j % 6 in (4, 5)),
    "full": lambda i, j: True,
    "multi_diagonal": lambda i, j: abs(i % 7 - j % 7) < 2,
    "power_attention": power_oracle,
    "prefix": lambda i, j: j <= i or j < 7,
    "sliding_window": lambda i, j: 0 <= i - j < 5,
    "streaming_llm": lambda i, j: j <= i and (i - j < 4 or j < 2),
    "strided": lambda i, j: j <= i and (i - j < 5 or (i - j) % 5 == 0),
    "vertical_stripe": lambda i, j: 3 <= j < 7,
}
NONCAUSAL = {
    *("bigbird", "block_diagonal", "diagonal", "full", "multi_diagonal", "prefix"),
    "vertical_stripe",
}

leaves = st.sampled_from(sorted(EXAMPLES)).map(lambda n: PATTERNS[n](**EXAMPLES[n]))
expressions = st.recursive(
    leaves | st.integers(0, N).map(patterns.first),
    lambda p: st.one_of(
        st.tuples(p, p).map(lambda ab: ab[0] & ab[1]),
        st.tuples(p, p).map(lambda ab: ab[0] | ab[1]),
        p.map(lambda a: ~a),
    ),
    max_leaves=5,
)


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_pattern_admits_what_its_definition_says(name):
    found = PATTERNS[name](**EXAMPLES[name])(ROW, COLUMN)
    expected = [[ORACLES[name](i, j) for j in range(N)] for i in range(N)]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_pattern_knows_whether_it_is_causal(name):
    pattern = PATTERNS[name](**EXAMPLES[name])
    assert pattern.is_causal == (name not in NONCAUSAL)
    assert not pattern.is_causal or not np.triu(pattern(ROW, COLUMN), 1).any()


@given(pattern=expressions)
def test_an_expression_said_to_be_causal_never_reads_the_future(pattern):
    assert not pattern.is_causal or not np.triu(pattern(ROW, COLUMN), 1).any()


@given(a=expressions, b=expressions)
def test_patterns_obey_de_morgan(a, b):
    np.testing.assert_array_equal((~(a & b))(ROW, COLUMN), (~a | ~b)(ROW, COLUMN))
    np.testing.assert_array_equal((~(a | b))(ROW, COLUMN), (~a & ~b)(ROW, COLUMN))


@given(pattern=expressions)
def test_patterns_are_values(pattern):
    assert pattern == eval(repr(pattern), NAMES)
    assert len({pattern, pattern & pattern}) == 2


@given(pattern=expressions, rows=st.integers(1, 7), columns=st.integers(1, 7))
def test_judging_a_block_never_contradicts_its_elements(pattern, rows, columns):
    top, left = np.arange(0, N - rows + 1)[:, None], np.arange(0, N - columns + 1)[None]
    cover = pattern.cover(Span(top, top + rows - 1), Span(left, left + columns - 1))
    dense = pattern(ROW, COLUMN)
    windows = np.lib.stride_tricks.sliding_window_view(dense, (rows, columns))
    assert (cover.some | ~windows.any((2, 3))).all()
    assert (~np.broadcast_to(cover.every, cover.some.shape) | windows.all((2, 3))).all()


@given(pattern=leaves, rows=st.integers(1, 7), columns=st.integers(1, 7))
def test_judging_full_blocks_finds_those_of_windows_and_strides(pattern, rows, columns):
    edges = Span(np.array([[5]]), np.array([[5]]))
    cover = pattern.cover(edges, edges)
    assert cover.some.item() == cover.every.item() == pattern(5, 5)


@given(pattern=expressions)
def test_candidate_intervals_hold_everything_a_row_reads(pattern):
    rows = np.arange(N)
    inside = np.zeros((N, N), bool)
    for span in pattern.reads(Span(rows, rows)):
        inside |= (span.first[:, None] <= COLUMN) & (span.last[:, None] >= COLUMN)
    assert not (pattern(ROW, COLUMN) & ~inside).any()


def test_strided_and_fixed_reach_every_past_position_in_two_hops():
    for pattern in (patterns.strided(5), patterns.fixed(6, 1)):
        reach = pattern(ROW, COLUMN).astype(int)
        np.testing.assert_array_equal(reach @ reach > 0, np.tril(np.ones((N, N), bool)))


def test_streaming_llm_without_sinks_is_a_sliding_window():
    streaming, window = patterns.streaming_llm(0, 5), patterns.sliding_window(5)
    np.testing.assert_array_equal(streaming(ROW, COLUMN), window(ROW, COLUMN))


def test_streaming_llm_longer_than_the_text_is_causal():
    np.testing.assert_array_equal(
        patterns.streaming_llm(4, N)(ROW, COLUMN), COLUMN <= ROW
    )


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5, 6, 9, 40])
@pytest.mark.parametrize("random", [0, 1, 3])
def test_bigbird_draws_as_many_blocks_as_are_left_and_none_twice(blocks, random):
    pattern = patterns.full() & block_patterns.bigbird(blocks, 1, random, seed=5)
    row, column = np.arange(blocks)[:, None], np.arange(blocks)[None]
    ends = (np.minimum(row, column) == 0) | (np.maximum(row, column) == blocks - 1)
    rest = pattern(row, column) & ~ends & (abs(row - column) > 1)
    free = (~ends & (abs(row - column) > 1)).sum(axis=1)
    np.testing.assert_array_equal(rest.sum(axis=1), np.minimum(free, random))


def test_bigbird_draws_evenly_and_anew_for_each_seed():
    row, column = np.arange(64)[:, None], np.arange(64)[None]
    drawn = [block_patterns._Random(64, 3, seed)(row, column) for seed in range(50)]
    share = np.mean(drawn, axis=0)[2:-2]
    free = abs(row[2:-2] - column) > 1
    free[:, [0, -1]] = False
    # 50 draws of 3 out of 59: about 2.5 a block; none is favoured or forgotten.
    assert share[free].mean() == pytest.approx(3 / 59, rel=0.01)
    assert share[free].std() < 1.5 * np.sqrt(3 / 59 / 50)
    assert not np.array_equal(drawn[0], drawn[1])


def test_draws_are_the_same_in_32_bits():
    rule = block_patterns._Random(2**14, 3, 7)
    row = np.arange(1, 2**14 - 1)
    for pick in range(3):
        narrow = rule.column(row.astype("int32"), pick)
        np.testing.assert_array_equal(rule.column(row, pick), narrow)
        np.testing.assert_array_equal(rule.column(jnp.asarray(row), pick), narrow)


def test_power_attention_reaches_all_of_the_past_in_log_many_layers():
    pattern = block_patterns.power_attention(block=1, window=1, sinks=0)
    reach, n = pattern(np.arange(64)[:, None], np.arange(64)[None]).astype(int), 64
    assert reach.sum(axis=1).max() == 7
    reached = np.linalg.matrix_power(reach, 6) > 0
    np.testing.assert_array_equal(reached, np.tril(np.ones((n, n), bool)))


def test_wide_phases_and_windows_are_everything():
    for pattern in (patterns.full(), video_patterns.multi_diagonal(6, 6)):
        assert pattern(ROW, COLUMN).all()
    assert video_patterns.diagonal(N)(ROW, COLUMN).all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: patterns.sliding_window(0), "window=0.*at least 1"),
        (lambda: patterns.streaming_llm(-1, 4), "length=-1.*at least 0"),
        (lambda: patterns.dilated(3, 0), "dilation=0"),
        (lambda: patterns.fixed(4, 5), "summary=5.*stride=4"),
        (lambda: block_patterns.bigbird(0), "length=0.*at least 1"),
        (lambda: block_patterns.power_attention(block=0), "size=0"),
        (lambda: video_patterns.multi_diagonal(4, 0), "width=0"),
        (lambda: video_patterns.vertical_stripe(-1, 4), "start=-1"),
    ],
)
def test_an_impossible_pattern_names_its_argument(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("module", [patterns, mask])
def test_the_documented_examples_hold(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_block_rules_cost_what_they_admit():
    for pattern in (
        block_patterns.bigbird(2**13, 64, 3, seed=1),
        block_patterns.power_attention(64, 5, 1),
    ):
        mask = BlockMask.from_pattern(
            pattern, q_len=2**13, kv_len=2**13, block_q=64, block_kv=64
        )
        place = 64 * np.arange(128)
        admitted = pattern(place[:, None], place[None])
        np.testing.assert_array_equal(mask.count[0, 0], admitted.sum(axis=1))


def test_a_million_positions_need_no_dense_mask():
    pattern = patterns.streaming_llm(128, 1024)
    n = 2**20
    large = BlockMask.from_pattern(
        pattern, q_len=n, kv_len=n, block_q=128, block_kv=128
    )
    assert large.ids.shape == (1, 1, n // 128, 10)
    assert (large.full[0, 0, 16:] == 8).all()
