"""λ trained alone, and searched on a grid, on the self-trained GPT-2."""

from pathlib import Path

import pytest
import torch

from distattn_hf import AttentionSpec, convert
from distattn_hf.evaluation.score import EvaluationOptions, evaluate_model
from distattn_hf.training.lambda_search import grid_search, optimize_lambda_parameters
from tests.fixtures.load import gpt2_english

TEXTS = Path("tests/fixtures/gpt2-english/heldout.txt").read_text(encoding="utf-8").split("\n\n")
OPTIONS = EvaluationOptions(max_length=64, max_tokens=1024, progress=False)


@pytest.fixture(scope="module")
def teacher():
    return gpt2_english()[:2]


def batches(tokenizer, count: int) -> list[dict]:
    ids = tokenizer("\n".join(TEXTS), return_tensors="pt")["input_ids"][0]
    rows = ids[: count * 4 * 64].view(count, 4, 64)
    return [{"input_ids": row, "labels": row} for row in rows]


def test_only_lambda_trains_and_the_loss_falls(teacher):
    model, tokenizer = teacher
    student = convert(model, AttentionSpec(metric="l2"), init="plain")
    student.lm_head.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in student.named_parameters()}
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    data = batches(tokenizer, 6)
    result = optimize_lambda_parameters(student, data, 3, learning_rate=0.1, progress=False)
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(result.before) == {name for name in before if name.endswith("log_lambda")}
    assert result.losses[0] > result.losses[1] > result.losses[2]
    for name, values in result.after.items():
        assert values == student.state_dict()[name].exp().tolist()
        assert result.before[name] == before[name].exp().tolist()
    assert {name: p.requires_grad for name, p in student.named_parameters()} == flags
    assert all(p.grad is None for p in student.parameters())
    assert not student.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [*rows, {"input_ids": rows[0]["input_ids"]}], "batches need labels"),
        (lambda rows: [], "dataloader gave no batch"),
    ],
)
def test_what_goes_wrong_changes_nothing(teacher, change, message):
    model, tokenizer = teacher
    student = convert(model, AttentionSpec(metric="l2"), init="plain").train()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        optimize_lambda_parameters(student, change(batches(tokenizer, 2)), progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert student.training
    assert all(p.requires_grad for p in student.parameters())


def test_bad_arguments(teacher):
    model, tokenizer = teacher
    with pytest.raises(ValueError, match="has no λ"):
        optimize_lambda_parameters(model, batches(tokenizer, 1))
    constant = convert(model, AttentionSpec(metric="l2", lam=1.0, learnable_lambda=False), init="plain")
    with pytest.raises(ValueError, match="has no λ"):
        optimize_lambda_parameters(constant, batches(tokenizer, 1))
    for name, value in (("num_epochs", 0), ("learning_rate", 0.0)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            optimize_lambda_parameters(model, [], **{name: value})
    with pytest.raises(ValueError, match="unknown metric 'l7'"):
        grid_search(model, tokenizer, TEXTS, metrics=["l2", "l7"], progress=False)
    with pytest.raises(ValueError, match="must not be empty"):
        grid_search(model, tokenizer, TEXTS, metrics=[], progress=False)


def test_the_grid_is_sorted_and_says_what_each_conversion_scores(teacher):
    model, tokenizer = teacher
    rows = grid_search(
        model, tokenizer, TEXTS, metrics=["l2", "sqeuclidean"], lams=[0.5, 8.0], options=OPTIONS, progress=False
    )
    assert {(row["metric"], row["lam"]) for row in rows} == {(m, x) for m in ("l2", "sqeuclidean") for x in (0.5, 8.0)}
    assert [row["perplexity"] for row in rows] == sorted(row["perplexity"] for row in rows)
    for row in (rows[0], rows[-1]):
        spec = AttentionSpec(metric=row["metric"], lam=row["lam"], learnable_lambda=False)
        alone = evaluate_model(convert(model, spec, init="plain"), tokenizer, TEXTS, options=OPTIONS)
        assert row["perplexity"] == alone["perplexity"]
    fitted = grid_search(model, tokenizer, TEXTS, calibration=TEXTS[:2], options=OPTIONS, progress=False)
    plain = grid_search(model, tokenizer, TEXTS, options=OPTIONS, progress=False)
    assert fitted[0]["perplexity"] < plain[0]["perplexity"]
