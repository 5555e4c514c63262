"""The table of cases that the core tests share: every registered metric on every backend that can run it."""

from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from torch import Tensor

from distattn_hf import distance_attention
from distattn_hf.core import backend_chunked
from distattn_hf.core.backends import BACKENDS
from distattn_hf.core.inputs import AttentionInputs
from distattn_hf.core.kernel_cpp_library import unavailable
from distattn_hf.core.metrics import METRICS, get_metric

# A metric that needs an order p is tested with these: one below 2, one above.
ORDERS = (1.5, 3.0)


def _orders(metric: str) -> tuple[float | None, ...]:
    try:
        return (get_metric(metric).validate(None),)
    except ValueError:
        return ORDERS


# Of the order of the distances and norms of test tensors, so that some are softened and some are not.
SOFTENING = 2.5
# (metric, p) of everything registered: a new metric is in all tests by being registered.
METRIC_CASES = [(metric, p) for metric in METRICS for p in _orders(metric)]


@dataclass(frozen=True)
class Case:
    """`distance_attention` with metric and backend filled in; `blocks`: chunked in blocks of 16 queries, the fewest."""

    metric: str
    p: float | None
    backend: str
    blocks: bool = False
    softening: float = 0.0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, **options):
        entries = 1 if self.blocks else backend_chunked._BLOCK_ENTRIES
        with mock.patch.object(backend_chunked, "_BLOCK_ENTRIES", entries):
            return distance_attention(
                query,
                key,
                value,
                metric=self.metric,
                p=self.p,
                backend=self.backend,
                softening=self.softening,
                **options,
            )

    @property
    def reference(self) -> "Case":
        return Case(self.metric, self.p, "reference", softening=self.softening)

    def __str__(self) -> str:
        return "-".join(
            [
                metric_id((self.metric, self.p)),
                self.backend,
                *(["blocks"] if self.blocks else []),
                *(["soft"] if self.softening else []),
            ]
        )


def metric_id(case: tuple[str, float | None]) -> str:
    metric, p = case
    return metric if p is None else f"{metric}{p:g}"


# On a machine without a compiler "auto" takes other backends; every test that is not about the kernels runs there too.
needs_compiler = pytest.mark.skipif(unavailable() is not None, reason=f"CPU kernels: {unavailable()}")


def runs(
    metric: str,
    p: float | None,
    backend: str,
    *,
    grad=False,
    queries=5,
    dtype=torch.float32,
    dropout=0.0,
    softening=0.0,
    softcap=None,
) -> bool:
    """Whether `backend` says that it can run `metric` for a problem of this kind."""
    query = torch.ones(1, 1, queries, 4, dtype=dtype, requires_grad=grad)
    inputs = AttentionInputs(
        query, query, query, get_metric(metric), 1.0, 1.0, p, dropout_p=dropout, softening=softening or None,
        softcap=softcap,
    )  # fmt: skip
    return BACKENDS.get(backend).unsupported(inputs) is None


def _cases(**problem) -> list[Case]:
    return [
        Case(metric, p, backend, blocks, softening)
        for metric, p in METRIC_CASES
        for softening in ((0.0, SOFTENING) if get_metric(metric).softens else (0.0,))
        for backend in BACKENDS
        for blocks in ((False, True) if backend == "chunked" else (False,))
        if runs(metric, p, backend, softening=softening, **problem)
    ]


CASES = _cases(grad=True)

every_metric = pytest.mark.parametrize(("metric", "p"), METRIC_CASES, ids=[metric_id(c) for c in METRIC_CASES])
FLOAT64_CASES = _cases(grad=True, dtype=torch.float64)
DECODING_CASES = _cases(queries=1)
CAPPED_CASES = _cases(grad=True, softcap=1.0)
CAPPED_DECODING_CASES = _cases(queries=1, softcap=1.0)


def _but_the_reference(cases: list[Case]):
    """All but the judge itself, which test_oracle.py holds against Python loops."""
    return pytest.mark.parametrize("case", [case for case in cases if case.backend != "reference"], ids=str)


every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_backend = _but_the_reference(CASES)
every_float64_case = pytest.mark.parametrize("case", FLOAT64_CASES, ids=str)
every_float64_backend = _but_the_reference(FLOAT64_CASES)
every_dropout_case = pytest.mark.parametrize("case", _cases(grad=True, dropout=0.1), ids=str)
every_decoding_backend = _but_the_reference(DECODING_CASES)


def make_tensors(
    num_queries: int,
    num_keys: int | None = None,
    head_dim: int = 8,
    value_dim: int | None = None,
    *,
    batch: int = 2,
    heads: int = 2,
    key_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Query, key and value from N(0, 1); lengths and sizes not given are those of the query."""
    num_keys, value_dim, key_heads = num_keys or num_queries, value_dim or head_dim, key_heads or heads
    return {
        "query": torch.randn(batch, heads, num_queries, head_dim).to(dtype),
        "key": torch.randn(batch, key_heads, num_keys, head_dim).to(dtype),
        "value": torch.randn(batch, key_heads, num_keys, value_dim).to(dtype),
    }


def lambdas(heads: int) -> Tensor:
    return torch.linspace(0.5, 1.5, heads)


def some(*shape: int) -> Tensor:
    """A mask (True: keep) that hides 3 in 10, never the first key."""
    keep = torch.rand(*shape) < 0.7
    keep[..., 0] = True
    return keep


def padded(batch: int, keys: int) -> Tensor:
    """(B, M) as a tokenizer gives it: item 0 is padded on the left, item 1 on the right."""
    mask = torch.ones(batch, keys, dtype=torch.long)
    mask[0, :4] = 0
    mask[1, -5:] = 0
    return mask


def with_empty_rows(batch: int, queries: int, keys: int, first: int) -> Tensor:
    """(B, 1, N, M): query 3 of item 0 sees nothing, and in item 1 no query from `first` on."""
    keep = some(batch, 1, queries, keys)
    keep[0, :, 3] = False
    keep[1, :, first:] = False
    return keep


def upstream_gradient(output: Tensor) -> Tensor:
    """Fixed random numbers that every floating-point type holds exactly, so that all types answer one question."""
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(output.dtype)


def evaluate(function, tensors: dict[str, Tensor], dtype: torch.dtype | None = None, **options) -> dict[str, Tensor]:
    """{"output": function(**tensors), name: gradient of a fixed random combination of the outputs, ...}.

    `tensors` are raised to `dtype` (None: left) and differentiated; `options` are passed on as they are.
    """
    leaves = {name: tensor.detach().to(dtype or tensor.dtype).requires_grad_() for name, tensor in tensors.items()}
    output = function(**leaves, **options)
    gradients = torch.autograd.grad(output, list(leaves.values()), upstream_gradient(output))
    return {"output": output.detach(), **dict(zip(leaves, gradients))}
