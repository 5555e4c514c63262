"""Retrieval attention against a plain loop, its kernel against its operators, and what no query may see."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from distattn_hf import distance_attention, retrieval_attention
from distattn_hf.core import retrieval_blocks
from distattn_hf.core.derived_cache import FirstQueries
from distattn_hf.core.inputs import AttentionInputs
from distattn_hf.core.kernel_cpp_library import compiler
from distattn_hf.core.metrics import get_metric
from distattn_hf.core.retrieval import Retrieval, Search, encode, first_keys
from distattn_hf.core.retrieval_blocks import Layout
from distattn_hf.core.retrieval_cache import KeyCodes, KeySummaries
from distattn_hf.core.retrieval_cpp import cpp_supports, encode_keys, summarise_keys
from distattn_hf.core.retrieval_far import far_field, summaries_of
from distattn_hf.core.retrieval_gather import retrieval_by_operators, run_retrieval
from tests.tolerances import HALF_ERROR_RATIO, STANDARD_ERRORS, assert_close

from .cases import METRIC_CASES, metric_id

SMALL = Search(window_size=6, num_sinks=3, block_size=4, num_blocks=3, min_weight=0.0, cluster_keys=False)
# What the kernel takes: blocks of whole panels.
LARGE = Search(window_size=20, num_sinks=4, block_size=16, num_blocks=3, min_weight=0.0, cluster_keys=False)
# Queries read as many blocks as they need: some none, some all that they may.
BY_WEIGHT = {"num_blocks": 5, "min_weight": 0.05}
FORMS = ("causal", "bidirectional", "cross")
needs_kernel = pytest.mark.skipif(compiler() is None, reason="no C++ compiler here")


def problem(
    form="causal",
    search=SMALL,
    *,
    shape=(2, 4, 2, 70, 70),
    metric="dot",
    p=None,
    keep=None,
    dtype=torch.float64,
    **kwargs,
):
    """Random inputs, d = 6, d_v = 5; shape: B, H, H_kv, N, M."""
    batch, heads, key_heads, num_queries, num_keys = shape
    sizes = kwargs.pop("sizes", (6, 5))
    query, key, value = (
        torch.randn(batch, h, n, d, dtype=dtype)
        for h, n, d in (
            (heads, num_queries, sizes[0]),
            (key_heads, num_keys, sizes[0]),
            (key_heads, num_keys, sizes[1]),
        )
    )
    keep = None if keep is None or bool(keep.all()) else keep
    if form == "cross":
        search = replace(search, window_size=0, num_sinks=0)
    inputs = AttentionInputs(
        query, key, value, get_metric(metric), kwargs.pop("lam", 3.0), 0.7, p,
        None if keep is None else keep[:, None, None], None, form == "causal", **kwargs,
    )  # fmt: skip
    return Retrieval(inputs, search, first_keys(keep))


def padding(rows: int, length: int) -> torch.Tensor:
    """keep (B, M): the first row has padding to the left, the second anywhere, others none."""
    keep = torch.ones(rows, length, dtype=torch.bool)
    keep[0, : length // 5] = False
    keep[1] = torch.rand(length) < 0.7
    return keep


class Loops:
    """One row of the batch and one key head, by the definition: a query at a time, in the words of the docstring."""

    def __init__(self, x: Retrieval, row: int, key_head: int):
        inputs, self.search, self.causal = x.inputs, x.search, x.inputs.is_causal
        groups = inputs.query.shape[1] // inputs.key.shape[1]
        heads = slice(key_head * groups, (key_head + 1) * groups)
        self.query, self.key = inputs.query[row, heads], inputs.key[row, key_head]
        self.budget = (
            self.search.num_blocks if isinstance(self.search.num_blocks, int) else self.search.num_blocks[key_head]
        )
        self.num_keys = len(self.key)
        self.tells_shares = bool(self.search.min_weight and self.search.window_size and inputs.bias is None)
        keep = [True] * self.num_keys if inputs.keep is None else inputs.keep[row, 0, 0].tolist()
        self.keep, self.first = keep, keep.index(True)
        self.count = -(-(self.num_keys - self.first) // self.search.block_size)
        lam = torch.as_tensor(inputs.lam, dtype=torch.float64).expand(inputs.query.shape[1])[heads, None, None]
        self.logits = lambda keys: (
            -lam * inputs.scaling * inputs.metric.checked_distance(self.query, keys, inputs.p, fast=False)
        )
        self.name, self.factor, self.made, self.stand_ins = inputs.metric.name, lam * inputs.scaling, {}, {}

    def real(self, start: int, stop: int) -> list[int]:
        """Keys that are not padding, at places start to stop from the first one."""
        return [j for j in range(self.first + start, min(self.first + stop, self.num_keys)) if self.keep[j]]

    def keys_of(self, number) -> list[int]:
        """The real keys of a block."""
        return self.real(number * self.search.block_size, (number + 1) * self.search.block_size)

    def end_of(self, number) -> int:
        """How many keys of the row there are up to a block's end."""
        return (number + 1) * self.search.block_size

    def score(self, number) -> torch.Tensor:
        """(G, N): the largest logit of a block; of dot products as four bits of each key and seven of a query say."""
        if number not in self.made:
            keys = self.key[self.keys_of(number)]
            if self.name not in ("dot", "cosine"):
                self.made[number] = self.logits(keys).amax(-1)
                return self.made[number]
            query = self.query * self.factor
            if self.name == "cosine":
                keys = keys / keys.norm(dim=-1, keepdim=True)
                query = self.query / self.query.norm(dim=-1, keepdim=True) * self.factor
            mean, step = keys.mean(0), query.abs().amax(-1, keepdim=True) / 63
            largest = (keys - mean).abs().amax(-1, keepdim=True) / 7
            rounded = largest * ((keys - mean) / largest.clamp_min(1e-300)).round()
            self.made[number] = query @ mean + ((query / step).round() * step @ rounded.T).amax(-1)
        return self.made[number]

    def best(self, query: int, scores: dict[int, torch.Tensor], most: int, near: list[int]) -> list[int]:
        """The `most` numbers of which some query head's softmax over the scores is the largest, if it is large enough.

        near: the keys that are read in any case, of whose logits the softmax is then, too.
        """
        if not scores:
            return []
        table, least = torch.stack(list(scores.values()), dim=-1)[:, query], self.search.min_weight
        if least and self.tells_shares:
            beside = self.logits(self.key[near])[:, query]
            if self.name == "cosine":
                beside = beside + self.factor[..., 0]
            wanted = torch.cat([table, beside], dim=-1).softmax(-1)[:, : len(scores)].amax(0).tolist()
        else:
            wanted = (table.softmax(-1).amax(0) if len(table) > 1 else table[0]).tolist()
        ranked = sorted(zip(wanted, scores, strict=True), key=lambda pair: (-pair[0], pair[1]))
        return [number for share, number in ranked[:most] if share >= least or not self.tells_shares]

    def seen(self, query: int, position: int) -> list[int]:
        """The keys that a query sees which stands at this place, counted from the first key."""
        search, size = self.search, self.search.block_size
        near, sinks = [], []
        if search.window_size:
            own, reach = position // size, -(-(search.window_size - 1) // size)
            near = list(range(max(0, own - reach), (own if self.causal else min(own + reach, self.count - 1)) + 1))
            sinks = list(range(min(-(-search.num_sinks // size), self.count)))
        far = [n for n in range(self.count) if n not in near and n not in sinks]
        if self.causal:
            far, sinks = ([n for n in numbers if n < near[0]] for numbers in (far, sinks))
        scores = {n: self.score(n) for n in far if self.keys_of(n)}
        read = [j for n in {*near, *sinks} for j in self.real(n * size, (n + 1) * size)]
        read = [j for j in read if not self.causal or j <= self.first + position]
        blocks = {*near, *sinks, *self.best(query, scores, self.budget, read)}
        beyond = [n for n in scores if n not in blocks] if search.far_field and search.window_size else []
        return [j for n in sorted(blocks) for j in self.real(n * size, (n + 1) * size)], beyond

    def stand_in(self, number) -> tuple[list[int], torch.Tensor, torch.Tensor]:
        """A block's real keys, their shares (G, n) of the weight that a mean query gives it, and (G, N) logits."""
        if number not in self.stand_ins:
            self.stand_ins[number] = self._stand_in(number)
        return self.stand_ins[number]

    def _stand_in(self, number):
        where, keys, queries = self.keys_of(number), self.key, self.query
        if self.name == "cosine":
            keys, queries = (t / t.norm(dim=-1, keepdim=True) for t in (keys, queries))
        keys = keys[where]
        end = min(64, self.end_of(number)) if self.causal else self.num_keys
        center = self.query[:, self.real(0, end)].mean(1)
        if self.name == "cosine":
            center = center / center.norm(dim=-1, keepdim=True)

        def logits(query, keys):
            """(G, d), (n, d) or (G, n, d) -> (G, n)."""
            if self.name in ("dot", "cosine"):
                return ((query[:, None] * keys).sum(-1) - float(self.name == "cosine")) * self.factor[..., 0]
            distance = {"l2": lambda x: x.square().sum(-1).sqrt(), "l1": lambda x: x.abs().sum(-1)}[self.name]
            return -self.factor[..., 0] * distance(query[:, None] - keys)

        own = logits(center, keys)
        shares = own.softmax(-1)
        mean = (shares @ keys)[:, None]
        bias = own.logsumexp(-1, keepdim=True) - logits(center, mean)
        return where, shares, torch.cat([logits(q, mean) for q in queries.unbind(1)], dim=-1) + bias


def by_loops(x: Retrieval, of_row: type = Loops) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, weights) by the definition."""
    inputs = x.inputs
    batch, heads, num_queries, _ = inputs.query.shape
    key_heads, num_keys = inputs.key.shape[1:3]
    groups, weights = heads // key_heads, inputs.query.new_zeros(batch, heads, num_queries, num_keys)
    bias = torch.zeros(1) if inputs.bias is None else inputs.bias
    bias = bias.expand_as(weights)
    before = num_keys - num_queries if inputs.is_causal else 0
    for row in range(batch):
        for key_head in range(key_heads):
            loops, own = of_row(x, row, key_head), slice(key_head * groups, (key_head + 1) * groups)
            logits = loops.logits(loops.key) + bias[row, own]
            for query in range(num_queries):
                position = before + query - loops.first
                keys, beyond = loops.seen(query, position) if position >= 0 or not x.search.window_size else ([], [])
                keys = [j for j in keys if not inputs.is_causal or j <= before + query]
                if not keys:
                    continue
                others = [loops.stand_in(n) for n in beyond if inputs.bias is None]
                parts = torch.cat([logits[:, query, keys], *(far[:, query, None] for *_, far in others)], dim=-1)
                chances = parts.softmax(-1)
                weights[row, own, query, keys] = chances[:, : len(keys)]
                for (where, shares, _), chance in zip(others, chances[:, len(keys) :].unbind(1), strict=True):
                    weights[row, own, query, where] = chance[:, None] * shares
    return weights @ inputs.value.repeat_interleave(groups, dim=1), weights


@pytest.mark.parametrize("by_weight", [False, True])
@pytest.mark.parametrize("far_field", [True, False])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("metric", ["dot", "l2", "l1", "cosine"])
def test_the_definition(metric, form, padded, far_field, by_weight, monkeypatch):
    """Also with few queries, and a few queries at a time. Breaks if a block, a mean or a group is off by one."""
    monkeypatch.setattr(retrieval_blocks, "ENTRIES", 2**10)
    length = 44 if far_field and form != "cross" else 70
    shape = (2, 4, 2, length if far_field or form == "bidirectional" else 23, length)
    if form == "cross":
        shape = (2, 4, 2, 23, 70)
    keep = padding(2, length) if padded else None
    search = replace(SMALL, far_field=far_field, **(BY_WEIGHT if by_weight else {}))
    x = problem(form, search, metric=metric, keep=keep, shape=shape, lam=1.0 if by_weight else 3.0)
    output, weights = retrieval_by_operators(x, return_weights=True)
    expected, expected_weights = by_loops(x)
    rows = torch.ones(2, 1, shape[3], dtype=torch.bool)
    if padded and form == "bidirectional":
        rows[0, :, : length // 5] = False  # rows of padding mean nothing
    rows = rows.expand(2, 4, shape[3])
    assert_close(weights[rows], expected_weights[rows], "float64")
    assert_close(output[rows], expected[rows], "float64")
    if not far_field or form == "cross":
        assert (weights > 0).sum(-1).max() < 45, "the control: not all of 70 keys are seen"


def test_budgets_by_head_and_a_bias():
    bias = torch.randn(1, 4, 70, 70, dtype=torch.float64)
    x = problem(search=replace(SMALL, num_blocks=(0, 5)))
    x = replace(x, inputs=replace(x.inputs, bias=bias))
    expected, weights = by_loops(x)
    assert_close(retrieval_by_operators(x)[0], expected, "float64")
    seen = (weights[:, :, -1] > 0).sum(-1)
    assert (seen[:, :2] < seen[:, 2:]).all()
    table = torch.randn(4, 70 + 70 - 1, dtype=torch.float64)
    relative = torch.arange(70) - torch.arange(70)[:, None] + 69
    written = replace(x, inputs=replace(x.inputs, bias=table[:, relative][None]))
    lazy = replace(x, inputs=replace(x.inputs, bias=None), relative_bias=table)
    assert_close(retrieval_by_operators(lazy)[0], retrieval_by_operators(written)[0], "equal")


@pytest.mark.parametrize("metric", METRIC_CASES, ids=metric_id)
@pytest.mark.parametrize("form", FORMS)
def test_all_blocks_are_exact_attention(form, metric):
    """Every metric, grouped keys, padding: with a budget for all blocks nothing is lost."""
    name, p = metric
    keep = padding(2, 70)
    keep[:, -1] = True
    x = problem(
        form, replace(SMALL, num_blocks=50), metric=name, p=p, keep=keep, lam=torch.tensor([1.0, 2.0, 0.5, 3.0])
    )
    expected = distance_attention(
        x.inputs.query, x.inputs.key, x.inputs.value, metric=name, p=p, lam=x.inputs.lam, scaling=0.7,
        mask=keep, is_causal=form == "causal", backend="reference",
    )  # fmt: skip
    rows = keep if form != "cross" else torch.ones_like(keep)
    rows = rows[:, None].expand(2, 4, 70)
    assert_close(retrieval_by_operators(x)[0][rows], expected[rows], "float64")


@pytest.mark.parametrize("where", ["cross", "bias", "cap"])
def test_where_shares_are_not_known_blocks_are_read_by_number(where):
    """Flat attention over many blocks: none has the share, nothing stands for them, and zeros would come."""
    shape = (1, 2, 1, 3, 1000) if where == "cross" else (1, 2, 1, 1000, 1000)
    changes = {"cap": {"softcap": 5.0}, "bias": {"bias": torch.zeros(1, 1, 1, 1000, dtype=torch.float64)}}
    outputs = []
    for min_weight in (0.1, 0.0):
        torch.manual_seed(0)
        search = replace(SMALL, num_blocks=9, min_weight=min_weight)
        x = problem("cross" if where == "cross" else "causal", search, shape=shape, lam=1e-3)
        x = replace(x, inputs=replace(x.inputs, **changes.get(where, {})))
        outputs.append(retrieval_by_operators(x, return_weights=True))
    assert_close(outputs[0][0], outputs[1][0], "equal")
    assert_close(outputs[0][1].sum(-1), torch.ones(shape[0], 2, shape[3], dtype=torch.float64), "float64")
    if compiler() is not None and where == "cross":
        x = problem("cross", replace(LARGE, min_weight=0.1), shape=shape, lam=1e-3, dtype=torch.float32)
        assert cpp_supports(x)
        assert_close(run_retrieval(x)[0], retrieval_by_operators(x)[0], "float32_gradient")


@pytest.mark.parametrize("cluster_keys", [False, True])
def test_how_much_is_read_follows_what_is_looked_for(cluster_keys):
    """A query of one key alone reads its block, one of no key none; without min_weight both read all that they may."""
    query, key = torch.zeros(1, 1, 128, 8, dtype=torch.float64), torch.randn(1, 1, 128, 8, dtype=torch.float64)
    key[..., 0], key[0, 0, 40, 0] = 0.0, 30.0
    query[0, 0, 100, 0] = 1.0
    options = {"is_causal": True, "window_size": 4, "num_sinks": 1, "block_size": 4, "num_blocks": 8, "scaling": 1.0}
    for min_weight, blocks in ((0.05, (1, 0)), (0.0, (8, 8))):
        weights = retrieval_attention(
            query, key, key, **options, min_weight=min_weight, far_field=False, return_weights=True,
            cluster_keys=cluster_keys,
        )[1]  # fmt: skip
        # Of sinks, window and the query's own block; in clusters from key 64 on, the start of the window's unit.
        near = (4 + 37, 4 + 38) if cluster_keys else (4 + 4 + 1, 4 + 4 + 2)
        read = [int((weights[0, 0, row] > 1e-20).sum()) for row in (100, 101)]
        assert read == [n + 4 * count for n, count in zip(near, blocks, strict=True)]
    assert weights[0, 0, 100, 40] > 0.99


@needs_kernel
@pytest.mark.parametrize("by_weight", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("form", [*FORMS, "steps", "one step"])
@pytest.mark.parametrize("metric", METRIC_CASES, ids=metric_id)
def test_the_kernel_is_the_operators(metric, form, padded, by_weight):
    name, p = metric
    queries = {"steps": 19, "one step": 1, "cross": 40}.get(form, 300)
    keep = padding(2, 300) if padded else None
    form = "causal" if "step" in form else form
    for heads, key_heads, sizes in ((6, 2, (24, 20)), (2, 2, (16, 16)), (5, 1, (7, 9))):
        x = problem(
            form, replace(LARGE, **(BY_WEIGHT if by_weight else {})), metric=name, p=p, keep=keep,
            shape=(2, heads, key_heads, queries, 300), dtype=torch.float32,
            sizes=sizes, lam=torch.linspace(0.5, 4, heads),
        )  # fmt: skip
        if not cpp_supports(x):
            assert name == "lp"
            continue
        output, expected = run_retrieval(x)[0], retrieval_by_operators(x)[0]
        assert_close(output, expected, "float32_gradient")


@needs_kernel
@pytest.mark.parametrize("metric", ["l2", "l1", "cosine"])
def test_the_kernel_takes_softened_distances(metric):
    for softening in (2.0, torch.tensor([0.5, 2.0])):
        x = problem("causal", LARGE, metric=metric, shape=(2, 2, 2, 300, 300), dtype=torch.float32, softening=softening)
        assert cpp_supports(x)
        assert_close(run_retrieval(x)[0], retrieval_by_operators(x)[0], "float32_gradient")


@needs_kernel
def test_half_precision_is_as_good_as_pytorchs():
    """In bfloat16, where all blocks are chosen, beside scaled_dot_product_attention in bfloat16."""
    x = problem("causal", replace(LARGE, num_blocks=99), shape=(2, 4, 2, 300, 300), dtype=torch.float32, lam=1.0)
    q, k, v = (t.to(torch.bfloat16) for t in (x.inputs.query, x.inputs.key, x.inputs.value))
    own = run_retrieval(replace(x, inputs=replace(x.inputs, query=q, key=k, value=v)))[0]
    options = {"is_causal": True, "scale": 0.7, "enable_gqa": True}
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), **options)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
    error, limit = ((t.double() - exact).square().mean().sqrt() for t in (own, theirs))
    assert own.dtype == torch.bfloat16
    assert error <= HALF_ERROR_RATIO * limit


@needs_kernel
@pytest.mark.parametrize("run", ["kernel", "operators"])
def test_nothing_hidden_reaches_anything(run):
    """The future, padding (NaN in it) and batch neighbours change no bit."""
    keep = padding(3, 200)
    attend = cpp_or_operators(run)
    x = problem("causal", LARGE, shape=(3, 4, 2, 200, 200), keep=keep, dtype=torch.float32)
    expected = attend(x)
    key, value = x.inputs.key.clone(), x.inputs.value.clone()
    hidden = ~keep[:, None, :, None]
    key.masked_fill_(hidden, math.nan), value.masked_fill_(hidden, math.nan)
    assert torch.equal(attend(replace(x, inputs=replace(x.inputs, key=key, value=value))), expected)
    key, value = x.inputs.key.clone(), x.inputs.value.clone()
    key[:, :, 150:], value[:, :, 150:] = torch.randn_like(key[:, :, 150:]), torch.randn_like(value[:, :, 150:])
    changed = attend(replace(x, inputs=replace(x.inputs, key=key, value=value)))
    assert torch.equal(changed[:, :, :150], expected[:, :, :150])
    assert not torch.equal(changed[:, :, 150:], expected[:, :, 150:])
    for start in (150, 30):  # the mean of the first queries comes from none after a block
        query = x.inputs.query.clone()
        query[:, :, start:] = torch.randn_like(query[:, :, start:])
        changed = attend(replace(x, inputs=replace(x.inputs, query=query)))
        assert torch.equal(changed[:, :, :start], expected[:, :, :start])
    key = x.inputs.key.clone()
    key[1] = torch.randn_like(key[1])
    changed = attend(replace(x, inputs=replace(x.inputs, key=key)))
    assert torch.equal(changed[[0, 2]], expected[[0, 2]])


def cpp_or_operators(run):
    if run == "operators":
        return lambda x: retrieval_by_operators(x)[0]

    def by_kernel(x):
        assert cpp_supports(x)
        return run_retrieval(x)[0]

    return by_kernel


@pytest.mark.parametrize("metric", METRIC_CASES, ids=metric_id)
@pytest.mark.parametrize("form", ["causal", "bidirectional"])
@pytest.mark.parametrize("padded", [False, True])
def test_nothing_is_lost_where_all_queries_are_one(form, metric, padded):
    """The far field is exact at the query it is expanded about: exact attention, though few blocks are read."""
    name, p = metric
    lam = torch.tensor([1.0, 2.0, 0.5, 3.0])
    x = problem(form, metric=name, p=p, keep=padding(2, 70) if padded else None, lam=lam)
    query = x.inputs.query[:, :, :1].expand_as(x.inputs.query).contiguous()
    x = replace(x, inputs=replace(x.inputs, query=query))
    expected = distance_attention(
        query, x.inputs.key, x.inputs.value, metric=name, p=p, lam=lam, scaling=0.7, is_causal=form == "causal",
        mask=None if x.inputs.keep is None else x.inputs.keep[:, 0, 0], backend="reference",
    )  # fmt: skip
    rows = torch.ones(2, 4, 70, dtype=torch.bool)
    if padded:
        rows = x.inputs.keep[:, 0].expand(2, 4, 70)
    assert_close(retrieval_by_operators(x)[0][rows], expected[rows], "float64")
    without = retrieval_by_operators(replace(x, search=replace(SMALL, far_field=False)))[0]
    assert (without - expected)[rows].abs().max() > 1e-2


@pytest.mark.parametrize("metric", ["dot", "l2", "cosine"])
@pytest.mark.parametrize("form", ["causal", "bidirectional"])
def test_gradients_through_the_far_field(form, metric, monkeypatch):
    """Query (also by the mean of the first), grouped key, value, λ, sink and softening."""
    monkeypatch.setattr(retrieval_blocks, "ENTRIES", 2**8)
    x = problem(form, Search(2, 1, 2, 1), metric=metric, shape=(1, 2, 1, 9, 9), sizes=(2, 1))
    leaves = [t.clone().requires_grad_() for t in (x.inputs.query, x.inputs.key, x.inputs.value)]
    more = [torch.tensor(n, dtype=torch.float64, requires_grad=True) for n in ([0.7, 1.4], [0.5, 0.9])]
    sink = torch.randn(1, 2, 1, 1, dtype=torch.float64, requires_grad=True)

    def attention(query, key, value, lam, softening, sink):
        softening = None if metric == "dot" else softening
        inputs = replace(
            x.inputs, query=query, key=key, value=value, lam=lam, softening=softening, sink_logit=sink,
        )  # fmt: skip
        return retrieval_by_operators(replace(x, inputs=inputs))[0]

    assert torch.autograd.gradcheck(attention, (*leaves, *more, sink))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_equal_finite_differences(form, monkeypatch):
    """Query, grouped key, value, λ, bias, sink and softening, two queries at a time."""
    monkeypatch.setattr(retrieval_blocks, "ENTRIES", 2**8)
    search = Search(2, 1, 2, 1) if form != "cross" else Search(0, 0, 2, 1)
    x = problem(form, search, metric="l2", shape=(1, 2, 1, 9, 9), sizes=(2, 1))

    def leaf(tensor):
        return tensor.clone().requires_grad_()

    lam, softening = (leaf(torch.tensor(n, dtype=torch.float64)) for n in ([0.7, 1.4], [0.5, 0.9]))
    bias, sink = (leaf(torch.randn(s, dtype=torch.float64)) for s in ((1, 2, 9, 9), (1, 2, 1, 1)))
    table = leaf(torch.randn(2, 17, dtype=torch.float64))

    def attention(query, key, value, lam, softening, bias, sink, table):
        inputs = replace(
            x.inputs, query=query, key=key, value=value, lam=lam, softening=softening, bias=bias, sink_logit=sink
        )
        return retrieval_by_operators(replace(x, inputs=inputs, relative_bias=table))[0]

    leaves = [leaf(t) for t in (x.inputs.query, x.inputs.key, x.inputs.value)]
    assert torch.autograd.gradcheck(attention, (*leaves, lam, softening, bias, sink, table))


def test_dropout_is_one_for_both_passes():
    """Output is linear in the value, so Σ output·g = Σ value·gradient under one mask; and it averages to the whole."""
    x = problem("causal", shape=(1, 2, 2, 60, 60), dropout_p=0.4)
    value = x.inputs.value.requires_grad_()
    output = retrieval_by_operators(x)[0]
    g = torch.randn_like(output)
    (gradient,) = torch.autograd.grad((output * g).sum(), value)
    assert_close((gradient * value).sum(), (output * g).sum(), "float64")
    with torch.no_grad():
        draws = torch.stack([retrieval_by_operators(x)[0] for _ in range(400)])
        whole = retrieval_by_operators(replace(x, inputs=replace(x.inputs, dropout_p=0.0)))[0]
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - whole).abs() <= STANDARD_ERRORS * error + 1e-12).all()
    assert draws.std(0).max() > 1e-2


@pytest.mark.parametrize(
    "cuts", [[200], [1] * 200, [70, 1, 1, 3, 60, 65], [5, 195]], ids=["once", "single", "mixed", "two"]
)
@pytest.mark.parametrize("padded", [False, True])
def test_codes_of_a_growing_cache_are_those_of_all_keys(cuts, padded):
    """Bit for bit, however the keys came. Breaks if a block that new keys fall into is not made anew."""
    key = torch.randn(3, 2, 200, 6)
    keep = padding(3, 200) if padded else None
    if padded:
        keep[2, :77] = False
    codes, start = KeyCodes(), 0
    for count in cuts:
        start += count
        own = None if keep is None else keep[:, :start]
        first = first_keys(own)
        if own is not None and not own.any(-1).all():
            first = torch.where(own.any(-1), own.int().argmax(-1), start)
        grown = codes.update(key[:, :, :start], own, first, 4)
    x = problem("causal", shape=(3, 2, 2, 200, 200), keep=keep, dtype=torch.float32)
    x = replace(x, inputs=replace(x.inputs, key=key))
    layout = Layout(x, 1)
    expected = encode_keys(layout.key, layout.keep, 4)
    blocks = layout.blocks
    for old, new, axis in zip(grown.lines(6), expected.lines(6), (2, 2, 2, 1), strict=True):
        assert torch.equal(old.narrow(axis, 0, blocks), new.narrow(axis, 0, blocks))
    assert not grown.real.flatten(1)[:, blocks:].any()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("metric", ["dot", "l2"])
def test_summaries_of_a_growing_cache_are_those_of_all_keys(metric, padded):
    """Bit for bit, however the keys came, of the blocks that are whole. Breaks if a center takes later queries in."""
    keep = padding(3, 200) if padded else None
    x = problem("causal", shape=(3, 4, 2, 200, 200), keep=keep, dtype=torch.float32, metric=metric)
    expected = summaries_of(x).lines(50)
    for cuts in ([200], [1] * 200, [70, 1, 1, 3, 60, 65]):
        summaries, known, stop = KeySummaries(), FirstQueries(), 0
        for count in cuts:
            start, stop = stop, stop + count
            query, key, value = (
                t[:, :, a:stop] for t, a in ((x.inputs.query, start), (x.inputs.key, 0), (x.inputs.value, 0))
            )
            own = None if keep is None else keep[:, :stop]
            first = first_keys(own)
            if own is not None and not own.any(-1).all():
                first = torch.where(own.any(-1), own.int().argmax(-1), stop)
            inputs = replace(
                x.inputs, query=query, key=key, value=value, keep=None if own is None else own[:, None, None]
            )
            beginning = known.update(0, query, stop, first)
            made = summaries.update(Retrieval(inputs, x.search, first, beginning=beginning), [])
        for row in range(3):
            whole = (200 - (0 if first is None else int(first[row]))) // x.search.block_size
            for own, all_at_once in zip(made.lines(50), expected, strict=True):
                assert torch.equal(own[row, :, :whole], all_at_once[row, :, :whole])


@needs_kernel
@pytest.mark.parametrize("block", [4, 16, 48])
@pytest.mark.parametrize("size", [3, 40, 64])
def test_the_kernels_codes_are_the_operators(size, block):
    """Also of keys that lie apart in memory, and beside keys at padding that are no numbers."""
    key, keep = torch.randn(2, 1000, 3, size).transpose(1, 2), padding(2, 1000)
    keep[0, 96:192] = False
    bare = key.masked_fill(~keep[:, None, :, None], float("nan"))
    for given, own in ((key, torch.ones_like(keep)), (bare, keep)):
        made = encode_keys(given, own, block)
        expected = encode(given.masked_fill(~own[:, None, :, None], 0.0).double(), own, block)
        real = expected.lines(size)[3]
        assert torch.equal(made.lines(size)[3], real)
        for mine, theirs, tolerance in zip(made.lines(size)[:3], expected.lines(size)[:3], (1e-6, 1.0, 1e-6)):
            mine, theirs = (t.movedim(1, 2)[real].double() for t in (mine, theirs))
            # A code on the border between two may be either.
            assert ((mine - theirs).abs() > 1e-6).float().mean() < 1e-4
            assert (mine - theirs).abs().max() <= tolerance
        # What queries rank by is the variance, to half of the 127th part of the largest.
        blocks = F.pad(given.masked_fill(~own[:, None, :, None], 0.0), (0, 0, 0, -1000 % block)).unflatten(
            2, (-1, block)
        )
        is_key = F.pad(own, (0, -1000 % block)).unflatten(1, (-1, block))[:, None, :, :, None]
        count = is_key.sum(3).clamp_min(1)
        mean = blocks.sum(3) / count
        variance = torch.where(is_key, blocks - mean[:, :, :, None], 0.0).square().sum(3) / count
        coded = made.variance.transpose(3, 4).flatten(2, 3).flatten(-2)[:, :, : variance.shape[2], :size]
        off = (coded * made.spread.flatten(2)[:, :, : variance.shape[2], None] - variance).abs()
        assert bool((off <= 0.501 / 127 * variance.amax(-1, keepdim=True) + 1e-7).all())


@needs_kernel
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_the_kernels_summaries_are_the_operators(metric, padded):
    x = problem(
        search=LARGE, shape=(2, 6, 2, 300, 300), metric=metric, dtype=torch.float32, sizes=(24, 20),
        keep=padding(2, 300) if padded else None, lam=torch.linspace(0.5, 4, 6),
    )  # fmt: skip
    layout = Layout(x, 3)
    assert summarise_keys(x.inputs.query[:, :, :1], layout.key, layout.value, layout.keep, 16) is not None
    names = ("query", "key", "value", "lam")
    inputs = replace(x.inputs, **{name: getattr(x.inputs, name).double() for name in names})
    expected = far_field(
        replace(x, inputs=inputs), layout.key.double(), layout.value.double(), layout.keep, layout.numbers
    )
    made = summaries_of(x).lines(layout.blocks)
    for mine, theirs in zip(made, (expected.key, expected.bias, expected.value), strict=True):
        assert torch.equal(mine.isinf(), theirs.isinf())
        assert_close(mine.nan_to_num(neginf=0.0), theirs.nan_to_num(neginf=0.0).float(), "float32_forward")


@needs_kernel
@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_best_of_many_blocks(count):
    """Of equal ones the first; where one query head has a key head, a key that is no number is read, and seen.

    190 blocks are ranked in two passes.
    """
    x = problem(search=replace(LARGE, num_blocks=count), shape=(1, 2, 2, 3040, 3040), dtype=torch.float32)
    key = x.inputs.key.clone()
    key[:, :, 1600:] = key[:, :, :1440]
    x = replace(x, inputs=replace(x.inputs, key=key))
    assert_close(run_retrieval(x)[0], retrieval_by_operators(x)[0], "float32_gradient")
    key[:, :, 100] = float("nan")
    output = run_retrieval(replace(x, search=replace(x.search, far_field=False)))[0]
    assert output[:, :, :100].isfinite().all()
    assert output[:, :, 160:].isnan().all()


def test_a_code_is_the_key_to_four_bits():
    """Within half a step of a fifteenth of each key's range; padding looks like another key and is not real alone."""
    key, keep = torch.randn(2, 3, 50, 11, dtype=torch.float64), padding(2, 50)
    layout = Layout(problem(shape=(2, 3, 3, 50, 50), sizes=(11, 4)), 1)
    key, keep = torch.nn.functional.pad(key, (0, 0, 0, 2)), torch.nn.functional.pad(keep, (0, 2))
    codes = encode(key.masked_fill(~keep[:, None, :, None], 0.0), keep, 4)
    mean, code, scale, real = (
        t[:, :, : layout.blocks] if t.dim() > 2 else t[:, : layout.blocks] for t in codes.lines(11)
    )
    copy = (mean[:, :, :, None] + scale[..., None] * code).flatten(2, 3)
    own = keep[:, None].expand(2, 3, 52)
    error = (copy - key).abs()[own]
    assert (error <= 0.5 * scale.flatten(2)[own][:, None] + 1e-12).all()
    assert error.max() > 0.05, "the control: it is not the key itself"
    assert torch.equal(real, keep.unflatten(1, (-1, 4)).any(-1))
    assert code.abs().max() == 7


class TestArguments:
    """`retrieval_attention` itself."""

    def tensors(self):
        return torch.randn(1, 4, 40, 8), torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8)

    def test_dot_product_is_the_default_and_weights_are_those_applied(self):
        query, key, value = self.tensors()
        output, weights = retrieval_attention(
            query, key, value, is_causal=True, num_blocks=1, window_size=2, return_weights=True
        )
        assert_close(weights @ value.repeat_interleave(2, dim=1), output, "float32_forward")
        assert_close(weights.sum(-1), torch.ones(1, 4, 40), "weights_sum")
        assert not torch.allclose(
            output, torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        )
        exact = retrieval_attention(query, key, value, is_causal=True)
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        assert_close(exact, expected, "float32_forward")

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"block_size": 0}, "block_size must be an integer >= 1, got 0"),
            ({"num_blocks": -1}, "num_blocks must be an integer >= 0, or one for each key head, got -1"),
            ({"min_weight": -0.1}, "min_weight must be from 0 to below 1, got -0.1"),
            ({"min_weight": "x"}, "min_weight must be a number, got 'x'"),
            ({"num_blocks": (1, 2, 3)}, "num_blocks must be one number or one for each of 2 key heads"),
            ({"window_size": 0}, "window_size must be an integer >= 1 unless is_cross, got 0"),
            ({"window_size": -5, "is_cross": True}, "window_size must be an integer >= 0, got -5"),
            ({"metric": "l7"}, "unknown metric 'l7'"),
            ({"scaling": -1.0}, "scaling must be a positive finite number, got -1.0"),
            ({"dropout_p": 1.0}, "dropout_p must be in"),
            ({"is_causal": True, "is_cross": True}, "exclude each other"),
            ({"mask": torch.ones(1, 1, 40, 40, dtype=torch.bool)}, "mask must be padding"),
            ({"position_bias": torch.full((1, 4, 40, 40), -math.inf)}, "position_bias must be finite"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_what_cannot_be_is_refused_by_name(self, options, says):
        with pytest.raises(ValueError, match=says.replace("(", r"\(")):
            retrieval_attention(*self.tensors(), **options)

    def test_nothing_to_see(self):
        query, key, value = self.tensors()
        mask = torch.zeros(1, 40, dtype=torch.bool)
        assert not retrieval_attention(query, key, value, mask=mask, is_causal=True).any()
        empty = retrieval_attention(query[:, :, :0], key, value, is_causal=True)
        assert empty.shape == (1, 4, 0, 8)
