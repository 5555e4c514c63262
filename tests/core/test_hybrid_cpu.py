"""The fused CPU kernel of causal linear attention against the plain loop in float64, and when it is left out."""

from dataclasses import replace

import pytest
import torch

from distattn_hf import nystrom_attention
from distattn_hf.core import nystrom_hybrid as hybrid
from distattn_hf.core.kernel_cpp_hybrid import cpp_supports
from distattn_hf.core.kernel_cpp_library import unavailable
from distattn_hf.core.nystrom_hybrid import HybridInputs, hybrid_attention
from tests.core.test_hybrid import ROWS, in_chunks, naive, padding, problem
from tests.tolerances import assert_close

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"CPU kernels: {unavailable()}")
TENSORS = ("query", "key", "value", "far_query", "far_key")
# (window, sinks): none, the row itself, less than a block, a block, one key more than blocks, several blocks.
SETTINGS = [(0, 0), (0, 3), (1, 0), (5, 3), (64, 4), (66, 1), (150, 2), (300, 3)]


@pytest.fixture
def taken(monkeypatch):
    """How often the kernel ran."""
    calls = []
    kernel = hybrid.cpp_hybrid_attention
    monkeypatch.setattr(hybrid, "cpp_hybrid_attention", lambda *arguments: calls.append(1) or kernel(*arguments))
    return calls


def single(window, sinks, length, **options) -> tuple[HybridInputs, HybridInputs]:
    """The same numbers in float32, and in float64 for the loop."""
    torch.manual_seed(length + window)
    x = problem(True, window, sinks, False, length, **options)
    x = replace(x, **{name: getattr(x, name).float() for name in TENSORS})
    return x, replace(x, **{name: getattr(x, name).double() for name in TENSORS})


@pytest.mark.parametrize(("window", "sinks"), SETTINGS)
@pytest.mark.parametrize("length", [1, 7, 64, 65, 200])
def test_kernel_equals_a_plain_loop(window, sinks, length, taken):
    x, exact = single(window, sinks, length)
    assert_close(hybrid_attention(x)[0], naive(exact)[0], "float32_forward")
    assert taken


@pytest.mark.parametrize("sizes", [(16, 16, 64, 64, 65), (17, 7, 20, 40, 33), (80, 48, 40, 100, 130)])
def test_kernel_at_other_widths(sizes, taken):
    """d, d_v and m that are and are not multiples of the vector's 16."""
    torch.manual_seed(0)
    size, value_size, rank, window, length = sizes
    shapes = {"query": size, "key": size, "value": value_size, "far_query": rank, "far_key": rank}
    x = {name: torch.randn(2, 3, length, n) * size**-0.25 for name, n in shapes.items()}
    x["far_key"] = x["far_key"].abs()
    x = HybridInputs(keep=padding(length)[:2], num_sinks=2, window_size=window, is_causal=True, **x)
    exact = replace(x, **{name: getattr(x, name).double() for name in TENSORS})
    assert_close(hybrid_attention(x)[0], naive(exact)[0], "float32_forward")
    assert taken


@pytest.mark.parametrize(("window", "sinks"), SETTINGS)
def test_chunks_and_steps_hand_on_the_same_state(window, sinks, taken):
    x, exact = single(window, sinks, 150)
    expected, (_, state, _) = naive(exact)[0], hybrid_attention(exact)
    for sizes in ((150,), (1, 70, 1, 64, 14), (100, *[1] * 50)):
        output, found = in_chunks(x, sizes)
        assert_close(output, expected, "float32_forward", str(sizes))
        assert_close(found.total, state.total, "float32_forward", str(sizes))
        assert_close(found.weight, state.weight, "float32_forward", str(sizes))
        assert found.length == state.length
    assert len(taken) == 1 + 5 + 51


@pytest.mark.parametrize(("window", "sinks"), SETTINGS)
def test_the_future_and_neighbours_change_no_bit(window, sinks, taken):
    x, _ = single(window, sinks, 140)
    expected = hybrid_attention(x)[0]
    for first in (1, 63, 64, 65, 139):
        changed = {n: getattr(x, n).clone() for n in TENSORS}
        for tensor in changed.values():
            tensor[:, :, first:] = 9 * torch.rand_like(tensor[:, :, first:])
        keep = torch.cat([x.keep[:, :first], ~x.keep[:, first:]], dim=1)
        actual = hybrid_attention(replace(x, **changed, keep=keep))[0]
        assert torch.equal(actual[:, :, :first], expected[:, :, :first]), first
        assert not torch.equal(actual[:, :, first:], expected[:, :, first:])
    for row, name in enumerate(ROWS):
        others = torch.arange(len(ROWS)) != row
        changed = {n: torch.where(others.view(-1, 1, 1, 1), getattr(x, n).flip(1), getattr(x, n)) for n in TENSORS}
        assert torch.equal(hybrid_attention(replace(x, **changed))[0][row], expected[row]), name
    assert bool((expected[4] == 0).all()), "a text that is padding throughout"


