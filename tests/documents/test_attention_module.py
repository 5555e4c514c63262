"""Every block of "Attention Mechanisms and Transformer Operations", whose pseudo-code no machine runs, in ours.

Left out, as mistakes of the document: "lower temperature" among the remedies of collapse, which makes it worse.
"""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache

from distattn_hf import (
    AttentionFactory,
    AttentionSpec,
    DistanceAttentionConfig,
    DistanceDecoder,
    DistanceDecoderLayer,
    DistanceEncoder,
    DistanceEncoderLayer,
    DistanceMultiheadAttention,
    DistAttnConfig,
    DistAttnForCausalLM,
    DistAttnForConditionalGeneration,
    DistAttnForMaskedLM,
    DistAttnSeq2SeqConfig,
    PositionalEncodingFactory,
    create_distance_attention,
    distance_attention,
)
from distattn_hf.analysis.importance import gradient_importance
from distattn_hf.analysis.report.figures import attention_map
from distattn_hf.analysis.statistics import measure
from distattn_hf.core.inputs import causal_keep, masked_softmax
from distattn_hf.functional.row_statistics import row_statistics
from tests.tolerances import assert_close

query_matrix, key_matrix, value_matrix = torch.tensor(
    [
        [[0.1, 0.5, 0.3], [0.2, 0.4, 0.6], [0.3, 0.2, 0.8]],
        [[0.4, 0.1, 0.2], [0.3, 0.6, 0.1], [0.2, 0.3, 0.7]],
        [[1.0, 0.5, 0.2], [0.8, 0.6, 0.4], [0.3, 0.9, 0.7]],
    ]
)[:, None, None]  # each (batch 1, head 1, 3, 3)


def dot_product(query, key, value, temperature=1.0, **options):
    """scaled_dot_product_attention of the document: λ is one over its temperature."""
    return distance_attention(query, key, value, metric="dot", lam=1 / temperature, return_weights=True, **options)


def by_loops(query, key, value, temperature=1.0, causal=False):
    """softmax(q·k/(√d·T))·v in float64, a row at a time."""
    query, key, value = (t[0, 0].double() for t in (query, key, value))
    rows = []
    for i, q in enumerate(query):
        seen = i + 1 if causal else len(key)
        logits = torch.stack([q @ key[j] for j in range(seen)]) / (math.sqrt(query.shape[1]) * temperature)
        rows.append(logits.softmax(0) @ value[:seen])
    return torch.stack(rows)


def test_basic_attention_mechanism():
    attention_output, weights = dot_product(query_matrix, key_matrix, value_matrix)
    assert attention_output.shape == (1, 1, 3, 3)
    assert_close(attention_output[0, 0].double(), by_loops(query_matrix, key_matrix, value_matrix), "float32_forward")
    assert_close(weights.sum(-1), torch.ones(1, 1, 3), "weights_sum")


def test_attention_with_masking():
    causal_mask = causal_keep(3, 3, "cpu")
    expected = by_loops(query_matrix, key_matrix, value_matrix, causal=True)
    for how in ({"mask": causal_mask[None, None]}, {"is_causal": True}):
        masked_attention, weights = dot_product(query_matrix, key_matrix, value_matrix, **how)
        assert_close(masked_attention[0, 0].double(), expected, "float32_forward")
        assert weights.triu(1).eq(0).all()


def test_temperature_scaled_attention():
    sharp_attention, sharp = dot_product(query_matrix, key_matrix, value_matrix, temperature=0.5)
    expected = by_loops(query_matrix, key_matrix, value_matrix, temperature=0.5)
    assert_close(sharp_attention[0, 0].double(), expected, "float32_forward")
    assert (sharp.amax(-1) > dot_product(query_matrix, key_matrix, value_matrix)[1].amax(-1)).all()


def make_mha(**options):
    options = {"d_model": 512, "num_heads": 8, "d_v": 64, "temperature": 1.0, "initializer": "xavier", **options}
    return create_distance_attention(metric="dot", lam=1.0, **options).eval()


