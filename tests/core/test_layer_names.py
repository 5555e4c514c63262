"""Layers under the names that papers and PyTorch use give what they give under ours."""

import torch

from distattn_hf import (
    AttentionFactory,
    DistanceAttentionConfig,
    DistanceBasedAttention,
    DistanceType,
    DistAttnConfig,
    MultiHeadDistanceAttention,
    PositionalEncodingFactory,
    create_distance_attention,
)

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
