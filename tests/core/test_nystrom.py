"""`nystrom_attention` against exact attention and the formula in NumPy, its gradients, and what it refuses."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from distattn_hf import distance_attention, nystrom_attention
from distattn_hf.core.nystrom_hybrid import WindowBias
from distattn_hf.functional.landmarks import select_landmarks
from tests.tolerances import HALF_ERROR_RATIO, assert_close

from .cases import evaluate, make_tensors
from .test_half_precision import DTYPES, errors, pytorch_errors

# Everything is exact in float64 up to rounding times the condition of κ(L, L), below 10⁴ for the points here.
EXACT = {torch.float64: 1e-8, torch.float32: 1e-5}
NEAR = [{}, {"window_size": 1}, {"window_size": 5, "num_sinks": 2}, {"num_sinks": 3}, {"window_size": 100}]
every_near = pytest.mark.parametrize("near", NEAR, ids=str)
both_directions = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])


def expanded(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    return tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


@both_directions
@every_near
@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("lam", ["number", "per head"])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_all_keys_as_landmarks_are_exact_attention(is_causal, near, dtype, lam, key_heads):
    tensors = make_tensors(14, value_dim=5, heads=4, key_heads=key_heads, dtype=dtype)
    lam = 0.8 if lam == "number" else torch.tensor([0.3, 0.5, 0.9, 1.4], dtype=dtype)
    options = {"lam": lam, "scaling": 0.4, "is_causal": is_causal}
    expected = distance_attention(**tensors, metric="sqeuclidean", **options)
    landmarks = expanded(tensors["key"], 4)
    actual = nystrom_attention(**tensors, landmarks=landmarks, regularisation=0.0, **options, **near)
    assert actual.dtype == dtype
    assert (actual - expected).abs().max() <= EXACT[dtype]


@both_directions
@every_near
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_lifted_landmarks_are_pytorchs_attention(is_causal, near, dtype):
    tensors = make_tensors(14, heads=4, key_heads=2, dtype=dtype)
    expected = F.scaled_dot_product_attention(**tensors, is_causal=is_causal, enable_gqa=True)
    landmarks = expanded(tensors["key"], 4)
    actual = nystrom_attention(
        **tensors, landmarks=landmarks, regularisation=0.0, lift=True, is_causal=is_causal, **near
    )
    assert (actual - expected).abs().max() <= EXACT[dtype]


@pytest.mark.parametrize("lift", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(3, 14), (30, 9), (1, 1)])
def test_cross_attention(lift, queries, keys):
    tensors = make_tensors(queries, keys, dtype=torch.float64)
    keep = torch.ones(2, keys, dtype=torch.bool)
    keep[0, keys // 2 + 1 :] = False
    expected = distance_attention(**tensors, metric="dot" if lift else "sqeuclidean", lam=1.0, mask=keep)
    options = {"lam": 0.5 if lift else 1.0, "lift": lift, "regularisation": 0.0, "mask": keep}
    for sinks in (0, 2):
        actual = nystrom_attention(**tensors, landmarks=tensors["key"], num_sinks=sinks, **options)
        assert (actual - expected).abs().max() <= 1e-8


def numpy_nystrom(
    query, key, value, keep, landmarks, *, weight, gamma, nonnegative, lift, window, sinks, is_causal
) -> np.ndarray:
    """The formula of the docstring for one head, (N, d), (M, d), (M, d_v), keep (M,), (m, d), row by row."""

    def kernel(x, y):
        return np.exp(-weight * ((x[:, None] - y[None]) ** 2).sum(-1))

    exact = kernel(query, key)
    if lift:
        norms = [(landmarks**2).sum(-1)] + ([] if is_causal else [(key[keep] ** 2).sum(-1)])
        radius = np.concatenate(norms).max()

        def lifted(x):
            return np.concatenate([x, np.sqrt(np.maximum(radius - (x**2).sum(-1, keepdims=True), 0))], axis=1)

        # As if all keys lay on the sphere, also those outside.
        exact = np.exp(-weight * ((query**2).sum(-1)[:, None] + radius - 2 * query @ key.T))
        key, landmarks = lifted(key), lifted(landmarks)
        query = np.concatenate([query, np.zeros_like(query[:, :1])], axis=1)
    # One column per key.
    coefficients = np.linalg.solve(
        kernel(landmarks, landmarks) + gamma * np.eye(len(landmarks)), kernel(landmarks, key)
    )
    if nonnegative:
        coefficients = np.maximum(coefficients, 0)
    far = kernel(query, landmarks) @ coefficients
    first = np.flatnonzero(keep)[:sinks]
    output = np.zeros((len(query), value.shape[1]))
    for i in range(len(query)):
        near = [j in first or abs(i - j) < window for j in range(len(key))]
        seen = [keep[j] and (j <= i or not is_causal) for j in range(len(key))]
        row = np.where(near, exact[i], far[i]) * seen
        output[i] = row @ value / row.sum() if any(seen) else 0.0
    return output


def test_a_row_of_negative_sum_is_divided_by_it():
    """Coefficients of both signs: the formula holds all the same, and with it the gradient."""
    landmarks, key, value = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [4.0]]), torch.eye(2)
    query = torch.tensor([[-2.0], [0.5], [4.0]])
    tensors = {n: t.double()[None, None] for n, t in (("query", query), ("key", key), ("value", value))}
    options = {"lam": 1.0, "scaling": 0.3, "regularisation": 0.0}
    far = torch.exp(-0.3 * (key - landmarks.T).double() ** 2)
    matrix = torch.exp(-0.3 * (landmarks - landmarks.T).double() ** 2)
    weights = torch.exp(-0.3 * (query - landmarks.T).double() ** 2) @ torch.linalg.inv(matrix) @ far.T
    assert bool((weights.sum(-1) < 0).any())
    assert bool((weights.sum(-1) > 0).any())

    def attention(query):
        return nystrom_attention(query, tensors["key"], tensors["value"], landmarks=landmarks.double()[None], **options)

    assert_close(attention(tensors["query"])[0, 0], weights / weights.sum(-1, keepdim=True), "float64")
    assert torch.autograd.gradcheck(attention, tensors["query"].requires_grad_())


def against_numpy(tensors, landmarks, keep, lam, actual, **options):
    for b in range(2):
        for h in range(4):
            arrays = [tensors[n][b, h if n == "query" else h // 2].numpy() for n in ("query", "key", "value")]
            chosen = landmarks[b, h] if landmarks.dim() == 4 else landmarks[h]
            expected = numpy_nystrom(*arrays, keep[b].numpy(), chosen.numpy(), weight=float(lam[h]) * 0.3, **options)
            assert_close(actual[b, h], torch.from_numpy(expected), "float64", f"item {b}, head {h}")


@pytest.mark.parametrize(
    ("is_causal", "window", "sinks", "nonnegative", "default"),
    [
        (False, 0, 0, False, True), (False, 0, 0, True, False), (False, 4, 0, True, True), (False, 0, 2, True, True),
        (False, 4, 2, False, False), (True, 0, 0, True, True), (True, 4, 2, True, True), (True, 0, 0, False, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("lift", [False, True])
@pytest.mark.parametrize("shared", [False, True], ids=["per item", "shared"])
def test_formula(is_causal, window, sinks, nonnegative, default, lift, shared):
    """Signed and non-negative coefficients, landmarks of each item or shared; `default`: what None means here."""
    tensors = make_tensors(20, value_dim=3, heads=4, key_heads=2, dtype=torch.float64)
    tensors["query"] = 0.5 * tensors["query"]
    landmarks = torch.randn(*(() if shared else (2,)), 4, 6, 8, dtype=torch.float64)
    keep = torch.ones(2, 20, dtype=torch.bool)
    keep[0, :4], keep[1, [2, 9, 19]] = False, False
    lam = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    actual = nystrom_attention(
        **tensors, landmarks=landmarks, window_size=window, num_sinks=sinks, lam=lam, scaling=0.3, mask=keep,
        is_causal=is_causal, lift=lift, regularisation=0.05, nonnegative=None if default else nonnegative,
    )  # fmt: skip
    against_numpy(
        tensors, landmarks, keep, lam, actual, gamma=0.05, nonnegative=nonnegative, lift=lift, window=window,
        sinks=sinks, is_causal=is_causal,
    )  # fmt: skip


@pytest.mark.parametrize("strategy", ["segment_means", "kmeans", "rpcholesky"])
def test_landmarks_chosen_here_are_those_of_select_landmarks(strategy):
    tensors = make_tensors(20, heads=4, key_heads=2, dtype=torch.float64)
    keep = torch.rand(2, 20) < 0.7
    lam = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    options = {"num_landmarks": 5, "strategy": strategy, "seed": 3}
    actual = nystrom_attention(**tensors, lam=lam, scaling=0.3, mask=keep, **options)
    landmarks = select_landmarks(
        expanded(tensors["key"], 4), 5, strategy, keep=keep[:, None], scaling=2 * 0.5 * 0.3, seed=3
    )
    against_numpy(
        tensors, landmarks, keep, lam, actual, gamma=0.01, nonnegative=False, lift=False, window=0, sinks=0,
        is_causal=False,
    )  # fmt: skip


def test_position_bias_is_added_to_the_logits():
    """All keys as landmarks: exact attention with a bias of the relative position."""
    tensors = make_tensors(14, dtype=torch.float64)
    bias = WindowBias(torch.randn(2, 7).double(), torch.randn(2).double(), torch.randn(2).double())
    relative = torch.arange(14) - torch.arange(14)[:, None]
    for is_causal in (False, True):
        expected = distance_attention(
            **tensors, metric="sqeuclidean", lam=0.5, position_bias=bias.at(relative)[None], is_causal=is_causal
        )
        actual = nystrom_attention(
            **tensors, landmarks=tensors["key"], regularisation=0.0, window_size=4, position_bias=bias,
            is_causal=is_causal,
        )  # fmt: skip
        assert (actual - expected).abs().max() <= 1e-8


@both_directions
@pytest.mark.parametrize("lift", [False, True])
@pytest.mark.parametrize("near", [{}, {"window_size": 2, "num_sinks": 1}], ids=str)
def test_gradients_equal_finite_differences(is_causal, lift, near):
    """Query, key (grouped), value, landmarks and λ of each head."""

    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    lam = torch.tensor([0.7, 1.4], dtype=torch.float64, requires_grad=True)
    inputs = (leaf(1, 2, 6, 2), leaf(1, 1, 6, 2), leaf(1, 1, 6, 1), leaf(2, 3, 2), lam)

    def attention(query, key, value, landmarks, lam):
        return nystrom_attention(
            query, key, value, landmarks=landmarks, lam=lam, scaling=0.8, is_causal=is_causal, lift=lift,
            mask=torch.tensor([[True, True, False, True, True, True]]), **near,
        )  # fmt: skip

    assert torch.autograd.gradcheck(attention, inputs)


@pytest.mark.parametrize("strategy", ["segment_means", "kmeans", "uniform"])
def test_gradients_through_landmarks_that_are_chosen(strategy):
    inputs = [torch.randn(1, 1, 7, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    options = {"num_landmarks": 3, "strategy": strategy}
    assert torch.autograd.gradcheck(lambda *qkv: nystrom_attention(*qkv, **options), inputs)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("near", [{}, {"window_size": 3, "num_sinks": 2}], ids=str)
@pytest.mark.parametrize("lift", [False, True])
def test_padding_changes_nothing(side, near, lift):
    """Landmarks, radius, sinks and window are those of the sequence alone; what the padding holds changes no bit."""
    tensors = make_tensors(17, batch=1, dtype=torch.float64)
    options = {"num_landmarks": 5, "strategy": "kmeans", "lift": lift, **near}
    alone = nystrom_attention(**tensors, **options)
    results = []
    for size in (1.0, 30.0):
        filler = {name: size * torch.randn(1, 2, 6, 8, dtype=torch.float64) for name in tensors}
        order = (filler, tensors) if side == "left" else (tensors, filler)
        padded = {name: torch.cat([part[name] for part in order], dim=2) for name in tensors}
        keep = torch.ones(1, 23, dtype=torch.bool)
        keep[:, slice(None, 6) if side == "left" else slice(17, None)] = False
        output = nystrom_attention(**padded, mask=keep, **options)
        results.append(output[:, :, 6:] if side == "left" else output[:, :, :17])
    assert_close(results[0], alone, "float64")
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize("kind", ["(B, M)", "(B, 1, 1, M)", "integers", "(1, M)"])
def test_forms_of_a_padding_mask(kind):
    tensors, keep = make_tensors(9), torch.ones(2, 9, dtype=torch.bool)
    keep[:, 6:] = False
    mask = {"(B, M)": keep, "(B, 1, 1, M)": keep[:, None, None], "integers": keep.long(), "(1, M)": keep[:1]}[kind]
    expected = nystrom_attention(**tensors, mask=keep, num_landmarks=3)
    assert torch.equal(nystrom_attention(**tensors, mask=mask, num_landmarks=3), expected)
    assert not torch.allclose(nystrom_attention(**tensors, num_landmarks=3), expected)


@pytest.mark.parametrize("near", [{}, {"window_size": 3, "num_sinks": 2}], ids=str)
def test_fully_masked_item(near):
    tensors, keep = make_tensors(9), torch.ones(2, 9, dtype=torch.bool)
    keep[1] = False
    result = evaluate(lambda **t: nystrom_attention(**t, mask=keep, num_landmarks=3, **near), tensors)
    assert all(bool(tensor.isfinite().all()) for tensor in result.values())
    for name in ("output", "key", "value"):
        assert bool((result[name][1] == 0).all()), name
        assert bool((result[name][0] != 0).any()), name


@both_directions
@DTYPES
@pytest.mark.parametrize("near", [{}, {"window_size": 5, "num_sinks": 2}], ids=str)
def test_half_precision_error_is_within_twice_pytorchs(is_causal, dtype, near):
    """The rule of test_half_precision: truth is float64 on the same rounded inputs, PyTorch's error the yardstick."""
    tensors = make_tensors(40, head_dim=32, dtype=dtype)
    landmarks = torch.randn(2, 8, 32).to(dtype)
    options = {"landmarks": landmarks, "is_causal": is_causal, "nonnegative": True, **near}
    expected = evaluate(nystrom_attention, tensors, torch.float64, **options)
    actual = evaluate(nystrom_attention, tensors, **options)
    assert all(tensor.dtype == dtype for tensor in actual.values())
    ours, theirs = errors(actual, expected), pytorch_errors(tensors, {"is_causal": is_causal})
    for name in expected:
        for kind, mine, budget in zip(("root mean square", "largest"), ours[name], theirs[name]):
            assert mine <= HALF_ERROR_RATIO * budget, f"{name}: {kind} error {mine:.2e}, PyTorch's {budget:.2e}"


