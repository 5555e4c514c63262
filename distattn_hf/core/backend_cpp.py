"""Fused CPU kernels for every built-in metric: online softmax, forward and backward, with memory linear in N and M."""

import math
import re
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .absolute_logits import relative_sink, row_constant, row_shift, unlifted
from .inputs import AttentionInputs
from .kernel_cpp_library import (
    attention_backward,
    attention_decode,
    attention_forward,
    in_knees,
    kind_of,
    readable,
    transformed,
    unavailable,
)
from .metrics import BUILT_IN
from .softening import knee, soft_normalize

# Up to this many queries (times the query heads that share a key head) read the keys in place.
_FEW_QUERIES = 16


def unsupported(inputs: AttentionInputs) -> str | None:
    """Return why this backend cannot run `inputs`, or None when it can."""
    inputs = unlifted(inputs)
    metric, device, dtype = inputs.metric, inputs.query.device, inputs.query.dtype
    if device.type != "cpu":
        return f"runs on the CPU only, the tensors are on {device}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"computes in float32, the tensors are {dtype}"
    kind = kind_of(metric.name, inputs.p, inputs.softening is not None)
    if kind is None or BUILT_IN.get(metric.name) is not metric:
        return f"no kernel for metric {metric.name!r}{'' if inputs.softening is None else ' softened'}"
    if metric.name in ("cosine", "dot") and inputs.softcap is None and not few_queries(inputs):
        return f"metric {metric.name!r} has a kernel for at most {_FEW_QUERIES} queries without gradients"
    if inputs.dropout_p > 0:
        return "no dropout in the kernels"
    if not torch.compiler.is_compiling() and transformed():
        return "torch.func and forward-mode derivatives cannot look into the kernels"
    return unavailable()


def declined(inputs: AttentionInputs) -> str | None:
    """Return why "auto" takes another backend although this one can run, or None."""
    if inputs.is_absolute:
        return None
    if inputs.metric.name == "dot":
        return "plain dot-product attention is left to PyTorch"
    if inputs.metric.name != "sqeuclidean" or few_queries(inputs) or inputs.is_causal or inputs.needs_grad():
        return None
    if _depends_on_query(inputs.keep) or _depends_on_query(inputs.bias):
        return None
    return "one key bias on scaled_dot_product_attention is faster here"


def _depends_on_query(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.shape[2] > 1


def few_queries(inputs: AttentionInputs) -> bool:
    """Return whether this is a decoding step: so few queries that reading the keys dominates the cost."""
    return inputs.query.shape[2] * inputs.groups <= _FEW_QUERIES and not inputs.needs_grad()


def cpp_attention(inputs: AttentionInputs) -> Tensor:
    """Compute softmax(-λ·scaling·distance(q, k) + bias)·v by the compiled kernels. Returns (B, H, N, d_v)."""
    dtype, inputs = inputs.value.dtype, _with_kernel(unlifted(inputs))
    query, key, value, heads = inputs.query, inputs.key, inputs.value, inputs.query.shape[1]
    if 0 in query.shape or 0 in key.shape or 0 in value.shape:
        # Nothing to compute: products of empty matrices have the right shape, values (0) and gradients.
        empty = inputs.written_out()
        output = empty.query @ empty.key.transpose(-1, -2) @ empty.value
        for tensor in (inputs.lam, inputs.bias, inputs.sink_logit, inputs.shift):
            if isinstance(tensor, Tensor):
                output = output + 0 * tensor.sum()
        return output.to(dtype)
    lam = inputs.lam
    if not isinstance(lam, Tensor):
        lam = torch.full((heads,), float(lam), dtype=torch.float32, device="cpu")
    coef, few = lam.float() * inputs.scaling, few_queries(inputs)
    kind = kind_of(inputs.metric.name, inputs.p, inputs.softening is not None)
    p = math.inf if inputs.metric.name == "chebyshev" else inputs.p or 0.0
    soft, left_out = _epsilon(inputs), 0.0
    if inputs.metric.name == "cosine" and few:
        query = query.float()
        query = F.normalize(query, dim=-1) if soft is None else soft_normalize(query, soft[:, None, None])
        # The kernel's distance is 1 - cos, the softened one is -cos: 1 would swallow the digits of a small cosine.
        left_out = 0.0 if soft is None else 1.0
    elif soft is not None and in_knees(kind):
        coef, soft = coef * soft, 1 / knee(soft, query.shape[3], p)
    elif soft is not None and kind == kind_of("l1", None, softened=True):
        soft = knee(soft, query.shape[3], 1.0)
    sink, shift, cap = relative_sink(inputs, left_out), None, inputs.softcap or 0.0
    sink = None if sink is None else sink.float()
    if cap:
        shift = row_shift(inputs, left_out).float()
    if few:
        kernel = attention_decode if _eager(inputs) else _decode
        tensors = query, key, value, coef, soft, inputs.keep, inputs.bias, sink, shift
        return kernel(*tensors, kind, p, cap, inputs.is_causal).to(dtype)
    key, value, bias = key.float(), value.float(), None if inputs.bias is None else inputs.bias.float()
    kernel = attention_forward if _eager(inputs) and not inputs.needs_grad() else _forward
    tensors = query.float(), key, value, coef, soft, inputs.keep, bias, sink, shift
    return kernel(*tensors, kind, p, cap, inputs.is_causal)[0].to(dtype)


def _with_kernel(inputs: AttentionInputs) -> AttentionInputs:
    """Return capped cosine attention of many queries as that of dot products, which has a kernel; others unchanged."""
    if inputs.metric.name != "cosine" or few_queries(inputs):
        return inputs
    # A key is normalised by the ε of each query head.
    inputs = inputs.written_out() if isinstance(inputs.softening, Tensor) else inputs.in_full_precision()
    shift = row_shift(inputs, row_constant(inputs.metric, inputs.query, inputs.key, inputs.softening is not None))
    epsilon = inputs.softening_column(torch.float32)
    query, key, *_ = inputs.metric.dot_form(inputs.query, inputs.key, epsilon)
    return replace(inputs, query=query, key=key, metric=BUILT_IN["dot"], softening=None, shift=shift)


def _epsilon(inputs: AttentionInputs) -> Tensor | None:
    """Return ε of each head, (H,) in float32, or None for the plain distance."""
    if inputs.softening is None:
        return None
    epsilon = inputs.softening_column(torch.float32)
    if isinstance(epsilon, Tensor):
        return epsilon[:, 0, 0]
    return torch.full(inputs.query.shape[1:2], epsilon, dtype=torch.float32, device="cpu")


def _eager(inputs: AttentionInputs) -> bool:
    """Return whether plain tensors are computed now, so that kernels can be called without the operators' overhead."""
    lam = inputs.lam if isinstance(inputs.lam, Tensor) else None
    soft = inputs.softening if isinstance(inputs.softening, Tensor) else None
    absolute = inputs.sink_logit, inputs.shift
    return readable(inputs.query, inputs.key, inputs.value, inputs.keep, inputs.bias, *absolute, lam, soft)


# Operators of their own, so that torch.compile keeps one graph around them. A copy of this file that transformers loads
# from a checkpoint registers under its own name.
_NAMESPACE = "distattn_" + re.sub(r"\W", "_", __name__)


def _decode_fake(query, key, value, coef, soft, keep, bias, sink, shift, kind, p, cap, causal):
    return query.new_empty(*query.shape[:3], value.shape[-1], dtype=torch.float32)


@torch.library.custom_op(f"{_NAMESPACE}::decode", mutates_args=())
def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coef: Tensor,
    soft: Tensor | None,
    keep: Tensor | None,
    bias: Tensor | None,
    sink: Tensor | None,
    shift: Tensor | None,
    kind: int,
    p: float,
    cap: float,
    causal: bool,
) -> Tensor:
    return attention_decode(query, key, value, coef, soft, keep, bias, sink, shift, kind, p, cap, causal)


