"""Every code block of "Advanced Attention Mechanisms and Positional Encodings", with our imports.

Where a class of the document has a name of its own, the import line makes it of our factory. Sequences are batch first
here, also where the document has [seq_len, batch_size, d_model].
"""

import time
from functools import partial

import pytest
import torch

from distattn_hf import (
    AttentionFactory,
    DistanceMultiheadAttention,
    DistAttnConfig,
    DistAttnForMaskedLM,
    DistAttnModel,
    PositionalEncodingFactory,
)
from tests.tolerances import assert_close

MultiHeadAttention = partial(AttentionFactory.create_attention, "standard")
LocalAttention = partial(AttentionFactory.create_attention, "local")
SparseAttention = partial(AttentionFactory.create_attention, "nystrom")
AttentionWithRelativePositions = partial(AttentionFactory.create_attention, "relative")
PositionalEncoding = partial(PositionalEncodingFactory.create_positional_encoding, "sinusoidal")
LearnedPositionalEncoding = partial(PositionalEncodingFactory.create_positional_encoding, "learned")
RelativePositionalEncoding = partial(PositionalEncodingFactory.create_positional_encoding, "relative")
RotaryPositionalEncoding = partial(PositionalEncodingFactory.create_positional_encoding, "rotary")
TransformerConfig = DistAttnConfig
SEOSpecificTransformer = DistAttnModel

seq_len = 40
x = torch.randn(2, seq_len, 512, generator=torch.Generator().manual_seed(0))
attention_mask = torch.ones(2, seq_len, dtype=torch.bool)
attention_mask[0, 30:] = False


def test_standard_multi_head_attention():
    attention = MultiHeadAttention(
        d_model=512,
        num_heads=8,
        dropout=0.1
    )  # fmt: skip
    attention.eval()

    # Forward pass
    output, attention_weights = attention(
        query=x, key=x, value=x,
        mask=attention_mask,
        need_weights=True
    )  # fmt: skip

    theirs = torch.nn.MultiheadAttention(512, 8, batch_first=True)
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    theirs.in_proj_weight.data = torch.cat([p.weight.detach() for p in projections])
    theirs.in_proj_bias.data = torch.cat([p.bias.detach() for p in projections])
    theirs.out_proj.load_state_dict(attention.o_proj.state_dict())
    expected = theirs(x, x, x, key_padding_mask=~attention_mask, average_attn_weights=False)
    assert_close(output, expected[0], "float32_forward")
    assert_close(attention_weights, expected[1], "float32_forward")
    assert DistanceMultiheadAttention(512, 8, spec="l1", batch_first=True)(x, x, x)[0].shape == x.shape


