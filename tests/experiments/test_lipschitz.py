"""Lipschitz constants: the theorem's bound is never exceeded, and power iteration is the Jacobian's largest value."""

import copy
import math

import pytest
import torch
from scipy.special import lambertw
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import distattn_hf
from distattn_hf.experiments.lipschitz import longer_keys, replace_words
from distattn_hf.experiments.run_experiment import run_experiment
from distattn_hf.functional.lipschitz_bounds import (
    ATTENTIONS,
    SelfAttention,
    infinity_norm,
    inverse_phi,
    spectral_norm,
    steepest_points,
)


def jacobian(function, x):
    return torch.func.jacrev(function)(x).reshape(x.numel(), x.numel())


def points(n: int = 6, width: int = 8, seed: int = 0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("value", [1e-3, 1, 15, 1023, 1e6])
def test_inverse_phi_is_lamberts(value):
    assert inverse_phi(value) == pytest.approx(float(lambertw(value / math.e).real), rel=1e-12)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_function_is_the_packages_attention(attention):
    """Logits by `distance_attention`, the values of the paper by hand."""
    function, x, d = SelfAttention.random(attention, 8, 2), points(), 4
    heads = []
    for query, value in zip(function.query, function.value):
        q, v = (x @ query)[None, None], x @ value
        if attention != "dot":
            v = x @ (query @ query.T / math.sqrt(d)) @ value
        if attention == "dot":
            heads.append((q @ q.mT / math.sqrt(d)).softmax(-1)[0, 0] @ v)
        else:
            heads.append(distattn_hf.distance_attention(q, q, v[None, None], metric=attention, lam=1.0)[0, 0])
    torch.testing.assert_close(function(x), torch.cat(heads, -1) @ function.output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_power_iteration_finds_the_largest_singular_value(attention):
    function, x = SelfAttention.random(attention, 8, 2), points()
    full = jacobian(function, x)
    norm, u, v = spectral_norm(function, x, iterations=100)
    assert norm == pytest.approx(float(torch.linalg.svdvals(full)[0]), rel=1e-6)
    torch.testing.assert_close(full @ v.flatten(), norm * u.flatten(), rtol=1e-6, atol=1e-6)
    largest = float(full.abs().sum(1).max())
    assert 0.9 * largest < infinity_norm(function, x, starts=16) < largest * (1 + 1e-9)


@pytest.mark.parametrize("num_tokens", [2, 9])
@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
def test_no_points_are_steeper_than_the_bound(num_tokens, scale):
    for seed in range(2):
        function = SelfAttention.random("sqeuclidean", 4, 2, seed)
        steep, norm = steepest_points(function, scale * points(num_tokens, 4, seed), steps=8)
        full, bounds = jacobian(function, steep), function.bounds(num_tokens)
        assert norm <= float(torch.linalg.svdvals(full)[0]) * (1 + 1e-9) <= bounds["2"]
        assert float(full.abs().sum(1).max()) <= bounds["inf"]


def test_the_bound_is_near_for_one_dimension():
    """D = H = 1, weights of 1, one token at 0 and the others at t: Σ_j P_0j x_j² has its largest value, φ⁻¹(N-1), for
    some t. A bound that is too large by an order would not be noticed above."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    function = SelfAttention("sqeuclidean", one, one, one[0])
    bound, found = function.bounds(32)["inf"], []
    for t in torch.linspace(0.5, 3, 26, dtype=torch.float64):
        x = t.repeat(32)[:, None].clone()
        x[0] = 0
        found.append(float(jacobian(function, x).abs().sum(1).max()))
    assert bound / 3 < max(found) <= bound


def test_the_bound_in_the_2_norm_by_hand():
    """Queries of norm 5, values of 2, outputs of 3: √N/√d·(4·φ⁻¹(N-1) + 1)·√(H·(5²·2)²)·3."""
    eye = torch.eye(4, dtype=torch.float64)
    query = eye.view(4, 2, 2).transpose(0, 1)
    function = SelfAttention("sqeuclidean", 5 * query, 2 * query, 3 * eye)
    by_hand = math.sqrt(50 / 2) * (4 * float(lambertw(49 / math.e).real) + 1) * math.sqrt(2) * 25 * 2 * 3
    assert function.bounds(50)["2"] == pytest.approx(by_hand)


def test_ascent_climbs_and_stays_in_the_ball():
    function, x = SelfAttention.random("sqeuclidean", 8, 2), points()
    steep, norm = steepest_points(function, x, steps=5)
    assert norm > spectral_norm(function, x)[0]
    assert float(steep.norm()) <= float(x.norm()) * (1 + 1e-9)


def test_rows_of_the_quick_run(tmp_path):
    rows = run_experiment("lipschitz", tmp_path, quick=True).rows
    assert len(rows) == 2 * 2 * 2
    norms = {(row["attention"], row["num_tokens"], row["scale"]): row["measured_2"] for row in rows}
    for row in rows:
        assert row["measured_2"] >= row["at_random_points"] * (1 - 1e-9)
        if row["attention"] == "sqeuclidean":
            assert row["measured_2"] <= row["bound_2"]
            assert row["measured_inf"] <= row["bound_inf"]
        else:
            assert row["bound_2"] is None
    # Covariance of the inputs: 64 times as large.
    assert norms["dot", 6, 8.0] > 20 * norms["dot", 6, 1.0]
    assert norms["sqeuclidean", 6, 8.0] < 3 * norms["sqeuclidean", 6, 1.0]
    assert (tmp_path / "lipschitz.png").exists()


def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_longer_keys_are_longer_keys():
    """Of all tokens: as if the key projection were larger; of some: another thing; afterwards: as before."""
    model, ids = tiny(), torch.arange(40)[None]
    scaled = tiny()
    for layer in scaled.model.layers:
        layer.self_attn.k_proj.weight.data *= 10
    with torch.no_grad():
        before, expected = model(ids).logits, scaled(ids).logits
        with longer_keys(model, 10.0, 1.0):
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-3)
        with longer_keys(model, 10.0, 0.05):
            some = model(ids).logits
        torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)
    first = int((torch.rand(1, 40, generator=torch.Generator().manual_seed(0)) < 0.05).int().argmax())
    changed = (some - before).abs().amax((0, 2)) > 0
    assert not changed[:first].any()
    assert changed[first + 1 :].all()


def test_longer_keys_of_a_conversion():
    """The same tokens, through the converted heads."""
    student, ids = distattn_hf.convert(tiny(), distattn_hf.AttentionSpec("l2"), init="plain"), torch.arange(40)[None]
    with torch.no_grad():
        before = student(ids).logits
        with longer_keys(student, 10.0, 0.05):
            assert not torch.equal(student(ids).logits, before)


def test_longer_keys_of_fused_projections():
    """GPT-2's keys, all of them: as if their part of the weights were larger."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5)
    model, ids = GPT2LMHeadModel(config).eval(), torch.arange(40)[None]
    scaled = copy.deepcopy(model)
    for block in scaled.transformer.h:
        block.attn.c_attn.weight.data[:, 32:64] *= 10
        block.attn.c_attn.bias.data[32:64] *= 10
    with torch.no_grad(), longer_keys(model, 10.0, 1.0):
        torch.testing.assert_close(model(ids).logits, scaled(ids).logits, rtol=1e-3, atol=1e-3)


def test_replaced_words():
    text = " ".join(f"word{i}" for i in range(4000))
    replaced = replace_words(text, 0.025).split(" ")
    assert len(replaced) == 4000
    assert 60 < replaced.count("AAA") < 140
    assert all(new in (old, "AAA") for new, old in zip(replaced, text.split(" ")))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("attentions=cosine", "attentions must be among dot, sqeuclidean, l2, got 'cosine'"),
        ("num_tokens=1", "num_tokens must be integers >= 2"),
        ("heads=3", "heads must divide width=4, got 3"),
        ("key_share=0.0", r"key_share must be in \(0, 1\], got 0.0"),
    ],
)
def test_bad_options(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_experiment("lipschitz", tmp_path / "out", [given], quick=True)
