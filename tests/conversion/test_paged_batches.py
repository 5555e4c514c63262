"""Continuous batching: texts of different lengths over one paged cache give the tokens that `generate` gives each."""

import pytest
import torch
from transformers import (
    ContinuousBatchingConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from distattn_hf import AttentionSpec, convert
from distattn_hf.core.interface import EAGER_IMPLEMENTATION
from distattn_hf.core.paged_batches import PAGED_IMPLEMENTATION
from tests.conversion.models import VOCAB, gpt2, llama
from tests.conversion.nystrom_cases import student_of
from tests.conversion.test_mapped_keys import SPECS
from tests.tolerances import CACHED_LOGITS

_SMALL = {
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "hidden_size": 32,
    "intermediate_size": 64, "vocab_size": VOCAB, "max_position_embeddings": 256, "initializer_range": 0.2,
    "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1,
}  # fmt: skip


def of(model_class, config_class, **options):
    def make():
        torch.manual_seed(0)
        return model_class(config_class(**_SMALL, **options)).eval()

    return make


MODELS = {
    "gpt2": gpt2,
    "llama": llama,
    "mistral, sliding": of(MistralForCausalLM, MistralConfig, sliding_window=8),
    # Layers of two kinds, and a cap on the logits.
    "gemma2": of(Gemma2ForCausalLM, Gemma2Config, sliding_window=8, attn_logit_softcapping=0.5),
    # A learned sink.
    "gpt-oss": of(GptOssForCausalLM, GptOssConfig, sliding_window=8, num_local_experts=2, num_experts_per_tok=1),
}
PAGES = ContinuousBatchingConfig(num_blocks=32, page_size=16, max_batch_tokens=24)


def prompts(count: int = 4) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    # One is longer than a step of the batch takes, and several pages long.
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in (5, 37, 9, 17)[:count]]


def batch_of(model, texts, **options):
    config = GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=-1, pad_token_id=0, **options)
    results = model.generate_batch(texts, generation_config=config, continuous_batching_config=PAGES)
    assert all(result.error is None for result in results.values())
    return [results[f"req_{index}"].generated_tokens for index in range(len(texts))]


def alone(model, text):
    ids = torch.tensor([text])
    return model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=-1)[0, len(text) :].tolist()


def check(student, texts):
    before = student.config._attn_implementation
    expected = [alone(student, text) for text in texts]
    assert batch_of(student, texts) == expected
    # The model is what it was, for whoever generates next.
    assert student.config._attn_implementation == before
    assert alone(student, texts[0]) == expected[0]
    return expected


@pytest.mark.parametrize("metric", ["sqeuclidean", "l2", "l1", "cosine", "chebyshev"])
def test_every_metric(metric):
    student = convert(llama(), metric, init="plain")
    texts = prompts()
    assert check(student, texts) != [alone(llama(), text) for text in texts]


@pytest.mark.parametrize("family", MODELS)
def test_every_kind_of_model(family):
    check(convert(MODELS[family](), AttentionSpec("l2", softening=1.0), init="plain"), prompts())


@pytest.mark.parametrize("name", ["heads apart", "l2"])
def test_maps_and_heads_apart(name):
    student = convert(llama(), SPECS[name], init="plain")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter_name, parameter in student.named_parameters():
            if parameter_name.endswith(("query_map", "key_map", "shift", "log_alpha")):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    check(student, prompts())


def test_layers_that_were_not_converted_run_as_the_teachers():
    """Their cap is one that transformers' own paged attention leaves out."""
    student = convert(MODELS["gemma2"](), AttentionSpec("l1", layers=[1]), init="plain")
    check(student, prompts())
    check_log_probabilities(student)


def test_texts_with_a_beginning_in_common_share_its_pages():
    student = convert(llama(), "l2", init="plain")
    start = prompts()[1]
    check(student, [start + [5, 6], start + [7], start + [8, 9, 10]])


def test_an_untouched_model_is_served_as_before():
    check(llama(), prompts())


def test_persistent_managers():
    student = convert(llama(), "l2", init="plain")
    texts = prompts()
    config = GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=-1, pad_token_id=0)
    for _ in range(2):
        results = student.generate_batch(
            texts, generation_config=config, continuous_batching_config=PAGES, persistent_manager=True
        )
        assert [results[key].generated_tokens for key in sorted(results)[-4:]] == [alone(student, t) for t in texts]
    student.destroy_cached_continuous_batching_manager()


def check_log_probabilities(student):
    text = prompts()[1]
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    pages = ContinuousBatchingConfig(num_blocks=32, page_size=16, max_batch_tokens=24, return_logprobs=True)
    result = student.generate_batch([text], generation_config=config, continuous_batching_config=pages)["req_0"]
    logits = student(torch.tensor([text + result.generated_tokens])).logits[0, len(text) - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(result.generated_tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(result.logprobs), expected, atol=CACHED_LOGITS, rtol=0)


def test_log_probabilities():
    check_log_probabilities(convert(llama(), "l2", init="plain"))


@pytest.mark.parametrize(
    ("mechanism", "reason"), [("retrieval", "blocks of keys of one text"), ("nystrom", "running sums")]
)
def test_others_are_refused_before_anything_runs(mechanism, reason):
    student = student_of("llama") if mechanism == "nystrom" else convert(llama(), mechanism)
    before = student.config._attn_implementation
    with pytest.raises(ValueError, match=f"mechanism='{mechanism}', which .*{reason}"):
        batch_of(student, prompts())
    assert student.config._attn_implementation == before


def test_the_reference_is_refused_before_anything_runs():
    student = convert(llama(), "l2", init="plain")
    student.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="set_attn_implementation\\('sdpa'\\) first"):
        batch_of(student, prompts())
    assert student.config._attn_implementation == EAGER_IMPLEMENTATION


def test_what_fails_at_the_beginning_leaves_the_model_as_it_was():
    student = convert(llama(), "l2", init="plain")
    before = student.config._attn_implementation
    student.generation_config = None
    with pytest.raises(ValueError, match="GenerationConfig"):
        student.init_continuous_batching()
    assert student.config._attn_implementation == before


def test_the_name_is_for_nothing_else():
    student = convert(llama(), "l2", init="plain")
    with pytest.raises(ValueError, match=r"'paged\|eager' is not available"):
        student.set_attn_implementation(PAGED_IMPLEMENTATION)
    student.config._attn_implementation = PAGED_IMPLEMENTATION
    with pytest.raises(ValueError, match="for continuous batching alone"):
        student(torch.tensor([prompts()[0]]))
