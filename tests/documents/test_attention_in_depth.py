"""Every code block and formula of "Day 42: Attention Mechanisms", with our imports.

Left out, as a mistake of the document: Σ w·position called an average distance (ours: Σ w·|position_i - position_j|).
"""

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache

from distattn_hf import MECHANISMS, create_distance_attention, distance_attention
from distattn_hf.analysis.report.figures import attention_map
from distattn_hf.core.inputs import causal_keep
from distattn_hf.functional.row_statistics import row_statistics
from tests.tolerances import assert_close


def test_self_and_cross_attention():
    """Self-Attention(X) = Attention(XW_Q, XW_K, XW_V), Cross-Attention(X, Y) = Attention(XW_Q, YW_K, YW_V)."""
    layer = create_distance_attention(32, 4, "l2", lam=1.0)
    x, y = torch.randn(2, 6, 32), torch.randn(2, 9, 32)
    for other in (x, y):
        q, k, v = (
            projection(source).unflatten(-1, (4, 8)).transpose(1, 2)
            for projection, source in ((layer.q_proj, x), (layer.k_proj, other), (layer.v_proj, other))
        )
        weights = (-torch.cdist(q.double(), k.double()) / 8**0.5).softmax(-1).float()
        expected = layer.o_proj((weights @ v).transpose(1, 2).flatten(2))
        assert_close(layer(x) if other is x else layer(x, other), expected, "float32_forward")
    order = torch.randperm(6)  # without positions, order does not matter
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], rtol=0, atol=1e-5)


def test_causal_attention():
    seq_len = 7
    scores = torch.randn(1, 1, seq_len, seq_len)
    # Create causal mask
    mask = torch.tril(torch.ones(seq_len, seq_len))
    scores = scores.masked_fill(mask == 0, -float('inf'))  # fmt: skip

    qkv = torch.randn(3, 1, 1, seq_len, 8)
    causal = distance_attention(*qkv, metric="l1", is_causal=True)
    assert_close(distance_attention(*qkv, metric="l1", mask=mask.bool()[None, None]), causal, "float32_forward")
    assert causal_keep(seq_len, seq_len, "cpu").equal(mask.bool())
    biased = distance_attention(*qkv, metric="l1", position_bias=scores, return_weights=True)[1]
    assert biased.triu(1).eq(0).all()


@pytest.mark.parametrize("name", ["linear", "performer"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_linear_attention(name, is_causal):
    """Attention(Q,K,V) ≈ φ(Q)(φ(K)ᵀV), normalised: the weights are φ(q)·φ(k) over their sum."""
    mechanism = MECHANISMS.get(name)(2, 8, **({"num_features": 512} if name == "performer" else {})).eval()
    q, k, v = 0.5 * torch.randn(3, 1, 2, 11, 8)
    output, weights = mechanism(q, k, v, is_causal=is_causal, return_weights=True)
    assert_close(weights.sum(-1), torch.ones(1, 2, 11), "float32_forward")
    assert_close(weights @ v, output, "float32_forward")
    if name == "linear":
        products = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
        products = products.tril() if is_causal else products
    else:  # converges to true attention
        exact = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        assert float((output - exact).norm() / exact.norm()) < 0.1
        return
    assert_close(weights, products / products.sum(-1, keepdim=True), "float32_forward")


def test_attention_heatmaps():
    """`plot_attention_heatmap(attention_weights, tokens)` of the document is `attention_map`."""
    tokens = ["the", "cat", "sat"]
    attention_weights = torch.rand(3, 3).softmax(-1)
    figure = attention_map(attention_weights, tokens, title="Attention Weights")
    axes = figure.axes[0]
    assert axes.get_title() == "Attention Weights"
    for axis in (axes.xaxis, axes.yaxis):
        assert [label.get_text() for label in axis.get_ticklabels()] == tokens
    torch.testing.assert_close(torch.tensor(axes.images[0].get_array().data), attention_weights.double())


class AttentionCache:
    def __init__(self, max_seq_len, num_heads, head_dim):
        self.k_cache = torch.zeros(max_seq_len, num_heads, head_dim)
        self.v_cache = torch.zeros(max_seq_len, num_heads, head_dim)
        self.seq_len = 0

    def update(self, new_k, new_v):
        self.k_cache[self.seq_len] = new_k
        self.v_cache[self.seq_len] = new_v
        self.seq_len += 1
        return self.k_cache[:self.seq_len], self.v_cache[:self.seq_len]  # fmt: skip


def test_attention_caching():
    """The document's own cache in front of our attention, and transformers' in our layer, as one pass."""
    layer = create_distance_attention(32, 4, "l1", is_causal=True)
    x = torch.randn(1, 9, 32)
    whole, cache, theirs = layer(x), AttentionCache(16, 4, 8), DynamicCache()
    for step in range(9):
        token = x[:, step : step + 1]
        q, new_k, new_v = (p(token).view(4, 8) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        keys, values = (t.transpose(0, 1)[None] for t in cache.update(new_k, new_v))
        heads = distance_attention(q[None, :, None], keys, values, metric="l1", lam=layer.lam)
        assert_close(layer.o_proj(heads.reshape(1, 1, 32)), whole[:, step : step + 1], "float32_forward")
        assert_close(layer(token, past_key_values=theirs), whole[:, step : step + 1], "float32_forward")


def test_attention_entropy_and_distance():
    attention_weights, seq_len = torch.randn(2, 4, 10, 10).softmax(-1), 10
    entropy = -torch.sum(attention_weights * torch.log(attention_weights + 1e-9), dim=-1)
    rows = row_statistics(attention_weights)
    torch.testing.assert_close(rows.entropy, entropy, rtol=0, atol=1e-6)

    positions = torch.arange(seq_len).float()
    avg_distance = torch.sum(attention_weights * (positions - positions[:, None]).abs(), dim=-1)
    torch.testing.assert_close(rows.distance, avg_distance)


def test_graph_self_attention():
    """α_ij over neighbours only: the graph is a mask (B, N, M), and edges' weights a bias."""
    adjacency = torch.rand(2, 6, 6) > 0.5
    adjacency |= torch.eye(6, dtype=torch.bool)
    layer = create_distance_attention(32, 4, "l2")
    weights = layer(torch.randn(2, 6, 32), attention_mask=adjacency, need_weights=True)[1]
    assert weights[~adjacency[:, None].expand(-1, 4, -1, -1)].eq(0).all()
    assert_close(weights.sum(-1), torch.ones(2, 4, 6), "weights_sum")
