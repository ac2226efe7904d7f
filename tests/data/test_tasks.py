"""A question's answer is determined by its text."""

import re

import numpy as np
import pytest

from sparsejax.data.tasks import (
    TASKS,
    associative_recall,
    at_length,
    filler,
    multi_key,
    needle,
    variable_tracking,
)


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("name", TASKS)
def test_the_same_numbers_ask_the_same_question(name):
    one, two = (TASKS[name](rng(5), 3, filler(4)) for _ in range(2))
    assert one == two
    assert one != TASKS[name](rng(6), 3, filler(4))
    assert one.answer.startswith(" ")


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("tokens", [400, 1500])
def test_a_question_is_as_long_as_it_may_be(name, tokens):
    question = at_length(TASKS[name], rng(1), len, tokens=tokens, facts=2)
    assert tokens - 30 < len("".join(question)) <= tokens


def test_a_length_that_the_facts_exceed_is_named():
    with pytest.raises(ValueError, match=r"tokens=50: 4 facts of multi_key alone"):
        at_length(multi_key, rng(), len, tokens=50)


@pytest.mark.parametrize(("task", "facts"), [(needle, 1), (multi_key, 5)])
def test_a_number_stands_under_the_key_that_is_asked_for(task, facts):
    text, answer = task(rng(2), 5, filler(9))
    said = dict(re.findall(r"number of (\w+) is (\d+)\.", text))
    assert len(said) == facts
    key = re.search(r"What is the secret number of (\w+)\?", text).group(1)
    assert answer == f" {said[key]}"
    assert all(sentence in text for sentence in filler(5))


def test_variable_tracking_follows_a_chain():
    text, answer = variable_tracking(rng(3), 6, filler(3))
    values = {}
    for name, value in re.findall(r"VAR (\w+) = (\w+)\.", text):
        values[name] = values.get(value, value)
    asked = re.search(r"The value of VAR (\w+) is$", text).group(1)
    assert len(values) == 6
    assert answer == f" {values[asked]}"


def test_associative_recall_has_seen_the_pair_before():
    text, answer = associative_recall(rng(4), 8, [])
    pairs = set(re.findall(r"(\w+) (\w+),", text))
    assert len(pairs) == 8
    assert dict(pairs)[text.rsplit(" ", 1)[1]] == answer.strip()
