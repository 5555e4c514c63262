"""The first queries of a text, about which blocks that are not read are expanded: kept by caches, come what may."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from distattn_hf import AttentionFactory, convert
from distattn_hf.core.derived_cache import FirstQueries
from tests.conversion.models import FAMILIES, VOCAB
from tests.tolerances import CACHED_LOGITS, assert_close

from .test_retrieval_models import WHOLE_PANELS, retrieval, student_of

OPTIONS = pytest.mark.parametrize("options", [{}, WHOLE_PANELS], ids=["operators", "kernel"])


def ids_of(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, length), generator=torch.Generator().manual_seed(seed))


def in_chunks(model, ids, sizes=(70, 1, 1, 38)) -> torch.Tensor:
    cache = DynamicCache(config=model.config)
    return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(list(sizes), dim=1)], dim=1)


@OPTIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_in_half_precision(dtype, options):
    """No block is chosen, which rounding would change: what is seen beyond the window is the far field."""
    model, ids = student_of("llama", **{**options, "num_blocks": 0}), ids_of(110)

    def check(model):
        parts, whole = in_chunks(model, ids).float(), model(ids, use_cache=False).logits.float()
        # Some ten roundings of at most 2⁻⁹ through two layers; a wrong far field is off by as much as logits are large.
        assert (parts - whole).abs().max() <= 0.05 * whole.abs().max()

    with torch.autocast("cpu", dtype):
        check(model)
    check(copy.deepcopy(model).to(dtype))


@torch.no_grad()
def test_a_static_cache_that_is_reordered_and_begun_anew():
    model, rows = student_of("llama", **WHOLE_PANELS), torch.tensor([1, 0])
    cache = StaticCache(config=model.config, max_cache_len=120)
    for seed in (1, 2):
        prompt, rest = ids_of(20, seed), ids_of(90, seed + 2)
        model(prompt, past_key_values=cache)
        cache.reorder_cache(rows)
        logits = model(rest, past_key_values=cache).logits
        full = model(torch.cat([prompt[rows], rest], dim=1), use_cache=False).logits
        assert (logits - full[:, 20:]).abs().max() <= CACHED_LOGITS
        cache.reset()


@pytest.mark.parametrize("length", [20, 40, 70])
@pytest.mark.parametrize("how", ["cut", "begun anew"])
@torch.no_grad()
def test_a_shallow_copy_does_not_see_what_becomes_of_the_original(length, how):
    model, ids, rest = student_of("llama", **WHOLE_PANELS), ids_of(length), ids_of(50, 1)
    original = DynamicCache(config=model.config)
    model(ids, past_key_values=original)
    copied = copy.copy(original)
    copied.layers = [copy.copy(layer) for layer in original.layers]
    if how == "cut":
        original.crop(10 - length)
    else:
        original.reset()
    model(ids_of(50, 2), past_key_values=original)
    logits = model(rest, past_key_values=copied).logits
    full = model(torch.cat([ids, rest], dim=1), use_cache=False).logits
    assert (logits - full[:, length:]).abs().max() <= CACHED_LOGITS


@OPTIONS
@torch.no_grad()
def test_nothing_later_counts_where_the_beginning_is_unknown(options):
    """A cache that somebody filled: keys and values without queries."""
    model, ids = student_of("llama", **options), ids_of(110)
    cache = DynamicCache(config=model.config)
    model(ids[:, :70], past_key_values=cache)

    def logits(chunk):
        plain = DynamicCache(config=model.config)
        for index, layer in enumerate(cache.layers):
            plain.update(layer.keys.clone(), layer.values.clone(), index)
        return model(chunk, past_key_values=plain).logits

    chunk = ids[:, 70:]
    other = torch.cat([chunk[:, :20], ids_of(20, 5)], dim=1)
    assert_close(logits(other)[:, :20], logits(chunk)[:, :20], "equal")


@torch.no_grad()
def test_summaries_follow_the_parameters():
    """A step of training between two calls on one cache: what was made with another λ is made anew."""
    model = convert(FAMILIES["llama"](), retrieval(metric="l2", **WHOLE_PANELS), init="plain")
    ids = ids_of(110)
    cache = DynamicCache(config=model.config)
    model(ids[:, :70], past_key_values=cache)
    for name, parameter in model.named_parameters():
        if "log_lambda" in name:
            parameter += 1.0
    anew = copy.deepcopy(cache)  # a copy takes nothing along that is derived
    logits = model(ids[:, 70:], past_key_values=cache).logits
    assert (logits - model(ids[:, 70:], past_key_values=anew).logits).abs().max() <= CACHED_LOGITS


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_cache_changes_no_gradient(family):
    """transformers makes one in training, too."""
    model, ids = student_of(family).double(), ids_of(60)
    gradients = []
    for use_cache in (True, False):
        model.zero_grad()
        model(ids, labels=ids, use_cache=use_cache).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert_close(*gradients, "float64")


@torch.no_grad()
def test_a_layer_keeps_them_in_its_cache():
    layer = AttentionFactory.create("retrieval", 16, 2, is_causal=True, window_size=2, block_size=2, num_blocks=1)
    layer, x, cache = layer.double().eval(), torch.randn(2, 60, 16, dtype=torch.float64), DynamicCache()
    parts = [layer(part, past_key_values=cache) for part in x.split([30, 1, 29], dim=1)]
    assert_close(torch.cat(parts, dim=1), layer(x), "float64")


def test_places_are_counted_from_the_first_key():
    """A row whose first key is another than before has other first queries, unless it had none yet."""
    query, known = torch.randn(1, 2, 160, 4), FirstQueries()
    assert known.update(0, query[:, :, :100], 100, torch.tensor([20])) is not None
    late = known.update(0, query[:, :, 100:], 160, torch.tensor([120]))
    assert torch.equal(late[:, :, :40], query[:, :, 120:])
    known.update(0, query[:, :, :100], 100, torch.tensor([20]))
    assert known.update(0, query[:, :, 100:], 160, torch.tensor([0])) is None
    assert known.update(1, query[:, :, 100:], 160, None) is None


@pytest.mark.parametrize("changed", ["cluster_keys", "far_field"])
@torch.no_grad()
def test_a_text_that_began_without_them_does_not_go_on_with_them(changed):
    """Options that need no first queries, changed to such as do in the middle of a text: an error, and no other logits.

    Those of a text before it, of which the cache still holds a beginning, are not taken for its own.
    """
    needs = {"cluster_keys": False, "far_field": True}
    does_not = {**needs, changed: not needs[changed]}
    model, first, text = student_of("llama", **WHOLE_PANELS), ids_of(90, 1), ids_of(110, 2)
    for before in (None, first):
        cache = DynamicCache(config=model.config)
        if before is not None:
            model.set_attention_options(**needs)
            model(before, past_key_values=cache)
            cache.crop(2 - before.shape[1])
            text[:, :2] = before[:, :2]
        model.set_attention_options(**does_not)
        model(text[:, cache.get_seq_length() : 80], past_key_values=cache)
        model.set_attention_options(**needs)
        with pytest.raises(ValueError, match="begun with other options of retrieval .*begin the text anew"):
            model(text[:, 80:], past_key_values=cache)
    # From its first token on a text has its own, in the same cache.
    cache = StaticCache(config=model.config, max_cache_len=120)
    model.set_attention_options(**does_not)
    model(text[:, :50], past_key_values=cache)
    cache.reset()
    model.set_attention_options(**needs)
    model(text[:, :80], past_key_values=cache)
    logits = model(text[:, 80:], past_key_values=cache).logits
    assert (logits - model(text, use_cache=False).logits[:, 80:]).abs().max() <= CACHED_LOGITS
