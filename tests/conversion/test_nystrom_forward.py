"""Linear attention in the forward pass of a model: against the reference, beside exact attention, after a reload."""

import pytest
import torch

from distattn_hf import AttentionSpec, revert
from distattn_hf.core.nystrom_cache import NystromLayer
from tests.conversion.models import FAMILIES, llama, token_batch
from tests.conversion.nystrom_cases import (
    AUTO,
    DECODERS,
    EVERY_FAMILY,
    build,
    check_reload_and_reference,
    converted,
    in_chunks,
    layers_of,
    nystrom,
    padded,
    student_of,
)
from tests.tolerances import CACHED_LOGITS


@EVERY_FAMILY
@torch.no_grad()
def test_reference_equals_the_engine(family):
    """attn_implementation="eager" writes everything out; 60 tokens are 6 windows."""
    model = converted(build(family), nystrom(9))
    batch = token_batch(model, length=60, padded=True)
    fast = model(**batch).logits
    model.set_attn_implementation("eager")
    slow = model(**batch).logits
    real = slice(None) if family == "t5" else batch["attention_mask"].bool()
    assert not torch.equal(fast[real], slow[real])
    assert (fast - slow)[real].abs().max() <= CACHED_LOGITS * slow.abs().max().clamp_min(1)


@EVERY_FAMILY
@torch.no_grad()
def test_padding_changes_no_bit(family):
    model = student_of(family)
    batch = token_batch(model, length=40, padded=True)
    changed = dict(batch, input_ids=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 5))
    neighbour = dict(batch, input_ids=torch.cat([batch["input_ids"][:1], batch["input_ids"][1:].flip(1)]))
    expected = model(**batch).logits
    real = torch.ones_like(expected[..., 0]).bool() if family == "t5" else batch["attention_mask"].bool()
    assert torch.equal(model(**changed).logits[real], expected[real])
    assert torch.equal(model(**neighbour).logits[0][real[0]], expected[0][real[0]])
    assert not torch.equal(model(**neighbour).logits[1], expected[1])


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
@torch.no_grad()
def test_the_future_changes_no_bit(family):
    model = student_of(family)
    batch = token_batch(model, length=80)
    name = "decoder_input_ids" if family == "t5" else "input_ids"
    expected = model(**batch, use_cache=False).logits
    for first in (1, 17, 30):
        future = torch.cat([batch[name][:, :first], (batch[name][:, first:] + 1) % 60 + 3], dim=1)
        logits = model(**dict(batch, **{name: future}), use_cache=False).logits
        assert torch.equal(logits[:, :first], expected[:, :first])
        assert not torch.equal(logits[:, first:], expected[:, first:])


@DECODERS
@torch.no_grad()
def test_output_attentions(family):
    """Rows sum to 1 (padding: 0), nothing ahead of the query, and the weights are those of the reference."""
    model = converted(build(family), nystrom())
    batch = padded(40)
    fast = model(**batch, output_attentions=True)
    model.set_attn_implementation("eager")
    slow = model(**batch, output_attentions=True)
    real = batch["attention_mask"].bool()
    plain = model(**batch).logits
    assert (fast.logits - plain)[real].abs().max() <= CACHED_LOGITS
    assert len(fast.attentions) == 2
    for ours, theirs in zip(fast.attentions, slow.attentions, strict=True):
        rows = ours.sum(-1).transpose(1, 2)[real]
        torch.testing.assert_close(rows, torch.ones_like(rows), atol=1e-6, rtol=0)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
        assert bool((ours.triu(1) == 0).all())
        assert bool((ours.transpose(-1, -2)[0][:, ~real[0]] == 0).all())


@torch.no_grad()
def test_output_attentions_of_an_encoder_decoder():
    model = student_of("t5")
    output = model(**token_batch(model, length=30, padded=True), output_attentions=True)
    for name in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        for weights in getattr(output, name):
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), atol=1e-6, rtol=0)


def mixed_student(family: str):
    """Layers: linear, l2, untouched, linear."""
    layers = {"gpt2": "n_layer", "llama": "num_hidden_layers"}[family]
    teacher = FAMILIES[family]()
    config = type(teacher.config).from_dict({**teacher.config.to_dict(), layers: 4})
    torch.manual_seed(0)
    return converted(type(teacher)(config).eval(), [nystrom(layers=[0, 3]), AttentionSpec("l2", layers=[1])])


@DECODERS
@torch.no_grad()
def test_mixed_layers(family, tmp_path):
    """Linear, l2 and dot-product layers share one cache; padding, steps, the reference and a reload."""
    model, batch = mixed_student(family), padded(60)
    real = batch["attention_mask"].bool()
    full = model(**batch, use_cache=False).logits
    logits, past = in_chunks(model, batch, [21, 1, 1, 1, 7, 29])
    assert [type(layer) is NystromLayer for layer in past.layers] == [True, False, False, True]
    assert (logits - full)[real].abs().max() <= CACHED_LOGITS
    changed = dict(batch, input_ids=batch["input_ids"].masked_fill(~real, 5))
    assert (model(**changed).logits - full)[real].abs().max() <= CACHED_LOGITS
    check_reload_and_reference(model, batch, full, tmp_path)