def test_nothing_of_the_callers_is_changed(taken):
    x, _ = single(5, 3, 90)
    state = hybrid_attention(x)[1]
    before = {name: getattr(state, name).clone() for name in ("total", "weight", "sink_key", "sink_value")}
    kept = {name: getattr(x, name).clone() for name in TENSORS}
    hybrid_attention(replace(x, state=state))
    assert all(torch.equal(getattr(state, name), tensor) for name, tensor in before.items())
    assert all(torch.equal(getattr(x, name), tensor) for name, tensor in kept.items())
    assert len(taken) == 2


def test_views_are_read_as_they_are_meant(taken):
    """Heads and lengths swapped in memory, as models hand them over, and every second row of a longer tensor."""
    x, exact = single(5, 3, 90)
    for view in (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: t.repeat_interleave(2, dim=2)[:, :, ::2],
    ):
        actual = hybrid_attention(replace(x, **{name: view(getattr(x, name)) for name in TENSORS}))[0]
        assert_close(actual, naive(exact)[0], "float32_forward")
    assert len(taken) == 2


def test_logarithms_of_any_size(taken):
    """Logits up to ±300, whose exponentials float32 cannot hold, are cut where PyTorch's operations in float32 cut."""
    x, _ = single(5, 3, 90)
    x = replace(x, query=40 * x.query, far_query=60 * x.far_query)
    assert float(x.far_query.amax()) > 100
    learning = replace(x, key=x.key.clone().requires_grad_())
    expected = hybrid_attention(learning)[0].detach()
    assert not taken
    # Logits of 300 are rounded by 300·6e-8 each, and so are their exponentials.
    torch.testing.assert_close(hybrid_attention(x)[0], expected, rtol=2e-4, atol=2e-4)
    assert taken


def test_what_the_kernel_leaves_to_pytorch():
    x, exact = single(5, 3, 20)
    assert cpp_supports(x)
    assert not cpp_supports(exact), "float64"
    assert not cpp_supports(replace(x, is_causal=False))
    assert not cpp_supports(replace(x, dropout_p=0.1))
    assert not cpp_supports(problem(True, 5, 0, True, 20)), "a bias"
    learning = replace(x, key=x.key.clone().requires_grad_())
    assert not cpp_supports(learning)
    with torch.no_grad():
        assert cpp_supports(learning)
    with torch.device("meta"):
        assert not cpp_supports(
            replace(x, **{name: torch.empty_like(getattr(x, name), device="meta") for name in TENSORS})
        )


@pytest.mark.parametrize("window", [0, 4])
def test_rows_whose_sum_is_hardly_a_number(window):
    """Far weights beyond the headroom underflow; what is left of a row is divided, as 1 / sum would be infinite."""
    torch.manual_seed(0)
    query, key, marks = (8 * torch.randn(1, 2, 50, 16) for _ in range(3))
    value = torch.randn(1, 2, 50, 4)
    options = {"landmarks": marks[0, :, :16], "is_causal": True, "window_size": window}
    with torch.no_grad():
        actual = nystrom_attention(query, key, value, **options)
    expected = nystrom_attention(query.requires_grad_(), key, value, **options).detach()
    assert bool(actual.isfinite().all())
    # Rows of subnormal weights have a few digits; all others agree.
    different = ((actual - expected).abs().amax(-1) > 1e-3).float().mean()
    assert float(different) < 0.1
    assert float(actual.abs().max()) <= float(value.abs().max()) * 1.001, "a mean of values, whatever the weights"


@pytest.mark.parametrize("gradients", [False, True])
def test_a_window_far_wider_than_the_text_takes_no_room(gradients):
    query, marks = torch.randn(1, 1, 40, 8, requires_grad=gradients), torch.randn(1, 4, 8)
    wide, fitting = (
        nystrom_attention(query, query, query, landmarks=marks, is_causal=True, window_size=window)
        for window in (10**12, 40)
    )
    assert_close(wide, fitting.detach(), "float32_forward")


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("lift", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_what_is_no_number_at_padding_goes_nowhere(causal, lift, gradients):
    torch.manual_seed(1)
    tensors = [torch.randn(2, 2, 20, 8, requires_grad=gradients) for _ in range(3)]
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, :7] = False
    options = {"landmarks": torch.randn(2, 5, 8), "mask": mask, "lift": lift, "is_causal": causal}
    options["window_size"] = 3 if causal else 0
    expected = nystrom_attention(*tensors, **options)
    query, *others = tensors
    broken = [t.detach().clone().requires_grad_(gradients) for t in others]
    with torch.no_grad():
        broken[0][0, :, :7], broken[1][0, :, :7] = float("inf"), float("nan")
    assert torch.equal(nystrom_attention(query, *broken, **options)[:, :, 7:], expected[:, :, 7:])


def test_nothing_at_all():
    for shape in ((0, 2, 5, 8), (1, 2, 0, 8)):
        x = torch.randn(shape)
        assert nystrom_attention(x, x, x, landmarks=torch.randn(2, 3, 8), is_causal=True).shape == shape
