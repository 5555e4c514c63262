"""Attention functions take by position what transformers' own take by position."""

import inspect

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward as transformers_eager

from distattn_hf import AttentionSpec, convert
from distattn_hf.analysis.watch import watched
from distattn_hf.core.interface import IMPLEMENTATIONS
from distattn_hf.core.native_attention import eager_attention_forward
from tests.conversion.models import bert, gpt2, llama, token_batch
from tests.native.choices import make_model

NYSTROM = AttentionSpec(mechanism="nystrom", num_landmarks=4, window_size=4, num_sinks=1)


def attention_of(name: str):
    """(a converted attention module, one that was left, the function registered under a name)."""
    spec = NYSTROM if "nystrom" in name else AttentionSpec("l2")
    teacher = gpt2()
    options = {"calibration": [token_batch(teacher)]} if "nystrom" in name else {"init": "plain"}
    student = convert(teacher, spec, layers=[0], **options)
    return student.transformer.h[0].attn, student.transformer.h[1].attn, ALL_ATTENTION_FUNCTIONS[name]


def problem(length: int = 9):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, length, 8, generator=generator) for _ in range(3)]


def padding(name: str, length: int = 9):
    keep = torch.ones(2, 1, 1, length, dtype=torch.bool)
    keep[0, ..., -2:] = False
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return keep if "nystrom" in name else keep & causal


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_by_position_as_by_keyword(name):
    *modules, function = attention_of(name)
    inputs = problem()
    for module in modules:
        for values in ((0.0,), (0.0, 0.2), (0.0, 0.2, True), (0.0, None, False)):
            for mask in (None, padding(name)):
                names = dict(zip(("dropout", "scaling", "is_causal"), values))
                expected = function(module, *inputs, mask, **names)[0]
                assert torch.equal(function(module, *inputs, mask, *values)[0], expected)
                assert torch.equal(function(module, *inputs, attention_mask=mask, **names)[0], expected)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_what_comes_by_position_counts(name):
    module, _, function = attention_of(name)
    inputs = problem()
    plain = function(module, *inputs, None)[0]
    assert not torch.equal(function(module, *inputs, None, 0.0, 0.9)[0], plain)
    assert not torch.equal(function(module, *inputs, None, 0.0, None, False)[0], plain)
    torch.manual_seed(0)
    assert not torch.equal(function(module, *inputs, None, 0.5)[0], plain)


@pytest.mark.parametrize("name", ["distattn", "distattn_eager"])
def test_a_position_bias_comes_by_position(name):
    module, _, function = attention_of(name)
    inputs, bias = problem(), torch.randn(1, 4, 9, 9)
    expected = function(module, *inputs, None, position_bias=bias)[0]
    assert torch.equal(function(module, *inputs, None, 0.0, None, None, bias)[0], expected)
    assert not torch.equal(function(module, *inputs, None)[0], expected)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_order_is_that_of_transformers(name):
    shared = ["module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "position_bias"]
    assert list(inspect.signature(sdpa_attention_forward).parameters)[: len(shared)] == shared
    assert list(inspect.signature(ALL_ATTENTION_FUNCTIONS[name]).parameters)[: len(shared)] == shared


def test_native_eager_attention_follows_transformers_eager_attention():
    module = make_model("dot", "none", "causal").model.layers[0].self_attn
    query, key, value = (torch.randn(2, 2, 9, 8) for _ in range(3))
    expected = transformers_eager(module.eval(), query, key, value, None, 0.3, 0.0)
    got = eager_attention_forward(module, query, key, value, None, 0.3, 0.0)
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(got, expected))


@pytest.mark.parametrize("family", [gpt2, bert, llama])
@pytest.mark.parametrize("spec", [AttentionSpec("l2"), NYSTROM])
def test_models_whose_attention_is_wrapped(monkeypatch, family, spec):
    teacher = family()
    batch = token_batch(teacher, padded=True)
    student = convert(teacher, spec, layers=[0], calibration=[batch])
    expected, calls = student(**batch).logits, []

    def wrap(original):
        def wrapper(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs):
            calls.append(original)
            return original(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)

        return wrapper

    for name in ("sdpa", *IMPLEMENTATIONS):
        monkeypatch.setitem(AttentionInterface._global_mapping, name, wrap(ALL_ATTENTION_FUNCTIONS[name]))
    assert torch.equal(student(**batch).logits, expected)
    assert calls


def test_watched_attention_takes_arguments_by_position():
    teacher = gpt2()
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    module, inputs = teacher.transformer.h[0].attn, problem()
    seen = []
    with watched(teacher, seen.append):
        wrapped = ALL_ATTENTION_FUNCTIONS["sdpa"]
        output = wrapped(module, *inputs, None, 0.0, 0.2, True)[0]
    assert torch.equal(output, original(module, *inputs, None, 0.0, 0.2, True)[0])
    assert (seen[0].scaling, seen[0].is_causal) == (0.2, True)
