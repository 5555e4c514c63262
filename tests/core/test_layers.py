"""The layers for PyTorch users: against loops over single entries, with masks, caches and everything they refuse."""

import math
import warnings

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, StaticCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from distattn_hf.core.mechanisms import MECHANISMS
from distattn_hf.core.metrics import METRICS, get_metric
from distattn_hf.layers.attention_layers import DistanceBasedAttention
from distattn_hf.layers.factory import (
    AttentionFactory,
    PositionalEncodingFactory,
    create_distance_attention,
)
from distattn_hf.layers.layer_settings import DistanceAttentionConfig
from tests.tolerances import STANDARD_ERRORS, assert_close

from .cases import METRIC_CASES, every_metric
from .oracles import loop_attention

SIZE, HEADS = 12, 3


def layer_of(metric="l2", kind=DistanceBasedAttention, **options):
    """A layer in float64, in evaluation mode."""
    return kind(DistanceAttentionConfig(SIZE, HEADS, metric, **options)).double().eval()


def states(length, size=SIZE):
    return torch.randn(2, length, size, dtype=torch.float64)


def naive(layer, x, other=None, *, keep=None, bias=None, clip=None):
    """(output, weights) of a layer: projections written out, then loops; values of unit vectors give the weights."""
    other, config = x if other is None else other, layer.config

    def heads(projection, t):
        t = torch.einsum("bni,oi->bno", t, projection.weight) + projection.bias
        return torch.stack([t[..., h * 4 : (h + 1) * 4] for h in range(HEADS)], dim=1).detach()

    query, key, value = heads(layer.q_proj, x), heads(layer.k_proj, other), heads(layer.v_proj, other)
    lam, softening = layer.lam.tolist(), float(layer.softening[0]) if config.softening else 0.0
    shape = (*query.shape[:3], key.shape[2])
    units = torch.eye(shape[-1], dtype=torch.float64).expand(2, HEADS, -1, -1)
    weights = loop_attention(
        config.metric, config.p, query, key, units, lam=lam, scaling=1 / math.sqrt(4) / config.temperature,
        keep=None if keep is None else keep.expand(shape), bias=None if bias is None else bias.expand(shape),
        is_causal=config.is_causal, softening=softening,
    )  # fmt: skip
    if clip is not None:
        weights = torch.where(weights > 0, weights.clamp(min=weights.amax(-1, keepdim=True) * math.exp(-clip)), weights)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-9)
    joined = torch.cat(list((weights @ value).unbind(1)), dim=-1)
    return torch.einsum("bni,oi->bno", joined, layer.o_proj.weight) + layer.o_proj.bias, weights


@every_metric
@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_loops(metric, p, causal):
    """Output and weights, with another temperature and λ than the default; rows of weights sum to 1."""
    layer = layer_of(metric, p=p, is_causal=causal, temperature=0.7, lam=1.3)
    x = states(7)
    assert_close(layer.lam, torch.full((HEADS,), 1.3, dtype=torch.float64), "float32_forward")
    expected = naive(layer, x)
    output, weights = layer(x, output_attentions=True)
    assert_close(output, expected[0], "float64")
    assert_close(weights, expected[1], "float64")
    assert_close(weights.sum(-1), torch.ones(2, HEADS, 7, dtype=torch.float64), "float64")
    assert_close(layer(x), expected[0], "float64")


SOFT = [case for case in METRIC_CASES if get_metric(case[0]).softens]


@pytest.mark.parametrize(("metric", "p"), SOFT)
@pytest.mark.parametrize("options", [{}, {"logit_clip": 0.5}], ids=["backend", "written out"])
def test_softened_equals_the_loops(metric, p, options):
    layer = layer_of(metric, p=p, is_causal=True, lam=1.3, softening=0.6, **options)
    x = states(6)
    expected = naive(layer, x, clip=options.get("logit_clip"))
    output, weights = layer(x, output_attentions=True)
    assert_close(output, expected[0], "float64")
    assert_close(weights, expected[1], "float64")


