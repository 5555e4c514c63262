"""What a user is told about choices that mean something else here, cost time, or test nothing."""

import pytest
import torch

from distattn_hf import AttentionSpec, DistAttnConfig, DistAttnForCausalLM, convert
from distattn_hf.core import attention, interface
from distattn_hf.core.kernel_cpp_library import unavailable
from distattn_hf.evaluation import score as evaluation
from distattn_hf.evaluation.score import warn_without_far_keys
from distattn_hf.evaluation.scorecard import without_far_field
from tests.conversion.models import bert, gpt2, t5, token_batch
from tests.conversion.nystrom_cases import converted, nystrom


def native(mechanism):
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return DistAttnForCausalLM(DistAttnConfig(mechanism=mechanism, is_decoder=True, **sizes))


@pytest.fixture
def said(monkeypatch):
    """What the loggers were given."""
    found = []
    for logger in (attention.logger, interface.logger, evaluation.logger):
        for name in ("warning", "warning_once"):
            monkeypatch.setattr(logger, name, found.append)
    return found


@pytest.mark.parametrize("build", [lambda: convert(gpt2(), AttentionSpec("l2"), init="plain"), lambda: native("l1")])
def test_what_sdpa_means_on_a_model_of_ours(build, said):
    model = build()
    assert not said
    for requested in ("eager", "sdpa"):
        model.set_attn_implementation(requested)
    assert len(said) == 1
    assert said[0].startswith(f"{type(model).__name__}: attn_implementation='sdpa' stands here for the attention that")


def test_sdpa_on_a_native_model_of_dot_product_attention_is_sdpa(said):
    native("dot").set_attn_implementation("sdpa")
    assert not said


# Dropout


@pytest.mark.skipif(unavailable() is not None, reason="no compiled kernel to lose")
@pytest.mark.parametrize(("metric", "dropout"), [("l2", 0.1), ("l1", 0.1), ("l2", 0.0), ("cosine", 0.1)])
def test_dropout_that_costs_the_kernel_names_its_remedy(metric, dropout, said):
    student = convert(gpt2(attn_pdrop=dropout), AttentionSpec(metric), init="plain")
    batch = token_batch(student)
    student(**batch, labels=batch["input_ids"]).loss.backward()
    assert not said, "nothing is dropped in eval mode"
    student.train()(**batch, labels=batch["input_ids"]).loss.backward()
    told = metric != "cosine" and dropout > 0
    assert any("set it to 0, in a model's config: attention_dropout (attn_pdrop" in text for text in said) == told


# A Nyström model whose text its exact part covers


@pytest.mark.parametrize(
    ("build", "window", "sinks", "told"),
    [
        (gpt2, 38, 2, True), (gpt2, 37, 2, False), (bert, 40, 2, True), (bert, 39, 2, False), (t5, 200, 2, False),
    ],
)  # fmt: skip
def test_the_report_says_where_the_fit_saw_no_far_key(build, window, sinks, told):
    """Rows of 40 tokens: causal sinks + window see so many, in both directions the window alone; T5 has cross."""
    student = converted(build(), nystrom(window, num_sinks=sinks))
    found = [text for text in student.conversion_report["warnings"] if "no text is longer than 40 tokens" in text]
    assert bool(found) == told


def test_the_report_says_that_exact_below_undoes_the_conversion():
    for limit, told in ((127, False), (128, True), (2048, True)):
        warnings = converted(bert(), nystrom(exact_below=limit)).conversion_report["warnings"]
        text = f"up to {limit} tokens, and the model has 128 positions: nothing is linear"
        assert any(text in warning for warning in warnings) == told


def test_evaluation_says_what_is_no_test(said):
    student = converted(gpt2(), nystrom(6, exact_below=16))
    short, long = (token_batch(student, length=length) for length in (16, 17))
    for model, batch, told in (
        (student, short, True), (student, long, False), (gpt2(), short, False),
        (without_far_field(student), short, False),
    ):  # fmt: skip
        said.clear()
        with warn_without_far_keys(model), torch.no_grad():
            model(**batch)
        assert bool(said) == told
    assert not student._forward_pre_hooks


def test_evaluate_model_says_it(said):
    from tests.conversion.test_row_starts import TEXTS, letters

    student = converted(gpt2(), nystrom(30))
    options = evaluation.EvaluationOptions(max_length=20, progress=False)
    evaluation.evaluate_model(student, letters("none (GPT-2)"), TEXTS, options=options)
    assert "no text is longer than 20 tokens, and up to 32 the model sees every key exactly" in said[0]