def test_multi_head_self_attention():
    mha = make_mha(dropout=0.1)
    input_sequence = torch.randn(1, 10, 512)
    output, weights = mha(query=input_sequence, key=input_sequence, value=input_sequence, need_weights=True)
    assert (output.shape, weights.shape) == ((1, 10, 512), (1, 8, 10, 10))
    torchs = torch.nn.MultiheadAttention(512, 8, batch_first=True)
    in_proj = [mha.q_proj, mha.k_proj, mha.v_proj]
    torchs.in_proj_weight.data, torchs.in_proj_bias.data = (
        torch.cat([getattr(p, n).detach() for p in in_proj]) for n in ("weight", "bias")
    )
    torchs.out_proj.load_state_dict(mha.o_proj.state_dict())
    expected = torchs(*3 * [input_sequence], average_attn_weights=False)
    assert_close(output, expected[0], "float32_forward")
    assert_close(weights, expected[1], "float32_forward")


def test_cross_attention():
    encoder_output, decoder_input = torch.randn(1, 15, 512), torch.randn(1, 10, 512)
    mha = make_mha()
    output, weights = mha(query=decoder_input, key=encoder_output, value=encoder_output, need_weights=True)
    assert (output.shape, weights.shape) == ((1, 10, 512), (1, 8, 10, 15))
    assert output.equal(mha(decoder_input, encoder_output, need_weights=True)[0])
    three = DistanceMultiheadAttention(512, 8, batch_first=True, spec="l2")
    assert three(decoder_input, encoder_output, torch.randn(1, 15, 512))[0].shape == (1, 10, 512)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = DistAttnConfig(
        vocab_size=40, d_model=32, num_heads=4, num_layers=2, distance_type="l1", use_causal_mask=True,
        initializer_range=0.5,
    )  # fmt: skip
    return DistAttnForCausalLM(config).eval()


batch = {"input_ids": torch.randint(3, 40, (2, 14), generator=torch.Generator().manual_seed(0))}


def test_attention_head_analysis_and_pattern_analysis(model):
    analysis = measure(model, [batch])
    weights = model(**batch, output_attentions=True).attentions
    for layer, module in enumerate(analysis.modules):
        for head in analysis.of(module):
            rows = row_statistics(weights[layer][:, head.head], causal_keep(14, 14, "cpu"))
            counted = rows.counted()
            assert abs(head.entropy - float(rows.entropy[counted].mean())) < 1e-4
            assert abs(head.maximum - float(rows.maximum[counted].mean())) < 1e-4
            assert abs(head.sparsity - float(rows.sparsity[counted].mean())) < 1e-4
            assert head.diversity >= 0
            assert head.pattern in (*head.patterns, "mixed")


@pytest.mark.parametrize("encoding_type", ["sinusoidal", "learned"])
def test_sinusoidal_and_learned_positional_encoding(encoding_type):
    pos_encodings = PositionalEncodingFactory.create_positional_encoding(
        encoding_type=encoding_type, max_len=1000, d_model=512, dropout=0.1
    ).eval()
    input_sequence = torch.randn(1, 10, 512)
    input_with_pos = pos_encodings(input_sequence)
    matrix = pos_encodings.encoding_matrix
    assert matrix.shape == (1000, 512)
    assert_close(input_with_pos, input_sequence + matrix[:10], "float32_forward")
    if encoding_type == "sinusoidal":
        for pos, i in ((0, 0), (7, 3), (9, 255)):
            angle = pos / 10000 ** (2 * i / 512)
            found = matrix[pos, [2 * i, 2 * i + 1]].tolist()
            assert found == pytest.approx([math.sin(angle), math.cos(angle)], abs=1e-5)


