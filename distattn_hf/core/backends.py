"""The table of attention backends and the choice among them; each backend says what it cannot run and why."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .absolute_logits import check_absolute
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
from .kernel_cpp_library import in_onnx_export
from .metrics import get_metric
from .reference import reference_attention
from .registry import Registry
from .softening import check_softening


@dataclass(frozen=True)
class Backend:
    """A backend: `run` computes the output; `unsupported` says why it cannot for given inputs (None: it can).

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
    """Return the canonical backend name, "auto" included; raises `ValueError` listing the known ones."""
    if isinstance(name, str) and name.lower() == "auto":
        return "auto"
    try:
        return BACKENDS.canonical(name)
    except ValueError as error:
        raise ValueError(f"{error}, auto") from None


def choose_backend(name: str, inputs: AttentionInputs) -> Backend:
    """Return the backend to run: the first able one for "auto"; an explicit one that cannot raises `ValueError`."""
    if name == "auto" and in_onnx_export():
        # No kernels of one's own, and no loops whose length is that of the text.
        return next(b for b in map(BACKENDS.get, ("sdpa", "reference")) if b.unsupported(inputs) is None)
    if name == "auto":
        return next(b for b in map(BACKENDS.get, BACKENDS) if b.unsupported(inputs) is None and not b.declined(inputs))
    backend = BACKENDS.get(name)
    if (reason := backend.unsupported(inputs)) is not None:
        usable = [b for b in BACKENDS if BACKENDS.get(b).unsupported(inputs) is None]
        raise ValueError(f"backend {name!r} cannot run this: {reason}; use one of {', '.join(usable)} or auto")
    return backend


@dataclass(frozen=True)
class BackendChoice:
    """The result of `explain_backend`: `backend` runs; `reasons` says for each other one why it does not; `note`, for a
    device that this machine lacks, what was assumed."""

    backend: str
    reasons: dict[str, str]
    note: str | None = None

    def __str__(self) -> str:
        width = max(map(len, (self.backend, *self.reasons)))
        runs = "runs" if self.note is None else "would run"
        lines = [f"{self.backend:{width}}  {runs}", *(f"{name:{width}}  {why}" for name, why in self.reasons.items())]
        lines += [] if self.note is None else [self.note]
        return "\n".join(lines)


def explain_backend(
    *,
    metric: str,
    num_queries: int,
    num_keys: int | None = None,
    batch: int = 1,
    heads: int = 12,
    kv_heads: int | None = None,
    head_dim: int = 64,
    value_dim: int | None = None,
    p: float | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    mask_shape: tuple[int, ...] | None = None,
    bias_shape: tuple[int, ...] | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    requires_grad: bool = False,
    softening: float = 0.0,
    backend: str = "auto",
    sink: bool = False,
    softcap: float | None = None,
) -> BackendChoice:
    """Say which backend runs for these shapes, dtype and device, and why the others don't; nothing is computed.

    Args:
        metric, p, is_causal, dropout_p, softening, backend: as in `distance_attention`.
        num_queries, num_keys: N and M (M = N by default). batch, heads, kv_heads: B, H, H_kv (H by default).
        head_dim, value_dim: d and d_v (d by default).
        dtype, device: of query, key and value. The device need not exist here.
        mask_shape, bias_shape: of the bool mask and of the position bias, broadcastable to (B, H, N, M), if there are.
        requires_grad: whether gradients are wanted.
        sink: whether there is a learned sink (`sink_logit` of `distance_attention`). softcap: as there.

    Raises:
        ValueError: for an unknown metric or backend, for shapes that do not fit, and for an explicit backend that
            cannot run.
    """
    entry = get_metric(metric)
    p, backend, softening = entry.validate(p), validate_backend(backend), check_softening(entry, softening)
    num_keys = num_queries if num_keys is None else num_keys
    kv_heads, value_dim = heads if kv_heads is None else kv_heads, head_dim if value_dim is None else value_dim
    sizes = {"num_queries": num_queries, "num_keys": num_keys, "batch": batch, "heads": heads, "kv_heads": kv_heads}
    for name, value in {**sizes, "head_dim": head_dim, "value_dim": value_dim}.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    if heads % kv_heads:
        raise ValueError(f"heads ({heads}) must be a multiple of kv_heads ({kv_heads})")
    shape = (batch, heads, num_queries, num_keys)
    for name, dims in (("mask_shape", mask_shape), ("bias_shape", bias_shape)):
        fits = dims is None or (len(dims) == 4 and all(g in (1, s) for g, s in zip(dims, shape)))
        if not fits:
            raise ValueError(f"{name} must broadcast to (B, H, N, M)={shape}, got {tuple(dims)}")
    with FakeTensorMode():
        options = {"dtype": dtype, "device": device}
        inputs = AttentionInputs(
            torch.empty(batch, heads, num_queries, head_dim, **options),
            torch.empty(batch, kv_heads, num_keys, head_dim, **options),
            torch.empty(batch, kv_heads, num_keys, value_dim, **options),
            entry,
            1.0,
            head_dim**-0.5,
            p,
            None if mask_shape is None else torch.empty(mask_shape, dtype=torch.bool, device=device),
            None if bias_shape is None else torch.empty(bias_shape, **options),
            is_causal,
            dropout_p,
            assumed_grad=requires_grad,
            softening=softening,
            sink_logit=torch.empty(1, heads, 1, 1, **options) if sink else None,
            softcap=check_absolute(None, softcap, (batch, heads, num_queries))[1],
        )
        chosen = choose_backend(backend, inputs).name
        reasons = {}
        for name in BACKENDS:
            other = BACKENDS.get(name)
            if name != chosen:
                reason = other.unsupported(inputs) or (backend == "auto" and other.declined(inputs))
                reasons[name] = reason or ("not asked for" if backend != "auto" else f"{chosen} comes first")
    note = None
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        note = "(this machine has no GPU: so it would be on one that has, with the packages that are installed here)"
    return BackendChoice(chosen, reasons, note)
