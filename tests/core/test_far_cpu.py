"""The fused CPU kernels of attention through landmarks alone against the formula in float64."""

import pytest
import torch

from distattn_hf import nystrom_attention
from distattn_hf.core.kernel_cpp_library import unavailable
from distattn_hf.functional import nystrom
from tests.tolerances import assert_close

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"CPU kernels: {unavailable()}")
# (B, H, N, M, d, d_v, m): a block and less, one key more than blocks, splits among few heads, no multiple of 16.
SHAPES = [(2, 3, 64, 64, 16, 16, 16), (1, 2, 1, 65, 8, 5, 7), (1, 1, 130, 5000, 40, 24, 33), (3, 2, 70, 3, 16, 16, 2)]


@pytest.fixture
def taken(monkeypatch):
    """How often the kernels ran."""
    calls = []
    sums = nystrom.far_sums
    monkeypatch.setattr(nystrom, "far_sums", lambda *arguments: calls.append(1) or sums(*arguments))
    return calls


def inputs(shape) -> dict[str, torch.Tensor]:
    torch.manual_seed(sum(shape))
    batch, heads, num_queries, num_keys, size, value_size, rank = shape
    query, key = (torch.randn(batch, heads, n, size) for n in (num_queries, num_keys))
    mask = torch.rand(batch, num_keys) < 0.7
    mask[:, 0] = True
    landmarks = torch.randn(heads, rank, size)
    return {"query": query, "key": key, "value": torch.randn(*key.shape[:3], value_size)}, mask, landmarks


def kernel(x, y, weight) -> torch.Tensor:
    return (-weight * (x[:, None] - y[None]).square().sum(-1)).exp()


def formula(tensors, mask, landmarks, lam, lift, regularisation) -> torch.Tensor:
    """κ(q, L)(κ(L, L) + γI)⁻¹κ(L, k) written out in float64, a head at a time."""
    query, key, value = (t.double() for t in tensors.values())
    landmarks, lam = landmarks.double(), lam.double() * query.shape[-1] ** -0.5
    output = torch.zeros(*query.shape[:3], value.shape[-1], dtype=torch.float64)
    for b in range(len(query)):
        for h in range(query.shape[1]):
            q, k, v, marks = query[b, h], key[b, h][mask[b]], value[b, h][mask[b]], landmarks[h]
            if lift:
                radius = torch.cat([k, marks]).square().sum(-1).amax()
                q = torch.cat([q, torch.zeros(len(q), 1, dtype=q.dtype)], dim=1)
                k, marks = (
                    torch.cat([t, (radius - t.square().sum(-1, True)).clamp_min(0).sqrt()], 1) for t in (k, marks)
                )

            middle = kernel(marks, marks, lam[h]) + regularisation * torch.eye(len(marks), dtype=q.dtype)
            weights = kernel(q, marks, lam[h]) @ torch.linalg.solve(middle, kernel(marks, k, lam[h]))
            output[b, h] = weights @ v / weights.sum(-1, keepdim=True)
    return output


@pytest.mark.parametrize("lift", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_equal_the_formula(shape, lift, taken):
    tensors, mask, landmarks = inputs(shape)
    lam = torch.linspace(0.2, 0.6, shape[1])
    actual = nystrom_attention(
        **tensors, landmarks=landmarks, mask=mask, lam=lam, lift=lift, regularisation=1.0, nonnegative=False
    )
    assert_close(actual, formula(tensors, mask, landmarks, lam, lift, 1.0), "float32_forward")
    assert taken


@pytest.mark.parametrize("lift", [False, True])
def test_padding_neighbours_and_strides_change_nothing(lift, taken):
    (tensors, mask, landmarks), options = inputs(SHAPES[0]), {"lift": lift, "nonnegative": False}
    expected = nystrom_attention(**tensors, landmarks=landmarks, mask=mask, **options)
    garbage = {
        n: torch.where(mask[:, None, :, None], t, 9 * torch.rand_like(t)) for n, t in tensors.items() if n != "query"
    }
    again = nystrom_attention(tensors["query"], **garbage, landmarks=landmarks, mask=mask, **options)
    assert torch.equal(again, expected)
    alone = nystrom_attention(**{n: t[1:] for n, t in tensors.items()}, landmarks=landmarks, mask=mask[1:], **options)
    assert torch.equal(alone, expected[1:])
    swapped = {n: t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in tensors.items()}
    assert torch.equal(nystrom_attention(**swapped, landmarks=landmarks, mask=mask, **options), expected)
    assert len(taken) == 4


def test_a_text_that_is_all_padding_and_gradients_are_left_to_pytorch(taken):
    tensors, mask, landmarks = inputs(SHAPES[0])
    mask[0] = False
    output = nystrom_attention(**tensors, landmarks=landmarks, mask=mask)
    assert bool((output[0] == 0).all())
    assert bool(output[1].isfinite().all())
    assert len(taken) == 1
    tensors["key"].requires_grad_()
    nystrom_attention(**tensors, landmarks=landmarks).sum().backward()
    nystrom_attention(**{n: t.detach().double() for n, t in tensors.items()}, landmarks=landmarks)
    assert len(taken) == 1
    assert bool(tensors["key"].grad.isfinite().all())
