"""Count floating-point operations: of PyTorch's operators, and of the package's CPU kernels, which it does not see."""

import threading

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..core.kernel_cpp_library import KINDS, kernel_listeners, kind_of

# Of a pair of numbers: products and sums, or difference, absolute value (power) and sum (maximum).
_OF_PRODUCTS, _OF_DIFFERENCES = 2, 3
_BY_PRODUCTS = {KINDS["dot"], KINDS["cosine"], kind_of("l2", None, softened=True)}


def _cdist(left, right, *args, out_shape=None, **kwargs) -> int:
    """Return the operations of distances (..., n, m) of vectors of size d."""
    return _OF_DIFFERENCES * _size(out_shape) * left[-1]


def _size(shape) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


class FlopCounter:
    """Counts what runs in its thread within the context: `total`, a product or sum each one operation.

    Matrix products, convolutions and PyTorch's attention by its own `FlopCounterMode` (whole triangles of causal
    attention); distances by cdist 3 operations a pair of numbers; the package's kernels by their sizes: exact
    attention without what a causal mask hides, Nyström attention its window, sinks and far state, retrieval the keys
    that were read (of its search, the look at codes of 8 bits is not counted). Elementwise operations are not.
    """

    def __init__(self):
        self.operators = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._cdist_forward: _cdist})
        self.of_kernels, self._thread = 0, threading.get_ident()

    @property
    def total(self) -> int:
        """All operations so far."""
        return self.operators.get_total_flops() + self.of_kernels

    def __enter__(self) -> "FlopCounter":
        self.operators.__enter__()
        kernel_listeners.append(self._heard)
        return self

    def __exit__(self, *error):
        kernel_listeners.remove(self._heard)
        return self.operators.__exit__(*error)

    def _heard(self, name: str, data, numbers: tuple, tensors: dict[str, Tensor]) -> None:
        if threading.get_ident() == self._thread and name in _KERNELS:
            self.of_kernels += _KERNELS[name](data, numbers, tensors)


def _pair(data, kind: int) -> int:
    """Return the operations of one query and one key: their distance, and the sum of values."""
    return (_OF_PRODUCTS if kind in _BY_PRODUCTS else _OF_DIFFERENCES) * data.d + 2 * data.dv_


def _exact(data, numbers: tuple, tensors: dict) -> int:
    pairs = data.N * data.M - data.causal * data.N * (data.N - 1) // 2
    return data.B * data.H * pairs * _pair(data, numbers[0])


def _retrieval(data, numbers: tuple, tensors: dict) -> int:
    return int(tensors["read"].sum()) * data.G * _pair(data, data.kind)


def _hybrid(data, numbers: tuple, tensors: dict) -> int:
    near = min(data.window + data.sinks, data.M)
    # Of the far field: a query's m features with the state, and a key's in it.
    far = 2 * 2 * data.m * data.dv_
    return data.B * data.H * data.N * (near * _pair(data, KINDS["dot"]) + far)


_KERNELS = {"attention_forward": _exact, "attention_decode": _exact, "retrieval_forward": _retrieval,
            "hybrid_forward": _hybrid}  # fmt: skip