def leaks(attention) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, largest change of it where padding changes)."""
    attention.eval()
    output = attention(x, mask=attention_mask)
    changed = torch.where(attention_mask[..., None], x, torch.randn_like(x))
    return output, (attention(changed, mask=attention_mask) - output)[attention_mask].abs().max()


def test_local_attention():
    attention = LocalAttention(
        d_model=512,
        num_heads=8,
        window_size=128,  # Local window size
        dropout=0.1
    )  # fmt: skip

    output, leak = leaks(attention)
    assert output.shape == x.shape
    assert leak < 1e-5
    narrow = LocalAttention(d_model=512, num_heads=8, window_size=3)
    gap = (torch.arange(seq_len)[:, None] - torch.arange(seq_len)).abs()
    assert narrow(x, need_weights=True)[1][:, :, gap >= 3].eq(0).all()


def test_sparse_attention():
    attention = SparseAttention(
        d_model=512,
        num_heads=8,
        num_landmarks=64,  # Number of landmark tokens
        dropout=0.1
    )  # fmt: skip

    output, leak = leaks(attention)
    assert output.shape == x.shape
    assert leak < 1e-5
    weights = attention(x, mask=attention_mask, need_weights=True)[1]
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 8, seq_len), rtol=0, atol=1e-5)


def test_relative_position_attention():
    attention = AttentionWithRelativePositions(
        d_model=512,
        num_heads=8,
        max_relative_position=32,  # Maximum relative distance
        dropout=0.1
    )  # fmt: skip

    output, leak = leaks(attention)
    assert leak < 1e-5
    assert attention.mechanism.key_embedding.shape == (65, 64)
    same = torch.ones(1, 40, 512)
    with torch.no_grad():
        attention.mechanism.key_embedding[40:] += 3.0  # keys from 8 on ahead: with equal tokens only these can differ
    weights = attention(same, need_weights=True)[1][0]
    assert not torch.allclose(weights[:, 0], weights[:, 20], atol=1e-3)


def test_sinusoidal_and_learned_positional_encoding():
    for kind in (PositionalEncoding, LearnedPositionalEncoding):
        pos_encoding = kind(
            d_model=512,
            max_len=5000,
            dropout=0.1
        )  # fmt: skip

        # Apply to input
        output = pos_encoding(x)

        assert 0.08 < float(output.eq(0).float().mean()) < 0.12
        assert pos_encoding.encoding_matrix.shape == (5000, 512)
        assert_close(pos_encoding.eval()(x), x + pos_encoding.encoding_matrix[:seq_len], "float32_forward")


def test_relative_positional_encoding():
    """T5's buckets, or ALiBi: something on the logits, not on x, which the refusal says."""
    with pytest.raises(ValueError, match="adds to the logits, where there is nothing to drop; got dropout=0.1"):
        RelativePositionalEncoding(
            d_model=512,
            max_relative_position=32,
            dropout=0.1
        )  # fmt: skip
    pos_encoding = RelativePositionalEncoding(d_model=512, num_heads=8, max_relative_position=32)
    with pytest.raises(ValueError, match=r"give a layer position_bias=encoding.bias\(num_queries, num_keys\)"):
        pos_encoding(x, seq_len)
    bias = pos_encoding.bias(seq_len, seq_len)
    gap = torch.arange(seq_len) - torch.arange(seq_len)[:, None]
    assert bias.shape == (1, 8, seq_len, seq_len)
    assert all(bias[0, :, gap == offset].unique(dim=1).shape[1] == 1 for offset in (-3, 0, 7))
    assert MultiHeadAttention(d_model=512, num_heads=8)(x, position_bias=bias).shape == x.shape


def test_rotary_positional_encoding():
    pos_encoding = RotaryPositionalEncoding(
        d_model=512,
        max_len=5000,
        dropout=0.1
    )  # fmt: skip

    output = pos_encoding(x, seq_len)

    assert 0.08 < float(output.eq(0).float().mean()) < 0.12
    turned = pos_encoding.eval()(x, seq_len)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    same = pos_encoding(torch.ones(1, seq_len, 512))[0]
    products = same @ same.T  # depend on the distance of positions alone
    torch.testing.assert_close(products.diagonal(3), products[0, 3].expand(seq_len - 3), rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="needs an even head size"):
        RotaryPositionalEncoding(d_model=511)


input_ids = torch.randint(3, 10000, (2, seq_len))


@pytest.fixture(scope="module")
def transformer():
    # Create configuration
    config = TransformerConfig(
        hidden_size=512,
        num_layers=6,
        num_heads=8,
        attention_type="standard",
        positional_encoding_type="sinusoidal",
        vocab_size=10000
    )  # fmt: skip

    # Create transformer
    return SEOSpecificTransformer(config).eval()


def test_basic_usage_and_debugging_attention(transformer):
    # Forward pass
    outputs = transformer(
        input_ids=input_ids,
        attention_mask=attention_mask,
        output_attentions=True
    )  # fmt: skip

    attention_weights = outputs['attentions']  # fmt: skip
    # attention_weights is a tuple of [batch_size, num_heads, seq_len, seq_len] tensors

    # Analyze attention patterns
    for layer_idx, layer_attention in enumerate(attention_weights):
        print(f"Layer {layer_idx}:")
        print(f"  Mean attention: {layer_attention.mean():.4f}")
        print(f"  Std attention: {layer_attention.std():.4f}")
        print(f"  Max attention: {layer_attention.max():.4f}")

    assert [tuple(weights.shape) for weights in attention_weights] == 6 * [(2, 8, seq_len, seq_len)]
    assert all(weights[0, :, :, 30:].eq(0).all() for weights in attention_weights)
    assert_close(attention_weights[5].sum(-1), torch.ones(2, 8, seq_len), "weights_sum")


def test_performance_monitoring(transformer):
    # Measure inference time
    start_time = time.time()
    outputs = transformer(input_ids=input_ids, attention_mask=attention_mask)
    end_time = time.time()

    print(f"Inference time: {end_time - start_time:.4f}s")

    # Measure memory usage (if using CUDA)
    if torch.cuda.is_available():
        print(f"GPU memory: {torch.cuda.memory_allocated() / 1024**2:.2f} MB")

    assert outputs.last_hidden_state.isfinite().all()


