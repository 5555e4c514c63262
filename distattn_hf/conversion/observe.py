"""Observe a converted model's attention while it runs, and replace its output."""

from contextlib import contextmanager

from torch import Tensor

from ..core.attention import distance_attention
from ..core.inputs import ModuleCall


@contextmanager
def observed(model, observer):
    """Call `observer(state, query, key, value, call)` in place of every converted module's attention.

    Its result (B, H, N, d_v) is the attention's output; key and value come with a head for every query head.
    """
    states = list(model.attention_states.values())
    for state in states:
        state.observer = observer
    try:
        yield
    finally:
        for state in states:
            state.observer = None


def teacher_attention(query: Tensor, key: Tensor, value: Tensor, call: ModuleCall) -> Tensor:
    """Run dot-product attention of one observed call without dropout: (B, H, N, d_v)."""
    # Under autocast rotated queries and keys are float32 beside a value in half precision.
    tensors = query.to(key.dtype), key, value.to(key.dtype)
    output = distance_attention(
        *tensors, metric="dot", lam=1.0, scaling=call.scaling, mask=call.mask, position_bias=call.position_bias,
        is_causal=call.is_causal, sink_logit=call.sink_logit, softcap=call.softcap,
    )  # fmt: skip
    return output.to(value.dtype)
