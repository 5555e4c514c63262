"""Synthetic tasks that tell attentions apart at small size: associative recall, induction, selective copying.

Each gives inputs and labels (B, N): labels[:, i] is what a causal model must predict having read inputs[:, :i+1], and
-100 where nothing is asked. Fresh data for every seed; numpy only.
"""

from collections.abc import Callable

import numpy as np

from ..core.registry import Registry

TASKS = Registry("synthetic task")
IGNORED = -100


def make_examples(
    task: str, batch: int, length: int, *, items: int, vocab_size: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs and labels, int64 (batch, length) each.

    Args:
        task: "mqar", "induction" or "selective_copying".
        batch: how many examples.
        length: N tokens each.
        items: pairs of "mqar", copied tokens of "selective_copying"; 1 for "induction".
        vocab_size: of all tokens.
        seed: of everything drawn.

    Raises `ValueError` naming what does not fit.
    """
    return TASKS.get(task)(np.random.default_rng(seed), batch, length, items, vocab_size)


def _register(name: str):
    return lambda function: TASKS.register(name, function)


def _choose(random: np.random.Generator, batch: int, count: int, keys: Callable[[tuple[int, int]], np.ndarray], size):
    """Draw `count` different numbers below `size` in each row, by the smallest of random keys: (batch, count)."""
    return np.argsort(keys((batch, size)), axis=1)[:, :count]


@_register("mqar")
def multi_query_associative_recall(random, batch: int, length: int, items: int, vocab_size: int, power: float = 0.01):
    """Write key-value pairs one after another, then ask for the value of each key, once, among random tokens.

    Keys are from the lower half of the vocabulary and values from the upper, different ones in each example. Queries
    stand at even gaps after the pairs; gap g is drawn with probability ∝ g^(power - 1), so most of them early.
    Source: Arora et al., Zoology: Measuring and Improving Recall in Efficient Language Models (2023).
    """
    if items < 1 or 4 * items > length or length % 2:
        raise ValueError(f"length must be even and at least 4·items for mqar, got {length} with {items} pairs")
    half, start = vocab_size // 2, 2 * items
    if items > half - 1:
        raise ValueError(f"vocab_size must be above {2 * items + 1} for {items} pairs, got {vocab_size}")
    keys = 1 + _choose(random, batch, items, random.random, half - 1)
    values = half + _choose(random, batch, items, random.random, vocab_size - half)
    room = (length - start) // 2
    weights = np.arange(1, room + 1) ** (power - 1)
    # Exponential numbers of rate w come in the order of draws without replacement by w.
    gaps = _choose(random, batch, items, lambda size: random.exponential(size=size) / weights, room)
    inputs = random.integers(vocab_size, size=(batch, length))
    inputs[:, 0:start:2], inputs[:, 1:start:2] = keys, values
    labels = np.full((batch, length), IGNORED)
    np.put_along_axis(inputs, start + 2 * gaps, keys, axis=1)
    np.put_along_axis(labels, start + 2 * gaps, values, axis=1)
    return inputs, labels


@_register("induction")
def induction(random, batch: int, length: int, items: int, vocab_size: int):
    """Write random tokens with one special token (0), which ends the text again: what followed it the first time?

    Source: Dao et al., Hungry Hungry Hippos (2022), with one special token, as in Mamba (Gu and Dao, 2023).
    """
    if items != 1 or length < 4 or vocab_size < 3:
        raise ValueError(
            f"induction has items=1, length >= 4 and vocab_size >= 3, got {items}, {length} and {vocab_size}"
        )
    inputs = random.integers(1, vocab_size, size=(batch, length))
    place = random.integers(length - 2, size=batch)
    inputs[np.arange(batch), place] = inputs[:, -1] = 0
    labels = np.full((batch, length), IGNORED)
    labels[:, -1] = inputs[np.arange(batch), place + 1]
    return inputs, labels


@_register("selective_copying")
def selective_copying(random, batch: int, length: int, items: int, vocab_size: int):
    """Scatter tokens among noise (0), then ask for all of them in their order by as many markers (1).

    Source: Gu and Dao, Mamba (2023), after Jing et al. (2019).
    """
    if items < 1 or 2 * items > length or vocab_size < 4:
        raise ValueError(
            f"length must be at least 2·items and vocab_size at least 4 for selective_copying, got {length}, {items} "
            f"tokens and {vocab_size}"
        )
    tokens = random.integers(2, vocab_size, size=(batch, items))
    places = np.sort(_choose(random, batch, items, random.random, length - items), axis=1)
    inputs, labels = np.zeros((batch, length), dtype=np.int64), np.full((batch, length), IGNORED)
    np.put_along_axis(inputs, places, tokens, axis=1)
    inputs[:, -items:], labels[:, -items:] = 1, tokens
    return inputs, labels
