"""The entry point of exact distance attention: check the inputs, choose a backend, run it."""

import math
from contextlib import nullcontext
from dataclasses import replace
from numbers import Real

import torch
from torch import Tensor
from transformers.utils import logging

from .absolute_logits import check_absolute
from .backend_cpp import cpp_attention, few_queries
from .backends import choose_backend, validate_backend
from .inputs import HALF, AttentionInputs, merge_masks, say_backend
from .metrics import get_metric
from .reference import reference_attention
from .softening import check_softening

logger = logging.get_logger(__name__)


def distance_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    metric: str,
    lam: float | Tensor | None = None,
    p: float | None = None,
    scaling: float | None = None,
    mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    backend: str = "auto",
    return_weights: bool = False,
    softening: float | Tensor = 0.0,
    sink_logit: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute attention whose logits are negative distances: softmax(-λ·scaling·dist(q_i, k_j) + b_ij)·V.

    Args:
        query: (B, H, N, d).
        key: (B, H_kv, M, d); H a multiple of H_kv (grouped keys: head h uses key head h // (H / H_kv)).
        value: (B, H_kv, M, d_v).
        metric: "sqeuclidean", "l2", "l1", "lp", "cosine", "chebyshev", an alias, or a name from `register_metric`.
        lam: λ > 0, one number or a tensor (H,). None: the metric's own default, at which the logits of N(0, I) vectors
            have unit deviation along a row.
        p: order of "lp", p >= 1.
        scaling: factor beside λ; None: 1/√d.
        mask: None; bool (True = keep); integer 0/1; or float, which is added to the logits (also at rank 2: give 0/1
            padding as integers or bool). Rank 2 is (B, M); rank 3 is (B, N, M); rank 4 broadcasts to (B, H, N, M).
        position_bias: float, broadcastable to (B, H, N, M), added to the logits; -inf masks.
        is_causal: query i sees keys j <= i, counted from the start of both, as in PyTorch.
        dropout_p: dropout on the weights, applied whenever it is > 0.
        backend: "auto", "cpp", "sdpa", "triton", "chunked" or "reference" (see `explain_backend`). An explicit one that
            cannot run raises.
        softening: ε >= 0, one number or a tensor (H,): below it the distance is quadratic (the formulas: softening.py).
            0: the plain distance.
        sink_logit: logit of a key without a value, which takes weight and gives nothing: (H,), or broadcastable to
            (B, H, N, 1). It compares with the logits above (of "lifted_sqeuclidean" with 2λ·scaling·q·k, of softened
            cosine with λ·scaling·cos, without the constant -λ·scaling).
        softcap: c > 0: distances' logits become c·tanh(logits / c), before mask and bias join; None: no cap.
        return_weights: also return the weights (B, H, N, M), before dropout; runs the reference backend.

    Returns:
        (B, H, N, d_v) in value's dtype; with `return_weights`, also the weights. A row in which nothing is kept is 0.

    Raises:
        ValueError: for a field out of range or shapes that do not fit, naming field, value and what is allowed.
    """
    metric = get_metric(metric)
    p = metric.validate(p)
    backend = validate_backend(backend)
    check_shapes(query, key, value)
    named = {"key": key, "value": value, "lam": lam, "mask": mask, "position_bias": position_bias}
    for name, tensor in {**named, "softening": softening, "sink_logit": sink_logit}.items():
        # A kernel would read an address of another device.
        if isinstance(tensor, Tensor) and tensor.device != query.device:
            raise ValueError(f"{name} must be on the query's device {query.device}, got {tensor.device}")
    batch, heads, num_queries, head_dim = query.shape
    if scaling is None:
        scaling = head_dim**-0.5
    elif not scaling > 0 or not math.isfinite(scaling):
        raise ValueError(f"scaling must be a positive finite number, got {scaling!r}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p!r}")
    lam = check_lambda(lam, metric, head_dim, scaling, p, heads)
    softening = check_softening(metric, softening, heads)
    sink_logit, softcap = check_absolute(sink_logit, softcap, (batch, heads, num_queries))
    shape = (batch, heads, num_queries, key.shape[-2])
    if position_bias is not None:
        if not position_bias.is_floating_point():
            raise ValueError(f"position_bias must be a floating-point tensor, got {position_bias.dtype}")
        if position_bias.dim() != 4:
            raise ValueError(f"position_bias must have rank 4 (B, H, N, M), got shape {tuple(position_bias.shape)}")
        try:
            torch.broadcast_shapes(position_bias.shape, shape)
        except RuntimeError:
            raise ValueError(
                f"position_bias of shape {tuple(position_bias.shape)} does not broadcast to (B, H, N, M)={shape}"
            ) from None
    keep, bias = merge_masks(mask, position_bias, shape)
    inputs = AttentionInputs(
        query, key, value, metric, lam, float(scaling), p, keep, bias, is_causal, dropout_p, softening=softening,
        sink_logit=sink_logit, softcap=softcap,
    )  # fmt: skip
    return run_attention(inputs, backend, return_weights)


def run_attention(
    inputs: AttentionInputs, backend: str = "auto", return_weights: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Run `distance_attention` on inputs that are already checked; converted models call this at every layer."""
    dtype = inputs.value.dtype
    # Distances and softmax need full precision: autocast would run their matmuls in half precision.
    with without_autocast(inputs.query.device.type):
        if isinstance(inputs.softening, Tensor) and inputs.softening.requires_grad:
            inputs = inputs.in_units()
        if return_weights:
            if backend not in ("auto", "reference"):
                raise ValueError(f"return_weights needs backend 'reference' or 'auto', got {backend!r}")
            output, weights = reference_attention(inputs.written_out())
            return output.to(dtype), weights
        chosen = choose_backend(backend, inputs)
        say_backend(inputs.metric.name, chosen.name, inputs.query, inputs.key)
        if inputs.dropout_p > 0 and (backend, chosen.name) == ("auto", "chunked") and not torch.compiler.is_compiling():
            _say_what_dropout_costs(inputs)
        shared = inputs.value.shape[1] != inputs.key.shape[1]
        if shared and (chosen.run is not cpp_attention or not few_queries(inputs)):
            # Only the kernel of decoding steps reads values that key heads share.
            inputs = inputs.with_value_heads()
        return chosen.run(inputs).to(dtype)


def _say_what_dropout_costs(inputs: AttentionInputs) -> None:
    """Warn, once per metric, where only dropout keeps "auto" from a fused kernel, and say the remedy."""
    kernel = choose_backend("auto", replace(inputs, dropout_p=0.0)).name
    if kernel != "chunked":
        logger.warning_once(
            f"{inputs.metric.name}: dropout on attention weights is not in the {kernel} kernels, so this trains by the "
            "slower backend 'chunked'; to train faster set it to 0, in a model's config: attention_dropout (attn_pdrop "
            "in GPT-2, attention_probs_dropout_prob in BERT, dropout_rate in T5)"
        )


def without_autocast(device: str):
    """Return a context without autocast; a null context, which is quicker, where autocast is not active."""
    active = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if active else nullcontext()


def check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise `ValueError` naming the tensor that does not fit."""
    named = (("query", query), ("key", key), ("value", value))
    for name, tensor in named:
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be (batch, heads, length, head_dim), got shape {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
    for name, tensor in named:
        if tensor.dtype != key.dtype and not (name == "query" and tensor.dtype == torch.float32 and key.dtype in HALF):
            raise ValueError(
                f"query, key and value must share a dtype (the query may be float32 beside half precision), got "
                f"query {query.dtype}, key {key.dtype}, value {value.dtype}"
            )
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(f"key {tuple(key.shape)} and value {tuple(value.shape)} must agree in batch, heads and length")
    if query.shape[0] != key.shape[0] or query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} must agree in batch and head_dim")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(f"query heads ({query.shape[1]}) must be a multiple of key heads ({key.shape[1]})")


def check_lambda(lam, metric, head_dim, scaling, p, heads) -> float | Tensor:
    if lam is None:
        return metric.default_lambda(head_dim, scaling, p)
    if isinstance(lam, Tensor):
        if lam.dim() == 0:
            lam = lam.expand(heads)
        if lam.shape != (heads,):
            raise ValueError(f"lam must be a number or a tensor of shape ({heads},), got shape {tuple(lam.shape)}")
        if not torch.compiler.is_compiling() and not bool(((lam > 0) & torch.isfinite(lam)).all()):
            raise ValueError(f"lam (λ) must be positive and finite, got {lam.detach().tolist()}")
        return lam
    if isinstance(lam, bool) or not isinstance(lam, Real) or not 0 < lam < math.inf:
        raise ValueError(f"lam (λ) must be a positive finite number or a tensor of them, got {lam!r}")
    return float(lam)
