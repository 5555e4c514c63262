"""Conversions to softened distances: fitted, saved, folded, reverted, generated from; and what the report says."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from distattn_hf import (
    AttentionSpec,
    CalibrationOptions,
    DistAttnConfig,
    DistAttnForCausalLM,
    convert,
    fold_alpha,
    register_metric,
    revert,
)
from distattn_hf.core.metrics import METRICS, get_metric
from tests.conversion.models import FAMILIES, gpt2, token_batch
from tests.tolerances import EXACT_LOGITS

SOFT = [metric for metric in METRICS if get_metric(metric).softens]


def fitted(metric="l2", family="gpt2", transform="scalar", **options):
    teacher = FAMILIES[family]()
    spec = AttentionSpec(metric, p=3 if metric == "lp" else None, transform=transform, softening="fit", **options)
    calibration = [token_batch(teacher, seed=seed) for seed in range(3)]
    return convert(teacher, spec, calibration=calibration, options=CalibrationOptions(steps=8, progress=False))


def logits(model):
    with torch.no_grad():
        return model(**token_batch(model, padded=True, seed=9)).logits


@pytest.mark.parametrize("metric", SOFT)
def test_it_is_nearer_the_teacher_than_the_plain_distance(metric):
    (group, *_) = fitted(metric).conversion_report.groups
    assert sum(group.divergence_after) < sum(group.divergence_plain)
    for name in ("softening", "softening_ratio"):
        assert len(getattr(group, name)) == 4
        assert all(value > 0 for value in getattr(group, name))


def test_the_table_shows_it():
    report = fitted().conversion_report
    lines = report.table().splitlines()
    assert all(word in lines[0] for word in ("ε", "ε/median", "KL plain"))
    assert any(line.startswith("ε: below it the distance is quadratic") for line in lines)
    plain = convert(gpt2(), AttentionSpec("l2"), init="plain").conversion_report
    assert "ε" not in plain.table()


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5", "llama"])
@pytest.mark.parametrize("metric", ["l2", "l1", "cosine"])
def test_saved_and_loaded_bit_for_bit(metric, family, tmp_path):
    student = fitted(metric, family)
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(student))
    assert again.conversion_report == student.conversion_report
    assert again.config.attention_specs[0].softening == "fit"


def test_saved_and_loaded_with_a_number(tmp_path):
    student = convert(gpt2(), AttentionSpec("l1", softening=3), init="plain")
    assert not torch.equal(logits(student), logits(convert(gpt2(), AttentionSpec("l1"), init="plain")))
    student.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(student))
    assert student.conversion_report.groups[0].softening == [3.0] * 4
    assert not [name for name, _ in student.named_parameters() if "softening" in name]


@pytest.mark.parametrize("metric", ["l2", "l1"])
def test_folding_changes_nothing(metric):
    student = fitted(metric)
    assert float((logits(fold_alpha(student)) - logits(student)).abs().max()) <= EXACT_LOGITS


@pytest.mark.parametrize("transform", ["none", "scalar", "maps"])
def test_eager_is_the_same_attention(transform):
    """The reference on what `mapped` gives, the kernels on what `fold` gives."""
    student = fitted(transform=transform)
    fast = logits(student)
    student.set_attn_implementation("eager")
    assert float((logits(student) - fast).abs().max()) <= EXACT_LOGITS


def test_it_generates_with_a_cache_what_it_generates_without():
    student, ids = fitted("l1"), token_batch(gpt2())["input_ids"][:1, :5]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(student.generate(ids, **options), student.generate(ids, use_cache=False, **options))


def test_it_reverts():
    assert torch.equal(logits(revert(fitted())), logits(gpt2()))


def test_epsilon_trains():
    student = fitted().train()
    student(**token_batch(student), labels=token_batch(student)["input_ids"]).loss.backward()
    gradients = [p.grad for name, p in student.named_parameters() if name.endswith("log_softening")]
    assert gradients
    assert all(bool((gradient != 0).all()) for gradient in gradients)


def test_a_fit_needs_text():
    with pytest.raises(ValueError, match="softening='fit' needs init='calibrated'"):
        convert(gpt2(), AttentionSpec("l2", softening="fit"), init="plain")


@pytest.mark.parametrize("softening", [5.0, "fit"])
def test_native_models_take_it_as_an_option(softening, tmp_path):
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "is_decoder": True}
    models = []
    for options in ({}, {"softening": softening}):
        torch.manual_seed(0)
        models.append(DistAttnForCausalLM(DistAttnConfig(mechanism="l1", mechanism_options=options, **sizes)).eval())
    ids = torch.arange(1, 13)[None]
    plain, soft = (model(ids).logits for model in models)
    assert not torch.allclose(plain, soft, atol=1e-4)
    models[1].save_pretrained(tmp_path)
    assert torch.equal(DistAttnForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, soft)
    soft.sum().backward()
    gradients = [p.grad for name, p in models[1].named_parameters() if name.endswith("log_softening")]
    assert len(gradients) == (2 if softening == "fit" else 0)
    assert all(bool((gradient != 0).all()) for gradient in gradients)


def test_it_is_the_default_of_a_fit_and_zero_forbids_it():
    """Where nothing is asked for, ε is fitted and there are no maps; a user's own metric has no ε."""
    calibration, options = [token_batch(gpt2(), seed=1)], CalibrationOptions(steps=1, progress=False)

    def specs(*given, **how):
        return convert(gpt2(), list(given), **how).config.attention_specs

    fit = {"calibration": calibration, "options": options}
    for metric in SOFT:
        order = {"p": 3.0} if metric == "lp" else {}
        (spec,) = specs(AttentionSpec(metric, **order), **fit)
        assert (spec.softening, spec.transform) == ("fit", "scalar")
        (spec,) = specs(AttentionSpec(metric, softening=0, **order), **fit)
        assert (spec.softening, spec.transform) == (0.0, "scalar" if metric == "l2" else "maps")
        (spec,) = specs(AttentionSpec(metric, **order), init="plain")
        assert (spec.softening, spec.transform) == (None, None)
    (spec,) = specs(AttentionSpec("l1", transform="maps"), **fit)
    assert (spec.softening, spec.transform) == ("fit", "maps")
    (spec,) = specs(AttentionSpec("sqeuclidean"), **fit)
    assert (spec.softening, spec.transform) == (None, "scalar")
    register_metric("half_l1", lambda q, k: 0.5 * (q[..., :, None, :] - k[..., None, :, :]).abs().sum(-1))
    (spec,) = specs(AttentionSpec("half_l1"), **fit)
    assert (spec.softening, spec.transform) == (None, "maps")
