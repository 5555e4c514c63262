"""Layers under the names that papers and PyTorch use give what they give under ours."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from transformers import DynamicCache

from distattn_hf import (
    AttentionFactory,
    DistanceAttentionConfig,
    DistanceBasedAttention,
    DistanceEncoderLayer,
    DistanceType,
    DistAttnConfig,
    MultiHeadDistanceAttention,
    PositionalEncodingFactory,
    create_distance_attention,
)
from tests.tolerances import assert_close

SIZE, HEADS = 32, 4


def of(make):
    """Return the output of a layer made with seed 0."""
    torch.manual_seed(0)
    layer = make()
    return layer(torch.randn(2, 6, SIZE, generator=torch.Generator().manual_seed(1)))


def test_keywords_and_aliases_make_the_layer_of_the_config():
    config = DistanceAttentionConfig(SIZE, HEADS, "l1", lam=1.5, learnable_lambda=True)
    expected = of(lambda: DistanceBasedAttention(config))
    ours = {"hidden_size": SIZE, "num_heads": HEADS, "metric": "l1", "lam": 1.5, "learnable_lambda": True}
    theirs = {
        "d_model": SIZE, "nhead": HEADS, "distance_type": DistanceType.L1, "lambda_param": 1.5,
        "use_learnable_lambda": True,
    }  # fmt: skip
    for given in (ours, theirs):
        assert DistanceAttentionConfig(**given) == config
        for make in (DistanceBasedAttention, create_distance_attention):
            assert of(lambda make=make, given=given: make(**given)).equal(expected)
    assert of(lambda: create_distance_attention(config)).equal(expected)
    assert DistanceBasedAttention(**theirs).learnable_lambda
    block = of(lambda: MultiHeadDistanceAttention(**theirs, use_residual=True, use_layer_norm=True))
    assert block.equal(of(lambda: MultiHeadDistanceAttention(config)))


def test_sizes_and_the_order_of_lp_have_defaults():
    config = DistanceAttentionConfig()
    assert (config.hidden_size, config.num_heads) == (768, 12)
    lp = of(lambda: create_distance_attention(SIZE, HEADS, "lp", lam=2.0))
    l2 = of(lambda: create_distance_attention(SIZE, HEADS, "l2", lam=2.0))
    assert torch.allclose(lp, l2, atol=1e-5)
    third = of(lambda: create_distance_attention(SIZE, HEADS, "lp", p_norm=3.0, lam=2.0))
    assert not torch.allclose(third, l2, atol=1e-4)


def test_factories_take_keywords():
    ours = of(lambda: AttentionFactory.create("local", SIZE, HEADS, window_size=3))
    assert of(
        lambda: AttentionFactory.create_attention(attention_type="local", d_model=SIZE, num_heads=HEADS, window_size=3)
    ).equal(ours)
    encoding = PositionalEncodingFactory.create_positional_encoding(encoding_type="learned", d_model=SIZE, max_len=9)
    assert encoding.position_embeddings.weight.shape == (9, SIZE)


def test_pytorchs_words_at_the_call():
    layer = create_distance_attention(SIZE, HEADS)
    x = torch.randn(2, 6, SIZE)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    output, weights = layer(x, need_weights=True, key_padding_mask=padding)
    assert output.equal(layer(x, attention_mask=~padding, output_attentions=True)[0])
    assert weights[1, ..., 4:].eq(0).all()
    block = MultiHeadDistanceAttention(layer.config)
    assert block(x, need_weights=True)[1].shape == (2, HEADS, 6, 6)


def test_a_native_config_knows_them():
    config = DistAttnConfig(num_heads=4, attention_type="local", positional_encoding_type="learned", num_layers=2)
    assert (config.num_attention_heads, config.mechanism, config.positional_encoding) == (4, "local", "learned")


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("value_head_dim", [3, 16])
def test_values_of_a_size_of_their_own(value_head_dim, backend):
    config = DistanceAttentionConfig(SIZE, HEADS, "l1", d_v=value_head_dim, backend=backend)
    layer = DistanceBasedAttention(config).double()
    lam = layer.lam
    x = torch.randn(2, 5, SIZE, dtype=torch.float64)
    query, key = (p(x).unflatten(-1, (HEADS, -1)) for p in (layer.q_proj, layer.k_proj))
    value = layer.v_proj(x).unflatten(-1, (HEADS, value_head_dim))
    heads = torch.zeros(2, 5, HEADS, value_head_dim, dtype=torch.float64)
    for b, h, i in product(range(2), range(HEADS), range(5)):
        logits = torch.stack([-lam[h] * (query[b, i, h] - key[b, j, h]).abs().sum() for j in range(5)])
        heads[b, i, h] = (logits * (SIZE // HEADS) ** -0.5).softmax(0) @ value[b, :, h]
    assert_close(layer(x), layer.o_proj(heads.flatten(2)), "float64")
    cache = DynamicCache()
    layer.is_causal = True
    steps = [layer(x[:, i : i + 1], past_key_values=cache) for i in range(5)]
    assert_close(torch.cat(steps, 1), layer(x), "float64")


def test_dropout_of_weights_and_of_the_output_apart():
    x = torch.randn(1, 3, 64)
    layer = DistanceBasedAttention(hidden_size=64, num_heads=HEADS, output_dropout=0.5)
    whole = layer.eval()(x)
    dropped = layer.train()(x)
    kept = dropped != 0
    assert 60 < int(kept.sum()) < 132
    torch.testing.assert_close(dropped[kept], 2 * whole[kept])
    assert not DistanceBasedAttention(hidden_size=64, num_heads=HEADS, dropout=0.5)(x).eq(0).any()
    for kind in (MultiHeadDistanceAttention, DistanceEncoderLayer):
        # Once in a block, and of the feed-forward part, too; the weights' dropout is none of it.
        config = DistanceAttentionConfig(64, HEADS, output_dropout=0.5, use_residual=False, use_layer_norm=False)
        share = float(kind(config)(torch.randn(4, 8, 64)).eq(0).float().mean())
        assert 0.42 < share < 0.58
        weights_only = replace(config, dropout=0.5, output_dropout=0.0)
        assert not kind(weights_only)(torch.randn(4, 8, 64)).eq(0).any()
    with pytest.raises(ValueError, match=r"output_dropout must be in \[0, 1\), got 1.5"):
        DistanceAttentionConfig(output_dropout=1.5)


def test_xavier():
    def deviations(**options):
        torch.manual_seed(0)
        layer = DistanceEncoderLayer(DistanceAttentionConfig(256, HEADS, **options))
        linear = {n: m for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
        return {n: (float(m.weight.detach().std()), bool(m.bias.any()), m) for n, m in linear.items()}

    found = deviations(initializer="xavier")
    assert len(found) == 6
    for name, (deviation, has_bias, linear) in found.items():
        expected = (2 / (linear.in_features + linear.out_features)) ** 0.5
        assert abs(deviation / expected - 1) < 0.02, name
        assert not has_bias
        assert deviations()[name][1]
    with pytest.raises(ValueError, match="initializer must be one of linear, xavier, got 'he'"):
        DistanceAttentionConfig(initializer="he")


def test_papers_words_at_the_call():
    layer = create_distance_attention(SIZE, HEADS)
    x, other = torch.randn(2, 6, SIZE), torch.randn(2, 4, SIZE)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 3:] = False
    for any_layer in (layer, MultiHeadDistanceAttention(layer.config), AttentionFactory.create("local", SIZE, HEADS)):
        expected = any_layer(x, attention_mask=mask, output_attentions=True)
        found = any_layer(query=x, key=x, value=x, mask=mask, need_weights=True)
        assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
        assert any_layer(query=x).equal(any_layer(x))
    assert create_distance_attention(SIZE, HEADS)(query=x, key=other, value=other).shape == x.shape
    cross = create_distance_attention(SIZE, HEADS)
    assert cross(query=x, key=other, value=other).equal(cross(x, other))
    for given, message in (
        ({"query": x, "key": other, "value": other + 1}, "DistanceMultiheadAttention takes three sequences"),
        ({"query": x, "hidden_states": x}, "give query= .* or hidden_states"),
        ({"key": x}, "give query="),
        ({"hidden_states": x, "mask": mask, "attention_mask": mask}, "'mask' is another name of 'attention_mask'"),
    ):
        with pytest.raises(ValueError, match=message):
            cross(**given)


@pytest.mark.parametrize("name", ["sinusoidal", "learned"])
def test_an_encoding_is_called_on_a_sequence(name):
    create = PositionalEncodingFactory.create_positional_encoding
    encoding = create(encoding_type=name, d_model=SIZE, max_len=9)
    x = torch.randn(2, 7, SIZE)
    positions = torch.arange(7)[None]
    assert encoding(x).equal(encoding.embed(x, positions))
    assert encoding(x, 7).equal(encoding(x))
    assert encoding.encoding_matrix.shape == (9, SIZE)
    torch.testing.assert_close(encoding(x), x + encoding.encoding_matrix[:7])
    with pytest.raises(ValueError, match="length=N; got .* length=6"):
        encoding(x, 6)
    dropping = create(encoding_type=name, d_model=SIZE, max_len=9, dropout=0.5)
    dropped = dropping(x)
    assert 0.35 < float(dropped.eq(0).float().mean()) < 0.65
    whole = dropping.eval()(x)
    torch.testing.assert_close(dropped[dropped != 0], 2 * whole[dropped != 0])


def test_rotary_turns_a_sequence_and_biases_refuse():
    rotary = PositionalEncodingFactory.create_positional_encoding(encoding_type="rotary", d_model=SIZE)
    x = torch.randn(2, 7, SIZE)
    turned = rotary(x, 7)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    for i, c in product(range(7), range(SIZE // 2)):
        angle = torch.tensor(i * 10000.0 ** (-2 * c / SIZE))
        a, b = x[:, i, c], x[:, i, c + SIZE // 2]
        torch.testing.assert_close(turned[:, i, c], a * angle.cos() - b * angle.sin(), rtol=0, atol=1e-5)
    relative = PositionalEncodingFactory.create_positional_encoding(
        encoding_type="relative", d_model=SIZE, max_relative_position=32
    )
    assert relative.relative_attention_max_distance == 32
    with pytest.raises(ValueError, match="'relative' adds to the logits, not to embeddings: .* position_bias="):
        relative(x, 7)
    with pytest.raises(ValueError, match="nothing to drop; got dropout=0.1"):
        PositionalEncodingFactory.create("alibi", SIZE, HEADS, dropout=0.1)


def test_a_name_of_several_mechanisms_says_which():
    assert AttentionFactory.create("standard", SIZE, HEADS).config.metric == "dot"
    assert AttentionFactory.create_attention("relative", d_model=SIZE, num_heads=HEADS, max_relative_position=5)
    assert DistAttnConfig(attention_type="standard").mechanism == "dot"
    for make in (
        lambda: AttentionFactory.create("sparse", SIZE, HEADS),
        lambda: DistAttnConfig(attention_type="sparse", attention_num_landmarks=8),
    ):
        with pytest.raises(ValueError, match=r"'sparse' \(which may be 'nystrom', with num_landmarks, 'landmark'"):
            make()


def test_options_of_a_native_config_by_other_names():
    config = DistAttnConfig(distance_type="lp", lambda_param=2.0, p_norm=3.0, use_learnable_lambda=False)
    assert config.mechanism_options == {"lam": 2.0, "p": 3.0, "learnable_lambda": False}
    local = DistAttnConfig(attention_type="local", attention_window_size=9, use_causal_mask=True)
    assert (local.mechanism_options, local.is_decoder) == ({"window_size": 9}, True)
    assert DistAttnConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    with pytest.raises(ValueError, match=r"lambda_param is another name of mechanism_options\['lam'\]: got 2.0"):
        DistAttnConfig(distance_type="l1", lambda_param=2.0, mechanism_options={"lam": 1.0})
    with pytest.raises(ValueError, match="mechanism 'dot' has no option 'lam'"):
        DistAttnConfig(lambda_param=2.0)
