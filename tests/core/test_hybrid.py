"""The engine of linear attention against a plain loop, in any split into chunks, and what no query may see."""

import math
from dataclasses import fields, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distattn_hf.core import nystrom_hybrid as hybrid
from distattn_hf.core.nystrom_hybrid import HybridInputs, WindowBias, hybrid_attention
from distattn_hf.core.reference import reference_hybrid
from tests.tolerances import STANDARD_ERRORS, assert_close

SETTINGS = [
    (causal, window, sinks, bias)
    for causal in (True, False)
    for window in (0, 1, 5, 64, 70, 300)
    for sinks in (0, 3)
    for bias in (False, True)
    if window or not bias
]
every_setting = pytest.mark.parametrize(("causal", "window", "sinks", "bias"), SETTINGS)
# Enough for what does not depend on the block size, at blocks of 4.
SMALL_SETTINGS = [s for s in SETTINGS if s[1] in (0, 1, 5) or s[1:] == (300, 3, True)]
every_small_setting = pytest.mark.parametrize(("causal", "window", "sinks", "bias"), SMALL_SETTINGS)
every_small_causal_setting = pytest.mark.parametrize(
    ("window", "sinks", "bias"), [s[1:] for s in SMALL_SETTINGS if s[0]]
)
WIDE_SETTINGS = [(True, 0, 0, False), (True, 3, 2, True), (False, 0, 2, False), (False, 3, 2, True)]
ROWS = ("full", "left", "right", "holes", "nothing")


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 4 queries, a block at a time."""
    monkeypatch.setattr(hybrid, "_BLOCK", 4)
    monkeypatch.setattr(hybrid, "_PART_ENTRIES", 1)


def padding(length: int) -> torch.Tensor:
    """keep (5, M): nothing masked, padding to the left, to the right, anywhere, everywhere."""
    keep = torch.ones(len(ROWS), length, dtype=torch.bool)
    keep[1, : length // 3] = False
    keep[2, length - length // 3 :] = False
    keep[3] = torch.rand(length) < 0.6
    keep[4] = False
    return keep


def problem(causal, window, sinks, bias, length, *, keys=None, keep=None, heads=2, batch=5) -> HybridInputs:
    """Random inputs in float64, d = 6, d_v = 5, 4 landmarks."""
    keys = keys or length

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    return HybridInputs(
        query=normal(batch, heads, length, 6),
        key=normal(batch, heads, keys, 6),
        value=normal(batch, heads, keys, 5),
        keep=padding(keys)[:batch] if keep is None else keep,
        far_query=normal(batch, heads, length, 4),
        far_key=normal(batch, heads, keys, 4).abs(),
        num_sinks=sinks,
        window_size=window,
        is_causal=causal,
        bias=WindowBias(normal(heads, 2 * window - 1), normal(heads), normal(heads)) if bias else None,
    )


def naive(x: HybridInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, weights): which entry is exact, far or unseen is decided one by one, and no maximum is taken out."""
    (batch, _, length, _), keys, w = x.query.shape, x.key.shape[2], x.window_size
    unseen, exact, far = 0, 1, 2
    kinds = []
    for keep in x.keep.tolist():
        sinks = [j for j in range(keys) if keep[j]][: x.num_sinks]
        kinds.append(
            [
                [
                    unseen if not keep[j] or (x.is_causal and j > i) else exact if abs(j - i) < w or j in sinks else far
                    for j in range(keys)
                ]
                for i in range(length)
            ]
        )
    kinds = torch.tensor(kinds).view(batch, 1, length, keys)
    offset = torch.zeros(length, keys, dtype=x.query.dtype).expand(x.query.shape[1], -1, -1).clone()
    if x.bias is not None:
        for r in range(-length + 1, keys):
            entry = x.bias.behind if r <= -w else x.bias.ahead if r >= w else x.bias.near[:, r + w - 1]
            offset.diagonal(r, 1, 2).copy_(entry[:, None])
    near_weights = (torch.einsum("bhnd,bhmd->bhnm", x.query, x.key) + offset).exp()
    far_weights = torch.einsum("bhna,bhma->bhnm", x.far_query.exp(), x.far_key) * offset.exp()
    weights = near_weights * (kinds == exact) + far_weights * (kinds == far)
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total > 0, total, 1.0)
    return weights @ x.value, weights