def test_relative_positional_encoding():
    relative = PositionalEncodingFactory.create_positional_encoding(
        encoding_type="relative", d_model=512, num_heads=8, max_relative_distance=128, num_buckets=32, is_causal=False
    )
    assert relative.relative_attention_bias.weight.shape == (32, 8)
    layer, states = make_mha(), torch.randn(1, 10, 512)
    bias = relative.bias(10, 10)
    output, weights = layer(states, position_bias=bias, need_weights=True)
    plain = layer(states, need_weights=True)[1]
    assert_close(weights, (plain.log() + bias).softmax(-1), "float32_forward")


FEED_FORWARD = {"intermediate_size": 2048, "activation": "relu", "layer_norm_eps": 1e-6, "dropout": 0.1}
encoder_config = DistanceAttentionConfig(
    d_model=512, num_heads=8, metric="dot", lam=1.0, norm_first=False, **FEED_FORWARD
)


def test_transformer_encoder_layer_and_stack():
    """Multi-head self-attention, add & norm, feed-forward, add & norm: as PyTorch's own layer with these weights."""
    layer = DistanceEncoderLayer(encoder_config).eval()
    theirs = torch.nn.TransformerEncoderLayer(
        512, 8, 2048, activation="relu", layer_norm_eps=1e-6, batch_first=True
    ).eval()
    attention, forward = layer.self_attention.attention, layer.feed_forward
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    theirs.self_attn.in_proj_weight.data = torch.cat([p.weight.detach() for p in projections])
    theirs.self_attn.in_proj_bias.data = torch.cat([p.bias.detach() for p in projections])
    for own, other in (
        (attention.o_proj, theirs.self_attn.out_proj), (forward.up_proj, theirs.linear1),
        (forward.down_proj, theirs.linear2), (layer.self_attention.residual.norm, theirs.norm1),
        (forward.residual.norm, theirs.norm2),
    ):  # fmt: skip
        other.load_state_dict(own.state_dict())
    input_sequence = torch.randn(2, 10, 512)
    assert_close(layer(input_sequence), theirs(input_sequence), "float32_forward")
    stack = DistanceEncoder(encoder_config, num_layers=6).eval()
    final_output = input_sequence
    for layer in stack.layers:
        final_output = layer(final_output)
    assert stack(input_sequence).equal(final_output)


def test_transformer_decoder_layer():
    layer = DistanceDecoderLayer(encoder_config).eval()
    decoder_input, encoder_output = torch.randn(1, 10, 512), torch.randn(1, 15, 512)
    decoder_output, (own, cross) = layer(decoder_input, encoder_output, output_attentions=True)
    assert (decoder_output.shape, cross.shape) == ((1, 10, 512), (1, 8, 10, 15))
    assert own.triu(1).eq(0).all()
    changed = torch.cat([decoder_input[:, :6], torch.randn(1, 4, 512)], 1)
    torch.testing.assert_close(layer(changed, encoder_output)[:, :6], decoder_output[:, :6], rtol=0, atol=1e-5)
    assert DistanceDecoder(encoder_config, num_layers=2)(decoder_input, encoder_output).shape == (1, 10, 512)


