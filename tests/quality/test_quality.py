"""Real checkpoints keep their quality, on text the fit has not seen; and the control shows that the fit is why."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from distattn_hf import AttentionSpec, convert, load_adapter, load_checkpoint, revert
from distattn_hf.conversion.calibrate import CalibrationOptions
from distattn_hf.experiments import conversion_quality
from tests.tolerances import EXACT_LOGITS

QUIET = CalibrationOptions(progress=False)


@pytest.fixture(scope="module")
def iglm():
    model, _, calibration, score = conversion_quality.iglm()
    return model, calibration, score, score(model)["perplexity"]


@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine", "l2", "l1", "lp", "chebyshev"])
def test_iglm_perplexity(iglm, metric):
    model, calibration, score, teacher = iglm
    spec = AttentionSpec(metric, p=3.0 if metric == "lp" else None)
    student = convert(model, spec, calibration=calibration, options=QUIET)
    control = convert(model, spec, init="plain")
    assert score(student)["perplexity"] / teacher <= 1.005
    assert score(control)["perplexity"] / teacher > 1.1


@pytest.mark.parametrize(("metric", "allowed"), [("l2", 1.03), ("cosine", 1.01), ("l1", 1.08), ("chebyshev", 1.25)])
def test_iglm_perplexity_of_plain_distances(iglm, metric, allowed):
    """Without an ε a distance costs what it costs."""
    model, calibration, score, teacher = iglm
    student = convert(model, AttentionSpec(metric, softening=0), calibration=calibration, options=QUIET)
    assert score(student)["perplexity"] / teacher <= allowed


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


@pytest.mark.parametrize("metric", ["sqeuclidean", "l2", "cosine", "l1"])
def test_minilm_retrieval(minilm, metric):
    model, tokenizer, calibration, score, teacher = minilm
    student = convert(model, AttentionSpec(metric), calibration=calibration, tokenizer=tokenizer, options=QUIET)
    scores = score(student)
    assert scores["mrr"] / teacher >= 0.99
    assert scores["cosine"] >= 0.995


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


@pytest.mark.parametrize(("metric", "allowed"), [("sqeuclidean", 1.02), ("l2", 1.01)])
def test_smollm2_perplexity(smollm2, metric, allowed):
    """A third of the default steps, which is enough for the limits."""
    model, tokenizer, calibration, score, teacher = smollm2
    options = CalibrationOptions(progress=False, steps=35)
    student = convert(model, AttentionSpec(metric), calibration=calibration, tokenizer=tokenizer, options=options)
    assert score(student)["perplexity"] / teacher <= allowed
    assert 0 < student.conversion_report.mean_alpha <= 1


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


def test_an_adapter_of_smollm2_is_small_and_loads_as_the_full_checkpoint(tmp_path):
    """Under 200 kB beside the code, whose files are those of any checkpoint; both ways, bit for bit."""
    teacher, tokenizer = load_checkpoint("smollm2-135m")
    # What is saved does not depend on how well it is fitted.
    options = CalibrationOptions(steps=1, max_length=128, max_tokens=256, progress=False)
    text = ["The news of the day was long, and nobody had read it to its end. " * 40]
    student = convert(teacher, "l2", calibration=text, tokenizer=tokenizer, options=options)
    student.save_adapter(tmp_path / "adapter", base=teacher, base_name="smollm2-135m")
    student.save_pretrained(tmp_path / "full")
    files = [path for path in (tmp_path / "adapter").iterdir() if path.suffix != ".py"]
    assert sum(path.stat().st_size for path in files) < 200_000
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :100]
    with torch.no_grad():
        full = AutoModelForCausalLM.from_pretrained(tmp_path / "full").eval()(ids).logits
        assert not full.equal(teacher(ids).logits)
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()(ids).logits.equal(full)
        assert load_adapter(teacher, tmp_path / "adapter").eval()(ids).logits.equal(full)
    # Another base of the same shape is refused by name.
    wrong = revert(student)
    wrong.model.layers[3].mlp.up_proj.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match="smollm2-135m"):
        load_adapter(wrong, tmp_path / "adapter")