def in_chunks(x: HybridInputs, sizes) -> tuple[torch.Tensor, hybrid.FarState]:
    """(output, final state) of a causal problem whose queries come a chunk at a time, the way a cache hands them on."""
    state, start, outputs, before = None, 0, [], None
    for size in sizes:
        new = slice(start, start + size)
        keys = (x.key[:, :, new], x.value[:, :, new], x.far_key[:, :, new], x.keep[:, new])
        if before is not None:
            keys = tuple(torch.cat([old, t], dim=1 if t.dim() == 2 else 2) for old, t in zip(before, keys))
        key, value, far_key, keep = keys
        chunk = replace(
            x, query=x.query[:, :, new], far_query=x.far_query[:, :, new], key=key, value=value, far_key=far_key,
            keep=keep, state=state,
        )  # fmt: skip
        output, state, keep = hybrid_attention(chunk)
        outputs.append(output)
        held = max(0, key.shape[2] - max(0, x.window_size - 1))
        before = (key[:, :, held:], value[:, :, held:], far_key[:, :, held:], keep[:, held:])
        start += size
    return torch.cat(outputs, dim=2), state


@every_setting
@pytest.mark.parametrize("length", [1, 7, 64, 150])
def test_engine_and_reference_equal_a_plain_loop(causal, window, sinks, bias, length):
    x = problem(causal, window, sinks, bias, length)
    expected, weights = naive(x)
    assert_close(hybrid_attention(x)[0], expected, "float64")
    output, reference_weights = reference_hybrid(x)
    assert_close(output, expected, "float64", "reference")
    assert_close(reference_weights, weights, "float64", "weights of the reference")


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize(("length", "keys"), [(5, 150), (150, 2)])
def test_cross_attention(sinks, length, keys):
    x = problem(False, 0, sinks, False, length, keys=keys)
    expected, weights = naive(x)
    assert_close(hybrid_attention(x)[0], expected, "float64")
    assert_close(reference_hybrid(x)[1], weights, "float64")


@every_small_setting
@pytest.mark.parametrize("part", [1, 2000])
def test_blocks_and_parts(causal, window, sinks, bias, part, monkeypatch):
    """Blocks of 4, and parts of a block and of several: the last of each is not full."""
    monkeypatch.setattr(hybrid, "_BLOCK", 4)
    monkeypatch.setattr(hybrid, "_PART_ENTRIES", part)
    x = problem(causal, window, sinks, bias, 43)
    assert_close(hybrid_attention(x)[0], naive(x)[0], "float64")


@pytest.mark.parametrize("window", [0, 1, 5, 20, 300])
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [[1] * 40, [40], [39, 1], [1, 39], [2, 1, 17, 1, 1, 8, 10], [23, 17]])
def test_any_split_into_chunks_is_the_whole(window, sinks, bias, sizes, small_blocks):
    x = problem(True, window, sinks, bias and window > 0, 40)
    output, state = in_chunks(x, sizes)
    assert_close(output, naive(x)[0], "float64")
    whole = hybrid_attention(x)[1]
    assert state.length == whole.length == max(0, 40 - max(0, window - 1))
    for field in fields(state)[:-1]:
        assert_close(getattr(state, field.name), getattr(whole, field.name), "float64", field.name)


def test_state_holds_the_first_kept_keys_and_sums_of_what_left_the_window():
    x = problem(True, 5, 3, False, 40)
    state = hybrid_attention(x)[1]
    for b, keep in enumerate(x.keep.tolist()):
        kept = [j for j in range(40) if keep[j]]
        assert state.sink_position[b].tolist() == (kept[:3] or [hybrid.NOWHERE] * 3), ROWS[b]
        left = [j for j in kept[3:] if j < 36]
        assert_close(state.weight[b], x.far_key[b, :, left].sum(1), "float64")
        assert_close(state.total[b], x.far_key[b, :, left].mT @ x.value[b, :, left], "float64")


