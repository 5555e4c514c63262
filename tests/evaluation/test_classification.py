"""Accuracy and F1 of classifiers on data with labels, beside scikit-learn's on each text alone."""

import csv
import json

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from transformers import BertForSequenceClassification, BertForTokenClassification, BertTokenizerFast

from distattn_hf import AttentionSpec, convert
from distattn_hf.data.datasets import DataArguments
from distattn_hf.evaluation.classification import evaluate_labels
from tests.conversion.models import bert, gpt2

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "log", "ran"]
TOKENIZER = BertTokenizerFast(
    vocab={w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
)
NAMES = ["bad", "fair", "good", "never"]


def texts(count: int) -> list[list[str]]:
    draw = torch.Generator().manual_seed(0)
    return [[WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=draw)] for length in range(2, count + 2)]


def named(cls, rows: list[list[str]]):
    model = bert(cls, id2label=dict(enumerate(NAMES)), label2id={n: i for i, n in enumerate(NAMES)})
    torch.nn.init.normal_(model.classifier.weight, std=2.0)
    # So that not all texts are of one class.
    logits = [model(**TOKENIZER(" ".join(row), return_tensors="pt")).logits.view(-1, 4) for row in rows]
    model.classifier.bias.sub_(torch.cat(logits).mean(0))
    # A class that neither a label nor an answer is counts for nothing.
    model.classifier.bias[3] = -1e4
    return model


@torch.no_grad()
def test_sequences(tmp_path):
    rows = texts(20)
    model = named(BertForSequenceClassification, rows)
    labels = [NAMES[number % 3] for number in range(20)]
    with (tmp_path / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((" ".join(row), own) for row, own in zip(rows, labels))])
    student = convert(model, AttentionSpec("sqeuclidean"), init="exact")
    models = {"student": (student, TOKENIZER), "teacher": (model, TOKENIZER)}
    scores = evaluate_labels(models, DataArguments(train_data=str(tmp_path / "data.csv")))
    taken = [NAMES[int(model(**TOKENIZER(" ".join(row), return_tensors="pt")).logits.argmax())] for row in rows]
    assert len(set(taken)) > 1
    assert scores["teacher"]["accuracy"] == pytest.approx(accuracy_score(labels, taken))
    assert scores["teacher"]["f1"] == pytest.approx(f1_score(labels, taken, average="macro"))
    assert scores["teacher"]["texts"] == 20
    assert scores["student"] == pytest.approx(scores["teacher"], rel=1e-4)


@torch.no_grad()
def test_tokens_count_at_the_first_piece_of_a_word(tmp_path):
    rows = texts(9)
    model = named(BertForTokenClassification, rows)
    labels = [[(len(word) + place) % 2 for place, word in enumerate(row)] for row in rows]
    data = [{"tokens": row, "labels": own} for row, own in zip(rows, labels)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, data)))
    scores = evaluate_labels(
        {"m": (model, TOKENIZER)}, DataArguments(train_data=str(tmp_path / "data.jsonl"), label_column="labels")
    )
    taken = [
        int(label) for row in rows
        for label in model(**TOKENIZER(" ".join(row), return_tensors="pt")).logits[0, 1:-1].argmax(-1)
    ]  # fmt: skip
    flat = [label for own in labels for label in own]
    assert scores["m"]["accuracy"] == pytest.approx(accuracy_score(flat, taken))
    # The third class, which no label has, counts where it is an answer.
    assert 2 in taken
    assert scores["m"]["f1"] == pytest.approx(f1_score(flat, taken, average="macro"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (gpt2, "needs one of the heads sequence-classification, .*, and 'm' is GPT2LMHeadModel"),
        (lambda: bert(BertForSequenceClassification, num_labels=1), "'m' has a regression head"),
        (lambda: bert(BertForSequenceClassification, num_labels=3),
         r"labels are names \(bad, good\), and the model calls its classes LABEL_0, LABEL_1, LABEL_2: give labels as"),
    ],
)  # fmt: skip
def test_heads_and_labels_that_do_not_fit_are_refused(tmp_path, model, message):
    (tmp_path / "data.csv").write_text("text,label\nthe cat,good\nthe dog,bad\n")
    model = model()
    model.forward = lambda *args, **kwargs: pytest.fail("the model was run")
    with pytest.raises(ValueError, match=message):
        evaluate_labels({"m": (model, TOKENIZER)}, DataArguments(train_data=str(tmp_path / "data.csv")))