def test_advanced_configuration():
    # Local attention with learned positional encoding
    config = TransformerConfig(
        hidden_size=512,
        num_layers=6,
        num_heads=8,
        attention_type="local",
        attention_window_size=128,
        positional_encoding_type="learned",
        vocab_size=10000
    )  # fmt: skip
    assert (config.mechanism, config.mechanism_options) == ("local", {"window_size": 128})

    # Sparse attention with relative positional encoding
    sparse = {
        "hidden_size": 512, "num_layers": 6, "num_heads": 8,
        "attention_num_landmarks": 64,
        "positional_encoding_type": "relative", "positional_encoding_max_relative_position": 32,
        "vocab_size": 10000,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"'sparse' \(which may be 'nystrom', with num_landmarks"):
        TransformerConfig(attention_type="sparse", **sparse)
    config = TransformerConfig(attention_type="nystrom", **sparse)
    assert config.mechanism_options == {"num_landmarks": 64}
    assert config.relative_attention_max_distance == 32


def test_using_factories():
    # Create attention mechanism
    attention = AttentionFactory.create_attention(
        attention_type="local",
        d_model=512,
        num_heads=8,
        window_size=128,
        dropout=0.1
    )  # fmt: skip

    # Create positional encoding
    pos_encoding = PositionalEncodingFactory.create_positional_encoding(
        encoding_type="rotary",
        d_model=512,
        max_len=5000,
        dropout=0.1
    )  # fmt: skip

    assert attention(pos_encoding(x)).shape == x.shape
    assert (attention.mechanism.window_size, attention.dropout, pos_encoding.dropout_p) == (128, 0.1, 0.1)


def test_transformer_config_parameters():
    """Each field of the document's dataclass with its value: our field, or the word to use."""
    config = TransformerConfig(
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        vocab_size=30522,
        attention_type="standard",
        positional_encoding_type="sinusoidal",
        positional_encoding_max_len=5000,
        positional_encoding_max_relative_position=32,
        use_causal_mask=False
    )  # fmt: skip
    found = config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.vocab_size
    assert found == (768, 12, 12, 30522)
    assert (config.mechanism, config.positional_encoding, config.is_decoder) == ("dot", "sinusoidal", False)
    assert (config.max_position_embeddings, config.relative_attention_max_distance) == (5000, 32)
    relative = TransformerConfig(attention_type="relative", attention_max_relative_position=32)
    assert relative.mechanism_options == {"max_distance": 32}
    for name, word in (("use_padding_mask", "attention_mask"), ("return_attention_weights", "output_attentions=True")):
        with pytest.raises(ValueError, match=f"no field '{name}': .*{word}"):
            TransformerConfig(**{name: True})
    # An option of another mechanism than the config's.
    with pytest.raises(ValueError, match="mechanism 'dot' has no option 'window_size'"):
        TransformerConfig(attention_type="standard", attention_window_size=128)


def test_gpu_optimization_and_memory_management():
    """Both are of training, and the refusal says where they are given."""
    with pytest.raises(ValueError, match="'use_mixed_precision': train with bf16=True"):
        TransformerConfig(use_mixed_precision=True)
    with pytest.raises(ValueError, match=r"'gradient_checkpointing': call model.gradient_checkpointing_enable\(\)"):
        TransformerConfig(gradient_checkpointing=True)
    model = DistAttnForMaskedLM(TransformerConfig(hidden_size=16, num_layers=1, num_heads=2, vocab_size=9)).train()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.ones(1, 4, dtype=torch.long)).logits.float().sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    "choices",
    [
        # For SEO content analysis (moderate length)
        {"attention_type": "standard", "positional_encoding_type": "sinusoidal", "num_layers": 6},
        # For long document processing
        {"attention_type": "local", "attention_window_size": 256, "positional_encoding_type": "learned",
         "num_layers": 8},
        # For very long sequences
        {"attention_type": "nystrom", "attention_num_landmarks": 128, "positional_encoding_type": "relative",
         "positional_encoding_max_relative_position": 64, "num_layers": 12},
    ],
)  # fmt: skip
def test_configuration_guidelines(choices):
    config = TransformerConfig(hidden_size=512, vocab_size=50, **choices)
    model = DistAttnForMaskedLM(config).eval()
    assert len(model.model.layers) == choices["num_layers"]
    with torch.no_grad():
        assert model(input_ids % 50).logits.isfinite().all()