def test_sparse_attention():
    """'local_window' and 'strided' are 'local' and 'strided'; 'sparse' alone says which names there are."""
    states = torch.randn(1, 200, 64)
    for name, options, seen in (
        ("local", {"window_size": 64}, lambda gap: gap < 64),
        ("strided", {"window_size": 64, "stride": 32, "num_strides": 4}, lambda gap: (gap < 64) | (gap % 32 == 0)),
    ):
        layer = AttentionFactory.create_attention(name, d_model=64, num_heads=8, is_causal=True, **options)
        weights = layer(states, need_weights=True)[1]
        gap = torch.arange(200)[:, None] - torch.arange(200)
        allowed = (gap >= 0) & seen(gap) & (gap <= 128)
        assert weights[:, :, ~allowed].eq(0).all()
        assert weights[:, :, allowed].gt(0).all()
        assert_close(weights.sum(-1), torch.ones(1, 8, 200), "weights_sum")
    with pytest.raises(ValueError, match=r"'sparse' \(which may be 'nystrom', .* 'strided', 'local'"):
        AttentionFactory.create_attention("sparse", d_model=64, num_heads=8)
    with pytest.raises(ValueError, match=r"'block_sparse' \(which may be 'bigbird', .* by register_mechanism\)"):
        AttentionFactory.create_attention("block_sparse", d_model=64, num_heads=8)
    with pytest.raises(ValueError, match=r"'Top_K' \(which is 'retrieval' with window_size=1, .* num_blocks=k\)"):
        AttentionFactory.create_attention("Top_K", d_model=64, num_heads=8)
    with pytest.raises(ValueError, match="'strided' has no option 'sparsity_ratio'"):
        AttentionFactory.create_attention("strided", d_model=64, num_heads=8, sparsity_ratio=0.1)
    for word, kind in (("keep_ratio", AttentionSpec), ("sparsity_ratio", DistAttnConfig)):
        with pytest.raises(ValueError, match=f"no field '{word}': mechanism.*retrieval.* reads the num_blocks best"):
            kind(**{word: 0.1})


def test_words_for_what_retrieval_and_local_are():
    for word in ("hierarchical", "Pyramid", "multi-resolution"):
        for make in (lambda w: DistAttnConfig(attention_type=w), lambda w: AttentionFactory.create(w, 64, 8)):
            with pytest.raises(ValueError, match=rf"(?i)'{word}' \(which is 'retrieval': near keys one by one"):
                make(word)
    assert DistAttnConfig(attention_type="longformer").mechanism == "local"
    with pytest.raises(ValueError, match="'flash' .which is 'dot' with attn_implementation='flash_attention_2'"):
        DistAttnConfig(attention_type="flash")
    with pytest.raises(ValueError, match="no field 'decay': .*native models have positional_encoding='decay'"):
        AttentionSpec("l2", decay=0.1)


def test_settings_that_are_no_layers():
    for word, place in (
        ("enable_performance_monitoring", r"layer.enable_performance_monitoring\(\)"),
        ("log_attention_weights", "output_attentions=True"),
        ("mechanism", r"AttentionFactory.create\('local', ...\)"),
        ("sparsity_ratio", "num_blocks"),
    ):
        with pytest.raises(ValueError, match=f"has no option '{word}': .*{place}"):
            DistanceAttentionConfig(**{word: True})
    layer = create_distance_attention(16, 2)
    layer.enable_performance_monitoring()
    layer(torch.randn(1, 3, 16))
    assert layer.get_performance_stats()


