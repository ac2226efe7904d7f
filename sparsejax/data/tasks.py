"""Questions about a long text whose answer stands in it, drawn at any length.

A task is ``(rng, facts, filler) -> Question``: ``facts`` says how many things the text
states, and ``filler(sentences)`` gives as much as is wanted of what has nothing to do
with them. The answer is the only continuation that counts.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

__all__ = ["TASKS", "Question", "at_length", "filler"]

SENTENCES = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
WORDS = (
    *("apple", "river", "stone", "candle", "forest", "winter"),
    *("garden", "silver", "bridge", "window", "mountain", "pepper"),
    *("violin", "harbor", "meadow", "lantern", "copper", "thunder"),
    *("island", "feather", "marble", "orchard", "compass", "velvet"),
    *("anchor", "cinnamon", "glacier", "pebble", "saddle", "tunnel"),
)


class Question(NamedTuple):
    """A text, and what has to follow."""

    text: str
    answer: str


Filler = Callable[[int], list[str]]
Task = Callable[[np.random.Generator, int, list[str]], Question]


def filler(sentences: int) -> list[str]:
    """Give so many sentences that say nothing."""
    return [SENTENCES[n % len(SENTENCES)] for n in range(sentences)]


def _number(rng: np.random.Generator) -> str:
    return str(rng.integers(10_000, 100_000))


def _hidden(rng: np.random.Generator, facts: list[str], around: list[str]) -> str:
    """Put facts, in their order, at places drawn among other sentences."""
    places = np.sort(rng.integers(0, len(around) + 1, len(facts)))
    text = list(around)
    for shift, (place, fact) in enumerate(zip(places, facts, strict=True)):
        text.insert(int(place) + shift, fact)
    return " ".join(text)


def needle(rng: np.random.Generator, facts: int, around: list[str]) -> Question:
    """One number in a haystack, whatever ``facts`` says.

    Source: Hsieh et al. 2024, arXiv:2404.06654, Sec. 3.1. Departure: the answer is the
    number, right behind the question; keys are of thirty nouns.
    """
    del facts
    return multi_key(rng, 1, around)


def multi_key(rng: np.random.Generator, facts: int, around: list[str]) -> Question:
    """One of several numbers, each under its own key.

    Source: Hsieh et al. 2024, arXiv:2404.06654, Sec. 3.1. Departure: as for ``needle``.
    """
    keys = rng.choice(WORDS, min(facts, len(WORDS)), replace=False)
    numbers = [_number(rng) for _ in keys]
    pairs = zip(keys, numbers, strict=True)
    said = [f"The secret number of {key} is {number}." for key, number in pairs]
    asked = int(rng.integers(len(keys)))
    text = _hidden(rng, said, around)
    text += f" What is the secret number of {keys[asked]}? The secret number of"
    return Question(f"{text} {keys[asked]} is", f" {numbers[asked]}")


def variable_tracking(
    rng: np.random.Generator, facts: int, around: list[str]
) -> Question:
    """The value of the last variable of a chain of assignments.

    Source: Hsieh et al. 2024, arXiv:2404.06654, Sec. 3.2. Departure: the value is asked
    for, not the variables that have it.
    """
    names = [f"X{n}" for n in rng.permutation(90)[:facts] + 10]
    value = _number(rng)
    said = [f"VAR {names[0]} = {value}."]
    said += [f"VAR {b} = {a}." for a, b in itertools.pairwise(names)]
    text = _hidden(rng, said, around)
    return Question(f"{text} The value of VAR {names[-1]} is", f" {value}")


def associative_recall(
    rng: np.random.Generator, facts: int, around: list[str]
) -> Question:
    """The partner of a word in a list of pairs that is as long as the text.

    Source: Arora et al. 2023, arXiv:2312.04927, Sec. 3. Departure: of words, and one
    query at the end.
    """
    keys = rng.choice(WORDS, min(facts, len(WORDS)), replace=False)
    values = rng.choice(WORDS, len(keys))
    table = dict(zip(keys, values, strict=True))
    asked = str(rng.choice(keys))
    pairs = [f"{key} {table[key]}," for key in rng.permutation(np.repeat(keys, 2))]
    text = " ".join([*around, *pairs])
    return Question(f"{text} {asked}", f" {table[asked]}")


TASKS: dict[str, Task] = {
    "associative_recall": associative_recall,
    "multi_key": multi_key,
    "needle": needle,
    "variable_tracking": variable_tracking,
}


def at_length(
    task: Task,
    rng: np.random.Generator,
    size: Callable[[str], int],
    *,
    tokens: int,
    facts: int = 4,
) -> Question:
    """Draw a question as long as fits, by adding filler.

    Args:
        size: counts the tokens of a text.
        tokens: of question and answer together, at most.

    Raises:
        ValueError: if the facts alone are longer.
    """
    seed = rng.integers(2**63)

    def drawn(sentences: int) -> Question:
        return task(np.random.default_rng(seed), facts, filler(sentences))

    def fits(sentences: int) -> bool:
        return size("".join(drawn(sentences))) <= tokens

    if not fits(0):
        raise ValueError(
            f"tokens={tokens}: {facts} facts of {task.__name__} alone take"
            f" {size(''.join(drawn(0)))}; ask for longer texts"
        )
    few, many = 0, 1
    while fits(many):
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if fits(middle) else (few, middle)
    return drawn(few)
