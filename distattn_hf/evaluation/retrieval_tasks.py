"""Long texts that end with a question: about a number, a fact or a pair hidden in them, or about how they go on.

Of every task the answer is the end of the text, so that one forward pass gives the logits of its tokens.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..conversion.probe import KEY, PAIRS, VALUE, key_value_text
from ..data.packing import start_tokens, token_stream

# How many tokens of running text are read at most.
MOST_TOKENS = 2**18
# Keys of random tokens differ if there are so many to draw from.
LEAST_TOKENS = 16

_CITIES = ("Lisbon", "Oslo", "Lima", "Kyoto", "Cairo", "Dublin", "Quito", "Vienna", "Perth", "Havana")
_VERBS = ("paint", "build", "carry", "draw", "hide", "clean", "throw", "borrow", "count", "repair")
_KINDS = ("small", "red", "heavy", "wooden", "round", "broken", "silver", "warm", "blue", "empty")
_THINGS = ("boat", "drum", "lamp", "chair", "kite", "bottle", "basket", "clock", "ladder", "bell")


@dataclass(frozen=True)
class Question:
    """One text: ids (1, N), the last `answer` of which are what is asked for (0: only a text to go on with).

    place: the index of the first token of what is hidden; None where nothing is.
    """

    ids: Tensor
    answer: int
    place: int | None = None


class Haystack:
    """Running text in a tokenizer's tokens, to hide things in; at most `MOST_TOKENS`, whatever the length asked for.

    Raises `ValueError` without a tokenizer, and for texts without a token.
    """

    def __init__(self, tokenizer, texts: Iterable[str]):
        if tokenizer is None:
            raise ValueError("tokenizer must be given: long texts are made of its tokens, got None")
        texts = list(texts)
        self.tokenizer = tokenizer
        self.start = start_tokens(tokenizer, texts)
        self.ids = token_stream(tokenizer, texts, MOST_TOKENS)[:MOST_TOKENS]
        if not self.ids:
            raise ValueError("data holds no token")

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text without special ones."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def cut(self, count: int, draw: random.Random) -> list[int]:
        """Return `count` tokens from a random place; raises `ValueError` where there are not so many."""
        self.check(count)
        start = draw.randrange(len(self.ids) - count + 1)
        return self.ids[start : start + count]

    def check(self, count: int, why: str = "") -> None:
        """Raise `ValueError` where the text has fewer than `count` tokens."""
        if len(self.ids) < count:
            raise ValueError(f"data holds {len(self.ids):,} tokens, and {count:,} are needed{why}; give more text")

    def hide(self, hidden: str, question: str, answer: str, length: int, depth: float, draw) -> Question:
        """Return a text of `length` tokens: `hidden` after a share `depth` of it, question and answer at its end.

        Raises `ValueError` for a tokenizer that has no tokens for the answer, for a length in which they have no room,
        and where the running text is too short.
        """
        found, asked, said = (self.encode(text) for text in (hidden, question, answer))
        while said and not self.tokenizer.decode(said[:1]).strip():
            # The space before a number is no part of it.
            asked, said = [*asked, said[0]], said[1:]
        if not said or self.tokenizer.unk_token_id in said:
            raise ValueError(f"the tokenizer has no tokens for the answer {answer.strip()!r}; task 'kv' needs no words")
        if (room := length - len(self.start) - len(found) - len(asked) - len(said)) < 1:
            raise ValueError(f"lengths must be at least {length - room + 1} tokens for this task, got {length}")
        text, place = self.cut(room, draw), round(depth * room)
        ids = [*self.start, *text[:place], *found, *text[place:], *asked, *said]
        return Question(torch.tensor([ids]), len(said), len(self.start) + place)


def passkey(text: Haystack, length: int, depth: float, draw: random.Random) -> Question:
    """Hide a number of five digits and ask for it (Mohtashami & Jaggi, 2023)."""
    number = draw.randint(10_000, 99_999)
    return text.hide(
        f" The pass key is {number}. Keep it in mind: {number} is the pass key. ",
        "\n\nQuestion: what is the pass key?\nAnswer: the pass key is", f" {number}", length, depth, draw,
    )  # fmt: skip


def needle(text: Haystack, length: int, depth: float, draw: random.Random) -> Question:
    """Hide a sentence about a city, one that cannot be guessed, and ask for it (after Kamradt, 2023)."""
    city, *words = (draw.choice(choice) for choice in (_CITIES, _VERBS, _KINDS, _THINGS))
    deed = " {} a {} {}".format(*words)
    return text.hide(
        f" The best thing to do in {city} is to{deed}. ",
        f"\n\nQuestion: what is the best thing to do in {city}?\nAnswer: the best thing to do in {city} is to",
        deed, length, depth, draw,
    )  # fmt: skip


def key_value(text: Haystack, length: int, depth: float, draw: random.Random) -> Question:
    """Spread pairs of random tokens over the text and ask for the value of one: its key again (as `probe` does).

    The other pairs stand before the question once more, which shows what is asked.

    Raises `ValueError` for a length without room for the pairs and for text of very few different tokens.
    """
    tokens = sorted(set(text.ids) - set(text.tokenizer.all_special_ids))
    if len(tokens) < LEAST_TOKENS:
        raise ValueError(f"data has {len(tokens)} different tokens, and keys are drawn from at least {LEAST_TOKENS}")
    start = torch.tensor([text.start], dtype=torch.long)
    if (room := length - len(text.start) - 2 * PAIRS * (KEY + VALUE)) < 1:
        raise ValueError(f"lengths must be at least {length - room + 1} tokens for this task, got {length}")
    text.check(room)
    ids, place = key_value_text(
        torch.tensor(text.ids), torch.tensor(tokens), length - len(text.start), (0, 0), draw, depth
    )
    return Question(torch.cat([start, ids], dim=1), VALUE, len(text.start) + place)


# Those that hide something, at a depth.
RETRIEVAL_TASKS: dict[str, Callable[[Haystack, int, float, random.Random], Question]] = {
    "passkey": passkey,
    "needle": needle,
    "kv": key_value,
}
LONG_TEXT_TASKS = (*RETRIEVAL_TASKS, "perplexity", "generation")


def questions(
    task: str, text: Haystack, length: int, depth: float | None, samples: int, tail: int = 256
) -> list[Question]:
    """Return the texts of one cell, each of exactly `length` tokens; the same ones in every run and for every model.

    depth: for tasks that hide something, 0 at the beginning to 1 before the question. For "perplexity" the answer is
    the last `tail` tokens, of each length the same ones, with more or less before them; "generation" has none.

    Raises `ValueError` for what is no such task, and where text, length or tokenizer do not allow it.
    """
    if task in RETRIEVAL_TASKS:
        depth = float(depth)  # 0 is 0.0, the same texts
        draws = (random.Random(f"{task} {depth} {sample}") for sample in range(samples))
        return [RETRIEVAL_TASKS[task](text, length, depth, draw) for draw in draws]
    if task not in LONG_TEXT_TASKS:
        raise ValueError(f"task must be one of {', '.join(LONG_TEXT_TASKS)}, got {task!r}")
    if task == "perplexity" and not 1 <= tail < length - len(text.start):
        raise ValueError(f"tail must be from 1 to fewer tokens than lengths, got tail={tail} and length {length}")
    count = length - len(text.start)
    text.check(
        count + (samples - 1) * tail, f" for {samples} texts of {length} tokens, each {tail} after the one before"
    )
    ends = [len(text.ids) - sample * tail for sample in range(samples)]
    answer = tail if task == "perplexity" else 0
    return [Question(torch.tensor([[*text.start, *text.ids[end - count : end]]]), answer) for end in ends]
