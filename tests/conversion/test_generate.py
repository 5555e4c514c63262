"""`generate` on converted models: prefill plus steps is one full forward, for every metric, cache and padding."""

import pytest
import torch

from distattn_hf import AttentionSpec, convert
from distattn_hf.core.metrics import METRICS
from tests.conversion.models import FAMILIES, gpt2, llama, token_batch
from tests.tolerances import CACHED_LOGITS

DISTANCES = [m for m in METRICS if METRICS.get(m).is_distance and not m.startswith("lifted")]


def student_of(family, metric, **kwargs):
    spec = AttentionSpec(metric, p=3 if metric == "lp" else None, **kwargs)
    return convert(FAMILIES[family](), spec, init="plain")


@pytest.mark.parametrize("metric", DISTANCES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_prefill_plus_steps_is_one_forward_with_left_padding(family, metric):
    model = student_of(family, metric)
    batch = token_batch(model, length=20, padded=True)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        full = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        prefill = model(input_ids=ids[:, :12], attention_mask=mask[:, :12], position_ids=positions[:, :12])
        cache, logits = prefill.past_key_values, [prefill.logits]
        for i in range(12, 20):
            step = model(
                input_ids=ids[:, i : i + 1], attention_mask=mask[:, : i + 1], position_ids=positions[:, i : i + 1],
                past_key_values=cache,
            )  # fmt: skip
            cache = step.past_key_values
            logits.append(step.logits)
    difference = (torch.cat(logits, dim=1) - full)[mask.bool()]
    assert difference.abs().max() <= CACHED_LOGITS


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_generation_with_any_cache_and_beams(family, options):
    """Against a loop that runs the whole sequence each step, without a cache; beams against no cache."""
    model = student_of(family, "l2")
    batch = token_batch(model, length=12, padded=True)
    batch.pop("decoder_input_ids", None)
    got = model.generate(**batch, max_new_tokens=8, do_sample=False, **options)
    beams = {k: v for k, v in options.items() if k == "num_beams"}
    expected = model.generate(**batch, max_new_tokens=8, do_sample=False, use_cache=False, **beams)
    assert torch.equal(got, expected)


def test_sampling_is_reproducible_and_padding_does_not_matter():
    model = gpt2()
    model = convert(model, AttentionSpec("cosine"), init="plain")
    ids = token_batch(model, length=10)["input_ids"][:1]
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 5, dtype=torch.long), torch.ones_like(ids)], dim=1)
    torch.manual_seed(3)
    bare = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=True)
    torch.manual_seed(3)
    left = model.generate(padded, attention_mask=mask, max_new_tokens=10, do_sample=True)
    assert torch.equal(bare[0, 10:], left[0, 15:])


@pytest.mark.parametrize("metric", DISTANCES)
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_tokens_and_batch_order_change_nothing(family, metric):
    model = student_of(family, metric)
    batch = token_batch(model, padded=True)
    changed = dict(batch, input_ids=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 5))
    flipped = {name: tensor.flip(0) for name, tensor in batch.items()}
    with torch.no_grad():
        expected = model(**batch).logits
        other = model(**changed).logits
        order = model(**flipped).logits.flip(0)
    real = slice(None) if model.config.is_encoder_decoder else batch["attention_mask"].bool()
    torch.testing.assert_close(other[real], expected[real], atol=CACHED_LOGITS, rtol=0)
    torch.testing.assert_close(order[real], expected[real], atol=CACHED_LOGITS, rtol=0)


@pytest.mark.parametrize("metric", DISTANCES)
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_the_future_changes_nothing_before_it(family, metric):
    model = student_of(family, metric)
    batch = token_batch(model)
    name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    future = batch[name].clone()
    future[:, 6:] = 7
    with torch.no_grad():
        before, after = model(**batch).logits, model(**dict(batch, **{name: future})).logits
    torch.testing.assert_close(after[:, :6], before[:, :6], atol=CACHED_LOGITS, rtol=0)
    assert not torch.allclose(after[:, 7:], before[:, 7:], atol=1e-3)


def test_sliding_window_is_honoured():
    """Mistral with a window of 4: a token 5 or more back does not matter in a model of one layer."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, hidden_size=32, intermediate_size=64,
        vocab_size=64, sliding_window=4, pad_token_id=0,
    )  # fmt: skip
    model = convert(MistralForCausalLM(config).eval(), AttentionSpec("l2"), init="plain")
    ids = torch.randint(3, 64, (1, 12))
    changed = ids.clone()
    changed[:, 3] = (ids[:, 3] + 1) % 60 + 3
    with torch.no_grad():
        first, second = model(ids).logits, model(changed).logits
    assert torch.equal(first[:, 7:], second[:, 7:])
    assert not torch.equal(first[:, 6], second[:, 6])


def test_eager_and_default_agree_and_attentions_are_returned_by_both():
    model = llama()
    student = convert(model, AttentionSpec("l1"), init="plain")
    batch = token_batch(student, padded=True)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        fast = student(**batch, output_attentions=True)
        student.set_attn_implementation("eager")
        slow = student(**batch, output_attentions=True)
    torch.testing.assert_close(fast.logits[real], slow.logits[real], atol=CACHED_LOGITS, rtol=0)
    rows = fast.attentions[0].sum(-1).transpose(1, 2)[real]
    torch.testing.assert_close(rows, torch.ones_like(rows))