def test_autocast_changes_nothing_inside():
    tensors = make_tensors(20, head_dim=16)
    options = {"num_landmarks": 6, "window_size": 3}
    expected = evaluate(nystrom_attention, tensors, **options)

    def under_autocast(**tensors):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return nystrom_attention(**tensors, **options)

    for name, value in evaluate(under_autocast, tensors).items():
        assert_close(value, expected[name], "equal", name)


@both_directions
def test_autocast_training_step_is_close_to_float32(is_causal):
    tokens, weight, landmarks = torch.randn(2, 20, 32), torch.randn(96, 32) / 32**0.5, torch.randn(2, 6, 16)

    def step():
        leaf = weight.clone().requires_grad_()
        query, key, value = F.linear(tokens, leaf).view(2, 20, 3, 2, 16).permute(2, 0, 3, 1, 4)
        output = nystrom_attention(query, key, value, landmarks=landmarks, window_size=4, is_causal=is_causal)
        return output, torch.autograd.grad(output.float().square().mean(), leaf)[0]

    expected = step()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = step()
    assert actual[0].dtype == torch.bfloat16
    for ours, truth in zip(actual, expected):
        error = (ours.detach().float() - truth.detach()).norm() / truth.detach().norm()
        assert_close(error, torch.tensor(0.0), "autocast")


