"""Blocks of alike keys: their order against plain recursion, the whole against a loop, the kernel against operators."""

import math
from dataclasses import replace

import pytest
import torch

from distattn_hf import retrieval_attention
from distattn_hf.core import retrieval_blocks, retrieval_cpp, retrieval_order
from distattn_hf.core.retrieval import Search, aligned, first_keys
from distattn_hf.core.retrieval_blocks import order_of
from distattn_hf.core.retrieval_cache import KeyClusters
from distattn_hf.core.retrieval_cpp import cpp_supports, order_keys
from distattn_hf.core.retrieval_gather import caught_weight, run_retrieval, visible_keys
from distattn_hf.core.retrieval_order import (
    level_of,
    levels_of,
    of_one_unit,
    order_by_likeness,
    segments_before,
    units_before,
)
from tests.tolerances import assert_close

from .test_retrieval import Loops, by_loops, needs_kernel, padding, problem

# Units of 32 keys: 170 keys have 5, a segment of four and one more.
SMALL = Search(window_size=5, num_sinks=3, block_size=2, num_blocks=3, min_weight=0.0)
LARGE = Search(window_size=20, num_sinks=4, block_size=16, num_blocks=6, min_weight=0.0)
FEW_CANDIDATES = 5
SAMPLE = 40


@pytest.fixture
def few_candidates(monkeypatch):
    for module in (retrieval_blocks, retrieval_cpp):
        monkeypatch.setattr(module, "CANDIDATES", FEW_CANDIDATES)


@pytest.fixture(autouse=True)
def few_sampled(monkeypatch):
    """A sample that leaves out some keys of a few hundred."""
    for module in (retrieval_order, retrieval_cpp):
        monkeypatch.setattr(module, "SAMPLE", SAMPLE)


