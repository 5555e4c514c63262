"""How rows of text begin: as the tokenizer begins a text, in the fit, the score and the training."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from distattn_hf import AttentionSpec, convert
from distattn_hf.conversion.calibrate import CalibrationOptions
from distattn_hf.data.batches import calibration_batch
from distattn_hf.data.datasets import DataArguments, build_data
from distattn_hf.data.packing import start_tokens
from distattn_hf.evaluation.score import EvaluationOptions, evaluate_model
from tests.conversion.models import bert, gpt2, t5

TEXTS = ["abcdefg", "hij", "a", "jihgfedcba", "bbbb"] * 3
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "[CLS]", "[SEP]", "[MASK]", "<sop>"]
TEMPLATES = {
    "none (GPT-2)": None,
    "bos (Gemma)": "<s> $A",
    "bos and eos": "<s> $A </s>",
    "two (GLM)": "<s> <sop> $A",
    "eos (T5)": "$A </s>",
    "cls and sep (BERT)": "[CLS] $A [SEP]",
    "bos is cls (RoBERTa)": "<s> $A </s>",
}
STARTS = dict.fromkeys(TEMPLATES, []) | dict.fromkeys(("bos (Gemma)", "bos and eos", "bos is cls (RoBERTa)"), [1])
STARTS["two (GLM)"] = [1, 7]
EVERY_SORT = pytest.mark.parametrize("sort", TEMPLATES)


def letters(sort: str) -> PreTrainedTokenizerFast:
    """One token a letter, a = 8; the special tokens around a text are what `TEMPLATES` says."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *"abcdefghij"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if TEMPLATES[sort]:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=TEMPLATES[sort], special_tokens=[(token, vocabulary[token]) for token in SPECIAL]
        )
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}
    names |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"} if "BERT" in sort else {}
    names |= {"cls_token": "<s>"} if "RoBERTa" in sort else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def ids(text: str) -> list[int]:
    return [8 + "abcdefghij".index(letter) for letter in text]


def rows_of(texts, length: int, start: list[int]) -> list[list[int]]:
    """The oracle: one long list, cut into rows that begin with `start`; what fills no row is dropped."""
    stream = [token for text in texts for token in (*ids(text), 2)]
    size = length - len(start)
    return [start + stream[i : i + size] for i in range(0, len(stream) - size + 1, size)]


@EVERY_SORT
def test_start_tokens(sort):
    assert start_tokens(letters(sort), ["  ", "abc", "d"]) == STARTS[sort]


def test_a_tokenizer_that_reads_texts_differently_beside_special_tokens_is_refused():
    tokenizer = letters("bos (Gemma)")
    told = []

    class Odd(type(tokenizer)):
        def __call__(self, text, add_special_tokens=True, **kwargs):
            told.append(text)
            return {"input_ids": [1, 9, 10] if add_special_tokens else [8]}

    tokenizer.__class__ = Odd
    with pytest.raises(ValueError, match="Odd turns 'abc' into other tokens with special tokens than without"):
        start_tokens(tokenizer, ["abc"])
    assert told == ["abc", "abc"]


@EVERY_SORT
def test_calibration_rows_of_a_decoder(sort):
    batch = calibration_batch(gpt2(), ["abcdefghij"] * 9, letters(sort), max_length=12, max_tokens=48)
    assert batch["input_ids"].tolist() == rows_of(["abcdefghij"] * 9, 12, STARTS[sort])[:4]


def test_calibration_rows_follow_the_seed_alone():
    first, again, other = (
        calibration_batch(gpt2(), TEXTS, letters("none (GPT-2)"), max_length=12, seed=seed)["input_ids"].tolist()
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


@EVERY_SORT
@pytest.mark.parametrize("build", [bert, t5])
def test_calibration_rows_of_other_models_are_whole_texts(sort, build):
    tokenizer = letters(sort)
    batch = calibration_batch(build(), ["abc"], tokenizer)
    assert batch["input_ids"].tolist() == [tokenizer("abc")["input_ids"]]


@EVERY_SORT
def test_perplexity_counts_the_text_alone(sort):
    model, start = gpt2(), STARTS[sort]
    options = EvaluationOptions(max_length=10, max_tokens=40, batch_size=3, progress=False)
    rows = torch.tensor(rows_of(TEXTS, 10, start)[:4])
    first = max(1, len(start))
    with torch.no_grad():
        losses = [F.cross_entropy(model(row[None]).logits[0, first - 1 : -1], row[first:]) for row in rows]
    found = evaluate_model(model, letters(sort), TEXTS, options=options)
    assert found["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("packing", [True, False])
@EVERY_SORT
def test_training_rows_of_a_causal_model(sort, packing, streaming, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    (tmp_path / "t.txt").write_text("\n\n".join(TEXTS))
    arguments = DataArguments(str(tmp_path / "t.txt"), max_length=8, packing=packing, streaming=streaming)
    start, config = STARTS[sort], gpt2().config
    rows = list(build_data(arguments, "causal-lm", letters(sort), config).train)
    wanted = rows_of(TEXTS, 8, start) if packing else [[*start, *ids(text), 2][:8] for text in TEXTS]
    assert [row["input_ids"] for row in rows] == wanted
    unpredicted = max(1, len(start))
    assert [row["labels"] for row in rows] == [[-100] * unpredicted + row[unpredicted:] for row in wanted]


def test_too_little_text_is_refused():
    options = EvaluationOptions(max_length=1, progress=False)
    with pytest.raises(ValueError, match="max_length=1 with 1 before each row"):
        evaluate_model(gpt2(), letters("bos (Gemma)"), TEXTS, options=options)


# Padding is no token


def test_calibration_tokens_are_real_ones():
    tokenizer, quick = letters("cls and sep (BERT)"), CalibrationOptions(steps=1, progress=False)
    count = sum(len(text) + 2 for text in TEXTS)
    whole = tokenizer(TEXTS, padding="max_length", max_length=100, return_tensors="pt")
    for data in (TEXTS, [whole]):
        student = convert(bert(), AttentionSpec("l2"), calibration=data, tokenizer=tokenizer, options=quick)
        assert student.conversion_report["calibration_tokens"] == count
        assert any(f"{count} tokens are little" in text for text in student.conversion_report["warnings"])


def test_padding_at_the_end_takes_no_room_in_the_batch():
    tokenizer = letters("cls and sep (BERT)")
    data = tokenizer(TEXTS, padding="max_length", max_length=100, return_tensors="pt")
    batch = calibration_batch(bert(), data, max_tokens=60)
    lengths = [len(text) + 2 for text in TEXTS]
    assert batch["attention_mask"].sum(1).tolist() == lengths[: len(batch["input_ids"])]
    assert batch["input_ids"].shape[1] == max(lengths)
    assert 60 <= int(batch["attention_mask"].sum()) < 60 + max(lengths)
