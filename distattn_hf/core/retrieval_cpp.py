"""Retrieval attention by the CPU's kernel."""

import ctypes

import torch
from torch import Tensor
from torch.nn import functional as F

from .kernel_cpp_library import (
    ALIGNMENT,
    FLOATS,
    KINDS,
    fields,
    kernel_listeners,
    kind_of,
    padded_rows,
    readable,
    run_kernel,
    strides,
    unavailable,
)
from .kernel_cpp_retrieval import SOURCE
from .metrics import BUILT_IN
from .retrieval import CANDIDATES, PANEL, SPREADS, Codes, encode, has_codes, whole_numbers
from .retrieval_order import SAMPLE, in_order, order_by_likeness
from .softening import LEAST

# Numbers of metrics (see `kind_of`) that the kernel has; cosine and dot product are products of what `dot_form` gives.
_PLAIN = (("l1", None), ("sqeuclidean", None), ("l2", None), ("lp", 3.0), ("chebyshev", None))
_KINDS = {kind_of(*metric) for metric in _PLAIN} | {kind_of(name, None, softened=True) for name in ("l1", "l2")}
_NUMBERS = "B H G N M d dp dq dv_ vp causal window sinks block groups far_groups most half kind threads"


class _Retrieve(ctypes.Structure):
    _fields_ = fields(
        "q coef soft mean spread scale off step far_key far_bias far_value k v variance code real keep whole order "
        "first budget o panels read",
        f"{_NUMBERS} units levels candidates far_heads",
        {"k_stride": 3, "v_stride": 3},
        "p least spreads",
    )


class _Blocks(ctypes.Structure):
    _fields_ = fields(
        "k v center order keep mean spread scale key bias value variance code",
        "B H G M n d dv_ block groups centers threads",
        {"k_stride": 3, "v_stride": 3},
        "",
    )


class _Order(ctypes.Structure):
    _fields_ = fields("k keep place", "B H M d n unit block pinned levels threads sample", {"k_stride": 3}, "")


def cpp_supports(x) -> bool:
    """Return whether the kernel runs this `Retrieval`: inference on the CPU, no bias, cap, sink or dropout."""
    inputs, search = x.inputs, x.search
    tensors = inputs.query, inputs.key, inputs.value
    if any(t.device.type != "cpu" or 0 in t.shape for t in tensors) or not readable(*tensors, inputs.keep):
        return False
    if inputs.dropout_p > 0 or inputs.is_absolute or inputs.bias is not None or x.relative_bias is not None:
        return False
    if any(t.dtype == torch.float64 for t in tensors) or inputs.needs_grad() or search.block_size % 16:
        return False
    metric = inputs.metric
    if metric is not BUILT_IN.get(metric.name):
        return False
    known = has_codes(inputs) or kind_of(metric.name, inputs.p, inputs.softening is not None) in _KINDS
    return known and unavailable(SOURCE) is None