@pytest.mark.parametrize(("metric", "p"), SOFT)
def test_softening_trains_where_it_is_asked_to(metric, p):
    """By its gradient against finite differences; else it stays, and a plain layer has no such parameter."""
    layer = layer_of(metric, p=p, softening=0.6, learnable_softening=True)
    x = states(5)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), layer.log_softening)
    with torch.no_grad():
        ends = []
        for step in (-1e-5, 1e-5):
            layer.log_softening[0] += step
            ends.append(layer(x).square().sum())
            layer.log_softening[0] -= step
    assert float(gradient[0]) == pytest.approx(float(ends[1] - ends[0]) / 2e-5, rel=1e-4)
    assert not layer_of(metric, p=p, softening=0.6).log_softening.requires_grad
    assert "log_softening" not in layer_of(metric, p=p).state_dict()


@every_metric
def test_default_lambda_is_the_metrics_and_temperature_divides_the_logits(metric, p):
    """Were λ made for the scaling that holds the temperature, the two would cancel."""
    default = get_metric(metric).default_lambda(4, 0.5, p)
    warm, plain = layer_of(metric, p=p, temperature=2.0), layer_of(metric, p=p, lam=default / 2)
    assert_close(warm.lam, torch.full((HEADS,), default, dtype=torch.float64), "float32_forward")
    plain.load_state_dict({**warm.state_dict(), "log_lambda": plain.log_lambda})
    x = states(6)
    assert_close(warm(x), plain(x), "float32_forward")


