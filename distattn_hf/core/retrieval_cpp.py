"""Retrieval attention by the CPU's kernel."""

import ctypes

import torch
from torch import Tensor

from .kernel_cpp_library import (
    ALIGNMENT,
    FLOATS,
    KINDS,
    fields,
    kind_of,
    padded_rows,
    readable,
    run_kernel,
    strides,
    unavailable,
)
from .kernel_cpp_retrieval import SOURCE
from .metrics import BUILT_IN
from .softening import LEAST

# Numbers of metrics (see `kind_of`) that the kernel has; cosine and dot product are products of what `dot_form` gives.
_KINDS = {KINDS["l1"], KINDS["sqeuclidean"], KINDS["l2"], 3, KINDS["chebyshev"], 8, 9}
_NUMBERS = "B H G N M d dp dv_ vp causal window sinks block size groups candidates most half kind threads"


class _Retrieve(ctypes.Structure):
    _fields_ = fields(
        "q coef soft means shares coarse coarse_shares k v keep first budget o panels",
        _NUMBERS,
        {"k_stride": 3, "v_stride": 3},
    )


def cpp_supports(x) -> bool:
    """Return whether the kernel runs this `Retrieval`: inference on the CPU, no bias, cap, sink or dropout."""
    inputs, search = x.inputs, x.search
    tensors = inputs.query, inputs.key, inputs.value
    if any(t.device.type != "cpu" or 0 in t.shape for t in tensors) or not readable(*tensors, inputs.keep):
        return False
    if inputs.dropout_p > 0 or inputs.is_absolute or inputs.bias is not None or x.relative_bias is not None:
        return False
    halves = inputs.key.dtype == inputs.value.dtype == torch.bfloat16
    if not halves and not all(t.dtype == torch.float32 for t in tensors):
        return False
    if inputs.needs_grad() or search.block_size % 16 or not _is_known(inputs):
        return False
    return unavailable(SOURCE) is None


def _is_known(inputs) -> bool:
    metric = inputs.metric
    if metric is not BUILT_IN.get(metric.name):
        return False
    if metric.name in ("dot", "lifted_sqeuclidean", "cosine"):
        # A key is normalised by the ε of each query head.
        return not isinstance(inputs.softening, Tensor) or inputs.groups == 1
    return kind_of(metric.name, inputs.p, inputs.softening is not None) in _KINDS


def cpp_retrieval(x) -> Tensor:
    """Return the output (B, H, N, d_v) of a `Retrieval` with its `means`, in float32."""
    inputs, search, means = x.inputs, x.search, x.means
    batch, heads, num_queries, size = inputs.query.shape
    key_heads, num_keys = inputs.key.shape[1:3]
    query, key, value, mean, coarse = inputs.query.float(), inputs.key, inputs.value, means.mean, means.coarse
    coef = torch.as_tensor(inputs.lam, **FLOATS).detach().expand(heads) * inputs.scaling
    softening, kind, order = None, KINDS["dot"], inputs.p or 0.0
    if inputs.metric.name in ("dot", "lifted_sqeuclidean", "cosine"):
        softened = () if inputs.softening is None else (inputs.softening_column(torch.float32),)
        form = inputs.metric.dot_form
        if inputs.metric.name == "cosine":
            query, key, _, factor = form(query, key.float(), *softened)
            value = value.float()
            flat = softened[:1] if not softened or not isinstance(softened[0], Tensor) else (softened[0][:, None],)
            mean, coarse = (form(t[:0], t.mT, *flat)[1].mT.contiguous() for t in (mean, coarse))
        else:
            factor = form(query[:0], key[:0])[3]
        query = query * (factor * coef[:, None, None])
    else:
        kind = kind_of(inputs.metric.name, inputs.p, inputs.softening is not None)
        if inputs.softening is not None:
            softening = torch.as_tensor(inputs.softening, **FLOATS).detach().expand(heads).clamp_min(LEAST)
            softening = (softening / size if kind == kind_of("l1", None, True) else softening).contiguous()
    key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (key, value))
    keep = None if inputs.keep is None else inputs.keep[:, 0, 0].expand(batch, num_keys).contiguous()
    first = torch.zeros(batch, dtype=torch.long) if x.first is None else x.first.expand(batch).contiguous()
    rows = padded_rows(query)
    value_size = value.shape[-1] + -value.shape[-1] % ALIGNMENT
    output = torch.zeros(batch, heads, num_queries, value_size, **FLOATS)
    blocks = -(-num_keys // search.block_size)
    # Where most keys are read more than once, their panels are made once.
    panels = None
    if num_queries * (search.most_blocks + 1) > blocks:
        panels = torch.empty(batch, key_heads, blocks * search.block_size * size, **FLOATS)
    data = _Retrieve(
        B=batch, H=heads, G=heads // key_heads, N=num_queries, M=num_keys, d=size, dp=rows.shape[-1],
        dv_=value.shape[-1], vp=value_size, causal=inputs.is_causal, window=search.window_size,
        sinks=search.sink_blocks, block=search.block_size, size=search.mean_size, groups=mean.shape[2],
        candidates=search.looked_into, most=min(search.most_blocks, blocks), half=key.dtype == torch.bfloat16,
        kind=kind, threads=min(torch.get_num_threads(), batch * key_heads * -(-num_queries // search.block_size)),
        k_stride=strides(key), v_stride=strides(value), p=order,
    )  # fmt: skip
    run_kernel(
        SOURCE, "retrieval_forward", data, q=rows, coef=coef.contiguous(), soft=softening, means=mean,
        shares=means.weight.log(), coarse=coarse, coarse_shares=means.coarse_weight.log(), k=key, v=value, keep=keep,
        first=first, budget=search.budget(key_heads).clamp(max=blocks), o=output, panels=panels,
    )  # fmt: skip
    return output[..., : value.shape[-1]]
