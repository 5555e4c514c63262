"""Caches of quantised keys and values under exact and retrieval heads: as an unquantised cache of the same numbers."""

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, QuantizedLayer

from distattn_hf import AttentionSpec, convert
from distattn_hf.core.compatibility import CACHE_NAME
from tests.conversion.models import llama

LENGTH, PROMPT = 120, 90
SPECS = {
    "exact": (AttentionSpec("sqeuclidean"), "exact"),
    "l2": (AttentionSpec("l2"), "plain"),
    "l1": (AttentionSpec("l1"), "plain"),
    "retrieval": (AttentionSpec(mechanism="retrieval", window_size=16, num_blocks=1, min_weight=0.0), "exact"),
    "l2 retrieval": (
        AttentionSpec("l2", mechanism="retrieval", window_size=16, num_blocks=1, min_weight=0.0), "plain",
    ),
}  # fmt: skip


class Lossless(QuantizedLayer):
    """transformers' layer with its short stretch of exact keys, and numbers that stay as they are."""

    def __init__(self):
        super().__init__(nbits=8, residual_length=16)

    def _quantize(self, tensor, axis):
        return tensor.clone()

    def _dequantize(self, quantised):
        return quantised


class Int8(Lossless):
    """Whole numbers from -127 to 127, a scale a vector."""

    def _quantize(self, tensor, axis):
        scale = tensor.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, quantised):
        return quantised[0] * quantised[1]


def student(name: str):
    spec, init = SPECS[name]
    return convert(llama(), spec, init=init)


@torch.no_grad()
def read(model, ids, cache) -> torch.Tensor:
    """Logits of the steps after a prompt."""
    given = {CACHE_NAME: cache, "use_cache": True}
    logits = [model(ids[:, :PROMPT], **given).logits[:, -1:]]
    logits += [model(ids[:, i : i + 1], **given).logits for i in range(PROMPT, LENGTH)]
    return torch.cat(logits, dim=1)


def tokens(rows: int = 2) -> torch.Tensor:
    return torch.randint(3, 64, (rows, LENGTH), generator=torch.Generator().manual_seed(0))


def cache_of(kind: type, model) -> Cache:
    return Cache(layers=[kind() for _ in range(model.config.num_hidden_layers)])


@pytest.mark.parametrize("name", SPECS)
def test_steps_are_those_of_an_unquantised_cache(name):
    """Retrieval heads need the text's first queries, which a cache of keys alone would lose."""
    model, ids = student(name), tokens()
    expected = read(model, ids, DynamicCache(config=model.config))
    found = read(model, ids, cache_of(Lossless, model))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    if "retrieval" in name:
        whole = model(ids, use_cache=False).logits[:, PROMPT - 1 :]
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["exact", "l2", "l1"])
def test_int8_costs_as_much_as_it_costs_the_teacher(name):
    model, ids = student(name), tokens()
    expected = read(model, ids, DynamicCache(config=model.config))
    error = (read(model, ids, cache_of(Int8, model)) - expected).abs().max()
    teacher = llama()
    of_teacher = read(teacher, ids, DynamicCache(config=teacher.config)) - read(teacher, ids, cache_of(Int8, teacher))
    assert 0 < float(error) < 3 * float(of_teacher.abs().max())


def test_rows_that_are_reordered_repeated_and_chosen_keep_their_own_first_queries():
    model, ids = student("retrieval"), tokens(3)
    # Blocks of alike keys need none.
    model.set_attention_options(cluster_keys=False)
    order = torch.tensor([2, 0, 0])
    given = {"use_cache": True}
    results = []
    for cache in (DynamicCache(config=model.config), cache_of(Lossless, model)):
        with torch.no_grad():
            model(ids[:, :PROMPT], **{CACHE_NAME: cache}, **given)
            model(ids[:, PROMPT : PROMPT + 1], **{CACHE_NAME: cache}, **given)
            cache.reorder_cache(order)
            moved = ids[order]
            results.append(model(moved[:, PROMPT + 1 : PROMPT + 2], **{CACHE_NAME: cache}, **given).logits)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-4)
    changed = cache.layers[0].first_queries.tensors()[0]
    assert len(changed) == 3
    assert torch.equal(changed[1], changed[2])
