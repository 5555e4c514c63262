"""What one mechanism alone has: random features, random blocks, peers in other libraries; and what is refused."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from distattn_hf.core.encodings import register_encoding
from distattn_hf.core.mechanism_performer import orthogonal_features
from distattn_hf.core.mechanisms import MECHANISMS, Mechanism, register_mechanism
from tests.tolerances import STANDARD_ERRORS, assert_close

from .mechanism_oracles import FORMS, forms, random_blocks


def tensors(length, *, batch=1, heads=2, size=4, dtype=torch.float64):
    """Query, key and value."""
    return [torch.randn(batch, heads, length, size, dtype=dtype) for _ in range(3)]


def test_performer_features_are_orthogonal_and_as_long_as_gaussian_vectors():
    features = orthogonal_features(12, 5, seed=3).double()
    for group in features.split(5):
        directions = F.normalize(group, dim=-1)
        assert_close(directions @ directions.mT, torch.eye(len(group), dtype=torch.float64), "float32_forward")
    # E‖ω‖² = d with variance 2·d.
    squares = orthogonal_features(5000, 5, seed=0).double().square().sum(-1)
    assert abs(float(squares.mean()) - 5) < STANDARD_ERRORS * math.sqrt(10 / 5000)
    # Uniform directions: the mean vanishes.
    directions = F.normalize(orthogonal_features(5000, 5, seed=1).double(), dim=-1)
    assert float(directions.mean(0).abs().max()) < STANDARD_ERRORS * math.sqrt(1 / 5 / 5000)


def test_performer_products_have_the_softmax_kernel_as_their_mean():
    """Over many draws: an estimate of exp(scaling·q·k) that is right on average."""
    query, key = 0.8 * torch.randn(2, 4, dtype=torch.float64)
    samples = []
    for seed in range(400):
        features = orthogonal_features(4, 4, seed).double()
        x, y = query * 0.5**0.5, key * 0.5**0.5
        samples.append(((features @ (x + y) - (x @ x + y @ y) / 2).exp()).mean())
    samples = torch.stack(samples)
    error = float(samples.mean() - (0.5 * query @ key).exp())
    assert abs(error) < STANDARD_ERRORS * float(samples.std()) / math.sqrt(len(samples))


def test_performer_approaches_softmax_attention_with_more_features():
    query, key, value = (0.7 * t for t in tensors(12, heads=1))
    exact = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    errors = []
    for count in (16, 4096):
        module = MECHANISMS.get("performer")(1, 4, num_features=count).double()
        errors.append(float((module(query, key, value, is_causal=True)[0] - exact).norm() / exact.norm()))
    # Errors fall as 1/√m: 16 times less, of which a factor 4 is left to chance.
    assert errors[1] < errors[0] / 4


@pytest.mark.parametrize("causal", [False, True])
def test_performer_stays_finite_with_large_queries_and_keys(causal):
    """The exponents are up to 2,000; in float32 their exponentials end at 88. Equal to the same sums in float64."""
    query, key, value = tensors(200, size=16, dtype=torch.float32)
    key[:, :, ::50] *= 30
    query[:, :, ::7] *= 10
    module = MECHANISMS.get("performer")(2, 16)
    leaves = [t.requires_grad_() for t in (query, key, value)]
    output = module(*leaves, is_causal=causal)[0]
    assert bool((output[:, :, 0] != 0).any())
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(output.sum(), leaves))
    features = module.projection.double()
    x, y = (t.detach().double() * 16**-0.25 for t in (query, key))
    exponents = (x @ features.mT)[:, :, :, None] + (y @ features.mT - y.square().sum(-1, keepdim=True) / 2)[:, :, None]
    if causal:
        later = torch.ones(200, 200, dtype=torch.bool).triu(1)
        exponents = exponents.masked_fill(later[..., None], float("-inf"))
    weights = exponents.logsumexp(-1).softmax(-1)
    # Exponents of 100 rounded to float32 are off by 1e-5, in query and in key.
    torch.testing.assert_close(output.double(), weights @ value.double(), rtol=0, atol=1e-3)


def test_performer_redraws_in_training_only_and_at_its_interval():
    module = MECHANISMS.get("performer")(2, 4, redraw_interval=3)
    x = tensors(5, dtype=torch.float32)
    seen = []
    for _ in range(7):
        module(*x)
        seen.append(module.projection.clone())
    assert [torch.equal(a, b) for a, b in zip(seen, seen[1:])] == [True, True, False, True, True, False]
    module.eval()
    for _ in range(4):
        module(*x)
        assert torch.equal(module.projection, seen[-1])
    kept = MECHANISMS.get("performer")(2, 4, redraw_interval=0)
    first = kept.projection.clone()
    for _ in range(3):
        kept(*x)
    assert torch.equal(kept.projection, first)
    kept.redraw()
    assert not torch.equal(kept.projection, first)


def test_performer_saved_and_loaded_goes_on_with_the_same_draws():
    modules = [MECHANISMS.get("performer")(2, 4, redraw_interval=2, seed=seed) for seed in (0, 0)]
    x = tensors(5, dtype=torch.float32)
    for _ in range(4):
        modules[0](*x)
    modules[1](*x)
    modules[1].load_state_dict(modules[0].state_dict())
    assert int(modules[1].calls) == 4
    for _ in range(4):
        assert torch.equal(modules[0](*x)[0], modules[1](*x)[0])


def test_performer_redraw_leaves_earlier_graphs_alone():
    """Two forward passes before one backward pass, with a redraw between them."""
    module = MECHANISMS.get("performer")(2, 4, redraw_interval=1)
    x = [t.requires_grad_() for t in tensors(5, dtype=torch.float32)]
    sum(module(*x)[0].sum() for _ in range(3)).backward()
    assert all(bool(t.grad.isfinite().all()) for t in x)


def test_performer_under_gradient_checkpointing_has_the_gradients_of_its_forward_pass():
    gradients = []
    for again in (False, True):
        module = MECHANISMS.get("performer")(2, 4, redraw_interval=1)
        torch.manual_seed(3)
        x = [t.requires_grad_() for t in tensors(5, dtype=torch.float32)]
        module(*x)
        output = checkpoint(module, *x, use_reentrant=False)[0] if again else module(*x)[0]
        gradients.append(torch.autograd.grad(output.square().sum(), x))
        assert int(module.calls) == 2
    for actual, expected in zip(*gradients):
        assert_close(actual, expected, "equal")


@pytest.mark.parametrize("causal", [False, True])
def test_dropout_of_feature_attention_drops_features(causal):
    """With one feature a row is dropped as a whole, or scaled as a whole."""
    module = MECHANISMS.get("performer")(2, 4, num_features=1).double()
    query, key, value = tensors(200)
    x = query, key, value.abs()
    ratio = module(*x, is_causal=causal, dropout_p=0.3)[0] / module(*x, is_causal=causal)[0]
    assert_close(ratio, ratio[..., :1].expand_as(ratio), "float64")
    dropped = ratio[..., 0] == 0
    assert_close(ratio[~dropped], torch.full_like(ratio[~dropped], 1 / 0.7), "float64")
    assert abs(float(dropped.double().mean()) - 0.3) < STANDARD_ERRORS * math.sqrt(0.3 * 0.7 / dropped.numel())


def test_landmark_dropout_differs_from_part_to_part(monkeypatch):
    """Each query is a part by itself; values that are unit vectors show which keys were dropped."""
    monkeypatch.setattr("distattn_hf.core.retrieval_blocks.ENTRIES", 1)
    module = MECHANISMS.get("landmark")(1, 4, block_size=8, num_blocks=1, num_candidates=2)
    query, key, _ = tensors(8, heads=1)
    output = module(query, key, torch.eye(8, dtype=torch.float64)[None, None], dropout_p=0.5)[0]
    assert len({tuple(row) for row in (output[0, 0] > 0).tolist()}) > 1


@pytest.mark.parametrize("causal", [False, True])
def test_performer_against_performer_pytorch(causal):
    """Their features without the constant that they add, which ours have no need of."""
    peer = pytest.importorskip("performer_pytorch.performer_pytorch")
    query, key, value = tensors(9)
    module = MECHANISMS.get("performer")(2, 4, num_features=7).double()
    features = [
        peer.softmax_kernel(t, projection_matrix=module.projection, is_query=is_query, eps=0.0)
        for t, is_query in ((query, True), (key, False))
    ]
    attend = peer.linear_attention
    if causal:
        # Their causal form is a CUDA extension, or this.
        attend = lambda q, k, v: peer.causal_linear_attention_noncuda(q, k, v, chunk_size=1, eps=0.0)  # noqa: E731
    assert_close(module(query, key, value, is_causal=causal)[0], attend(*features, value), "float64")


@pytest.mark.parametrize("causal", [False, True])
def test_local_against_local_attention(causal):
    """Their window is exact when asked: window_size keys back besides the query's own, and as many ahead."""
    peer = pytest.importorskip("local_attention")
    query, key, value = tensors(16, dtype=torch.float32)
    theirs = peer.LocalAttention(
        window_size=4, causal=causal, look_backward=1, look_forward=0 if causal else 1, exact_windowsize=True,
        autopad=True, use_rotary_pos_emb=False,
    )  # fmt: skip
    ours = MECHANISMS.get("local")(2, 4, window_size=5)
    assert_close(ours(query, key, value, is_causal=causal)[0], theirs(query, key, value), "float32_forward")