MASKS = {
    "B,M": lambda n: torch.ones(2, n).tril(n - 3).flip(0),
    "B,N,M": lambda n: torch.rand(2, n, n) > 0.4,
    "B,1,N,M": lambda n: torch.rand(2, 1, n, n) > 0.4,
    "B,H,N,M": lambda n: torch.rand(2, HEADS, n, n) > 0.4,
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", [bool, int, float])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("clip", [None, 1e6], ids=["fast", "written_out"])
def test_masks(mask, kind, causal, clip):
    """Every rank, as bool, integers and added floats; a query that sees nothing gets the output's bias alone.

    A logit_clip that no logit reaches changes how the same is computed.
    """
    keep = MASKS[mask](7).bool()
    keep[0, ..., 2:5] = False
    layer, x = layer_of(is_causal=causal, logit_clip=clip), states(7)
    given = {bool: keep, int: keep.long(), float: torch.where(keep, 0.0, float("-inf")).double()}[kind]
    shaped = {2: keep[:, None, None], 3: keep[:, None]}.get(keep.dim()) if keep.dim() < 4 else keep
    output, weights = layer(x, attention_mask=given, output_attentions=True)
    expected = naive(layer, x, keep=shaped)
    assert_close(output, expected[0], "float64")
    assert_close(weights, expected[1], "float64")


@pytest.mark.parametrize("clip", [None, 1e6], ids=["fast", "written_out"])
def test_position_bias(clip):
    """Beside a float mask; and a bias of -inf masks."""
    layer, x = layer_of(is_causal=True, logit_clip=clip), states(7)
    bias, mask = torch.randn(1, HEADS, 7, 7, dtype=torch.float64), torch.randn(2, 7, 7, dtype=torch.float64)
    expected = naive(layer, x, bias=bias + mask[:, None])[0]
    assert_close(layer(x, attention_mask=mask, position_bias=bias), expected, "float64")
    hidden = torch.rand(1, HEADS, 7, 7) > 0.6
    output = layer(x, position_bias=bias.masked_fill(hidden, float("-inf")))
    assert_close(output, naive(layer, x, bias=bias, keep=~hidden)[0], "float64")


def test_rotation():
    layer, x = layer_of(is_causal=True), states(7)
    rotary = PositionalEncodingFactory.create("rotary", SIZE, HEADS)
    turned = layer(x, position_embeddings=rotary.rotation(x, torch.arange(7)[None]))
    # Turning is what transformers does for Llama; ‖q - k‖ sees differences of positions only.
    moved = layer(x, position_embeddings=rotary.rotation(x, torch.arange(5, 12)[None]))
    assert_close(turned, moved, "float32_forward")
    assert float((turned - layer(x)).detach().abs().max()) > 0.01
    query, key = (layer._heads(p, x) for p in (layer.q_proj, layer.k_proj))
    pair = apply_rotary_pos_emb(query, key, *rotary.rotation(x, torch.arange(7)[None]))
    distance = torch.cdist(*pair)
    _, weights = layer(x, position_embeddings=rotary.rotation(x, torch.arange(7)[None]), output_attentions=True)
    logits = -layer.lam[:, None, None] / 2 * distance
    assert_close(weights, logits.masked_fill(~torch.ones(7, 7).tril().bool(), float("-inf")).softmax(-1), "float64")


def test_cross_attention():
    """Keys of another length and vector size, with their own padding."""
    layer, x, other = layer_of("l1", key_value_size=5), states(4), states(9, size=5)
    keep = torch.ones(2, 9, dtype=torch.bool)
    keep[1, 6:] = False
    output, weights = layer(x, other, keep, output_attentions=True)
    expected = naive(layer, x, other, keep=keep[:, None, None])
    assert weights.shape == (2, HEADS, 4, 9)
    assert_close(output, expected[0], "float64")
    assert_close(weights, expected[1], "float64")


@pytest.mark.parametrize("clip", [0.5, 3.0])
@pytest.mark.parametrize("causal", [False, True])
def test_logit_clip(clip, causal):
    """No weight is less than e^-clip of the largest in its row; masked keys stay masked, and empty rows zero."""
    keep = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    keep[1, ..., :3] = False
    options = {"lam": 4.0, "is_causal": causal}
    layer, x = layer_of("l1", logit_clip=clip, **options), states(7)
    output, weights = layer(x, attention_mask=keep, output_attentions=True)
    expected = naive(layer, x, keep=keep, clip=clip)
    assert_close(output, expected[0], "float64")
    assert_close(weights, expected[1], "float64")
    open_rows = weights[weights.sum(-1) > 0]
    smallest = open_rows.masked_fill(open_rows == 0, float("inf")).amin(-1)
    assert bool((smallest >= open_rows.amax(-1) * math.exp(-clip) * (1 - 1e-9)).all())
    assert bool((layer_of("l1", **options)(x, attention_mask=keep) - output).abs().max() > 1e-3)


class Stretched(DistanceBasedAttention):
    """A distance of a user's own, which looks at all queries and keys at once."""

    def compute_distance_matrix(self, query, key):
        assert query.shape[:2] == key.shape[:2] == (2, HEADS)
        return 2.5 * torch.cdist(query, key) + torch.arange(key.shape[2])


@pytest.mark.parametrize("options", [{}, {"logit_clip": 100.0}, {"is_causal": True}])
def test_an_overridden_distance_is_honoured(options):
    """2.5·‖q - k‖ + j is l2 with λ·2.5 and the bias -λ·j/√d."""
    layer, plain, x = layer_of(kind=Stretched, **options), layer_of(**options), states(7)
    plain.load_state_dict(layer.state_dict())
    plain.log_lambda.data += math.log(2.5)
    bias = -layer.lam[:, None, None] / 2 * torch.arange(7)
    keep = torch.ones(2, 7, dtype=torch.long)
    keep[1, 4:] = 0
    for wanted in (False, True):
        actual = layer(x, attention_mask=keep, output_attentions=wanted)
        expected = plain(x, attention_mask=keep, position_bias=bias[None].detach().expand(1, -1, 7, -1))
        assert_close(actual[0] if wanted else actual, expected, "float64")


def test_an_overridden_distance_of_the_wrong_shape_is_refused():
    class Wrong(DistanceBasedAttention):
        def compute_distance_matrix(self, query, key):
            return torch.cdist(query, key)[0]

    with pytest.raises(ValueError, match=r"compute_distance_matrix must return distances of shape \(2, 3, 7, 7\), got"):
        layer_of(kind=Wrong)(states(7))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}])
def test_an_overridden_distance_below_zero_is_refused(sign, options):
    class Similar(DistanceBasedAttention):
        def compute_distance_matrix(self, query, key):
            return sign * query @ key.mT

    with pytest.raises(ValueError, match="Similar.compute_distance_matrix must return distances, .*>= 0, got -"):
        layer_of(kind=Similar, **options)(states(7))


