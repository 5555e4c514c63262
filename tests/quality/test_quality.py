"""Real checkpoints keep their quality, on text the fit has not seen; and the control shows that the fit is why."""

import pytest
import torch

from distattn_hf import AttentionSpec, convert, load_checkpoint
from distattn_hf.analysis.evaluation import EvaluationOptions, embedding_agreement, evaluate_model
from distattn_hf.conversion.calibrate import CalibrationOptions
from distattn_hf.conversion.report import ConversionReport
from distattn_hf.conversion.texts import news_articles
from tests.quality.antibodies import perplexity, sample_sequences
from tests.tolerances import EXACT_LOGITS

pytestmark = pytest.mark.slow
QUIET = CalibrationOptions(progress=False)


@pytest.fixture(scope="module")
def iglm():
    model, tokenizer = load_checkpoint("iglm")
    calibration = sample_sequences(model, tokenizer, 48, seed=0)
    held_out = sample_sequences(model, tokenizer, 64, seed=1)
    return model, calibration, held_out, perplexity(model, held_out)


@pytest.mark.parametrize(
    ("metric", "allowed"), [("sqeuclidean", 1.01), ("cosine", 1.01), ("l2", 1.03), ("l1", 1.08), ("chebyshev", 1.25)]
)
def test_iglm_perplexity(iglm, metric, allowed):
    model, calibration, held_out, teacher = iglm
    student = convert(model, AttentionSpec(metric), calibration=[calibration], options=QUIET)
    control = convert(model, AttentionSpec(metric), init="plain")
    assert perplexity(student, held_out) / teacher <= allowed
    assert perplexity(control, held_out) / teacher > allowed


def test_iglm_exact(iglm):
    model, _, held_out, _ = iglm
    student = convert(model, AttentionSpec(), init="exact")
    real = held_out["attention_mask"].bool()
    with torch.no_grad():
        assert (student(**held_out).logits - model(**held_out).logits)[real].abs().max() <= EXACT_LOGITS


@pytest.fixture(scope="module")
def minilm():
    model, tokenizer = load_checkpoint("minilm")
    articles = news_articles()
    pairs = [(a["title"], a["text"]) for a in articles[-300:]]
    calibration = [text for a in articles[:48] for text in (a["title"], a["text"])]
    options = EvaluationOptions(progress=False)
    teacher = evaluate_model(model, tokenizer, [], pairs=pairs, options=options)["mrr"]
    return model, tokenizer, pairs, calibration, options, teacher


@pytest.mark.parametrize("metric", ["sqeuclidean", "l2", "cosine"])
def test_minilm_retrieval(minilm, metric):
    model, tokenizer, pairs, calibration, options, teacher = minilm
    student = convert(model, AttentionSpec(metric), calibration=calibration, tokenizer=tokenizer, options=QUIET)
    score = evaluate_model(student, tokenizer, [], pairs=pairs, options=options)["mrr"]
    assert score / teacher >= 0.98
    assert embedding_agreement(student, model, tokenizer, [p[1] for p in pairs[:64]], options) >= 0.97


def test_minilm_exact(minilm):
    model, tokenizer, pairs, *_ = minilm
    student = convert(model, AttentionSpec(), init="exact")
    batch = tokenizer([p[1] for p in pairs[:4]], padding=True, truncation=True, max_length=128, return_tensors="pt")
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        difference = student(**batch).last_hidden_state - model(**batch).last_hidden_state
    assert difference[real].abs().max() <= EXACT_LOGITS


@pytest.fixture(scope="module")
def smollm2():
    model, tokenizer = load_checkpoint("smollm2-135m")
    texts = [a["text"] for a in news_articles()]
    options = EvaluationOptions(max_length=512, max_tokens=2048, progress=False)
    teacher = evaluate_model(model, tokenizer, texts[3000:], options=options)["perplexity"]
    return model, tokenizer, texts, options, teacher


@pytest.mark.parametrize(("metric", "allowed"), [("sqeuclidean", 1.02), ("l2", 1.10)])
def test_smollm2_perplexity(smollm2, metric, allowed):
    model, tokenizer, texts, options, teacher = smollm2
    options_50 = CalibrationOptions(progress=False, steps=50)
    student = convert(model, AttentionSpec(metric), calibration=texts[:200], tokenizer=tokenizer, options=options_50)
    score = evaluate_model(student, tokenizer, texts[3000:], options=options)["perplexity"]
    assert score / teacher <= allowed
    assert 0 < ConversionReport.from_dict(student.conversion_report).mean_alpha <= 1


def test_smollm2_exact_logits_and_greedy_generation(smollm2):
    model, tokenizer, texts, *_ = smollm2
    student = convert(model, AttentionSpec(), init="exact")
    tokenizer.padding_side = "left"
    batch = tokenizer([texts[3000][:400], "The capital of France"], padding=True, return_tensors="pt")
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        assert (student(**batch).logits - model(**batch).logits)[real].abs().max() <= EXACT_LOGITS
    expected, got = (m.generate(**batch, max_new_tokens=24, do_sample=False) for m in (model, student))
    assert torch.equal(got, expected)