def test_bigbird_random_blocks():
    """As the hash says in unbounded integers; below each item's number of blocks; spread over them all."""
    module = MECHANISMS.get("bigbird")(3, 4, num_random_blocks=4, seed=11)
    counts = torch.tensor([1, 7, 100])
    found = module.random_blocks(counts, 50)
    assert found.shape == (3, 3, 50, 4)
    for item, count in enumerate(counts.tolist()):
        for head in range(3):
            for block in range(50):
                assert found[item, head, block].tolist() == random_blocks(11, head, block, 4, count)
    # 600 draws from 7 blocks: counts deviate from 600/7 by √(600·6/49).
    share = found[1].flatten().bincount(minlength=7) - 600 / 7
    assert float(share.abs().max()) < STANDARD_ERRORS * math.sqrt(600 * 6 / 49)
    other = MECHANISMS.get("bigbird")(3, 4, num_random_blocks=4, seed=12).random_blocks(counts, 50)
    assert not torch.equal(other, found)


def test_landmark_gradient_equals_finite_differences(monkeypatch):
    """The backward pass, that of retrieval attention, is written by hand, in parts."""
    monkeypatch.setattr("distattn_hf.core.retrieval_blocks.ENTRIES", 100)
    module = MECHANISMS.get("landmark")(1, 3, block_size=2, num_blocks=1, num_candidates=4)
    bias = torch.randn(1, 1, 7, 7, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (*tensors(7, heads=1, size=3), bias)]

    def attention(query, key, value, bias):
        return module(query, key, value, is_causal=True, position_bias=bias)[0]

    assert torch.autograd.gradcheck(attention, inputs)


