"""Where things are hidden in long texts, and that what is asked for can be found there, by nothing else."""

import random
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from distattn_hf.data.sources import read_texts
from distattn_hf.evaluation import retrieval_tasks
from distattn_hf.evaluation.long_text_scores import LongTextOptions, score_cell
from distattn_hf.evaluation.retrieval_tasks import RETRIEVAL_TASKS, Haystack, questions
from tests.conversion.test_row_starts import letters
from tests.fixtures.load import GPT2_ENGLISH

DEPTHS = (0.0, 0.3, 1.0)
TOKENIZER = AutoTokenizer.from_pretrained(GPT2_ENGLISH)


@pytest.fixture(scope="module")
def text():
    return Haystack(TOKENIZER, read_texts(str(GPT2_ENGLISH / "heldout.txt")))


def is_part(part: list[int], whole: list[int]) -> bool:
    return any(whole[start : start + len(part)] == part for start in range(len(whole) - len(part) + 1))


@pytest.mark.parametrize("length", [120, 250])
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize(
    ("task", "hidden", "asked"),
    [("passkey", " The pass key is {0}. Keep it in mind: {0} is the pass key. ",
      "\n\nQuestion: what is the pass key?\nAnswer: the pass key is"),
     ("needle", " The best thing to do in {1} is to {0}. ",
      "\n\nQuestion: what is the best thing to do in {1}?\nAnswer: the best thing to do in {1} is to")],
)  # fmt: skip
def test_what_is_hidden_stands_at_its_depth(text, task, hidden, asked, depth, length):
    """In a piece of the running text that is whole but for it, and the answer stands there and at the end."""
    for question in questions(task, text, length, depth, samples=3):
        ids, place = question.ids[0].tolist(), question.place
        assert len(ids) == length
        answer = TOKENIZER.decode(ids[-question.answer :]).strip()
        city = TOKENIZER.decode(ids).rpartition("to do in ")[2].partition(" is to")[0]
        found, end = (text.encode(part.format(answer, city)) for part in (hidden, asked))
        end += text.encode(f" {answer}")
        assert ids[place : place + len(found)] == found
        assert ids[-len(end) :] == end
        running = ids[:place] + ids[place + len(found) : -len(end)]
        assert abs(place - depth * len(running)) <= 0.5
        assert is_part(running, text.ids)


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_key_stands_at_its_depth_before_its_value(text, depth):
    for question in questions("kv", text, 250, depth, samples=3):
        ids = question.ids[0].tolist()
        assert (len(ids), question.answer) == (250, 3)
        pair = ids[-6:]
        assert [i for i in range(245) if ids[i : i + 6] == pair] == [question.place, 244]
        for other in (ids[i : i + 6] for i in range(250 - 48, 244, 6)):
            assert sum(ids[i : i + 6] == other for i in range(250 - 48)) == 1
        # Of 154 tokens of running text; up to seven other pairs stand before it.
        before = question.place - round(depth * 154)
        assert before % 6 == 0
        assert 0 <= before <= 42


def test_texts_are_the_same_each_time_and_differ_from_each_other(text):
    for task in RETRIEVAL_TASKS:
        first, again = (questions(task, text, 150, 0.5, samples=4) for _ in range(2))
        assert all(torch.equal(a.ids, b.ids) for a, b in zip(first, again))
        assert len({tuple(question.ids[0, -question.answer :].tolist()) for question in first}) == 4


def test_a_text_begins_as_the_tokenizer_begins_one(monkeypatch):
    monkeypatch.setattr(retrieval_tasks, "LEAST_TOKENS", 10)
    tokenizer = letters("bos (Gemma)")
    text = Haystack(tokenizer, ["abcdefghij" * 20])
    for task, depth in (("kv", 0.0), ("perplexity", None)):
        (question,) = questions(task, text, 100, depth, 1, tail=8)
        assert question.ids.shape == (1, 100)
        assert question.ids[0, 0] == tokenizer.bos_token_id
        assert not (question.ids[0, 1:] == tokenizer.bos_token_id).any()
        assert question.place in (1, None)


def test_perplexity_is_of_the_same_tokens_whatever_stands_before_them(text):
    """Of each text the last ones: together the end of the data, none of them twice."""
    short, long = (questions("perplexity", text, length, None, 3, tail=16) for length in (64, 200))
    assert all(torch.equal(a.ids[0], b.ids[0, -64:]) for a, b in zip(short, long))
    assert [t for q in reversed(short) for t in q.ids[0, -16:].tolist()] == text.ids[-48:]
    assert {question.answer for question in short} == {16}
    assert {question.answer for question in questions("generation", text, 64, None, 3)} == {0}