def halved(key: torch.Tensor, numbers: list[int], low: int, high: int, block: int) -> list[int]:
    """Numbers of keys, the first `low` and last `high` of which stay, in halves along where they differ most."""
    if len(numbers) <= block:
        end = len(numbers) - high
        return [*numbers[:low], *sorted(numbers[low:end]), *numbers[max(low, end) :]]
    free = numbers[low : len(numbers) - high]
    if free:
        free.sort()
        few = free[:: max(1, len(free) // SAMPLE)]
        rest = key[few] - key[few].mean(0)
        axis = rest[int(rest.square().sum(1).argmax())]
        for _ in range(2):
            axis = rest.T @ (rest @ axis)
            axis = axis / axis.abs().max() if axis.abs().max() > 0 else axis
        along = dict(zip(free, (key[free] @ axis).tolist()))
        free = sorted(free, key=lambda number: (along[number], number))
    numbers, half = [*numbers[:low], *free, *numbers[len(numbers) - high :]], len(numbers) // 2
    return [
        *halved(key, numbers[:half], min(low, half), max(0, half - (len(numbers) - high)), block),
        *halved(key, numbers[half:], max(0, low - half), min(high, half), block),
    ]


def in_order(key: torch.Tensor, keep: list[bool], start: int, count: int, pinned: int, block: int) -> list[int]:
    """The order of `count` keys from `start` on of (M, d); the first `pinned` of all stay, padding goes last."""
    pins = max(0, min(pinned - start, count))
    numbers = list(range(start, start + count))
    real = [j for n, j in enumerate(numbers) if n < pins or keep[j]]
    others = [j for n, j in enumerate(numbers) if n >= pins and not keep[j]]
    return halved(key, real + others, pins, len(others), block)


@pytest.mark.parametrize("pinned", [4, 40])
def test_the_order_is_the_recursions(pinned):
    """Of the kernel and of the operators, at each level, with padding. Breaks if a half, a pin or a level is off."""
    key, keep = torch.randn(2, 3, 200, 5), torch.rand(2, 200) < 0.8
    keep[0, 32:64] = False  # a whole unit
    orders = [make(key, keep, 2, 32, pinned, 2) for make in (order_keys, order_by_likeness)]
    for made in (orders[0], orders[1], order_by_likeness(key.double(), keep, 2, 32, pinned, 2)):
        assert made.shape == (2, 3, 2, 192)
        for row in range(2):
            for head in range(3):
                for level, size in enumerate((32, 128)):
                    expected = []
                    for start in range(0, 192 // size * size, size):
                        expected += in_order(key[row, head].double(), keep[row].tolist(), start, size, pinned, 2)
                    expected += range(len(expected), 192)
                    assert made[row, head, level].tolist() == expected


@pytest.mark.parametrize("make", [order_keys, order_by_likeness])
def test_keys_that_are_the_same_or_no_numbers_stay_in_order(make):
    keep = torch.ones(1, 64, dtype=torch.bool)
    assert make(torch.zeros(1, 1, 64, 3), keep, 2, 32, 0, 1).flatten().tolist() == list(range(64))
    key = torch.randn(1, 1, 64, 3)
    key[0, 0, 40] = math.nan
    order = make(key, keep, 2, 32, 0, 1).flatten()
    # Halves that hold it are those of the text.
    for start, count in ((0, 32), (32, 8), (40, 2), (42, 2), (44, 4), (48, 16)):
        assert sorted(order[start : start + count].tolist()) == list(range(start, start + count))
    assert order[:32].tolist() != list(range(32))


@pytest.mark.parametrize("units", [*range(23), 64, 277])
def test_segments_are_the_fewest_that_fit(units):
    """Each is a power of four at a multiple of its size; what `level_of` says is where a unit stands."""
    segments = segments_before(units)
    assert [start for start, _ in segments] == [sum(n for _, n in segments[:i]) for i in range(len(segments))]
    assert sum(count for _, count in segments) == units
    levels = levels_of(units)
    expected = []
    for start, count in segments:
        level = round(math.log(count, 4))
        assert count == 4**level
        assert start % count == 0
        assert level < levels
        # No larger one would do there.
        assert start % (4 * count) or start + 4 * count > units
        expected += [level] * count
    assert level_of(torch.arange(units), torch.tensor(units), levels).tolist() == expected


class Clusters(Loops):
    """A row and a key head as `Loops` has it, by the words of retrieval_order.py: a block is (segment, its number)."""

    def __init__(self, x, row, key_head):
        super().__init__(x, row, key_head)
        self.orders = {}

    def order(self, start: int, count: int) -> list[int]:
        """Keys of `count` units from unit `start` on, in order."""
        if (start, count) not in self.orders:
            size = self.search.block_size
            key = self.key[self.first :]
            if self.name == "cosine":
                key = key / key.norm(dim=-1, keepdim=True)
            keep = self.keep[self.first :]
            key = torch.where(torch.tensor(keep)[:, None], key, 0.0)
            pinned = -(-self.search.num_sinks // size) * size
            order = in_order(key, keep, start * 16 * size, count * 16 * size, pinned, size)
            self.orders[start, count] = [self.first + j for j in order]
        return self.orders[start, count]

    def keys_of(self, number):
        if isinstance(number, int):
            return super().keys_of(number)
        start, count, own = number
        size = self.search.block_size
        place = (own - start * 16) * size
        return [j for j in self.order(start, count)[place : place + size] if self.keep[j]]

    def end_of(self, number):
        return (number[2] + 1) * self.search.block_size

    def mean_logit(self, number) -> tuple[torch.Tensor, torch.Tensor]:
        """(G, N): the logit of the mean of a block's keys, and 2.5 times how far those of its keys lie about it.

        The variance of a coordinate in parts of 127 of the largest, a query's square in parts of 127 of its largest.
        """
        keys, query = self.key[self.keys_of(number)], self.query * self.factor
        if self.name == "cosine":
            keys = keys / keys.norm(dim=-1, keepdim=True)
            query = self.query / self.query.norm(dim=-1, keepdim=True) * self.factor
        variance, step = keys.var(0, unbiased=False), query.abs().amax(-1, keepdim=True) / 63
        part, square = variance.max() / 127, (step * 63) ** 2 / 127
        rounded = part * (variance / part.clamp_min(1e-300)).round()
        spread = square * ((query / step).round() ** 2 * 127 / 63**2).round() @ rounded
        return query @ keys.mean(0), query @ keys.mean(0) + 2.5 * spread.sqrt()

    def _stand_in(self, number):
        """As many keys, each with the mean of the block's, and the mean of its values."""
        if self.name not in ("dot", "cosine"):
            return super()._stand_in(number)
        where = self.keys_of(number)
        constant = self.factor[..., 0] if self.name == "cosine" else 0.0
        shares = torch.full((len(self.query), len(where)), 1 / len(where), dtype=self.key.dtype)
        return where, shares, self.mean_logit(number)[0] - constant + math.log(len(where))

    def seen(self, query, position):
        search, size = self.search, self.search.block_size
        own, reach = position // size, -(-(search.window_size - 1) // size)
        units = max(0, own - reach) // 16
        near = list(range(units * 16, own + 1))
        sinks = [n for n in range(-(-search.num_sinks // size)) if n < near[0]]
        read = [j for n in [*sinks, *near] for j in Loops.keys_of(self, n)]
        read = [j for j in read if j <= self.first + position]
        far, start = [], 0
        while start < units:
            count = max(4**n for n in range(5) if start % 4**n == 0 and start + 4**n <= units)
            far += [(start, count, n) for n in range(start * 16, (start + count) * 16) if n not in sinks]
            start += count
        far = [number for number in far if self.keys_of(number)]
        scores = {number: self.score(number) for number in far}
        if self.name in ("dot", "cosine"):
            means = {number: self.mean_logit(number)[0] for number in far}
            least = self.search.min_weight
            # The best by what their means promise, whatever their share; of equal ones the first.
            table = self._promises(query, far, means, read if least else [])
            ranked = sorted(far, key=lambda number: (-table[number], far.index(number)))
            looked = set(ranked[: max(FEW_CANDIDATES, self.budget)])
            mixed = {number: scores[number] if number in looked else means[number] for number in far}
            shares = self._shares(query, mixed, read if least else [])
            chosen = sorted(looked, key=lambda number: (-shares[number], far.index(number)))[: self.budget]
            chosen = [number for number in chosen if shares[number] >= least or not self.tells_shares]
        else:
            chosen = self.best(query, scores, self.budget, read)
        beyond = [number for number in far if number not in chosen] if search.far_field else []
        return sorted({*read, *(j for number in chosen for j in self.keys_of(number))}), beyond

    def _promises(self, query, far, means, near):
        """What blocks promise: the largest of the heads' logarithms of shares, among the blocks' means."""
        if not far:
            return {}
        hope = torch.stack([self.mean_logit(number)[1][:, query] for number in far], dim=-1)
        if near or len(hope) > 1:
            whole = torch.stack([means[number][:, query] for number in far], dim=-1)
            if near:
                beside = self.logits(self.key[near])[:, query]
                if self.name == "cosine":
                    beside = beside + self.factor[..., 0]
                whole = torch.cat([whole, beside], dim=-1)
            hope = hope - whole.logsumexp(-1, keepdim=True)
        return dict(zip(far, hope.amax(0).tolist()))

    def _shares(self, query, logits, near):
        """What blocks are ranked by: the largest share in any head, or the logit where there is but one."""
        if not logits:
            return {}
        table = torch.stack([row[:, query] for row in logits.values()], dim=-1)
        if near:
            beside = self.logits(self.key[near])[:, query]
            if self.name == "cosine":
                beside = beside + self.factor[..., 0]
            table = torch.cat([table, beside], dim=-1)
        wanted = table.softmax(-1).amax(0) if near or len(table) > 1 else table[0]
        return dict(zip(logits, wanted.tolist()))


@pytest.mark.parametrize(
    ("metric", "padded", "far_field", "by_weight"),
    # Every pair of choices; the loops take seconds each.
    [
        ("dot", False, True, False),
        ("dot", True, True, True),
        ("dot", True, False, False),
        ("l2", True, True, False),
        ("l2", False, False, True),
        ("cosine", True, True, True),
        ("cosine", False, False, False),
    ],
)
def test_the_definition(metric, padded, far_field, by_weight, few_candidates):
    """Also with few queries. Breaks if a segment, a candidate, a stand-in or a pin is another's."""
    search = replace(SMALL, far_field=far_field, **({"num_blocks": 8, "min_weight": 0.03} if by_weight else {}))
    keep = padding(2, 170) if padded else None
    x = problem(search=search, shape=(2, 2, 1, 170, 170), metric=metric, keep=keep)
    expected, weights = by_loops(x, Clusters)
    output, found = run_retrieval(x, return_weights=True, reference=True)
    assert_close(found, weights, "float64")
    assert_close(output, expected, "float64")
    in_text = by_loops(replace(x, search=replace(search, cluster_keys=False)))[0]
    assert (expected - in_text).abs().max() > 1e-3
    last = replace(x, inputs=replace(x.inputs, query=x.inputs.query[:, :, -9:]), beginning=None)
    last = replace(last, beginning=aligned(x.inputs.query, x.first, 2)[:, :, :64])
    assert_close(run_retrieval(last, reference=True)[0], expected[:, :, -9:], "float64")


@pytest.mark.parametrize("metric", ["dot", "l1", "cosine"])
def test_all_blocks_are_exact_attention(metric):
    x = problem(search=replace(SMALL, num_blocks=10**3), metric=metric, shape=(2, 4, 2, 170, 170), keep=padding(2, 170))
    whole = replace(x, search=replace(x.search, window_size=1000))
    assert_close(run_retrieval(x)[0], run_retrieval(whole)[0], "float64")


@needs_kernel
@pytest.mark.parametrize("num_queries", [1200, 37, 1])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("metric", ["dot", "l2", "cosine"])
@pytest.mark.parametrize("heads", [(3, 3), (6, 2), (5, 1)])
def test_the_kernel_is_the_operators(heads, metric, padded, num_queries):
    """Breaks if a panel, a place or a candidate is another's in the kernel. 1,200 keys: two levels."""
    search = replace(LARGE, **({"num_blocks": 40, "min_weight": 0.01} if padded else {}))
    keep = padding(2, 1200) if padded else None
    x = problem(
        search=search, shape=(2, *heads, num_queries, 1200), metric=metric, keep=keep, dtype=torch.float32,
        sizes=(24, 20), lam=1.0,
    )  # fmt: skip
    assert cpp_supports(x)
    assert order_of(x).shape[2] == 2
    assert_close(run_retrieval(x)[0], run_retrieval(x, reference=True)[0], "float32_forward")


@needs_kernel
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize(("block_size", "num_blocks"), [(16, 9), (32, 2)])
def test_the_kernels_candidates_are_the_operators(block_size, num_blocks, heads, few_candidates):
    """Five of 60 blocks are looked at, or as many as are read. Breaks if the kernel ranks by the mean alone, or looks
    at some keys of a block.
    """
    search = replace(LARGE, block_size=block_size, num_blocks=num_blocks)
    # Keys of some parts of the text lie farther about their means than others'.
    x = problem(search=search, shape=(2, *heads, 80, 60 * block_size), dtype=torch.float32, sizes=(17, 5), lam=1.0)
    spread = torch.rand(2, heads[1], x.inputs.key.shape[2] // 4, 1).repeat_interleave(4, dim=2) * 2
    x = replace(x, inputs=replace(x.inputs, key=x.inputs.key * spread))
    assert cpp_supports(x)
    assert_close(run_retrieval(x)[0], run_retrieval(x, reference=True)[0], "float32_forward")


@pytest.mark.parametrize("kernel", [True, False])
def test_nothing_that_comes_after_changes_what_a_query_gets(kernel):
    """Segments grow behind a query: what it sees of them must not."""
    search, sizes = (LARGE, (16, 16)) if kernel else (SMALL, (6, 5))
    length = 1200 if kernel else 170
    x = problem(search=search, shape=(1, 2, 1, length, length), dtype=torch.float32, sizes=sizes)
    whole = run_retrieval(x)[0]
    for count in (length // 2, length - 40):
        inputs = replace(
            x.inputs, query=x.inputs.query[:, :, :count], key=x.inputs.key[:, :, :count],
            value=x.inputs.value[:, :, :count],
        )  # fmt: skip
        assert_close(run_retrieval(replace(x, inputs=inputs))[0], whole[:, :, :count], "float32_forward")


def test_queries_of_one_unit():
    """Each slice's windows begin in one unit, in each row; neighbours' do not."""
    x = problem(search=SMALL, shape=(2, 2, 1, 150, 170), keep=padding(2, 170))
    parts = of_one_unit(x)
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == 150
    units = [[units_before(x, 20 + query) for query in range(part.start, part.stop)] for part in parts]
    assert all(len({tuple(row) for row in part}) == 1 for part in units)
    assert all(before[-1] != after[0] for before, after in zip(units, units[1:]))


def test_the_order_of_half_precisions_directions_is_that_of_the_cache():
    """Breaks if one of them rounds the directions of bfloat16 keys."""
    x = problem(search=SMALL, shape=(1, 2, 1, 170, 170), metric="cosine", dtype=torch.bfloat16)
    last = replace(x, inputs=replace(x.inputs, query=x.inputs.query[:, :, -1:]))
    found = KeyClusters().update(last, [], False).order[:, :, 0, :160]
    segments = torch.arange(5) // 4 == 0
    expected = order_of(x)
    levels = torch.where(segments.repeat_interleave(32), expected[:, :, 1], expected[:, :, 0])
    assert torch.equal(found, levels)


@pytest.mark.parametrize(
    "changes",
    [
        ({"num_blocks": 0}, {"num_blocks": 6}),
        ({}, {"num_sinks": 20}),
        ({}, {"far_field": False}, {"far_field": True}),
    ],
    ids=["no codes", "pins", "no summaries"],
)
def test_what_a_cache_made_by_other_options_does_not_go_on(changes):
    """Against what is made anew. Breaks if a search without codes or summaries, or of other pins, leaves its own."""
    x = problem(search=SMALL, shape=(1, 4, 2, 400, 400))
    clusters = KeyClusters()
    for number, change in enumerate(changes):
        # A unit further each time; there is room for the first of them.
        last = 168 + 32 * number
        inputs = replace(
            x.inputs, query=x.inputs.query[:, :, last - 1 : last], key=x.inputs.key[:, :, :last],
            value=x.inputs.value[:, :, :last],
        )  # fmt: skip
        now = replace(x, inputs=inputs, search=replace(x.search, **change), beginning=x.inputs.query[:, :, :64])
        found, expected = (run_retrieval(made.update(now, [], True))[0] for made in (clusters, KeyClusters()))
        assert_close(found, expected, "float64")


def test_gradients_are_those_of_what_is_read():
    """Against autograd through the weights written out, whose choice is the same."""
    x = problem(search=replace(SMALL, num_blocks=4), shape=(1, 2, 1, 120, 120))
    tensors = [t.requires_grad_() for t in (x.inputs.query, x.inputs.key, x.inputs.value)]
    output = run_retrieval(x)[0]
    probe = torch.randn_like(output)
    own = torch.autograd.grad((output * probe).sum(), tensors)
    step = 1e-6
    for number, tensor in enumerate(tensors):
        direction = torch.randn_like(tensor)
        results = []
        for sign in (1, -1):
            moved = [t.detach() for t in tensors]
            moved[number] = moved[number] + sign * step * direction
            inputs = replace(x.inputs, query=moved[0], key=moved[1], value=moved[2])
            # The order and the choice are those of where the derivative is taken.
            results.append((run_retrieval(replace(x, inputs=inputs, order=order_of(x)))[0] * probe).sum())
        found = (results[0] - results[1]) / (2 * step)
        torch.testing.assert_close((own[number] * direction).sum(), found, rtol=1e-5, atol=1e-7)


def test_fewer_keys_hold_more_of_the_weight():
    """What it is for: keys of few kinds, all through the text. As many blocks of alike keys catch more."""
    torch.manual_seed(0)
    kinds = 4 * torch.randn(60, 16)
    x = problem(search=replace(LARGE, num_blocks=4), shape=(1, 1, 1, 1500, 1500), sizes=(16, 16), dtype=torch.float32)
    own = torch.randint(60, (2, 1500))
    query, key = (kinds[numbers] + torch.randn(1500, 16) for numbers in own)
    x = replace(x, inputs=replace(x.inputs, query=query[None, None], key=key[None, None], lam=0.05, scaling=1.0))
    in_text = replace(x, search=replace(x.search, cluster_keys=False))
    shares = [caught_weight(p)[0, 0, 1400:].mean().item() for p in (x, in_text)]
    read = [visible_keys(p)(1400, 1500).float().sum(-1).mean().item() for p in (x, in_text)]
    assert shares[0] > 2 * shares[1]
    assert read[0] < read[1] + 16 * 16


def test_a_row_of_padding_and_a_short_text():
    """No unit before any window: everything is read where it stands."""
    query, key, value = torch.randn(3, 1, 2, 40, 8)
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert_close(retrieval_attention(query, key, value, is_causal=True, num_blocks=1), exact, "float32_forward")
    keep = torch.ones(2, 170, dtype=torch.bool)
    keep[0] = False
    x = problem(search=SMALL, shape=(2, 2, 1, 170, 170), keep=keep)
    output = run_retrieval(x)[0]
    assert bool((output[0] == 0).all())
    alone = replace(
        x, first=first_keys(keep[1:]),
        inputs=replace(x.inputs, query=x.inputs.query[1:], key=x.inputs.key[1:], value=x.inputs.value[1:], keep=None),
    )  # fmt: skip
    assert_close(output[1:], run_retrieval(alone)[0], "float64")