def test_an_overridden_control_that_says_so_may_be_negative():
    class Control(DistanceBasedAttention):
        def compute_distance_matrix(self, query, key):
            return -query @ key.mT

    x, options = states(7), {"metric": "dot", "lam": 1.0}
    layer, plain = layer_of(kind=Control, **options), layer_of(**options)
    plain.load_state_dict(layer.state_dict())
    assert_close(layer(x), plain(x), "float64")


def test_learnable_lambda():
    """Its gradient is that of finite differences; off, nothing trains and the values stay."""
    layer, x = layer_of(learnable_lambda=True), states(5)
    upstream = torch.randn(2, 5, SIZE, dtype=torch.float64)

    def loss():
        return (layer(x) * upstream).sum()

    (gradient,) = torch.autograd.grad(loss(), layer.log_lambda)
    for head in range(HEADS):
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                layer.log_lambda[head] += step
                values.append(float(loss()))
                layer.log_lambda[head] -= step
        # Central differences of float64: 1e-16 / 1e-6 of rounding on a loss of size 10.
        assert float(gradient[head]) == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-7)
    before = layer.lam
    layer.set_learnable_lambda(False)
    assert "log_lambda" not in [name for name, p in layer.named_parameters() if p.requires_grad]
    assert torch.equal(layer.lam, before)
    layer.set_learnable_lambda(True)
    assert layer.log_lambda.requires_grad
    assert not layer_of().log_lambda.requires_grad


def causal_layers():
    few = {"window_size": 1, "num_sinks": 1, "block_size": 2, "num_blocks": 1}
    options = {"linformer": {"max_length": 20}, "local": {"window_size": 4}, "retrieval": few}
    for name in (*METRICS, "retrieval", *(m for m in MECHANISMS if MECHANISMS.get(m).causal)):
        yield name, {"p": 3.0} if name == "lp" else options.get(name, {})


@pytest.mark.parametrize(("name", "options"), list(causal_layers()))
def test_cache_equals_one_pass(name, options):
    """Prompt, one token and several at once through a cache, with padding on the left, equal the whole text."""
    layer = AttentionFactory.create(name, SIZE, HEADS, is_causal=True, layer_idx=0, **options).double().eval()
    x, keep = states(9), torch.ones(2, 9, dtype=torch.bool)
    keep[1, :3] = False
    whole, weights = layer(x, attention_mask=keep, output_attentions=True)
    cache, start = DynamicCache(), 0
    for size in (4, 1, 1, 3):
        stop = start + size
        # Where keys became sums, they have no weights of their own any more.
        asked = start == 0 or name not in ("linear", "performer")
        new = {"attention_mask": keep[:, :stop], "past_key_values": cache, "output_attentions": asked}
        output, rows = layer(x[:, start:stop], **new) if asked else (layer(x[:, start:stop], **new), None)
        assert_close(output, whole[:, start:stop], "float64")
        if asked:
            # A ring has those keys only that a query reaches.
            first = stop - rows.shape[-1]
            assert first == (max(0, start - 3) if name == "local" else 0)
            assert_close(rows, weights[:, :, start:stop, first:stop], "float64")
            assert not weights[:, :, start:stop, :first].any()
        start = stop
    cache = DynamicCache()
    layer(x[:, :8], attention_mask=keep[:, :8], past_key_values=cache)
    assert_close(layer(x[:, 8:], attention_mask=keep, past_key_values=cache), whole[:, 8:], "float64")


def test_a_cache_with_empty_places_is_refused():
    config = LlamaConfig(num_hidden_layers=1, hidden_size=SIZE, num_attention_heads=HEADS)
    cache = StaticCache(config=config, max_cache_len=16)
    with pytest.raises(ValueError, match="StaticCache with 16 keys after 4 tokens"):
        layer_of(is_causal=True)(states(4), past_key_values=cache)