def test_refusals_of_forms():
    for name in MECHANISMS:
        kind = MECHANISMS.get(name)
        existing = forms(name)
        for form in FORMS:
            flags = {"is_causal": form == "causal", "is_cross": form == "cross"}
            if form in existing:
                kind.check(**flags)
            else:
                with pytest.raises(ValueError, match=f"'{name}' has no {form} form; it has: {', '.join(existing)}"):
                    kind.check(**flags)
        if not kind.takes_bias:
            with pytest.raises(ValueError, match=f"'{name}' takes no position_bias"):
                kind.check(has_bias=True)
        with pytest.raises(ValueError, match="is_causal and is_cross exclude"):
            kind.check(is_causal=True, is_cross=True)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("local", {"window": 3}, "mechanism 'local' has no option 'window'; its options are: window_size, dilation"),
        ("linear", {"rank": 3}, "mechanism 'linear' has no option 'rank'; its options are: none"),
        ("local", {"window_size": 0}, "window_size of mechanism 'local' must be an integer >= 1, got 0"),
        ("local", {"dilation": 1.5}, "dilation of mechanism 'local' must be an integer >= 1, got 1.5"),
        ("strided", {"stride": True}, "stride of mechanism 'strided' must be an integer >= 1, got True"),
        ("bigbird", {"num_random_blocks": -1}, "num_random_blocks of mechanism 'bigbird' must be an integer >= 0"),
        ("landmark", {"num_candidates": 1}, "num_candidates of mechanism 'landmark' must be an integer >= 2, got 1"),
        ("performer", {"num_features": 0}, "num_features of mechanism 'performer' must be an integer >= 1 or None"),
        ("linformer", {}, "max_length of mechanism 'linformer' must be an integer >= 1, got None"),
    ],
)
def test_refusals_of_options(name, options, message):
    for attempt in (MECHANISMS.get(name).check_options, lambda **o: MECHANISMS.get(name)(2, 4, **o)):
        with pytest.raises(ValueError, match=message):
            attempt(**options)


