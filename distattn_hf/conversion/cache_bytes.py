"""What a converted model's cache takes, by its sizes, beside the teacher's; and what a cache holds."""

import torch

from ..core.discovery import find_attention_modules, locate
from ..core.parameters import DistanceAttentionState, NystromParameters
from ..core.retrieval_far import BEGINNING

TOKENS = 1000


def cache_bytes(model) -> dict[str, int] | None:
    """Return bytes of one row's cache: {"growing": by so many more tokens, "teacher": of the teacher, "constant"}.

    Of all causal self-attention that sees the whole text, without the room that caches keep for more; Nyström modules
    past their `exact_below`. None for a model without a cache.
    """
    if not model.can_generate():
        return None
    found = {"growing": 0, "teacher": 0, "constant": 0}
    for name, entry in find_attention_modules(model).items():
        module = locate(model, name)
        if entry["kind"] != "self" or entry["type"] != "full_attention" or not getattr(module, "is_causal", False):
            continue
        if not entry["num_heads"] or not entry["head_dim"]:
            return None
        groups = getattr(module, "num_key_value_groups", 1)
        key_heads = entry["num_heads"] // groups
        sizes = entry["head_dim"] + getattr(module, "v_head_dim", entry["head_dim"])
        token = sizes * torch.finfo(model.dtype).bits // 8
        found["teacher"] += TOKENS * key_heads * token
        state = getattr(module, "distattn", None)
        parts = state.parts() if isinstance(state, DistanceAttentionState) else [(range(entry["num_heads"]), None)]
        full = {head // groups for heads, group in parts if not isinstance(group, NystromParameters) for head in heads}
        found["growing"] += TOKENS * len(full) * token
        for heads, group in parts:
            if isinstance(group, NystromParameters):
                spec = group.spec
                state_size = spec.num_landmarks * (sizes - entry["head_dim"] + 1) + spec.num_sinks * sizes
                found["constant"] += 4 * group.num_heads * state_size + max(0, spec.window_size - 1) * key_heads * token
            elif group is not None and group.spec.mechanism == "retrieval":
                size, block, width = entry["head_dim"], group.spec.block_size, torch.finfo(model.dtype).bits // 8
                # The codes of a block (see `Codes`): mean, variance and its unit, a scale for each key, half a byte a
                # coordinate.
                own = len(heads) if group.maps_keys else len({head // groups for head in heads})
                codes = 4 * size + 8 * -(-size // 8) + 4
                # As `has_codes` says of a call; of blocks of the text only the model's own keys have any that are kept.
                is_grouped = groups > 1 and not group.maps_keys
                cosine = group.metric == "cosine" and not (group.fits_softening and is_grouped)
                by_means = group.spec.cluster_keys and (group.is_absolute or cosine)
                has_codes = (group.is_absolute or by_means) and group.spec.num_blocks
                beside = own * (codes + block * (4 + 4 * -(-size // 8))) if has_codes else 0
                if group.spec.cluster_keys:  # and which key stands where
                    beside += own * 8 * block
                if group.spec.far_field:
                    # A key, its bias and a value for each query head (see `Summaries`), and the first queries; but of
                    # alike keys for each key head, whose keys are the means of its codes, and no queries.
                    of_key = size if by_means and has_codes else 0
                    beside += 4 * (own if by_means else len(heads)) * (sizes - of_key + 1)
                    found["constant"] += 0 if by_means else BEGINNING * len(heads) * size * width
                if state.is_nystrom or len(heads) == entry["num_heads"]:
                    # Of some of a module's heads nothing is kept beside the keys.
                    found["growing"] += TOKENS * beside // block
    return found if found["teacher"] else None


def held_bytes(cache) -> int:
    """Return the bytes of a cache's keys, values and states, packed ones with their scales.

    Not what retrieval derives from its keys, which `cache_bytes` counts.
    """
    return sum(layer.nbytes() if hasattr(layer, "nbytes") else _layer_bytes(layer) for layer in cache.layers)


# Of transformers' cache layers: keys and values, packed ones, and the states of linear attention.
_HELD = ("keys", "values", "_quantized_keys", "_quantized_values", "conv_states", "recurrent_states")


def _layer_bytes(layer) -> int:
    return sum(tensor_bytes(getattr(layer, name, None)) for name in _HELD)


def tensor_bytes(item) -> int:
    """Return the bytes of a tensor, of one of a library's packed kinds, or of all tensors in a list or dict."""
    if isinstance(item, torch.Tensor):
        inner = getattr(item, "tensor_data_names", None) or getattr(type(item), "tensor_data_names", None)
        if inner:
            return sum(tensor_bytes(getattr(item, name)) for name in inner)
        return item.numel() * item.element_size()
    values = item.values() if isinstance(item, dict) else item if isinstance(item, list | tuple) else ()
    return sum(map(tensor_bytes, values))
