"""Scores of real (tiny) models on long texts, beside what is worked out another way; and what is refused."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from distattn_hf import AttentionSpec, convert
from distattn_hf.data.sources import read_texts
from distattn_hf.evaluation.long_text_scores import (
    LongTextOptions,
    agreement,
    answer_logits,
    continuations,
    evaluate_long_texts,
    score_table,
)
from distattn_hf.evaluation.retrieval_tasks import Haystack
from tests.conversion.models import bert, gpt2, llama
from tests.fixtures.load import GPT2_ENGLISH, gpt2_english

HELDOUT = str(GPT2_ENGLISH / "heldout.txt")


@pytest.fixture(scope="module")
def english():
    model, tokenizer, texts = gpt2_english()
    return model, Haystack(tokenizer, texts)


@torch.no_grad()
def test_perplexity_and_log_loss_are_the_models_own(english):
    """Worked out from all logits of the whole text; of an answer all its tokens count, and nothing else."""
    model, text = english
    for task, answer in (("perplexity", 24), ("kv", 3)):
        options = LongTextOptions(task, (120,), (0.5,), samples=2, tail=24)
        losses = []
        for question in options.questions(text, 120, 0.5):
            nats = -model(question.ids).logits[0, :-1].log_softmax(-1)
            losses += nats.gather(1, question.ids[0, 1:, None])[-answer:, 0].tolist()
        (row,) = evaluate_long_texts({"m": model}, text, options)
        assert len(losses) == 2 * answer
        assert row["log_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        if task == "perplexity":
            assert row["perplexity"] == pytest.approx(math.exp(row["log_loss"]))
            assert (row["tokens"], row["samples"], "depth" in row) == (48, 2, False)


@torch.no_grad()
def test_a_model_that_gives_all_logits_is_scored_on_the_last(english):
    model, text = english
    (question,) = LongTextOptions("passkey", (120,), samples=1).questions(text, 120, 0)
    whole = copy.deepcopy(model)
    whole.forward = lambda logits_to_keep=0, **arguments: model(**arguments)
    assert torch.allclose(answer_logits(whole, question), answer_logits(model, question), atol=1e-5)
    assert LongTextOptions("passkey", (120,), samples=1).questions(text, 120, 0.0)[0].ids.equal(question.ids)


def test_a_model_that_gives_nan_has_a_table(english):
    model = copy.deepcopy(english[0])
    model.transformer.wpe.weight.data.fill_(math.nan)
    rows = evaluate_long_texts({"m": model}, english[1], LongTextOptions("passkey", (120,), (0, 1), samples=1))
    assert "NaN" in score_table(rows)


def test_agreement_counts_tokens_at_the_same_place():
    theirs = [torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6, 7, 8])]
    ours = [torch.tensor([1, 2, 9, 4]), torch.tensor([5, 6, 7, 8])]
    assert agreement(ours, theirs) == {
        "agreement": 7 / 8, "first_divergence": 3.0, "identical": 0.5, "samples": 2, "new_tokens": 4,
    }  # fmt: skip
    assert agreement([torch.tensor([0, 2, 3, 4])], theirs[:1])["first_divergence"] == 0.0


@torch.no_grad()
def test_generation_compares_what_each_goes_on_with(english):
    """By greedy steps without a cache, in which the end token is never chosen."""
    model, text = english
    options = LongTextOptions("generation", (60,), samples=2, new_tokens=5, tail=16)
    other = gpt2_english()[0]
    end = torch.tensor([model.config.eos_token_id])
    torch.nn.init.normal_(other.transformer.h[0].attn.c_proj.weight, std=0.2)
    expected = []
    for question in options.questions(text, 60):
        ids = question.ids
        for _ in range(5):
            logits = model(ids).logits[0, -1].index_fill(0, end, -torch.inf)
            ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
        expected.append(ids[0, -5:])
    tokens = continuations(model, options.questions(text, 60), options)
    assert torch.equal(torch.stack(tokens), torch.stack(expected))
    same = evaluate_long_texts({"student": model, "teacher": model}, text, options, "teacher")
    assert [(row["model"], row["agreement"], row["first_divergence"]) for row in same] == [("student", 1.0, 5.0)]
    (row,) = evaluate_long_texts({"student": other, "teacher": model}, text, options, "teacher")
    mine = torch.stack(continuations(other, options.questions(text, 60), options))
    assert row["agreement"] == (mine == torch.stack(expected)).double().mean().item() < 1


def test_rows_are_of_every_model_length_and_depth(english):
    model, text = english
    options = LongTextOptions("kv", (100, 130), (0.0, 1.0), samples=1)
    student = convert(model, AttentionSpec(mechanism="retrieval", window_size=8, block_size=8, num_blocks=1))
    rows = evaluate_long_texts({"a": model, "b": student}, text, options)
    assert [(row["model"], row["length"], row["depth"]) for row in rows] == [
        (name, length, depth) for length in (100, 130) for depth in (0.0, 1.0) for name in "ab"
    ]
    table = score_table([{**row, "exact": 0.25 if row["model"] == "a" else 1.0} for row in rows])
    assert table.splitlines()[1].split()[-4:] == ["0.0", "1.0", "all", "log-loss"]
    first = next(line for line in table.splitlines() if "100" in line and line.startswith("a"))
    loss = sum(row["log_loss"] for row in rows if (row["model"], row["length"]) == ("a", 100)) / 2
    assert first.split() == ["a", "100", "0.25", "0.25", "0.25", f"{loss:.2f}"]


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (bert, {}, "task 'kv' needs a causal language model, and 'm' is BertForMaskedLM"),
        (gpt2, {"lengths": (128, 129)}, r"lengths must be at most 128, the positions of 'm' \(128\); got 129"),
        (llama, {"task": "generation", "lengths": (250,), "new_tokens": 7},
         r"lengths must be at most 249, the positions of 'm' \(256\) less 7 new tokens; got 250"),
        (gpt2, {"lengths": (96,)}, "lengths must be at least 97 tokens for this task, got 96"),
    ],
)  # fmt: skip
def test_models_and_lengths_are_refused_before_one_runs(english, make, changes, message):
    model = make()
    model.forward = lambda *args, **kwargs: pytest.fail("the model was run")
    options = replace(LongTextOptions("kv", (100,), samples=1), **changes)
    with pytest.raises(ValueError, match=message):
        evaluate_long_texts({"m": model, "t": model}, english[1], options, "t")


def test_generation_needs_a_teacher(english):
    with pytest.raises(ValueError, match="task 'generation' compares a model with its teacher"):
        evaluate_long_texts({"m": english[0]}, english[1], LongTextOptions("generation", (50,)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "passkeys"}, "task must be one of passkey, needle, kv, perplexity, generation, got 'passkeys'"),
        ({"lengths": ()}, r"lengths must be integers >= 2, got \(\)"),
        ({"lengths": (64.5,)}, r"lengths must be integers >= 2, got \(64.5,\)"),
        ({"depths": (0.5, 1.5)}, r"depths must be shares from 0 to 1, got \(0.5, 1.5\)"),
        ({"samples": 0}, "samples must be an integer >= 1, got 0"),
        ({"new_tokens": True}, "new_tokens must be an integer >= 1, got True"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LongTextOptions(**{"task": "kv", **options})


def test_news_needs_no_more_than_a_tokenizer():
    """The default text; of the articles that no fit of the package reads."""
    text = Haystack(AutoTokenizer.from_pretrained(GPT2_ENGLISH), read_texts("news", split="test"))
    assert len(text.ids) == 2**18
