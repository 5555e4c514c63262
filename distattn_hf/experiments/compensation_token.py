"""A control of long texts: sinks, window, and one key and value for all that stands between them."""

import copy

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

_CHUNK = 256
# Of configs: what this attention does not do.
_OWN = ("attn_logit_softcapping", "sliding_window", "attention_chunk_size")


def attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int, sinks: int) -> Tensor:
    """Return causal attention (B, H, N, d_v) of query (B, H, N, d), key and value (B, H_kv, N, d) of the same tokens.

    Query i reads the first `sinks` keys, the last `window`, and of the n others before it one mean key k̄ with the mean
    value, whose logit is q·k̄·scaling + log n: the compensation token of RazorAttention (Tang et al. 2024), in every
    head, and of each query's own past rather than of the prompt.
    """
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    position = torch.arange(length, device=query.device)
    count = (position + 1 - window - sinks).clamp_min(0)
    between = slice(sinks, length)
    means = []
    for tensor in (key, value):
        # Of the keys sinks .. sinks + count - 1; summed in float64, as a running sum loses digits.
        total = F.pad(tensor[:, :, between].double().cumsum(2), (0, 0, 1, 0))
        mean = total[:, :, count] / count.clamp_min(1)[:, None]
        means.append(mean.to(tensor.dtype).repeat_interleave(groups, 1))
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    outputs = []
    for start in range(0, length, _CHUNK):
        rows = slice(start, min(start + _CHUNK, length))
        first = max(sinks, start - window + 1)
        columns = torch.cat((position[: min(sinks, rows.stop)], position[first : rows.stop]))
        distance = position[rows, None] - columns
        seen = (distance >= 0) & ((distance < window) | (columns < sinks))
        logits = query[:, :, rows] @ key[:, :, columns].mT * scaling
        logits = logits.masked_fill(~seen, -torch.inf)
        rest = (query[:, :, rows] * means[0][:, :, rows]).sum(-1, keepdim=True) * scaling
        rest = rest + count[rows, None].to(rest.dtype).log()
        weights = torch.cat((logits, rest), -1).softmax(-1, dtype=torch.float32).to(value.dtype)
        outputs.append(weights[..., :-1] @ value[:, :, columns] + weights[..., -1:] * means[1][:, :, rows])
    return torch.cat(outputs, 2)


def compensated(model, window: int, sinks: int):
    """Return a copy of a causal model of transformers' attention interface with this attention in every layer.

    It reads whole texts without padding: a cache or a mask raises `ValueError`, and so does, before anything is read, a
    model whose attention has a cap, learned sinks or a window of its own.
    """
    text_config = model.config.get_text_config()
    own = [name for name in _OWN if getattr(text_config, name, None)]
    if own or any(hasattr(module, "sinks") for module in model.modules()):
        raise ValueError(
            f"the compensation token is for full attention alone, and {type(model).__name__} has "
            f'{", ".join(own) or "sinks"}: leave "compensation" out of students'
        )

    def forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        if attention_mask is not None or query.shape[2] != key.shape[2]:
            raise ValueError("the compensation token is a control for whole texts, without a cache and padding")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attention(query, key, value, scaling, window, sinks).transpose(1, 2).contiguous(), None

    name = f"compensation_token_{window}_{sinks}"
    AttentionInterface.register(name, forward)
    # None where a text has no padding.
    AttentionMaskInterface.register(name, sdpa_mask)
    model = copy.deepcopy(model)
    model.set_attn_implementation(name)
    return model
