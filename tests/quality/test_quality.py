"""Real checkpoints keep their quality, on text the fit has not seen; and the control shows that the fit is why."""

import pytest
import torch

from distattn_hf import AttentionSpec, convert
from distattn_hf.conversion.calibrate import CalibrationOptions
from distattn_hf.experiments import conversion_quality
from tests.tolerances import EXACT_LOGITS

QUIET = CalibrationOptions(progress=False)


@pytest.fixture(scope="module")
def iglm():
    model, _, calibration, score = conversion_quality.iglm()
    return model, calibration, score, score(model)["perplexity"]


@pytest.mark.parametrize(
    ("metric", "allowed"), [("sqeuclidean", 1.01), ("cosine", 1.01), ("l2", 1.03), ("l1", 1.08), ("chebyshev", 1.25)]
)
@pytest.mark.xdist_group("iglm")
def test_iglm_perplexity(iglm, metric, allowed):
    model, calibration, score, teacher = iglm
    student = convert(model, AttentionSpec(metric), calibration=calibration, options=QUIET)
    control = convert(model, AttentionSpec(metric), init="plain")
    assert score(student)["perplexity"] / teacher <= allowed
    assert score(control)["perplexity"] / teacher > allowed


@pytest.mark.xdist_group("iglm")
def test_iglm_exact(iglm):
    model, calibration, *_ = iglm
    student = convert(model, AttentionSpec(), init="exact")
    real = calibration[0]["attention_mask"].bool()
    with torch.no_grad():
        difference = student(**calibration[0]).logits - model(**calibration[0]).logits
    assert difference[real].abs().max() <= EXACT_LOGITS


@pytest.fixture(scope="module")
def minilm():
    model, tokenizer, calibration, score = conversion_quality.minilm()
    return model, tokenizer, calibration, score, score(model)["mrr"]


@pytest.mark.parametrize("metric", ["sqeuclidean", "l2", "cosine"])
@pytest.mark.xdist_group("minilm")
def test_minilm_retrieval(minilm, metric):
    model, tokenizer, calibration, score, teacher = minilm
    student = convert(model, AttentionSpec(metric), calibration=calibration, tokenizer=tokenizer, options=QUIET)
    found = score(student)
    assert found["mrr"] / teacher >= 0.98
    assert found["cosine"] >= 0.97


@pytest.mark.xdist_group("minilm")
def test_minilm_exact(minilm):
    model, tokenizer, calibration, *_ = minilm
    student = convert(model, AttentionSpec(), init="exact")
    batch = tokenizer(calibration[:4], padding=True, truncation=True, max_length=128, return_tensors="pt")
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        difference = student(**batch).last_hidden_state - model(**batch).last_hidden_state
    assert difference[real].abs().max() <= EXACT_LOGITS


@pytest.fixture(scope="module")
def smollm2():
    model, tokenizer, calibration, score = conversion_quality.smollm2(max_tokens=2048)
    return model, tokenizer, calibration, score, score(model)["perplexity"]


@pytest.mark.parametrize(("metric", "allowed"), [("sqeuclidean", 1.02), ("l2", 1.10)])
@pytest.mark.xdist_group("smollm2")
def test_smollm2_perplexity(smollm2, metric, allowed):
    """Half the default steps, which is enough for the limits."""
    model, tokenizer, calibration, score, teacher = smollm2
    options = CalibrationOptions(progress=False, steps=50)
    student = convert(model, AttentionSpec(metric), calibration=calibration, tokenizer=tokenizer, options=options)
    assert score(student)["perplexity"] / teacher <= allowed
    assert 0 < student.conversion_report.mean_alpha <= 1


@pytest.mark.xdist_group("smollm2")
def test_smollm2_exact_logits_and_greedy_generation(smollm2):
    model, tokenizer, calibration, *_ = smollm2
    student = convert(model, AttentionSpec(), init="exact")
    tokenizer.padding_side = "left"
    batch = tokenizer([calibration[0][:400], "The capital of France"], padding=True, return_tensors="pt")
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        assert (student(**batch).logits - model(**batch).logits)[real].abs().max() <= EXACT_LOGITS
    expected, got = (m.generate(**batch, max_new_tokens=24, do_sample=False) for m in (model, student))
    assert torch.equal(got, expected)