@pytest.mark.parametrize("options", [{}, {"logit_clip": 50.0}])
def test_dropout(options):
    """Of the weights, in training only; its mean is the layer without it, and weights are those before it."""
    layer, x = layer_of(dropout=0.4, **options), states(5)[:1]
    expected, expected_weights = layer(x, output_attentions=True)
    layer.train()
    samples = layer(x.expand(4000, -1, -1))
    deviation = samples.std(0).detach() / math.sqrt(4000)
    assert bool((deviation > 0).all())
    assert float(((samples.mean(0) - expected[0]).abs() / deviation).detach().max()) < STANDARD_ERRORS
    assert_close(layer(x, output_attentions=True)[1], expected_weights, "equal")


def collapsing(lam, **options):
    """A layer in which head 1 looks at one key alone when λ is large."""
    layer = layer_of("sqeuclidean", detect_collapse=True, **options)
    layer.log_lambda.data[:] = math.log(1e-3)
    layer.log_lambda.data[1] = math.log(lam)
    return layer


def test_collapse_names_the_head_once():
    layer, x = collapsing(1e4), states(6)
    with pytest.warns(UserWarning, match=r"attention of head 1 collapsed in 100% of its rows") as caught:
        layer(x)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
        collapsing(1e-3)(x)
        layer_of("sqeuclidean", lam=1e4)(x)
        # One key to see is no collapse: the first rows of causal attention, and a text of one token.
        collapsing(1e-3, is_causal=True)(x)
        collapsing(1e4)(x[:, :1])


def test_collapse_detection_changes_no_output():
    x, keep = states(6), torch.ones(2, 6, dtype=torch.bool)
    keep[0, 4:] = False
    for causal in (False, True):
        watched, plain = layer_of(detect_collapse=True, is_causal=causal), layer_of(is_causal=causal)
        plain.load_state_dict(watched.state_dict())
        assert_close(watched(x, attention_mask=keep), plain(x, attention_mask=keep), "float64")


def test_an_overridden_distance_is_computed_in_float32_under_autocast():
    class Watched(DistanceBasedAttention):
        seen = None

        def compute_distance_matrix(self, query, key):
            self.seen = (query.dtype, key.dtype, torch.is_autocast_enabled("cpu"))
            return super().compute_distance_matrix(query, key)

    layer = Watched(DistanceAttentionConfig(SIZE, HEADS))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(states(5).float()).dtype == torch.bfloat16
    assert layer.seen == (torch.float32, torch.float32, False)


def test_saved_and_loaded():
    layer, other, x = layer_of(lam=3.0), layer_of(), states(4)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))


def test_half_precision_and_autocast():
    """bfloat16 in, bfloat16 out, near float32; under autocast the logits are still formed in float32."""
    layer = create_distance_attention(32, 4, "l2", lam=5.0).eval()
    x = torch.randn(2, 12, 32)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = [layer(x)]
    results.append(layer.bfloat16()(x.bfloat16()))
    for result in results:
        assert result.dtype == torch.bfloat16
        error = (result.float() - expected).norm() / expected.norm()
        assert_close(error.detach(), torch.tensor(0.0), "autocast")


def ones(*shape):
    return torch.ones(shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, (ones(2, 5, 8),), r"hidden_states must have shape \(B=2, length, 12\), got \(2, 5, 8\)"),
        ({}, (ones(2, 12),), "hidden_states must have shape"),
        ({}, (ones(2, 5, 12), ones(3, 5, 12)), "key_value_states must have shape"),
        ({}, (ones(2, 5, 12), None, ones(2, 6)), "attention_mask must speak of 5 keys"),
        ({}, (ones(2, 5, 12), None, ones(3, 5).bool()), "does not broadcast"),
        ({}, (ones(2, 5, 12), None, ones(5).bool()), "mask must have rank 2"),
        ({}, (ones(2, 5, 12), ones(2, 4, 12), ones(2, 5).bool()), "attention_mask must speak of 4 keys"),
        ({"key_value_size": 4}, (ones(2, 5, 12),), "made for cross-attention .*: pass key_value_states"),
        ({"is_causal": True}, (ones(2, 5, 12), ones(2, 5, 12)), "a causal layer takes no key_value_states"),
    ],
)
def test_bad_tensors_are_refused(options, arguments, message):
    with pytest.raises(ValueError, match=message):
        layer_of(**options)(*arguments)