def _ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": _ones(2, 3, 5, 4)}, r"query must be a floating-point tensor \(B, 2 heads"),
        ({"key": _ones(2, 2, 5)}, "key must be a floating-point tensor"),
        ({"value": _ones(2, 2, 5, 4, dtype=torch.long)}, "value must be a floating-point tensor .* torch.int64"),
        ({"key": _ones(2, 2, 5, 3)}, "must agree in batch, and have head_dim 4"),
        ({"value": _ones(2, 2, 6, 4)}, "must agree in batch, heads and length"),
        ({"query": _ones(2, 2, 4, 4)}, "self-attention needs as many keys as queries, or is_cross=True, got 4 .* 5"),
        (
            {"query": _ones(2, 2, 6, 4), "is_causal": True},
            "self-attention needs no fewer keys than queries, got 6 .* 5",
        ),
        ({"keep": _ones(2, 5)}, r"keep must be bool of shape \(B, M\)=\(2, 5\), got torch.float32"),
        ({"keep": _ones(2, 1, 1, 5, dtype=torch.bool)}, "keep must be bool of shape"),
        ({"scaling": 0.0}, "scaling must be a positive finite number, got 0.0"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"position_bias": _ones(1, 1, 5, 5)}, r"position_bias must have shape \(B or 1, H, N, M\)"),
    ],
)
def test_refusals_of_arguments(changes, message):
    arguments = {name: _ones(2, 2, 5, 4) for name in ("query", "key", "value")}
    with pytest.raises(ValueError, match=message):
        MECHANISMS.get("local")(2, 4)(**{**arguments, **changes})


def test_refusals_of_one_mechanism():
    x = _ones(1, 2, 5, 4)
    with pytest.raises(ValueError, match="'linformer' takes at most max_length=4 keys, got 5"):
        MECHANISMS.get("linformer")(2, 4, max_length=4)(x, x, x)
    with pytest.raises(ValueError, match="values of size 3"):
        MECHANISMS.get("relative")(2, 4)(x, x, x[..., :3])


def test_a_mechanism_of_ones_own():
    """Registered by name, with its options checked and its weights made from its pattern."""

    @register_mechanism("first_key", aliases=("first",))
    class FirstKey(Mechanism):
        complexity = memory = "O(N·d)"
        takes_bias = True

        def _attend(self, call):
            return call.value[:, :, :1].expand(-1, -1, call.query.shape[2], -1)

        def _visible(self, call):
            return torch.arange(call.key.shape[2]) == 0

    module = MECHANISMS.get("first")(2, 4)
    x = torch.randn(1, 2, 5, 4)
    output, weights = module(x, x, x, is_causal=True, return_weights=True)
    assert_close(weights @ x, output, "equal")
    with pytest.raises(ValueError, match="mechanism 'first' is already registered"):
        register_mechanism("first")(FirstKey)


def test_a_mechanism_of_ones_own_returns_what_it_must():
    """(B, N, H, d) in place of (B, H, N, d) would become a scrambled (B, N, H·d) without a word."""

    class Turned(Mechanism):
        name, complexity, memory = "turned", "O(N·d)", "O(N·d)"

        def _attend(self, call):
            return call.value.transpose(1, 2)

        def _weights(self, call):
            return call.query @ call.key.mT

    class Narrow(Turned):
        def _attend(self, call):
            return call.value

        def _weights(self, call):
            return (call.query @ call.key.mT).mean(1)

    x = torch.randn(1, 2, 5, 4)
    with pytest.raises(ValueError, match=r"Turned._attend must return shape \(1, 2, 5, 4\), got \(1, 5, 2, 4\)"):
        Turned(2, 4)(x, x, x)
    with pytest.raises(ValueError, match=r"Narrow._weights must return shape \(1, 2, 5, 5\), got \(1, 5, 5\)"):
        Narrow(2, 4)(x, x, x, return_weights=True)
    for register, kind in ((register_mechanism, "Mechanism"), (register_encoding, "PositionalEncoding")):
        for wrong in (torch.nn.Linear, Narrow(2, 4).forward):
            with pytest.raises(ValueError, match=f"'odd' must be a subclass of {kind}, got"):
                register("odd")(wrong)
