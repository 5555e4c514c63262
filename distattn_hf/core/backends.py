"""Which code runs one attention problem: a table of backends, each saying what it cannot do and why."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .backend_chunked import chunked_attention
from .backend_chunked import unsupported as chunked_unsupported
from .backend_cpp import cpp_attention
from .backend_cpp import declined as cpp_declined
from .backend_cpp import unsupported as cpp_unsupported
from .backend_sdpa import sdpa_attention
from .backend_sdpa import unsupported as sdpa_unsupported
from .backend_triton import declined as triton_declined
from .backend_triton import triton_attention
from .backend_triton import unsupported as triton_unsupported
from .inputs import AttentionInputs
from .reference import reference_attention
from .registry import Registry


@dataclass(frozen=True)
class Backend:
    """`run` computes the output; `unsupported` says why it cannot for given inputs (None: it can).

    `declined` says why "auto" leaves inputs that it can run to a later backend (None: it takes them).
    """

    name: str
    run: Callable[[AttentionInputs], Tensor]
    unsupported: Callable[[AttentionInputs], str | None]
    declined: Callable[[AttentionInputs], str | None] = lambda inputs: None


BACKENDS = Registry("backend")
# In the order in which "auto" tries them.
for _backend in (
    Backend("cpp", cpp_attention, cpp_unsupported, cpp_declined),
    Backend("sdpa", sdpa_attention, sdpa_unsupported),
    Backend("triton", triton_attention, triton_unsupported, triton_declined),
    Backend("chunked", chunked_attention, chunked_unsupported),
    Backend("reference", lambda inputs: reference_attention(inputs.written_out())[0], lambda inputs: None),
):
    BACKENDS.register(_backend.name, _backend)


def validate_backend(name: str) -> str:
    """The canonical backend name, "auto" included; raises `ValueError` listing what exists."""
    if isinstance(name, str) and name.lower() == "auto":
        return "auto"
    try:
        return BACKENDS.canonical(name)
    except ValueError as error:
        raise ValueError(f"{error}, auto") from None


def choose_backend(name: str, inputs: AttentionInputs) -> Backend:
    """The backend to run: the first able one for "auto"; an explicit one that cannot run raises `ValueError`."""
    if name == "auto":
        return next(b for b in map(BACKENDS.get, BACKENDS) if b.unsupported(inputs) is None and not b.declined(inputs))
    backend = BACKENDS.get(name)
    if (reason := backend.unsupported(inputs)) is not None:
        able = [b for b in BACKENDS if BACKENDS.get(b).unsupported(inputs) is None]
        raise ValueError(f"backend {name!r} cannot run this: {reason}; use one of {', '.join(able)} or auto")
    return backend
