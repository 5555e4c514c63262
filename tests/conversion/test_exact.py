"""`init="exact"` against the untouched teacher, and `revert` against it bit for bit."""

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from distattn_hf import AttentionSpec, convert, revert
from distattn_hf.core.metrics import get_metric
from tests.conversion.models import FAMILIES, token_batch
from tests.tolerances import EXACT_LOGITS, LIFT_FLOAT64, assert_close


def valid_rows(model, batch, tensor):
    """The rows of real tokens: what a model says about padding is nobody's business."""
    if model.config.is_encoder_decoder:
        return tensor.flatten(0, 1)
    return tensor[batch["attention_mask"].bool()]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_teachers(family, padded):
    teacher = FAMILIES[family]()
    batch = token_batch(teacher, padded=padded)
    student = convert(teacher, AttentionSpec(), init="exact")
    plain = convert(teacher, AttentionSpec(), init="plain")
    with torch.no_grad():
        expected, got, control = (valid_rows(teacher, batch, m(**batch).logits) for m in (teacher, student, plain))
    assert (got - expected).abs().max() <= EXACT_LOGITS
    # The test has teeth only if attention matters to these logits.
    assert (control - expected).abs().max() > 100 * EXACT_LOGITS


@pytest.mark.parametrize(("family", "scaling"), [("t5", 1.0), ("gpt2", 8**-0.5)])
def test_lambda_starts_from_the_models_own_scaling(family, scaling):
    """T5 has none: with λ for 1/√d its logits would be √d times as large as those of other models."""
    student = convert(FAMILIES[family](), AttentionSpec("l2"), init="plain")
    expected = get_metric("l2").default_lambda(8, scaling)
    lambdas = torch.stack([group.lam() for state in student.attention_states.values() for group in state.groups])
    assert_close(lambdas.detach(), torch.full_like(lambdas, expected), "float32_forward")


@pytest.mark.parametrize("family", FAMILIES)
def test_some_heads_alone_equal_the_teachers(family):
    """Breaks if a group of heads reads another head's query, key, value, mask or (T5) position bias."""
    teacher = FAMILIES[family]()
    batch = token_batch(teacher, padded=True)
    student = convert(teacher, AttentionSpec(heads=(1, 3)), init="exact")
    with torch.no_grad():
        expected, got = (valid_rows(teacher, batch, m(**batch).logits) for m in (teacher, student))
    assert (got - expected).abs().max() <= EXACT_LOGITS


def test_a_bias_that_hides_every_key_gives_zero():
    """T5 adds its mask to its bias: what is as low as its dtype goes hides, and is not one more number."""
    student = convert(FAMILIES["t5"](), AttentionSpec("l2"), init="plain")
    module, tensor = next(iter(student.attention_modules().values())), torch.randn(1, 4, 3, 8)
    bias = torch.zeros(1, 4, 3, 3)
    bias[:, :, 1] = torch.finfo(bias.dtype).min
    attention = ALL_ATTENTION_FUNCTIONS[student.config._attn_implementation]
    output, _ = attention(module, tensor, tensor, tensor, None, scaling=1.0, is_causal=False, position_bias=bias)
    assert bool((output[:, 1] == 0).all())
    assert bool((output[:, 0] != 0).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_path_of_the_lift_equals_the_teacher(family):
    """The literal lifted distances, not the dot-product form the fast path reduces them to, in float64."""
    teacher = FAMILIES[family]().double()
    batch = token_batch(teacher, padded=True)
    student = convert(teacher, AttentionSpec(backend="reference"), init="exact")
    with torch.no_grad():
        expected, got = (valid_rows(teacher, batch, m(**batch).logits) for m in (teacher, student))
    assert (got - expected).abs().max() <= LIFT_FLOAT64


@pytest.mark.parametrize("family", ["gpt2", "t5", "llama"])
def test_greedy_generation_is_the_teachers(family):
    teacher = FAMILIES[family]()
    batch = token_batch(teacher, padded=True)
    batch.pop("decoder_input_ids", None)
    student = convert(teacher, AttentionSpec(), init="exact")
    expected, got = (m.generate(**batch, max_new_tokens=20, do_sample=False) for m in (teacher, student))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("init", ["exact", "plain"])
@pytest.mark.parametrize("family", FAMILIES)
def test_revert_is_bit_equal(family, init):
    teacher = FAMILIES[family]()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    batch = token_batch(teacher, padded=True)
    original = revert(convert(teacher, AttentionSpec(), init=init))
    assert type(original) is type(teacher)
    assert type(original.config) is type(teacher.config)
    state = original.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name]) for name in before)
    assert torch.equal(original(**batch).logits, teacher(**batch).logits)


def test_the_teacher_is_untouched_and_shares_nothing():
    teacher = FAMILIES["gpt2"]()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    config = teacher.config.to_dict()
    student = convert(teacher, AttentionSpec("l2"), init="plain")
    storages = {p.data_ptr() for p in teacher.parameters()} | {b.data_ptr() for b in teacher.buffers() if b.numel()}
    assert not storages & {p.data_ptr() for p in student.parameters()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    assert teacher.config.to_dict() == config
    assert not any(hasattr(module, "distattn") for module in teacher.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_output_attentions_are_the_teachers_weights():
    teacher = FAMILIES["bert"]()
    batch = token_batch(teacher, padded=True)
    student = convert(teacher, AttentionSpec(), init="exact")
    teacher.set_attn_implementation("eager")
    with torch.no_grad():
        expected = teacher(**batch, output_attentions=True).attentions
        got = student(**batch, output_attentions=True).attentions
    assert len(got) == len(expected) == 2
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=EXACT_LOGITS, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_and_mixed_dtypes_are_kept(family, dtype):
    teacher = FAMILIES[family]().to(dtype)
    next(p for n, p in teacher.named_parameters() if "norm" in n.lower() or "ln_" in n).data = torch.ones(32)
    for other in (student := convert(teacher, AttentionSpec(), init="exact"), revert(student)):
        theirs = dict(teacher.named_parameters())
        for name, parameter in other.named_parameters():
            assert parameter.dtype == theirs[name].dtype, name
            assert torch.equal(parameter, theirs[name]), name


def test_name_mode_and_checkpointing_are_kept(tmp_path):
    FAMILIES["gpt2"]().save_pretrained(tmp_path)
    teacher = type(FAMILIES["gpt2"]()).from_pretrained(tmp_path)
    teacher.activation_checkpointing_enable()
    teacher.train()
    student = convert(teacher, AttentionSpec("l2"), init="plain")
    assert student.name_or_path == student.config.name_or_path == ""
    reverted = revert(student)
    assert reverted.name_or_path == reverted.config.name_or_path == str(tmp_path)
    for model in (student, reverted):
        assert model.is_activation_checkpointing
        assert model.training
