"""The order of batches, their split over processes, and resuming."""

import json
import threading

import numpy as np
import pytest

from sparsejax.config import ConfigError
from sparsejax.data import Batch, merge_states, pipeline


def take(data, count):
    return [next(data.train) for _ in range(count)]


def assert_equal(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        for array, target in zip(batch, other, strict=True):
            np.testing.assert_array_equal(array, target, strict=True)


def joined(*parts):
    return [
        Batch(*(np.concatenate(x) for x in zip(*rows, strict=True)))
        for rows in zip(*parts, strict=True)
    ]


def through_json(state):
    return json.loads(json.dumps(state))


def test_batches_are_packed_rows_of_int32(open_small):
    batch = next(open_small().train)
    assert {(x.shape, x.dtype.name) for x in batch} == {((8, 33), "int32")}


def test_a_row_counts_its_segments_and_their_positions(open_small):
    for batch in take(open_small(), 20):
        starts = np.diff(batch.segments, axis=1, prepend=0)
        assert set(np.unique(starts)) <= {0, 1}
        assert (batch.segments[:, 0] == 1).all()
        expected = np.where(starts == 1, 0, np.roll(batch.positions, 1, axis=1) + 1)
        np.testing.assert_array_equal(batch.positions, expected)


def test_every_document_starts_with_bos_and_only_there(open_small):
    data = open_small()
    for batch in take(data, 20):
        bos = batch.tokens == data.tokenizer.bos
        assert (batch.positions[bos] == 0).all()
        later = np.arange(33) > 0
        starts = (batch.positions == 0) & later  # the first may continue a document
        np.testing.assert_array_equal(bos & later, starts)


def test_training_text_is_never_padded(open_small):
    assert all((batch.segments > 0).all() for batch in take(open_small(), 50))


@pytest.mark.parametrize("batch_size", [1, 8])
def test_an_epoch_reads_every_training_document_once(open_small, batch_size):
    """The slow twin: streams, followed by hand, in the order of their documents."""
    data = open_small(batch_size=batch_size)
    streams = batch_size
    rows = np.stack([batch.tokens for batch in take(data, 4000 // batch_size)])
    documents = []
    for stream in range(streams):
        text = rows[:, stream].reshape(-1)
        starts = np.flatnonzero(text == data.tokenizer.bos)
        documents.append([x.tobytes() for x in np.split(text, starts)[1:-1]])
    per_stream = data.documents["train"] // streams
    first = [document for queue in documents for document in queue[:per_stream]]
    assert len(set(first)) == per_stream * streams


def test_every_epoch_has_an_order_of_its_own():
    order = pipeline.shuffled(range(50), seed=0)
    first, second = ([order[i + 50 * epoch] for i in range(50)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second


@pytest.mark.parametrize("room", [0, 3000])
def test_text_that_does_not_fit_in_memory_is_read_again(open_small, monkeypatch, room):
    expected = take(open_small(), 40)
    monkeypatch.setattr(pipeline, "KEPT_BYTES", room)
    assert_equal(take(open_small(), 40), expected)


def test_seeds_differ_in_order(open_small):
    tokens = [take(open_small(seed=s), 1)[0].tokens for s in (0, 1)]
    assert (tokens[0] != tokens[1]).any()


def test_the_same_seed_gives_the_same_batches(open_small):
    assert_equal(take(open_small(), 10), take(open_small(), 10))


@pytest.mark.parametrize(("prefetch", "threads"), [(0, 1), (5, 1), (0, 3), (2, 3)])
def test_reading_ahead_changes_no_batch(open_small, prefetch, threads):
    fast = open_small(prefetch=prefetch, threads=threads)
    assert_equal(take(fast, 10), take(open_small(prefetch=0), 10))


@pytest.mark.parametrize("count", [2, 4, 8])
def test_the_global_batch_does_not_know_how_many_processes_read_it(open_small, count):
    parts = [
        take(open_small(process_index=p, process_count=count), 6) for p in range(count)
    ]
    assert_equal(joined(*parts), take(open_small(), 6))


@pytest.mark.parametrize("after", [0, 1, 2, 3, 7, 40])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_resuming_equals_never_having_stopped(open_small, after, prefetch):
    data = open_small(prefetch=prefetch)
    take(data, after)
    state = through_json(data.train.state())
    resumed = open_small(prefetch=prefetch)
    take(resumed, 3)
    resumed.train.restore(state)
    assert resumed.train.state() == state
    assert_equal(take(resumed, 10), take(data, 10))
    assert resumed.train.state() == data.train.state()


def test_resuming_from_every_batch_is_exact(open_small):
    """Rows that end where a document ends have states of their own: try many."""
    data = open_small(seq_len=6, batch_size=1, prefetch=0)
    states, batches = [], []
    for _ in range(300):
        states.append(through_json(data.train.state()))
        batches.append(next(data.train))
    other = open_small(seq_len=6, batch_size=1, prefetch=0)
    for state, batch in zip(states, batches, strict=True):
        other.train.restore(state)
        assert_equal([next(other.train)], [batch])


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4)])
def test_any_number_of_processes_resumes_from_the_merged_state(
    open_small, before, after
):
    def processes(count):
        return [open_small(process_index=p, process_count=count) for p in range(count)]

    straight = open_small()
    take(straight, 5)
    first = processes(before)
    assert_equal(joined(*(take(data, 5) for data in first)), take(open_small(), 5))
    state = through_json(merge_states(data.train.state() for data in first))
    second = processes(after)
    for data in second:
        data.train.restore(state)
    assert_equal(joined(*(take(data, 5) for data in second)), take(straight, 5))


def test_the_state_is_that_of_the_last_batch_handed_out(open_small):
    ahead, here = open_small(prefetch=4), open_small(prefetch=0)
    for _ in range(5):
        assert ahead.train.state() == here.train.state()
        next(ahead.train), next(here.train)


def test_a_closed_iterator_continues_where_it_was(open_small):
    data = open_small()
    first = take(data, 3)
    data.close()
    assert_equal(first + take(data, 3), take(open_small(), 6))


def test_closing_ends_the_thread(open_small):
    before = threading.active_count()
    data = open_small()
    next(data.train)
    assert threading.active_count() == before + 1
    data.close()
    data.close()
    assert threading.active_count() == before


def test_an_error_while_reading_ahead_reaches_the_reader(open_small, monkeypatch):
    data = open_small()
    first = take(data, 1)

    def fail(text):
        raise OSError("disk on fire")

    monkeypatch.setattr(data.tokenizer, "encode", fail)
    with pytest.raises(OSError, match="disk on fire"):
        take(data, 200)
    monkeypatch.undo()
    assert_equal(first, take(open_small(), 1))


def test_state_of_other_data_is_refused(open_small):
    state = open_small(seed=1).train.state()
    with pytest.raises(ConfigError, match="seed must be the same to continue"):
        open_small(seed=0).train.restore(state)
    with pytest.raises(ConfigError, match="states of 2 readers"):
        merge_states([state, open_small(seed=0).train.state()])


def test_state_of_half_the_processes_is_refused(open_small):
    half = open_small(process_index=0, process_count=2).train.state()
    with pytest.raises(ConfigError, match=r"lacks .* streams \[4, 5, 6, 7\].*merge_st"):
        open_small().train.restore(half)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"process_count": 3}, "data.batch_size=8.*8 streams.*3 processes cannot"),
        ({"process_count": 2, "process_index": 2}, "process 2 of 2: no such process"),
        ({"seed": -1}, "seed=-1: must be in"),
    ],
)
def test_a_batch_that_cannot_be_divided_is_refused(open_small, changes, message):
    with pytest.raises(ValueError, match=message):
        open_small(**changes)