class Copier:
    """Predicts what came after the last place that ends like the text so far, of the last `window` tokens alone."""

    device = torch.device("cpu")

    def __init__(self, window: int):
        self.window, self.calls = window, 0

    def eval(self):
        pass

    def __call__(self, input_ids, use_cache, logits_to_keep):
        self.calls += 1
        ids, (count,) = input_ids[0].tolist(), input_ids.shape[:1]
        assert (count, use_cache) == (1, False)
        logits = torch.zeros(1, logits_to_keep, 3000)
        for row, end in enumerate(range(len(ids) - logits_to_keep, len(ids))):
            seen = ids[max(0, end + 1 - self.window) : end + 1]
            same = [self._same(seen, place) for place in range(len(seen) - 1)]
            best = max(range(len(same)), key=lambda place: (same[place], place))
            logits[0, row, seen[best + 1]] = 10.0
        return SimpleNamespace(logits=logits)

    def _same(self, seen: list[int], place: int) -> int:
        """How many tokens up to `place` are those at the end."""
        length = 0
        while length <= place and length < 12 and seen[place - length] == seen[-1 - length]:
            length += 1
        return length


@pytest.mark.parametrize("task", RETRIEVAL_TASKS)
def test_who_copies_finds_all_and_who_sees_the_end_alone_only_what_stands_there(text, task):
    options = LongTextOptions(task, (250,), (0.0, 1.0), samples=4)
    begin, end = (options.questions(text, 250, depth) for depth in options.depths)
    everything, near = Copier(250), Copier(90)
    assert max(TOKENIZER.vocab.values()) < 3000
    # A token of logit 10 among 3,000, the others at 0.
    right = torch.log1p(2999 * torch.tensor(-10.0).exp()).item()
    for asked in (begin, end):
        scores = score_cell(everything, asked, options)
        assert scores == {"exact": 1.0, "hits": 4, "samples": 4, "log_loss": pytest.approx(right, abs=1e-4)}
    assert score_cell(near, end, options)["exact"] == 1.0
    blind = score_cell(near, begin, options)
    assert (blind["exact"], blind["hits"]) == (0.0, 0)
    assert blind["log_loss"] > 1.0
    assert near.calls == 8


@pytest.mark.parametrize("wrong", [0, 2, -1])
def test_one_wrong_token_is_no_answer(text, wrong):
    class Spoilt(Copier):
        def __call__(self, **given):
            output = super().__call__(**given)
            # The last logits predict what would come after the answer.
            place = wrong - 1 if wrong < 0 else wrong
            output.logits[0, place] = output.logits[0, place].roll(1)
            return output

    options = LongTextOptions("passkey", (200,), (0.5,), samples=2)
    asked = options.questions(text, 200, 0.5)
    assert score_cell(Copier(200), asked, options)["exact"] == 1.0
    assert score_cell(Spoilt(200), asked, options)["exact"] == 0.0


@pytest.mark.parametrize(
    ("task", "length", "message"),
    [
        ("passkey", 40, "lengths must be at least .* tokens for this task, got 40"),
        ("kv", 96, "lengths must be at least 97 tokens for this task, got 96"),
        ("passkey", 60_000, "data holds .* tokens, and .* are needed; give more text"),
        ("kv", 60_000, "data holds .* tokens, and .* are needed; give more text"),
        ("perplexity", 60_000, "data holds .* are needed for 2 texts of 60000"),
        ("perplexity", 256, "tail must be from 1 to fewer tokens than lengths, got tail=256 and length 256"),
        ("needles", 100, "task must be one of passkey, needle, kv, perplexity, generation, got 'needles'"),
    ],
)
def test_what_text_and_length_do_not_allow_is_refused(text, task, length, message):
    with pytest.raises(ValueError, match=message):
        questions(task, text, length, 0.5, samples=2)


def test_a_tokenizer_without_words_is_refused():
    text = Haystack(letters("none (GPT-2)"), ["abcdefgh" * 60])
    with pytest.raises(ValueError, match=r"has no tokens for the answer '\d{5}'; task 'kv' needs no words"):
        questions("passkey", text, 100, 0.5, 1)
    with pytest.raises(ValueError, match="data has 8 different tokens, and keys are drawn from at least 16"):
        questions("kv", text, 100, 0.5, 1)
    with pytest.raises(ValueError, match="tokenizer must be given"):
        Haystack(None, ["abc"])
    with pytest.raises(ValueError, match="data holds no token"):
        Haystack(letters("none (GPT-2)"), [])


def test_no_more_text_is_read_than_needed(monkeypatch):
    monkeypatch.setattr(retrieval_tasks, "MOST_TOKENS", 50)
    text = Haystack(letters("none (GPT-2)"), ["abcd" * 60])
    assert len(text.ids) == 50
    assert len(text.cut(50, random.Random(0))) == 50
