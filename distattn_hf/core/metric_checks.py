"""Checks of a user's own distance: right shape, not negative, and without parameters of its own."""

import math
from functools import partial
from types import FunctionType, MethodType, ModuleType

import torch
from torch import Tensor, nn

from .kernel_cpp_library import readable

# ‖q‖² + ‖k‖² - 2q·k or 1 - cos may round to this much below 0: relative to the largest, or absolute.
_ROUNDING, _LEAST = 1e-3, 1e-4
# How far to look into what a function refers to: function -> bound object -> list -> module.
_DEPTH = 5


def check_distances(source: str, distances: Tensor, query: Tensor, key: Tensor, signed: bool = False) -> None:
    """Raise `ValueError` for distances of another shape than (..., N, M), negative ones (unless `signed`), and NaN.

    Under torch.compile and torch.func, where values cannot be looked at, only the shape is checked.
    """
    expected = (*torch.broadcast_shapes(query.shape[:-2], key.shape[:-2]), query.shape[-2], key.shape[-2])
    if not isinstance(distances, Tensor) or tuple(distances.shape) != expected:
        received = tuple(distances.shape) if isinstance(distances, Tensor) else type(distances).__name__
        raise ValueError(f"{source} must return distances of shape {expected}, got {received}")
    if not distances.numel() or not readable(distances):
        return
    least, largest = (float(end) for end in distances.detach().aminmax())
    if math.isnan(least):
        if bool(query.isfinite().all()) and bool(key.isfinite().all()):
            raise ValueError(f"{source} must return distances, got NaN for finite vectors")
    elif not signed and least < -max(_ROUNDING * largest if largest < math.inf else 0.0, _LEAST):
        raise ValueError(
            f"{source} must return distances, which are >= 0, got {least:.4g}: the smaller, the more attention, so a "
            "similarity would turn attention upside down; return a distance, such as its largest value minus it"
        )


def refuse_parameters(name: str, metric) -> None:
    """Raise `ValueError` for a metric that refers to parameters."""
    if holds_parameters(metric):
        raise ValueError(
            f"metric {name!r} refers to parameters, which no model would train or save. λ, scale and maps of each head "
            "train by themselves; parameters of a distance belong into a layer (DistanceBasedAttention with its own "
            "compute_distance_matrix), and constants into tensors without a gradient"
        )


def holds_parameters(thing) -> bool:
    """Return whether a function or object refers to a tensor with a gradient or a module with parameters.

    Looked through are closures, defaults, globals that a function names, bound objects, attributes and containers.
    """
    seen, level = {}, [thing]
    for _ in range(_DEPTH):
        level = [part for part in level if id(part) not in seen]
        seen.update((id(part), part) for part in level)
        for part in level:
            if isinstance(part, Tensor) and (part.requires_grad or isinstance(part, nn.Parameter)):
                return True
            if isinstance(part, nn.Module) and any(True for _ in part.parameters()):
                return True
        level = [below for part in level for below in _parts(part)]
    return False


def _parts(thing) -> list:
    """Return what a function, object or container refers to."""
    if isinstance(thing, Tensor | nn.Module | type | ModuleType):
        return []
    if isinstance(thing, dict):
        return list(thing.values())
    if isinstance(thing, list | tuple | set | frozenset):
        return list(thing)
    if isinstance(thing, partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, MethodType):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, FunctionType):
        named = [thing.__globals__[name] for name in thing.__code__.co_names if name in thing.__globals__]
        argument_defaults = [*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
        return [*map(_content, thing.__closure__ or ()), *named, *argument_defaults]
    # A method says what it refers to as a function does.
    methods = [value for value in vars(type(thing)).values() if isinstance(value, FunctionType)]
    return [*getattr(thing, "__dict__", {}).values(), *methods]


def _content(cell):
    """Return what a closure's cell holds; None where it is not filled yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None