HEAD_PLANS = {
    "beside dot product": [nystrom(heads=[0, 2, 3])],
    "beside l2": [AttentionSpec("l2", heads=[1]), nystrom(heads=[0, 2, 3])],
    "one of four": [nystrom(heads=[2]), AttentionSpec("l1", heads=[0])],
}


@DECODERS
@pytest.mark.parametrize("plan", HEAD_PLANS)
@torch.no_grad()
def test_linear_and_exact_heads_in_one_module(family, plan, tmp_path):
    """The exact heads' key heads alone are kept in full; grouped keys serve both kinds."""
    model, batch = converted(build(family), HEAD_PLANS[plan]), padded(60)
    real = batch["attention_mask"].bool()
    full = model(**batch, use_cache=False).logits
    logits, past = in_chunks(model, batch, [21, 1, 1, 1, 7, 29])
    assert (logits - full)[real].abs().max() <= CACHED_LOGITS
    exact = {"beside dot product": {1}, "beside l2": {1}, "one of four": {0, 1, 3}}[plan]
    key_heads = exact if family == "gpt2" else {head // 2 for head in exact}
    assert all(layer.all_keys.shape == (2, len(key_heads), 60, 8) for layer in layers_of(past))
    past.batch_select_indices(torch.tensor([1]))
    step = {"input_ids": torch.tensor([[5]]), "position_ids": torch.tensor([[60]])}
    longer = torch.cat([batch["input_ids"][1:], step["input_ids"]], dim=1)
    expected = model(longer, use_cache=False).logits[:, -1]
    assert (model(**step, past_key_values=past).logits[:, -1] - expected).abs().max() <= CACHED_LOGITS
    check_reload_and_reference(model, batch, full, tmp_path)


@torch.no_grad()
def test_exact_heads_beside_linear_ones_are_the_teachers():
    """In layer 0, where both see the same: the attention weights of the heads that were left alone."""
    for family in ("gpt2", "llama", "bert"):
        teacher = FAMILIES[family]()
        batch = token_batch(teacher, length=30, padded=True)
        student = converted(teacher, nystrom(heads=[0, 3]))
        teacher.set_attn_implementation("eager")
        expected = teacher(**batch, output_attentions=True).attentions[0]
        actual = student(**batch, output_attentions=True).attentions[0]
        real = batch["attention_mask"].bool()
        for head in range(4):
            error = (actual - expected)[:, head][real].abs().max()
            assert (error <= 1e-5) == (head in (1, 2)), (family, head)


@torch.no_grad()
def test_the_untouched_layers_of_a_mixed_model_are_the_teachers():
    """With only layer 1 converted, what layer 0 hands on is what the teacher's hands on."""
    teacher, batch = llama(), padded(30)
    student = converted(teacher, nystrom(layers=[1]))
    expected = teacher(**batch, output_hidden_states=True).hidden_states[1]
    actual = student(**batch, output_hidden_states=True).hidden_states[1]
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(actual[real], expected[real], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_window_as_long_as_the_text_is_the_teacher():
    """Nothing is far: all of T5's bias, sinks and padding, exactly."""
    for family in FAMILIES:
        teacher = FAMILIES[family]()
        batch = token_batch(teacher, length=30, padded=True)
        student = converted(teacher, nystrom(64, attention="self"))
        expected, actual = teacher(**batch).logits, student(**batch).logits
        real = slice(None) if family == "t5" else batch["attention_mask"].bool()
        assert (actual - expected)[real].abs().max() <= CACHED_LOGITS * expected.abs().max().clamp_min(1), family


@EVERY_FAMILY
@pytest.mark.parametrize("lift", [True, False])
def test_reload_is_bit_equal(tmp_path, family, lift):
    model = student_of(family, lift)
    batch = token_batch(model, length=40, padded=True, seed=9)
    model.save_pretrained(tmp_path)
    again = AUTO[family].from_pretrained(tmp_path).eval()
    assert type(again).__name__ == type(model).__name__
    assert again.config.attention_specs == model.config.attention_specs
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert again.conversion_report == model.conversion_report


@EVERY_FAMILY
@torch.no_grad()
def test_revert_is_bit_equal(family):
    teacher = build(family)
    batch = token_batch(teacher, length=40, padded=True)
    expected = teacher(**batch).logits
    student = converted(teacher, nystrom(9))
    assert not torch.allclose(student(**batch).logits, expected)
    again = revert(student)
    assert type(again) is type(teacher)
    assert torch.equal(again(**batch).logits, expected)
