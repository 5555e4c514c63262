"""Caches whose keys a forward hook takes out, as kvpress and its like do: a step attends to the keys that were left.

What is kept beside the keys (mapped ones, codes, summaries) must not be that of keys that are gone.
"""

from contextlib import contextmanager

import pytest
import torch
from transformers import DynamicCache

from distattn_hf import AttentionSpec, convert
from distattn_hf.core.compatibility import CACHE_NAME
from tests.conversion.models import VOCAB, llama
from tests.conversion.nystrom_cases import student_of
from tests.tolerances import CACHED_LOGITS

LENGTH, STEPS = 40, 4
# With as many blocks as there are, retrieval is exact attention to the keys that are there.
ALL = AttentionSpec(
    mechanism="retrieval", window_size=4, num_sinks=1, block_size=2, num_blocks=64, min_weight=0.0, far_field=False
)
SPECS = {
    "l2": AttentionSpec("l2"),
    "cosine": AttentionSpec("cosine"),
    "l1 with maps": AttentionSpec("l1", transform="maps"),
    "chebyshev, some heads": AttentionSpec("chebyshev", heads=[0, 3]),
    "retrieval": ALL,
    "retrieval, blocks of the text": AttentionSpec(**{**vars(ALL), "cluster_keys": False}),
}


def student(name: str):
    model = convert(llama(), SPECS[name], init="exact" if SPECS[name].mechanism == "retrieval" else "plain").eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(("query_map", "key_map")):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@contextmanager
def pressed(model, left: torch.Tensor):
    """Leave the keys of these places in every layer's cache after each forward pass within, as a press does."""

    def hook(module, arguments, options, output):
        layer = options[CACHE_NAME].layers[module.layer_idx]
        layer.keys, layer.values = (t[:, :, left[left < t.shape[2]]] for t in (layer.keys, layer.values))

    handles = [layer.self_attn.register_forward_hook(hook, with_kwargs=True) for layer in model.get_decoder().layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def ids_of(length: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, ids, cache, first: int, mask=None):
    """Return the logits of tokens whose positions begin at `first`, wherever in the cache their keys will stand."""
    place = torch.arange(first, first + ids.shape[1])[None]
    return model(ids, position_ids=place, attention_mask=mask, **{CACHE_NAME: cache}).logits


@pytest.mark.parametrize("name", SPECS)
def test_steps_after_a_pruned_prompt_see_what_was_left(name):
    model, ids = student(name), ids_of(LENGTH + STEPS)
    left = torch.arange(0, LENGTH, 3)
    pruned, whole = DynamicCache(), DynamicCache()
    with pressed(model, left):
        logits(model, ids[:, :LENGTH], pruned, 0)
    assert pruned.get_seq_length() == len(left)
    logits(model, ids[:, :LENGTH], whole, 0)
    keep = torch.zeros(1, LENGTH + STEPS, dtype=torch.long)
    keep[:, left] = 1
    keep[:, LENGTH:] = 1
    for step in range(LENGTH, LENGTH + STEPS):
        token = ids[:, step : step + 1]
        found = logits(model, token, pruned, step)
        expected = logits(model, token, whole, step, keep[:, : step + 1])
        torch.testing.assert_close(found, expected, atol=CACHED_LOGITS, rtol=0)


@pytest.mark.parametrize("name", SPECS)
def test_a_cache_that_is_held_at_one_size_while_a_text_goes_on(name):
    """One key goes at each step, so there are as many as before: what is kept of the others is not theirs."""
    model, ids = student(name), ids_of(LENGTH + STEPS)
    cache = DynamicCache()
    logits(model, ids[:, :LENGTH], cache, 0)
    for step in range(LENGTH, LENGTH + STEPS):
        # A cache with the same keys, and nothing beside them.
        bare = DynamicCache()
        for number, layer in enumerate(cache.layers):
            bare.update(layer.keys.clone(), layer.values.clone(), number)
        token = ids[:, step : step + 1]
        expected = logits(model, token, bare, step)
        # The first key but one goes each time.
        with pressed(model, torch.tensor([0, *range(2, LENGTH + 1)])):
            found = logits(model, token, cache, step)
        assert cache.get_seq_length() == LENGTH
        torch.testing.assert_close(found, expected, atol=CACHED_LOGITS, rtol=0)


def test_nystrom_attention_refuses_a_window_that_somebody_cut():
    """Its cache has no keys to choose from: what left the window is a sum."""
    model = student_of("llama")
    cache = DynamicCache()
    ids = ids_of(LENGTH + 1)
    with pressed(model, torch.arange(0, LENGTH, 3)):
        logits(model, ids[:, :LENGTH], cache, 0)
    with pytest.raises(ValueError, match="keys of its cache layer were replaced .*kvpress.*press a retrieval or exact"):
        logits(model, ids[:, LENGTH:], cache, LENGTH)
