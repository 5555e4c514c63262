"""Every formula of "Euclidean Approximate Attention with Linear-Time Distance Estimation".

Its experiments are commands with tests of their own: tests/experiments (distances, patterns, long_context).
"""

import torch

from distattn_hf import distance_attention, nystrom_attention
from distattn_hf.core.metrics import get_metric
from distattn_hf.functional.landmarks import select_landmarks
from tests.tolerances import assert_close

Q, K, V = torch.randn(3, 1, 2, 40, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_standard_attention():
    """Attention(Q, K, V) = softmax(QK^T / √d) @ V"""
    expected = (Q @ K.mT / 8**0.5).softmax(-1) @ V
    assert_close(distance_attention(Q, K, V, metric="dot", lam=1.0), expected, "float64")


def test_euclidean_attention():
    """Attention(Q, K, V) = softmax(-||Q - K||² / τ) @ V"""
    tau = 3.0
    expected = (-(torch.cdist(Q, K) ** 2) / tau).softmax(-1) @ V
    found = distance_attention(Q, K, V, metric="sqeuclidean", lam=1 / tau, scaling=1.0)
    assert_close(found, expected, "float64")


def test_key_relationship():
    """||q - k||² = ||q||² + ||k||² - 2⟨q, k⟩: sensitive to norms, not just angles."""
    distance = get_metric("sqeuclidean").fast_distance(Q, K)
    expanded = Q.square().sum(-1)[..., None] + K.square().sum(-1)[..., None, :] - 2 * Q @ K.mT
    assert_close(distance, expanded, "float64")
    longer = K.clone()
    longer[..., 0, :] *= 3
    before, after = (
        distance_attention(Q, keys, V, metric="cosine", lam=1.0, return_weights=True)[1] for keys in (K, longer)
    )
    assert_close(after, before, "float64")
    euclidean = distance_attention(Q, longer, V, metric="sqeuclidean", lam=1.0, return_weights=True)[1]
    assert not torch.allclose(euclidean, distance_attention(Q, K, V, metric="sqeuclidean", return_weights=True)[1])


def test_linear_attention_trick():
    """output ≈ normalize(Φ_Q @ (W^-1 @ (Φ_K^T @ V))), exact where the landmarks are the keys."""
    tau = 8.0

    def kernel(x, y):
        return (-(torch.cdist(x, y) ** 2) / tau).exp()

    exact = (-(torch.cdist(Q, K) ** 2) / tau).softmax(-1) @ V
    landmarks = select_landmarks(K, 16, "segment_means")
    phi_q, phi_k, w = kernel(Q, landmarks), kernel(K, landmarks), kernel(landmarks, landmarks)
    numerator = phi_q @ torch.linalg.solve(w, phi_k.mT @ V)
    expected = numerator / (phi_q @ torch.linalg.solve(w, phi_k.mT.sum(-1, keepdim=True)))
    found = nystrom_attention(Q, K, V, landmarks=landmarks, lam=1 / tau, scaling=1.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
    errors = [
        float((nystrom_attention(Q, K, V, num_landmarks=m, lam=1 / tau, scaling=1.0) - exact).norm() / exact.norm())
        for m in (4, 16, 40)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.1