@both_directions
@DTYPES
@pytest.mark.parametrize("lift", [False, True])
def test_large_activations_stay_finite(is_causal, dtype, lift):
    """‖q‖² overflows float16, and every kernel entry between different points underflows float32."""
    tensors = make_tensors(20, head_dim=64, dtype=dtype)
    tensors = {**tensors, "query": tensors["query"] * 200, "key": tensors["key"] * 200}
    options = {"landmarks": 200 * torch.randn(2, 6, 64), "is_causal": is_causal, "lift": lift, "window_size": 3}
    result = evaluate(nystrom_attention, tensors, **options)
    assert all(bool(tensor.isfinite().all()) for tensor in result.values())
    assert bool((result["output"] != 0).any())


def test_equal_keys_and_landmarks():
    """κ(L, L) has rank one: the regularisation alone makes it invertible."""
    tensors = make_tensors(9)
    tensors["key"] = tensors["key"][:, :, :1].expand(-1, -1, 9, -1)
    output = nystrom_attention(**tensors, num_landmarks=4)
    assert_close(output, tensors["value"].mean(2, keepdim=True).expand_as(output), "float32_forward")


SHAPE = (2, 2, 5, 8)
BIAS = WindowBias(torch.zeros(2, 5), torch.zeros(2), torch.zeros(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.ones(2, 5, 8)}, r"query must be \(batch, .* got shape \(2, 5, 8\)"),
        ({"key": torch.ones(SHAPE).long()}, "key must be a floating-point tensor, got torch.int64"),
        ({"value": torch.ones(SHAPE).bool()}, "value must be a floating-point tensor, got torch.bool"),
        ({"value": torch.ones(SHAPE).half()}, "must share a dtype .* key torch.float32, value torch.float16"),
        ({"query": torch.ones(1, 2, 5, 8)}, r"query \(1, 2, 5, 8\) and key .* must agree in batch"),
        ({"query": torch.ones(2, 2, 5, 7)}, r"query \(2, 2, 5, 7\) and key .* must agree in batch and head_dim"),
        ({"value": torch.ones(2, 2, 6, 8)}, r"value \(2, 2, 6, 8\) must agree in batch, heads and length"),
        ({"value": torch.ones(2, 1, 5, 8)}, r"value \(2, 1, 5, 8\) must agree"),
        ({"query": torch.ones(2, 3, 5, 8)}, r"query heads \(3\) must be a multiple of key heads \(2\)"),
        (
            {"key": torch.ones(2, 0, 5, 8), "value": torch.ones(2, 0, 5, 8)},
            r"query heads \(2\) must be a multiple of key heads \(0\)",
        ),
        *[
            ({name: bad}, f"{name} must be an integer >= 0, got {bad}")
            for name in ("window_size", "num_sinks")
            for bad in (-1, 2.0, True, None)
        ],
        ({"query": torch.ones(2, 2, 4, 8), "window_size": 2}, "window_size needs as many queries as keys, got 4 and 5"),
        ({"query": torch.ones(2, 2, 4, 8), "is_causal": True}, "is_causal needs as many queries as keys, got 4 and 5"),
        ({"is_causal": True, "landmarks": None}, r"causal Nyström attention needs fixed landmarks=\(H, m, d\)"),
        ({"landmarks": torch.ones(3, 4, 8)}, r"landmarks must be .* with B=2, H=2, d=8, got shape \(3, 4, 8\)"),
        ({"landmarks": torch.ones(2, 4, 7)}, r"landmarks must be .* got shape \(2, 4, 7\)"),
        ({"landmarks": torch.ones(3, 2, 4, 8)}, r"landmarks must be .* got shape \(3, 2, 4, 8\)"),
        ({"landmarks": torch.ones(4, 8)}, r"landmarks must be .* got shape \(4, 8\)"),
        ({"landmarks": torch.ones(8)}, r"landmarks must be .* got shape \(8,\)"),
        ({"lam": torch.ones(3)}, r"lam must be a number or a tensor of shape \(2,\), got shape \(3,\)"),
        ({"lam": torch.tensor([1.0, 0.0])}, r"lam \(λ\) must be positive and finite"),
        *[
            ({"lam": bad}, rf"lam \(λ\) must be positive and finite, got {bad}")
            for bad in (0.0, -1.0, math.nan, math.inf)
        ],
        *[({"scaling": bad}, f"scaling must be a finite number > 0, got {bad}") for bad in (0.0, -1.0, math.nan)],
        *[
            ({"regularisation": bad}, f"regularisation must be a finite number >= 0, got {bad}")
            for bad in (-1e-3, math.nan, math.inf)
        ],
        ({"mask": torch.ones(2, 5, 5).bool()}, r"mask must say which keys are padding: .* of shape \(2, 5, 5\)"),
        ({"mask": torch.ones(2, 2, 1, 5).bool()}, r"mask must say which keys are padding: .* of shape \(2, 2, 1, 5\)"),
        ({"mask": torch.zeros(2, 5)}, "mask must say which keys are padding: .* got torch.float32"),
        ({"mask": torch.ones(2, 4).bool()}, "mask of shape .* does not broadcast"),
        ({"landmarks": None, "num_landmarks": 0}, "num_landmarks must be an int >= 1, got 0"),
        ({"landmarks": None, "strategy": "lloyd"}, "unknown landmark strategy 'lloyd'"),
        ({"position_bias": BIAS}, "position_bias needs window_size >= 1"),
        ({"position_bias": BIAS, "window_size": 2}, r"position_bias.near must have shape \(2, 3\), got \(2, 5\)"),
    ],
)  # fmt: skip
def test_bad_arguments(change, message):
    arguments = {
        **{name: torch.ones(SHAPE) for name in ("query", "key", "value")},
        "landmarks": torch.ones(2, 4, 8),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        nystrom_attention(**arguments)