@every_small_causal_setting
@pytest.mark.parametrize("split", ["whole", "prompt and steps"])
def test_the_future_changes_no_bit(window, sinks, bias, split, small_blocks):
    """Query, key, value, features and padding of every later token, in blocks and in steps."""
    x = problem(True, window, sinks, bias, 19)
    sizes = [19] if split == "whole" else [11, *[1] * 8]
    expected = in_chunks(x, sizes)[0]
    for first in range(1, 19):
        changed = {
            name: torch.cat([getattr(x, name)[:, :, :first], 9 * torch.rand_like(getattr(x, name)[:, :, first:])], 2)
            for name in ("query", "key", "value", "far_query", "far_key")
        }
        keep = torch.cat([x.keep[:, :first], torch.rand(len(ROWS), 19 - first) < 0.5], dim=1)
        actual = in_chunks(replace(x, **changed, keep=keep), sizes)[0]
        assert torch.equal(actual[:, :, :first], expected[:, :, :first]), first
        assert not torch.equal(actual[:, :, first:], expected[:, :, first:])


@every_small_setting
def test_padding_and_neighbours_change_no_bit(causal, window, sinks, bias, small_blocks):
    x = problem(causal, window, sinks, bias, 23)
    expected = hybrid_attention(x)[0]
    hidden = ~x.keep[:, None, :, None]
    # As queries, too: their own rows may change and no other.
    garbage = {
        name: torch.where(hidden, 9 * torch.rand_like(getattr(x, name)), getattr(x, name))
        for name in ("query", "key", "value", "far_query", "far_key")
    }
    actual = hybrid_attention(replace(x, **garbage))[0]
    kept = x.keep[:, None].expand(-1, 2, -1)
    assert torch.equal(actual[kept], expected[kept])

    names = ("query", "key", "value", "far_query", "far_key", "keep")
    for row, name in enumerate(ROWS):
        others = torch.arange(len(ROWS)) != row
        changed = {n: getattr(x, n).clone() for n in names}
        for tensor in changed.values():
            tensor[others] = tensor[others].flip(0, 1)
        actual = hybrid_attention(replace(x, **changed))[0]
        assert torch.equal(actual[row], expected[row]), name
        assert not torch.equal(actual, expected)


@every_small_setting
def test_rows_that_see_nothing(causal, window, sinks, bias, small_blocks):
    """Left padding of a causal problem, and a row of the batch that is padding throughout."""
    x = problem(causal, window, sinks, bias, 12)
    names = ("query", "key", "value", "far_query", "far_key")
    leaves = {name: getattr(x, name).requires_grad_() for name in names}
    for path in (hybrid_attention, reference_hybrid):
        output = path(replace(x, **leaves))[0]
        assert bool((output[4] == 0).all())
        blind = (x.keep.cumsum(-1) == 0) if causal else ~x.keep.any(-1, keepdim=True).expand_as(x.keep)
        assert bool(((output == 0).all(-1) == blind[:, None]).all())
        gradients = torch.autograd.grad(output.square().sum(), leaves.values(), materialize_grads=True)
        for name, gradient in zip(names, gradients):
            assert bool(gradient.isfinite().all()), name
            if name in ("key", "value", "far_key"):
                assert bool((gradient[~x.keep[:, None].expand(-1, 2, -1)] == 0).all()), name


# Bidirectional attention has no state to hand on.
GRADIENT_SETTINGS = [
    (causal, *setting, sizes)
    for causal in (True, False)
    for setting in ((0, 0, False), (0, 2, False), (1, 0, True), (3, 2, True), (30, 2, True))
    for sizes in (([9], [5, 1, 3]) if causal else ([9],))
]


