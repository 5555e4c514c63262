"""Fused CPU kernels for every built-in metric: online softmax, forward and backward, with memory linear in N and M."""

import math
import re

import torch
from torch import Tensor
from torch.nn import functional as F

from .absolute_logits import relative_sink, unlifted
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
from .softening import soft_normalize

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
    if metric.name in ("cosine", "dot") and not few_queries(inputs):
        return f"metric {metric.name!r} has a kernel for at most {_FEW_QUERIES} queries without gradients"
    if inputs.softcap is not None:
        return "no cap on logits (softcap) in the kernels"
    if inputs.dropout_p > 0:
        return "no dropout in the kernels"
    if not torch.compiler.is_compiling() and transformed():
        return "torch.func and forward-mode derivatives cannot look into the kernels"
    return unavailable()


def declined(inputs: AttentionInputs) -> str | None:
    """Return why "auto" takes another backend although this one can run, or None."""
    if inputs.metric.name == "dot" and inputs.sink_logit is None:
        return "plain dot-product attention is left to PyTorch"
    if inputs.metric.name != "sqeuclidean" or few_queries(inputs) or inputs.is_causal or inputs.needs_grad():
        return None
    if inputs.sink_logit is not None:
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
    inputs = unlifted(inputs)
    query, key, value, dtype = inputs.query, inputs.key, inputs.value, inputs.value.dtype
    heads = query.shape[1]
    if 0 in query.shape or 0 in key.shape or 0 in value.shape:
        # Nothing to compute: products of empty matrices have the right shape, values (0) and gradients.
        empty = inputs.written_out()
        output = empty.query @ empty.key.transpose(-1, -2) @ empty.value
        for tensor in (inputs.lam, inputs.bias, inputs.sink_logit, inputs.shift):
            if isinstance(tensor, Tensor):
                output = output + 0 * tensor.sum()
        return output.to(dtype)
    lam = (
        inputs.lam
        if isinstance(inputs.lam, Tensor)
        else torch.full((heads,), float(inputs.lam), dtype=torch.float32, device="cpu")
    )
    coef = lam.float() * inputs.scaling
    kind = kind_of(inputs.metric.name, inputs.p, inputs.softening is not None)
    p = math.inf if inputs.metric.name == "chebyshev" else inputs.p or 0.0
    soft, sink = _epsilon(inputs), relative_sink(inputs)
    sink = None if sink is None else sink.float()
    if sink is not None and soft is not None and inputs.metric.name == "cosine":
        # The kernel's distance is 1 - cos, the softened one is -cos: 1 would swallow the digits of a small cosine.
        sink = sink - coef[:, None, None]
    if soft is not None and in_knees(kind):
        coef, soft = coef * soft, query.shape[3] ** (1 / p) / soft
    elif soft is not None and kind == kind_of("l1", None, softened=True):
        soft = soft / query.shape[3]
    if few_queries(inputs):
        if inputs.metric.name == "cosine":
            query = query.float()
            query = F.normalize(query, dim=-1) if soft is None else soft_normalize(query, soft[:, None, None])
        kernel = attention_decode if _eager(inputs) else _decode
        output = kernel(query, key, value, coef, soft, inputs.keep, inputs.bias, sink, kind, p, inputs.is_causal)
        return output.to(dtype)
    key, value, bias = key.float(), value.float(), None if inputs.bias is None else inputs.bias.float()
    kernel = attention_forward if _eager(inputs) and not inputs.needs_grad() else _forward
    output, _ = kernel(query.float(), key, value, coef, soft, inputs.keep, bias, sink, kind, p, inputs.is_causal)
    return output.to(dtype)


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


def _decode_fake(query, key, value, coef, soft, keep, bias, sink, kind, p, causal):
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
    kind: int,
    p: float,
    causal: bool,
) -> Tensor:
    return attention_decode(query, key, value, coef, soft, keep, bias, sink, kind, p, causal)


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
    kind: int,
    p: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    return attention_forward(query, key, value, coef, soft, keep, bias, sink, kind, p, causal)


@_forward.register_fake
def _(query, key, value, coef, soft, keep, bias, sink, kind, p, causal):
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
    output: Tensor,
    lse: Tensor,
    kind: int,
    p: float,
    causal: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return attention_backward(grad, query, key, value, coef, soft, keep, bias, output, lse, kind, p, causal, bias_grad)


@_backward.register_fake
def _(grad, query, key, value, coef, soft, keep, bias, output, lse, kind, p, causal, bias_grad):
    gradients = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value, coef)]
    return *gradients, bias.new_empty(bias.shape if bias_grad else 0) if bias is not None else query.new_empty(0)


def _save(ctx, inputs, output):
    query, key, value, coef, soft, keep, bias, sink, ctx.kind, ctx.p, ctx.causal = inputs
    ctx.save_for_backward(query, key, value, coef, soft, keep, bias, sink, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad, _):
    query, key, value, coef, soft, keep, bias, sink, output, lse = ctx.saved_tensors
    bias_grad = bias is not None and ctx.needs_input_grad[6]
    *grads, bias_gradient = _backward(
        grad, query, key, value, coef, soft, keep, bias, output, lse, ctx.kind, ctx.p, ctx.causal, bias_grad
    )
    sink_gradient = None
    if sink is not None and ctx.needs_input_grad[7]:
        # Its weight is exp(sink - lse), its value 0: softmax's derivative w·(0 - grad·output).
        sink_gradient = -(sink - lse[..., None]).exp() * (grad * output).sum(-1, keepdim=True)
    return *grads, None, None, bias_gradient if bias_grad else None, sink_gradient, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