def cpp_retrieval(x) -> Tensor:
    """Return the output (B, H, N, d_v) of a `Retrieval` in float32; dot products have λ and scaling in the query."""
    inputs, search = x.inputs, x.search
    batch, heads, num_queries, size = inputs.query.shape
    key_heads, num_keys = inputs.key.shape[1:3]
    query, key, value = inputs.query.float(), inputs.key, inputs.value
    if key.dtype != value.dtype or key.dtype not in (torch.float32, torch.bfloat16):
        key, value = key.float(), value.float()
    key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (key, value))
    coef = torch.as_tensor(inputs.lam, **FLOATS).detach().expand(heads) * inputs.scaling
    is_dot = inputs.metric is BUILT_IN["dot"]
    kind = KINDS["dot"] if is_dot else kind_of(inputs.metric.name, inputs.p, inputs.softening is not None)
    tensors = {}
    if inputs.softening is not None:
        softening = torch.as_tensor(inputs.softening, **FLOATS).detach().expand(heads).clamp_min(LEAST)
        tensors["soft"] = (softening / size if kind == kind_of("l1", None, True) else softening).contiguous()
    whole_size = size + -size % 8
    if x.codes is not None:
        number, step = whole_numbers(query)
        tensors |= {name: getattr(x.codes, name) for name in ("mean", "spread", "scale", "variance", "code", "real")}
        tensors |= {"off": 8 * number.sum(-1), "step": step.contiguous()}
        tensors["whole"] = F.pad(number, (0, whole_size - size)).to(torch.int8).contiguous()
    blocks = -(-num_keys // search.block_size)
    levels, places = (0, blocks * search.block_size) if x.order is None else x.order.shape[2:]
    value_size = value.shape[-1] + -value.shape[-1] % ALIGNMENT
    # Where most keys are read more than once, their panels are made once; a look at the keys themselves reads all.
    panels, most = None, min(search.most_blocks, blocks)
    if num_queries * (most + 1) > blocks or (num_queries > search.block_size and not is_dot):
        copies = blocks * search.block_size + levels * places
        panels = torch.empty(copies * (size + value_size), **FLOATS)
    rows = padded_rows(query)
    output = torch.zeros(batch, heads, num_queries, value_size, **FLOATS)
    if x.summaries is not None:
        # Where blocks are expanded about nothing, their codes have the same means.
        names = ("bias",) if x.is_clustered and x.codes is not None else ("key", "bias")
        tensors |= {f"far_{name}": getattr(x.summaries, name).float() for name in names}
        tensors["far_value"] = padded_rows(x.summaries.value)
    data = _Retrieve(
        B=batch, H=heads, G=heads // key_heads, N=num_queries, M=num_keys, d=size, dp=rows.shape[-1], dq=whole_size,
        dv_=value.shape[-1], vp=value_size, causal=inputs.is_causal, window=search.window_size,
        sinks=search.sink_blocks, block=search.block_size, groups=0 if x.codes is None else x.codes.mean.shape[2],
        far_groups=0 if x.summaries is None else x.summaries.key.shape[2],
        most=most, half=key.dtype == torch.bfloat16, kind=kind,
        threads=min(torch.get_num_threads(), batch * key_heads * -(-num_queries // search.block_size)),
        units=places // (PANEL * search.block_size), levels=levels, candidates=CANDIDATES,
        k_stride=strides(key), v_stride=strides(value), p=inputs.p or 0.0, least=x.min_weight,
        spreads=SPREADS, far_heads=1 if x.summaries is None else x.summaries.key.shape[1],
    )  # fmt: skip
    tensors["order"] = None if x.order is None else x.order.contiguous()
    tensors["keep"] = None if inputs.keep is None else inputs.keep[:, 0, 0].expand(batch, num_keys).contiguous()
    tensors["first"] = torch.zeros(batch, dtype=torch.long) if x.first is None else x.first.expand(batch).contiguous()
    tensors["budget"] = search.budget(key_heads).clamp(max=blocks)
    if kernel_listeners:
        tensors["read"] = torch.zeros(batch, key_heads, num_queries, dtype=torch.long, device="cpu")
    run_kernel(
        SOURCE, "retrieval_forward", data, q=rows, coef=coef.contiguous(), k=key, v=value, o=output, panels=panels,
        **tensors,
    )  # fmt: skip
    return output[..., : value.shape[-1]]


def _prepares(*tensors: Tensor | None) -> bool:
    """Return whether the kernel makes codes and summaries of these tensors."""
    given = [tensor for tensor in tensors if tensor is not None]
    if any(t.device.type != "cpu" or 0 in t.shape or t.requires_grad for t in given) or not readable(*given):
        return False
    return all(t.dtype in (torch.float32, torch.bool) for t in given) and unavailable(SOURCE) is None


def _blocks(
    key: Tensor, keep: Tensor, block_size: int, heads: int, order: Tensor | None, **numbers
) -> tuple[_Blocks, int]:
    """Return the structure of keys (B, H_kv, M, d) for so many query heads, and how many panels of blocks there are."""
    batch, key_heads, num_keys, size = key.shape
    blocks = -(-(num_keys if order is None else order.shape[2]) // block_size)
    panels = -(-blocks // PANEL)
    data = _Blocks(
        B=batch, H=heads, G=heads // key_heads, M=num_keys, n=blocks, d=size, block=block_size, groups=panels,
        threads=min(torch.get_num_threads(), batch * key_heads * panels), k_stride=strides(key), **numbers,
    )  # fmt: skip
    return data, panels


def order_keys(key: Tensor, keep: Tensor, block_size: int, unit: int, pinned: int, levels: int) -> Tensor:
    """Return what `order_by_likeness` does, by the CPU's kernel where it can."""
    key = key.detach().to(torch.promote_types(key.dtype, torch.float32))
    if not _prepares(key, keep):
        return order_by_likeness(key, keep, block_size, unit, pinned, levels)
    batch, heads, num_keys, size = key.shape
    units = num_keys // unit
    key, keep = key if key.stride(-1) == 1 else key.contiguous(), keep.expand(batch, -1).contiguous()
    place = torch.empty(batch, heads, levels, units * unit, dtype=torch.long, device="cpu")
    data = _Order(
        B=batch, H=heads, M=num_keys, d=size, n=units, unit=unit, block=block_size, pinned=pinned, levels=levels,
        threads=torch.get_num_threads(), sample=SAMPLE, k_stride=strides(key),
    )  # fmt: skip
    run_kernel(SOURCE, "order_keys", data, k=key, keep=keep, place=place)
    return place


def encode_keys(key: Tensor, keep: Tensor, block_size: int, order: Tensor | None = None) -> Codes:
    """Return what `encode` does, by the CPU's kernel where it can; codes have no gradient.

    order (B, H_kv, n·b): which key stands at each place of the blocks, if not each at its own.
    """
    key = key.detach()
    # What is no key stands at the same places for all heads.
    real = keep if order is None else keep.expand(len(key), -1).gather(1, order[:, 0])
    if not _prepares(key, keep):
        return encode(key if order is None else in_order(key, order), real, block_size)
    batch, key_heads, _, size = key.shape
    key, keep = key if key.stride(-1) == 1 else key.contiguous(), keep.expand(batch, -1).contiguous()
    data, panels = _blocks(key, keep, block_size, key_heads, order)
    fill = panels * PANEL * block_size - real.shape[1]
    made = Codes(
        torch.empty(batch, key_heads, panels, size, PANEL, **FLOATS),
        torch.empty(batch, key_heads, panels, 2 * -(-size // 8), PANEL, 4, dtype=torch.uint8, device="cpu"),
        torch.empty(batch, key_heads, panels, PANEL, **FLOATS),
        torch.empty(batch, key_heads, panels, PANEL, block_size, **FLOATS),
        torch.empty(batch, key_heads, panels, PANEL, -(-size // 8), block_size, 4, dtype=torch.uint8, device="cpu"),
        F.pad(real.expand(batch, -1), (0, fill)).unflatten(1, (panels, PANEL, -1)).any(-1),
    )
    order = None if order is None else order.contiguous()
    run_kernel(
        SOURCE, "encode_keys", data, k=key, keep=keep, order=order, mean=made.mean, variance=made.variance,
        spread=made.spread, scale=made.scale, code=made.code,
    )  # fmt: skip
    return made


def summarise_keys(
    center: Tensor, key: Tensor, value: Tensor, keep: Tensor, block_size: int, order: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return key, bias and value of a `Summaries` of dot products, or None where the kernel cannot.

    center (B, H, n or 1, d), with all factors of the logits in it; key (B, H_kv, n·b, d) and value, of which keep
    (B, n·b) are real; or of any number of keys with an order (B, H_kv, n·b) of them.
    """
    if not _prepares(center, key, value, keep):
        return None
    key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (key, value))
    center, keep = center.expand(len(key), -1, -1, -1).contiguous(), keep.expand(len(key), -1).contiguous()
    heads, width = center.shape[1], value.shape[-1]
    data, panels = _blocks(
        key, keep, block_size, heads, order, dv_=width, centers=center.shape[2], v_stride=strides(value)
    )  # fmt: skip
    made = (
        torch.empty(len(key), heads, panels, key.shape[-1], PANEL, **FLOATS),
        torch.empty(len(key), heads, panels, PANEL, **FLOATS),
        torch.empty(len(key), heads, panels, PANEL, width, **FLOATS),
    )
    run_kernel(
        SOURCE, "summarise_keys", data, k=key, v=value, center=center, keep=keep, key=made[0], bias=made[1],
        value=made[2], order=None if order is None else order.contiguous(),
    )  # fmt: skip
    return made