_decode.register_fake(_decode_fake)


@torch.library.custom_op(f"{_NAMESPACE}::forward", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coef: Tensor,
    soft: Tensor | None,
    keep: Tensor | None,
    bias: Tensor | None,
    sink: Tensor | None,
    shift: Tensor | None,
    kind: int,
    p: float,
    cap: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    return attention_forward(query, key, value, coef, soft, keep, bias, sink, shift, kind, p, cap, causal)


@_forward.register_fake
def _(query, key, value, coef, soft, keep, bias, sink, shift, kind, p, cap, causal):
    return query.new_empty(*query.shape[:3], value.shape[-1]), query.new_empty(query.shape[:3])


@torch.library.custom_op(f"{_NAMESPACE}::backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coef: Tensor,
    soft: Tensor | None,
    keep: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    output: Tensor,
    lse: Tensor,
    kind: int,
    p: float,
    cap: float,
    causal: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return attention_backward(
        grad, query, key, value, coef, soft, keep, bias, shift, output, lse, kind, p, cap, causal, bias_grad
    )


@_backward.register_fake
def _(grad, query, key, value, coef, soft, keep, bias, shift, output, lse, kind, p, cap, causal, bias_grad):
    gradients = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value, coef)]
    of_bias = bias.new_empty(bias.shape if bias_grad else 0) if bias is not None else query.new_empty(0)
    return *gradients, of_bias, query.new_empty((*query.shape[:3], 1) if cap else 0)


def _save(ctx, inputs, output):
    query, key, value, coef, soft, keep, bias, sink, shift, ctx.kind, ctx.p, ctx.cap, ctx.causal = inputs
    ctx.save_for_backward(query, key, value, coef, soft, keep, bias, sink, shift, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad, _):
    query, key, value, coef, soft, keep, bias, sink, shift, output, lse = ctx.saved_tensors
    bias_grad = bias is not None and ctx.needs_input_grad[6]
    tensors, numbers = (query, key, value, coef, soft, keep, bias, shift, output, lse), (ctx.kind, ctx.p, ctx.cap)
    *grads, bias_gradient, shift_gradient = _backward(grad, *tensors, *numbers, ctx.causal, bias_grad)
    sink_gradient = None
    if sink is not None and ctx.needs_input_grad[7]:
        # Its weight is exp(sink - lse), its value 0: softmax's derivative w·(0 - grad·output).
        sink_gradient = -(sink - lse[..., None]).exp() * (grad * output).sum(-1, keepdim=True)
    absolute = sink_gradient, shift_gradient if ctx.cap else None
    return *grads, None, None, bias_gradient if bias_grad else None, *absolute, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
