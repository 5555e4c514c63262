"""Check once what this code needs from transformers, and resolve the cache's name, in which its versions differ."""

import inspect
import warnings
from collections.abc import Iterable
from dataclasses import fields
from functools import lru_cache
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, EncoderDecoderCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask, sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from .attention_spec import version_note

# "past_key_values" up to 5.23, "cache" from 5.24 on: of models, their modules and their outputs.
CACHE_NAME = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")


@lru_cache
def check_transformers() -> None:
    """Raise `RuntimeError` where transformers lacks what attention, masks or caches here are built on.

    Checks names of arguments and attributes, which other versions of transformers may change, so that a change ends in
    an error when a model is made and not in wrong text.
    """
    for function, needed in (
        (create_causal_mask, ("config", "inputs_embeds", "attention_mask", CACHE_NAME, "position_ids")),
        (create_bidirectional_mask, ("config", "inputs_embeds", "attention_mask", "encoder_hidden_states")),
        (sdpa_mask, ("q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "attention_mask")),
        (sdpa_mask, ("allow_is_causal_skip",)),
        (sdpa_attention_forward, ("module", "query", "key", "value", "attention_mask", "dropout", "scaling")),
        (Cache.update, ("key_states", "value_states", "layer_idx")),
        (CacheLayerMixin.update, ("key_states", "value_states")),
        (CacheLayerMixin.get_mask_sizes, ("query_length",)),
    ):
        _check(function.__qualname__, needed, inspect.signature(function).parameters)
    _check("DynamicCache", ("layers", "layer_class_to_replicate", "offloading"), dir(DynamicCache()))
    pair = EncoderDecoderCache(DynamicCache(), DynamicCache())
    _check("EncoderDecoderCache", ("self_attention_cache", "cross_attention_cache", "is_updated"), dir(pair))
    _check("BaseModelOutputWithPast", (CACHE_NAME,), [field.name for field in fields(BaseModelOutputWithPast)])


def _check(owner: str, needed: Iterable[str], found: Iterable[str]) -> None:
    if missing := [name for name in needed if name not in found]:
        raise RuntimeError(
            f"{version_note()}, where {owner} has no {', '.join(map(repr, missing))}: attention would run without its "
            "mask or its cache. Install a tested version of transformers, or a newer distattn_hf"
        )


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """Return the one of two names of a model's cache that was given; raise `ValueError` where both were.

    As in transformers, `past_key_values` is deprecated from 5.24 on.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache are two names of one argument; got both")
    if past_key_values is not None and CACHE_NAME == "cache" and not torch.compiler.is_compiling():
        warnings.warn("`past_key_values` is deprecated. Use `cache` instead.", FutureWarning, stacklevel=3)
    return past_key_values if cache is None else cache


def cache_of(output: Any) -> Any:
    """Return the cache in a model's output, whichever name it has there."""
    return getattr(output, CACHE_NAME)


def given_cache(arguments: dict[str, Any]) -> Any:
    """Return the cache among the arguments of a module's forward, by its kind or else by name; None for none.

    Raises `ValueError` for what stands under a cache's name and is no transformers `Cache`, such as the paged cache of
    continuous batching.
    """
    if (cache := next((value for value in arguments.values() if isinstance(value, Cache)), None)) is not None:
        return cache
    for name in CACHE_NAMES:
        if arguments.get(name) is not None:
            raise ValueError(
                f"{name} must be a transformers Cache, got {type(arguments[name]).__name__}; a paged cache is for "
                "exact metrics, by generate_batch"
            )
    return None