def test_evaluation_is_fixed_whatever_the_seed_and_whatever_was_read(open_small):
    data = open_small(seed=3)
    first = data.evaluation(2)
    take(data, 3)
    assert_equal(data.evaluation(2), first)
    assert_equal(open_small(seed=4).evaluation(2), first)
    assert_equal(data.evaluation(1), first[:1])


def test_evaluation_rows_are_divided_like_training_rows(open_small):
    parts = [open_small(process_index=p, process_count=4) for p in range(4)]
    whole = open_small().evaluation(1000)
    assert_equal(joined(*(data.evaluation(1000) for data in parts)), whole)


def test_evaluation_reads_the_whole_validation_text_once_and_pads_its_end(open_small):
    data = open_small()
    batches = data.evaluation(1000)
    tokens = np.concatenate([batch.tokens.reshape(-1) for batch in batches])
    segments = np.concatenate([batch.segments.reshape(-1) for batch in batches])
    assert (np.diff((segments > 0).astype(int)) <= 0).all()
    assert (tokens[segments == 0] == data.tokenizer.pad).all()
    assert (tokens == data.tokenizer.bos).sum() == data.documents["validation"]
    assert all((batch.segments > 0).any() for batch in batches)
    assert (batches[-1].segments == 0).any()


def test_evaluation_of_no_batches_is_refused(open_small):
    with pytest.raises(ValueError, match=r"evaluation\(batches=0\)"):
        open_small().evaluation(0)