def test_local_attention():
    layer = AttentionFactory.create_attention("local", d_model=64, num_heads=8, window_size=128, is_causal=True)
    states = torch.randn(1, 300, 64)
    q, k, v = (p(states).unflatten(-1, (8, -1)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    gap = torch.arange(300)[:, None] - torch.arange(300)
    heads = F.scaled_dot_product_attention(q, k, v, attn_mask=(gap >= 0) & (gap < 128))
    assert_close(layer(states), layer.o_proj(heads.transpose(1, 2).flatten(2)), "float32_forward")
    with pytest.raises(ValueError, match="'local' has no option 'stride'; .*dilation"):
        AttentionFactory.create_attention("local", d_model=64, num_heads=8, window_size=128, stride=64)


def test_flash_attention():
    """Tiles are the kernels' own business: exact, without the (N, M) matrix, chosen by themselves."""
    qkv = torch.randn(3, 1, 2, 300, 16)
    expected = distance_attention(*qkv.double(), metric="l2", backend="reference")
    assert_close(distance_attention(*qkv, metric="l2").double(), expected, "float32_forward")
    torch.manual_seed(0)
    dropped = distance_attention(*qkv, metric="l2", dropout_p=0.1)
    assert not torch.allclose(dropped, expected.float(), atol=1e-3)


def test_attention_visualization(model):
    weights = model(**batch, output_attentions=True).attentions[1]
    token_labels = ["The", "cat", "sat", "on", "the", "mat"]
    figure = attention_map(weights[0, 0, :6, :6].detach(), token_labels)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == token_labels
    drawn = torch.tensor(axes.images[0].get_array().data)
    torch.testing.assert_close(drawn, weights[0, 0, :6, :6].detach().double())


class NextToken:
    """A loss as `gradient_importance` takes it."""

    batches = [batch]

    def __call__(self, model):
        ids = batch["input_ids"]
        yield model(input_ids=ids, labels=ids).loss, 1.0


def test_head_importance_analysis(model):
    importance_analysis = gradient_importance(model, NextToken())
    ranked_heads = importance_analysis.ranking()
    for layer, head, importance_score in ranked_heads:
        print(f"  Head {layer}-{head}: {importance_score}")
    assert len(ranked_heads) == 8
    scores = [entry[2] for entry in ranked_heads]
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] > 0


def test_attention_dropout():
    layer = make_mha(dropout=0.1, output_dropout=0.1)
    states = torch.randn(4, 10, 512)
    whole, dropped = layer(states), layer.train()(states)
    assert 0.08 < float(dropped.eq(0).float().mean()) < 0.12  # of the output
    kept = dropped.ne(0)
    assert not torch.allclose(dropped[kept], whole[kept] / 0.9, atol=1e-3)  # and of the weights


def test_gradient_accumulation_for_large_models(model):
    parameters, ids = list(model.parameters()), torch.randint(3, 40, (4, 9))
    losses = [model(input_ids=part, labels=part).loss / 4 for part in ids[:, None]]
    for loss in losses:
        loss.backward()
    accumulated = torch.nn.utils.clip_grad_norm_(parameters, 5.0)
    gradients = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    whole = torch.nn.utils.clip_grad_norm_(parameters, 5.0)
    torch.testing.assert_close(accumulated, whole, rtol=1e-4, atol=0)
    for one, other in zip(gradients, [p.grad for p in parameters if p.grad is not None], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    model.zero_grad()


def test_mixed_precision_training():
    layer, states = make_mha(), torch.randn(2, 10, 512)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2000)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = layer.o_proj.weight.detach().clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(states)
    assert float((output - layer(states)).norm() / output.norm()) < 0.015
    scaler.scale(output.float().square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1024.0
    assert not layer.o_proj.weight.equal(before)


def test_batch_attention_computation():
    layer, states = make_mha(), torch.randn(32, 12, 512)
    padding_token = 0
    token_ids = torch.randint(1, 9, (32, 12))
    token_ids[::2, 7:] = padding_token
    output = layer(states, attention_mask=token_ids != padding_token)
    for row in (0, 1):
        length = 7 if row == 0 else 12
        alone = layer(states[row : row + 1, :length])
        assert_close(output[row, :length], alone[0], "float32_forward")


def test_attention_caching_for_inference():
    layer, text = make_mha(is_causal=True), torch.randn(1, 20, 512)
    whole, kv_cache = layer(text), DynamicCache()
    for step in range(20):
        output = layer(text[:, step : step + 1], past_key_values=kv_cache)
        assert_close(output[:, 0], whole[:, step], "float32_forward")
    assert kv_cache.get_seq_length() == 20


@pytest.mark.parametrize(("name", "size", "heads", "causal"), [("bert", 768, 12, False), ("gpt", 1024, 16, True)])
def test_bert_and_gpt_style_attention(name, size, heads, causal):
    layer = make_mha(d_model=size, num_heads=heads, dropout=0.1, is_causal=causal)
    weights = layer(torch.randn(1, 9, size), need_weights=True)[1]
    assert weights.shape == (1, heads, 9, 9)
    assert weights.triu(1).eq(0).all() == causal
    kind = DistAttnForCausalLM if causal else DistAttnForMaskedLM
    config = DistAttnConfig(vocab_size=9, d_model=size, num_heads=heads, num_layers=1, use_causal_mask=causal)
    assert kind(config)(torch.ones(1, 4, dtype=torch.long)).logits.shape == (1, 4, 9)


def test_t5_style_encoder_decoder():
    config = DistAttnSeq2SeqConfig(
        vocab_size=30, d_model=512, num_heads=8, encoder_layers=1, num_decoder_layers=1, attention_dropout=0.1,
        positional_encoding_type="relative", distance_type="l2",
    )  # fmt: skip
    model = DistAttnForConditionalGeneration(config).eval()
    call = {"input_ids": torch.ones(1, 6, dtype=torch.long), "decoder_input_ids": torch.ones(1, 4, dtype=torch.long)}
    t5_output = model(**call, output_attentions=True)
    shapes = [
        w[0].shape for w in (t5_output.encoder_attentions, t5_output.decoder_attentions, t5_output.cross_attentions)
    ]
    assert shapes == [(1, 8, 6, 6), (1, 8, 4, 4), (1, 8, 4, 6)]
    assert t5_output.decoder_attentions[0].triu(1).eq(0).all()


@pytest.mark.parametrize("metric", ["dot", "l2", "l1"])
def test_attention_mechanism_tests(metric):
    """For identity matrices, diagonal elements are highest."""
    identity = torch.eye(4)[None, None]
    weights = distance_attention(identity, identity, identity, metric=metric, lam=1.0, return_weights=True)[1][0, 0]
    for i in range(4):
        assert weights[i, i] > torch.cat([weights[i, :i], weights[i, i + 1 :]]).max()


@pytest.mark.parametrize("metric", ["dot", "l2", "l1", "cosine", "chebyshev"])
def test_gradient_flow_verification(metric):
    qkv = [torch.randn(1, 1, 5, 8, requires_grad=True) for _ in range(3)]
    distance_attention(*qkv, metric=metric).square().sum().backward()
    for tensor in qkv:
        assert tensor.grad.norm() > 1e-8


def test_attention_collapse():
    """`max_attention > 0.95 or attention_entropy < 0.1`; a larger temperature widens it, a lower one does not."""
    narrow = (torch.eye(6) * 20).softmax(-1)
    assert row_statistics(narrow).collapsed.all()
    assert not row_statistics(torch.full((6, 6), 1 / 6)).collapsed.any()
    layer = create_distance_attention(d_model=16, num_heads=2, lam=500.0, detect_collapse=True)
    with pytest.warns(UserWarning, match="head 0 collapsed in .* a larger temperature, a smaller lam or a logit_clip"):
        layer(torch.randn(1, 9, 16))


def test_memory_issues_with_long_sequences():
    """'sparse', 'checkpoint' and 'standard' of the document: a mechanism, a model's method, and what runs anyhow."""
    config = DistAttnConfig(vocab_size=9, d_model=16, num_heads=2, num_layers=1, attention_type="local")
    model = DistAttnForMaskedLM(config).train()
    model.gradient_checkpointing_enable()
    model(torch.ones(1, 1100, dtype=torch.long)).logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_numerical_instability_in_softmax():
    """Stable without a clip; `logit_clip` of a layer bounds how far logits lie apart."""
    logits = torch.tensor([[1e4, 0.0, -1e4], [3e38, 3e38, 0.0]])
    stable = masked_softmax(logits, None)
    assert_close(stable, logits.double().softmax(-1).float(), "weights_sum")
    layer = create_distance_attention(d_model=16, num_heads=2, lam=1e4, logit_clip=50.0).double()
    weights = layer(torch.randn(1, 9, 16, dtype=torch.float64), need_weights=True)[1]
    assert float((weights.amax(-1) / weights.amin(-1)).log().max()) == pytest.approx(50.0)