@pytest.mark.parametrize(("causal", "window", "sinks", "bias", "sizes"), GRADIENT_SETTINGS)
def test_gradients_equal_finite_differences(causal, window, sinks, bias, sizes, small_blocks):
    """All float inputs, through the carried state as well; the keys have holes."""
    keep = torch.tensor([[True, False, True, True, False, True, True, True, True]])
    x = problem(causal, window, sinks, bias, 9, keep=keep, heads=1, batch=1)
    names = ["query", "key", "value", "far_query", "far_key"]
    tensors = [getattr(x, name)[..., :2] for name in names]
    tensors[-1] = tensors[-1] + 0.1
    if bias:
        tensors += [x.bias.near, x.bias.behind, x.bias.ahead]

    def attention(*leaves):
        y = replace(x, **dict(zip(names, leaves)), bias=WindowBias(*leaves[5:]) if bias else None)
        return in_chunks(y, sizes)[0] if causal else hybrid_attention(y)[0]

    assert torch.autograd.gradcheck(attention, [t.detach().clone().requires_grad_() for t in tensors])


@pytest.mark.parametrize(("causal", "window", "sinks", "bias"), WIDE_SETTINGS)
def test_dropout(causal, window, sinks, bias, small_blocks):
    """The mean over draws is the output without dropout; a batch of copies is as good as many draws."""
    draws = 3000
    x = problem(causal, window, sinks, bias, 11, keep=torch.ones(1, 11, dtype=torch.bool), heads=1, batch=1)
    expected = hybrid_attention(x)[0]
    names = ("query", "key", "value", "far_query", "far_key", "keep")
    copies = replace(x, **{n: getattr(x, n).expand(draws, *getattr(x, n).shape[1:]) for n in names}, dropout_p=0.3)
    samples = hybrid_attention(copies)[0]
    deviation = samples.std(0) / math.sqrt(draws)
    assert bool((deviation > 0).all())
    assert float(((samples.mean(0) - expected[0]).abs() / deviation).max()) < STANDARD_ERRORS
    # Without dropout nothing is drawn.
    before = torch.get_rng_state()
    assert torch.equal(hybrid_attention(replace(x, dropout_p=0.0))[0], expected)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("causal", "query", "together"),
    [(True, 11, [range(8)]), (False, 5, [range(4), range(8, 12)])],
    ids=["causal", "bidirectional"],
)
def test_dropout_of_the_far_field_drops_landmarks(causal, query, together, small_blocks):
    """One landmark: all keys outside a query's block, on one side, are dropped together or scaled together."""
    draws, p = 400, 0.3
    keep = torch.ones(1, 12, dtype=torch.bool).expand(draws, -1)
    x = problem(causal, 1, 0, False, 12, keep=keep, heads=1, batch=draws)
    one = {"far_query": x.far_query[..., :1], "far_key": x.far_key[..., :1]}
    x = replace(x, **one, value=torch.eye(12, dtype=torch.float64).expand(draws, 1, 12, 12))
    ratio = (hybrid_attention(replace(x, dropout_p=p))[0] / hybrid_attention(x)[0])[:, 0, query]
    for keys in together:
        part = ratio[:, keys]
        assert_close(part, part[:, :1].expand_as(part), "float64")
        dropped = part[:, 0] == 0
        assert_close(part[~dropped, 0], torch.full_like(part[~dropped, 0], 1 / (1 - p)), "float64")
        assert abs(float(dropped.double().mean()) - p) < STANDARD_ERRORS * math.sqrt(p * (1 - p) / draws)


class _Largest(TorchDispatchMode):
    """Entries of the largest tensor that any operation made."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return result


@pytest.mark.parametrize(("causal", "window", "sinks", "bias"), WIDE_SETTINGS)
def test_no_tensor_grows_faster_than_the_length(causal, window, sinks, bias):
    """Forward and backward; 4 times the length would make an (N, M) tensor 16 times as large."""
    largest = []
    for length in (512, 2048):
        keep = torch.ones(1, length, dtype=torch.bool)
        x = problem(causal, window, sinks, bias, length, keep=keep, heads=1, batch=1)
        leaves = {n: getattr(x, n).requires_grad_() for n in ("query", "key", "value", "far_query", "far_key")}
        with _Largest() as mode:
            hybrid_attention(replace(x, **leaves))[0].sum().backward()
        largest.append(mode.entries)
        assert mode.entries < length * length
    assert largest[1] <= 4.5 * largest[0]
