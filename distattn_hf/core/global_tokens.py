"""Global tokens of a native model's call: what may be marked, and beside a cache those that it has kept."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.integrations.sdpa_attention import repeat_kv

from .configuration_native import DistAttnConfig
from .constant_cache import RingLayer
from .mechanism_base import Beyond
from .mechanisms import MECHANISMS


def global_tokens(
    marked: Tensor | None, config: DistAttnConfig, given: Tensor | None, cache: Cache | None
) -> Tensor | None:
    """Return global_attention_mask as bool (B, M) for given (B, N, ...), the last N of M tokens; None for None.

    Raises `ValueError` for what cannot be, and where it is missing beside a cache that it was given with.
    """
    cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    known = getattr(cache, "distattn_has_global", False)
    past = 0 if cache is None or marked is None and not known else int(cache.get_seq_length())
    if marked is None:
        if past:
            raise ValueError(
                "the cache holds global tokens: give global_attention_mask of all tokens, those in the cache included"
            )
        if known:
            # A cache that was reset.
            cache.distattn_has_global = False
        return None
    able = [name for name in MECHANISMS if MECHANISMS.get(name).takes_global]
    if config.mechanism not in able:
        raise ValueError(
            f"global_attention_mask needs a mechanism with a pattern ({', '.join(able)}), got {config.mechanism!r}"
        )
    shape = None if given is None else (given.shape[0], past + given.shape[1])
    looks = not torch.compiler.is_compiling()
    if tuple(marked.shape) != shape or looks and bool(((marked != 0) & (marked != 1)).any()):
        raise ValueError(
            f"global_attention_mask must hold 0 and 1, of shape (B, M)={shape}, one entry for each token, those in the "
            f"cache included; got shape {tuple(marked.shape)}"
            + (f" and values {marked.unique().tolist()[:5]}" if looks else "")
        )
    marked = marked != 0
    for layer in [] if cache is None else cache.layers:
        if isinstance(layer, RingLayer):
            layer.check_global(marked)
    return marked


def before_ring(
    key: Tensor, value: Tensor, places: Tensor, keep: Tensor | None, bias: Tensor | None, groups: int
) -> Beyond:
    """Return the global tokens that `RingLayer.keep_global` found before a call's keys, for all query heads.

    keep (B, M) and bias (B or 1, H, N, M) speak of the whole text.
    """
    seen, places = places >= 0, places.clamp(min=0)
    if bias is not None:
        index = places[:, None, None].expand(-1, bias.shape[1], bias.shape[2], -1)
        bias = bias.expand(len(places), -1, -1, -1).gather(-1, index)
    seen = seen if keep is None else seen & keep.gather(1, places)
    return Beyond(repeat_kv(key, groups), repeat_kv(value, groups), seen, bias)
