"""Blocks and stacks of attention layers, layers and encodings by name, and the options they refuse."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache, EncoderDecoderCache

from distattn_hf.core.configuration_native import DistAttnConfig
from distattn_hf.core.encodings import POSITIONAL_ENCODINGS
from distattn_hf.core.mechanisms import MECHANISMS
from distattn_hf.core.metrics import METRICS
from distattn_hf.core.native_attention import AttentionHeads, DistAttnAttention
from distattn_hf.layers.attention_layers import DistanceBasedAttention
from distattn_hf.layers.blocks import (
    DistanceDecoder,
    DistanceDecoderLayer,
    DistanceEncoder,
    DistanceEncoderLayer,
    MultiHeadDistanceAttention,
)
from distattn_hf.layers.factory import (
    AttentionFactory,
    MechanismAttention,
    PositionalEncodingFactory,
    create_distance_attention,
)
from distattn_hf.layers.layer_settings import DistanceAttentionConfig, DistanceType
from tests.tolerances import assert_close

from .test_layers import HEADS, SIZE, Stretched, layer_of, naive, states


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_decoder_cache_equals_one_pass(metric):
    """Two layers, self- and cross-attention in one `EncoderDecoderCache`; the encoder is projected once."""
    config = DistanceAttentionConfig(SIZE, HEADS, metric, key_value_size=5)
    decoder = DistanceDecoder(config, num_layers=2).double().eval()
    x, other = states(6), states(8, size=5)
    other_keep = torch.ones(2, 8, dtype=torch.bool)
    other_keep[0, 5:] = False
    whole, weights = decoder(x, other, encoder_attention_mask=other_keep, output_attentions=True)
    assert [[w.shape[-1] for w in pair] for pair in weights] == [[6, 8], [6, 8]]
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    first = decoder(x[:, :4], other, encoder_attention_mask=other_keep, past_key_values=cache)
    assert_close(first, whole[:, :4], "float64")
    garbage = torch.full_like(other, 9.0)
    for place in (4, 5):
        output = decoder(x[:, place : place + 1], garbage, encoder_attention_mask=other_keep, past_key_values=cache)
        assert_close(output, whole[:, place : place + 1], "float64")


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("use_residual", [True, False])
@pytest.mark.parametrize("use_layer_norm", [True, False])
def test_blocks(norm_first, use_residual, use_layer_norm):
    """Residual and normalisation around attention and the feed-forward layer, each there or not."""
    flags = {"norm_first": norm_first, "use_residual": use_residual, "use_layer_norm": use_layer_norm}
    config = DistanceAttentionConfig(SIZE, HEADS, "l1", activation="relu", intermediate_size=20, **flags)
    layer, x = DistanceEncoderLayer(config).double().eval(), states(5)

    def block(x, norm, function):
        def normalise(t):
            centred = t - t.mean(-1, keepdim=True)
            scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            return scaled * norm.weight + norm.bias if use_layer_norm else t

        y = function(normalise(x) if norm_first else x) + (x if use_residual else 0)
        return y if norm_first else normalise(y)

    if use_layer_norm:
        for module in layer.modules():
            if isinstance(module, torch.nn.LayerNorm):
                torch.nn.init.normal_(module.weight)
                torch.nn.init.normal_(module.bias)
    attention, feed = layer.self_attention, layer.feed_forward
    hidden = block(x, attention.residual.norm, lambda t: naive(attention.attention, t)[0])
    assert_close(attention(x), hidden, "float64")

    def mlp(t):
        inner = (t @ feed.up_proj.weight.T + feed.up_proj.bias).clamp(min=0)
        return inner @ feed.down_proj.weight.T + feed.down_proj.bias

    output, weights = layer(x, output_attentions=True)
    assert_close(output, block(hidden, feed.residual.norm, mlp), "float64")
    assert weights.shape == (2, HEADS, 5, 5)


def test_stack_is_its_layers_and_a_last_norm():
    config = DistanceAttentionConfig(SIZE, HEADS, "sqeuclidean")
    encoder, x = DistanceEncoder(config, num_layers=3).double().eval(), states(6)
    keep = torch.ones(2, 6, dtype=torch.bool)
    keep[0, 4:] = False
    hidden = x
    for layer in encoder.layers:
        hidden = layer(hidden, keep)
    output, weights = encoder(x, keep, output_attentions=True)
    assert_close(output, F.layer_norm(hidden, (SIZE,)), "float64")
    assert len(weights) == 3
    assert bool((weights[0][0, ..., 4:] == 0).all())
    # After the sum, the last layer has normalised already.
    after = DistanceEncoder(DistanceAttentionConfig(SIZE, HEADS, norm_first=False), num_layers=1).double().eval()
    assert_close(after(x), after.layers[0](x), "equal")


@pytest.mark.parametrize("kind", [DistanceEncoder, DistanceDecoder])
def test_a_stack_learns(kind):
    """Twenty steps on one batch; every parameter that trains gets a finite gradient."""
    config = DistanceAttentionConfig(16, 2, "l2", learnable_lambda=True, is_causal=kind is DistanceEncoder)
    model, x = kind(config, num_layers=2), torch.randn(4, 8, 16)
    inputs = (x,) if kind is DistanceEncoder else (x, torch.randn(4, 5, 16))
    target, losses = torch.randn(4, 8, 16), []
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(20):
        loss = F.mse_loss(model(*inputs), target)
        optimiser.zero_grad()
        loss.backward()
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_distance_type_names_metrics():
    assert {member.value for member in DistanceType} == set(METRICS) - {"dot", "lifted_sqeuclidean"}
    for member in DistanceType:
        assert create_distance_attention(8, 2, member, p=2.0 if member == "lp" else None).config.metric == member.value
    assert DistanceType("manhattan") is DistanceType.L1 is DistanceType.MANHATTAN
    with pytest.raises(ValueError, match="unknown metric 'l7'; expected one of"):
        DistanceType("l7")


@pytest.mark.parametrize("name", [*METRICS, *MECHANISMS])
def test_attention_factory(name):
    """Everything that is registered, by name."""
    assert name in AttentionFactory.names()
    options = {"lp": {"p": 3.0}, "linformer": {"max_length": 20}}.get(name, {})
    layer = AttentionFactory.create(name, SIZE, HEADS, **options).double().eval()
    x, keep = states(6), torch.ones(2, 6, dtype=torch.long)
    keep[0, 4:] = 0
    output, weights = layer(x, attention_mask=keep, output_attentions=True)
    assert isinstance(layer, MechanismAttention if name in MECHANISMS else DistanceBasedAttention)
    if name not in ("relative", "linformer"):
        assert_close(weights.sum(-1), torch.ones(2, HEADS, 6, dtype=torch.float64), "float64")
    value = layer._heads(layer.v_proj, x)
    if name != "relative":
        assert_close(output, layer.o_proj((weights @ value).transpose(1, 2).flatten(2)), "float64")
    assert bool((weights[0, ..., 4:] == 0).all())


@pytest.mark.parametrize("mechanism", ["dot", "l2", "local"])
def test_layers_have_the_heads_of_the_native_models(mechanism):
    """One class projects, turns and remembers for both, and a layer's state dict fits its native twin's."""
    sizes = {"hidden_size": SIZE, "num_attention_heads": HEADS, "attention_bias": True, "is_decoder": True}
    native = DistAttnAttention(DistAttnConfig(mechanism=mechanism, **sizes), layer_idx=0).double().eval()
    native.config._attn_implementation = "eager" if mechanism == "dot" else "distattn"
    layer = AttentionFactory.create(
        mechanism, SIZE, HEADS, is_causal=True, **({"lam": 1.0} if mechanism == "dot" else {})
    )
    layer.double().eval()
    assert isinstance(layer, AttentionHeads)
    names = [name for name, _ in AttentionHeads(SIZE, HEADS, 0, True).named_parameters()]
    assert set(names) <= {*layer.state_dict()} & {*native.state_dict()}
    native.load_state_dict({name: layer.state_dict()[name] for name in names}, strict=False)
    rotary = PositionalEncodingFactory.create("rotary", SIZE, HEADS)
    x = states(7)
    turn = rotary.rotation(x, torch.arange(7)[None])
    mask = torch.zeros(1, 1, 7, 7).masked_fill(~torch.ones(7, 7).tril().bool(), float("-inf")).double()
    expected = native(x, None if mechanism == "local" else mask, position_embeddings=turn)[0]
    assert_close(layer(x, position_embeddings=turn), expected, "float32_forward")


@pytest.mark.parametrize("causal", [False, True])
def test_nystrom_layer(causal):
    """Within its window it is Euclidean attention; beyond it differs, and rows of weights sum to 1 all the same."""
    options = {"is_causal": causal, "num_landmarks": 4, "lam": 0.5}
    exact = AttentionFactory.create("sqeuclidean", SIZE, HEADS, is_causal=causal, lam=0.5).double().eval()
    x, keep = states(9), torch.ones(2, 9, dtype=torch.bool)
    keep[0, 7:] = False
    expected = exact(x, attention_mask=keep)
    for window, equal in ((9, True), (2, False)):
        layer = AttentionFactory.create("nystrom", SIZE, HEADS, window_size=window, **options).double().eval()
        layer.load_state_dict(exact.state_dict(), strict=False)
        output, weights = layer(x, attention_mask=keep, output_attentions=True)
        assert_close(weights.sum(-1), torch.ones(2, HEADS, 9, dtype=torch.float64), "float64")
        value = layer._heads(layer.v_proj, x)
        assert_close(output, layer.o_proj((weights @ value).transpose(1, 2).flatten(2)), "float64")
        # λ of the exact layer went through float32.
        same = torch.allclose(output, expected, rtol=0, atol=1e-6)
        assert same == equal
    with pytest.raises(ValueError, match="takes no past_key_values"):
        layer(x, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="a Nyström layer has no exact_below, got 8; models have it"):
        AttentionFactory.create("nystrom", SIZE, HEADS, exact_below=8)
    with pytest.raises(ValueError, match="'nystrom' takes a padding mask"):
        layer(x, attention_mask=torch.ones(2, 9, 9).bool())


@pytest.mark.parametrize("name", list(POSITIONAL_ENCODINGS))
def test_positional_encoding_factory(name):
    """An encoding of each name, usable with a layer by the method it is about."""
    encoding, x = PositionalEncodingFactory.create(name, SIZE, HEADS, max_length=9, is_causal=True), states(6)
    assert isinstance(encoding, POSITIONAL_ENCODINGS.get(name))
    assert name in PositionalEncodingFactory.names()
    place, layer = torch.arange(6)[None], layer_of(is_causal=True)
    bias = encoding.bias(6, 6)
    output = layer(
        encoding.embed(x, place).double(),
        position_embeddings=encoding.rotation(x, place),
        position_bias=None if bias is None else bias.double(),
    )
    assert bool(output.isfinite().all())
    changed = (output - layer(x)).abs().max().item()
    assert (changed == 0) == (name == "none")


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: DistanceAttentionConfig(10, 3), "hidden_size=10 must be a multiple of num_heads=3"),
        (lambda: DistanceAttentionConfig(0, 3), "hidden_size must be an integer >= 1, got 0"),
        (lambda: DistanceAttentionConfig(12, 3, "l7"), "unknown metric 'l7'; expected one of"),
        (lambda: DistanceAttentionConfig(12, 3, "lp", p=0.5), "p"),
        (lambda: DistanceAttentionConfig(12, 3, "l1", p=2.0), "only 'lp' takes an order p"),
        (
            lambda: DistanceAttentionConfig(12, 3, temperature=0.0),
            "temperature must be a positive finite number, got 0",
        ),
        (lambda: DistanceAttentionConfig(12, 3, lam=-1.0), "lam must be a positive finite number or None, got -1.0"),
        (
            lambda: DistanceAttentionConfig(12, 3, "sqeuclidean", softening=1.0),
            "softening must be 0 with metric 'sqeuclidean', got 1.0",
        ),
        (lambda: DistanceAttentionConfig(12, 3, softening=-1.0), r"softening \(ε\) must be a finite number >= 0"),
        (lambda: DistanceAttentionConfig(12, 3, learnable_softening=True), "needs a softening > 0 to start from"),
        (lambda: DistanceAttentionConfig(12, 3, logit_clip=math.inf), "logit_clip must be a positive finite number or"),
        (lambda: DistanceAttentionConfig(12, 3, dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (lambda: DistanceAttentionConfig(12, 3, backend="cuda"), "backend"),
        (lambda: DistanceAttentionConfig(12, 3, logit_clip=1.0, backend="sdpa"), "logit_clip runs written out"),
        (lambda: create_distance_attention(12, 3, heads=4), "has no option 'heads'; did you mean num_heads"),
        (lambda: create_distance_attention(12, 3, colour=4), "has no option 'colour'; its options are: hidden_size"),
        (lambda: DistanceBasedAttention(hidden_size=12, d_model=12), "'d_model' is another name of 'hidden_size'"),
        (lambda: DistanceBasedAttention(DistanceAttentionConfig(12, 3), num_heads=3), "a config and num_heads= were"),
        (lambda: DistanceBasedAttention(12, 3), "config must be a DistanceAttentionConfig, got 12"),
        (lambda: AttentionFactory.create_attention(d_model=12), "a factory needs the name of what to create"),
        (lambda: AttentionFactory.create_attention("l2", attention_type="l1"), "two names of what to create"),
        (lambda: DistanceEncoder(DistanceAttentionConfig(12, 3), 0), "num_layers must be an integer >= 1, got 0"),
        (lambda: DistanceEncoderLayer(DistanceAttentionConfig(12, 3, activation="x")), "unknown activation 'x'"),
        (
            lambda: AttentionFactory.create("magic", 12, 3),
            "unknown attention 'magic'; expected one of dot.* or a metric: ",
        ),
        (lambda: AttentionFactory.create("local", 10, 3), "hidden_size=10 must be a multiple of num_heads=3"),
        (lambda: AttentionFactory.create("local", 12, 3, rank=2), "mechanism 'local' has no option 'rank'"),
        (
            lambda: AttentionFactory.create("linformer", 12, 3, is_causal=True, max_length=8),
            "'linformer' has no causal form",
        ),
        (lambda: PositionalEncodingFactory.create("magic", 12, 3), "unknown positional encoding 'magic'"),
        (lambda: PositionalEncodingFactory.create("rotary", 9, 3), "needs an even head size"),
        (lambda: PositionalEncodingFactory.create("alibi", 12, 3, slope=1), "an encoding has no option 'slope'"),
    ],
)
def test_bad_options_are_refused(attempt, message):
    with pytest.raises(ValueError, match=message):
        attempt()


def test_mechanism_dropout_is_for_training():
    layer, x = AttentionFactory.create("local", SIZE, HEADS, dropout=0.5), torch.randn(2, 6, SIZE)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_masks_that_a_mechanism_cannot_take_are_refused():
    layer = AttentionFactory.create("linear", SIZE, HEADS)
    x = torch.randn(2, 5, SIZE)
    for mask in (torch.ones(2, 5, 5).bool(), torch.zeros(2, 5)):
        with pytest.raises(ValueError, match="'linear' takes a padding mask"):
            layer(x, attention_mask=mask)
    with pytest.raises(ValueError, match="'linear' takes no position_bias"):
        layer(x, position_bias=torch.zeros(1, HEADS, 5, 5))


def test_decoder_layer_by_itself():
    """Its first block is causal, its second is not."""
    layer = DistanceDecoderLayer(DistanceAttentionConfig(SIZE, HEADS, "l1")).double().eval()
    x, other = states(5), states(4)
    output, (own, cross) = layer(x, other, output_attentions=True)
    assert bool((own.triu(1) == 0).all())
    assert bool((cross > 0).all())
    keep = torch.tensor([[True, True, False, True]] * 2)
    _, (_, masked) = layer(x, other, encoder_attention_mask=keep, output_attentions=True)
    assert_close(masked > 0, keep[:, None, None].expand_as(masked), "equal")
    changed = x.clone()
    changed[:, 3:] = 7.0
    assert_close(layer(changed, other)[:, :3], output[:, :3], "equal")
    inside = layer.self_attention(x)
    expected = layer.feed_forward(layer.cross_attention(inside, other))
    assert_close(output, expected, "equal")


def test_multi_head_layer_shares_the_interface():
    layer = MultiHeadDistanceAttention(DistanceAttentionConfig(SIZE, HEADS, learnable_lambda=True), layer_idx=2)
    assert layer.attention.layer_idx == 2
    assert layer.attention.log_lambda.requires_grad
    layer.set_learnable_lambda(False)
    assert not layer.attention.log_lambda.requires_grad
    own = MultiHeadDistanceAttention(DistanceAttentionConfig(SIZE, HEADS), attention=layer_of(kind=Stretched))
    assert isinstance(own.attention, Stretched)
