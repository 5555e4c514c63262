"""Keys that maps change are mapped once: a cache keeps them, and whatever is done to it or to the maps stays right.

The oracle is a cache that has nothing but the keys, or no cache at all.
"""

import copy

import pytest
import torch
from transformers import DynamicCache

from distattn_hf import AttentionSpec, convert
from distattn_hf.core.attention import run_attention
from distattn_hf.core.derived_cache import DerivedLayer
from distattn_hf.core.inputs import AttentionInputs
from distattn_hf.core.metrics import get_metric
from distattn_hf.core.parameters import HeadParameters
from tests.conversion.models import FAMILIES, VOCAB, gpt2, llama
from tests.conversion.nystrom_cases import in_chunks, padded
from tests.tolerances import CACHED_LOGITS, assert_close

SPECS = {
    "cosine": AttentionSpec("cosine", transform="maps"),
    "cosine, softened": AttentionSpec("cosine", transform="maps", softening=2.0),
    "cosine, scalar": AttentionSpec("cosine", transform="scalar"),
    "l1": AttentionSpec("l1", transform="maps"),
    "chebyshev": AttentionSpec("chebyshev", transform="maps"),
    "lp": AttentionSpec("lp", p=3.0, transform="maps"),
    "l2": AttentionSpec("l2", transform="maps"),
    "sqeuclidean": AttentionSpec("sqeuclidean", transform="maps"),
    "heads apart": [
        AttentionSpec("l1", heads=[0, 3], transform="maps"), AttentionSpec("cosine", heads=[1], transform="maps"),
    ],
}  # fmt: skip
EVERY_SPEC = pytest.mark.parametrize("name", SPECS)


def student_of(family: str, name: str):
    """A converted model whose maps are no identities, and whose shift is not 0."""
    student = convert(FAMILIES[family](), SPECS[name], init="plain")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter_name, parameter in student.named_parameters():
            if parameter_name.endswith(("query_map", "key_map", "shift", "log_alpha")):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return student


def plain(cache: DynamicCache) -> DynamicCache:
    """A cache of the same keys and values, and of nothing else."""
    result = DynamicCache()
    for index, layer in enumerate(cache.layers):
        result.update(layer.keys.clone(), layer.values.clone(), index)
    return result


@pytest.fixture
def mapped(monkeypatch) -> list[int]:
    """How many keys each call of a group of heads maps."""
    counts, fold_key = [], HeadParameters._fold_key

    def counted(self, key, *args, **kwargs):
        counts.append(key.shape[2])
        return fold_key(self, key, *args, **kwargs)

    monkeypatch.setattr(HeadParameters, "_fold_key", counted)
    return counts


@EVERY_SPEC
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@torch.no_grad()
def test_chunks_with_left_padding_map_each_key_once(family, name, mapped):
    student, batch = student_of(family, name), padded(90)
    expected, count = student(**batch, use_cache=False).logits, len(mapped)
    mapped.clear()
    sizes = (70, 1, 1, 6, 1, 11)
    logits, cache = in_chunks(student, batch, sizes)
    real = batch["attention_mask"].bool()
    assert (logits - expected)[real].abs().max() <= CACHED_LOGITS
    assert all(type(layer) is DerivedLayer for layer in cache.layers)
    assert mapped == [size for size in sizes for _ in range(count)]


@EVERY_SPEC
@torch.no_grad()
def test_whatever_is_done_to_a_cache(name):
    student, ids = student_of("llama", name), torch.randint(3, VOCAB, (3, 60))

    def begun():
        cache = DynamicCache(config=student.config)
        student(ids[:, :50], past_key_values=cache)
        student(ids[:, 50:], past_key_values=cache)
        return cache

    def done(change):
        cache = begun()
        change(cache)
        return cache

    def replaced(cache):
        for layer in cache.layers:
            layer.keys = layer.keys.flip(2)

    cases = {
        "cropped": done(lambda cache: cache.crop(-37)),
        "cropped by less than comes": done(lambda cache: cache.crop(-1)),
        "reordered": done(lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0]))),
        "repeated": done(lambda cache: cache.batch_repeat_interleave(2)),
        "selected": done(lambda cache: cache.batch_select_indices(torch.tensor([2, 1]))),
        "offloaded": done(lambda cache: [(layer.offload(), layer.prefetch()) for layer in cache.layers]),
        "replaced": done(replaced),
        "copied": copy.deepcopy(begun()),
    }
    original = begun()
    shallow = copy.copy(original)
    shallow.layers = [copy.copy(layer) for layer in original.layers]
    cases |= {"copied, not deeply": shallow, "the original of a copy": original}
    for case, cache in cases.items():
        rows, oracle = cache.layers[0].keys.shape[0], plain(cache)
        # More at once than the copy got, whose keys would stand in their place.
        for size in (9, 1) if case == "the original of a copy" else (1, 4, 1):
            new = torch.randint(3, VOCAB, (rows, size))
            expected = student(new, past_key_values=oracle).logits
            assert (student(new, past_key_values=cache).logits - expected).abs().max() <= CACHED_LOGITS, case
            oracle = plain(oracle)


@EVERY_SPEC
@torch.no_grad()
def test_maps_that_change_between_steps(name):
    """By an optimiser, by `.data`, by another module in their place; and a cache that goes on with another model."""
    student, ids = student_of("llama", name), torch.randint(3, VOCAB, (2, 40))
    cache = DynamicCache(config=student.config)
    student(ids, past_key_values=cache)

    def changed(how):
        for parameter_name, parameter in student.named_parameters():
            if parameter_name.endswith(("key_map", "shift", "log_alpha")):
                how(parameter)

    changes = [
        lambda p: p.add_(0.2),
        lambda p: p.data.mul_(0.7),
        lambda p: setattr(p, "data", p.data + 0.1 * torch.randn_like(p)),
    ]
    for number, change in enumerate(changes):
        new = torch.randint(3, VOCAB, (2, 1))
        before = student(new, past_key_values=plain(cache)).logits
        changed(change)
        oracle = plain(cache)
        expected = student(new, past_key_values=oracle).logits
        assert (before - expected).abs().max() > 100 * CACHED_LOGITS, "the control: the change matters"
        assert (student(new, past_key_values=cache).logits - expected).abs().max() <= CACHED_LOGITS, number
    for other in SPECS:
        new, another = torch.randint(3, VOCAB, (2, 1)), student_of("llama", other)
        expected = another(new, past_key_values=plain(cache)).logits
        assert (another(new, past_key_values=cache).logits - expected).abs().max() <= CACHED_LOGITS, other


@pytest.mark.parametrize("name", ["cosine", "l1", "heads apart"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}, {"cache_implementation": "static"}],
    ids=["greedy", "beams", "looked up", "static"],
)
def test_generation_is_the_same_without_a_cache(name, options):
    student = student_of("llama", name)
    batch = padded(60)
    ids = {key: batch[key] for key in ("input_ids", "attention_mask")}
    if "prompt_lookup_num_tokens" in options:
        ids = {"input_ids": batch["input_ids"][1:, :20].repeat(1, 3)}
    lengths = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    given = student.generate(**ids, **lengths, **options)
    beams = {"num_beams": options.get("num_beams", 1)}
    assert torch.equal(given, student.generate(**ids, **lengths, **beams, use_cache=False))


@pytest.mark.parametrize("name", ["cosine", "l1"])
def test_gradients_through_a_cache(name):
    """With gradients nothing is kept: maps get theirs from all keys, as with a cache of keys alone."""
    student, ids = student_of("llama", name), torch.randint(3, VOCAB, (2, 30))
    gradients = []
    for kept in (True, False):
        student.zero_grad()
        cache = DynamicCache(config=student.config)
        with torch.no_grad():
            student(ids[:, :20], past_key_values=cache)
        cache = cache if kept else plain(cache)
        loss = student(ids[:, 20:25], past_key_values=cache).logits.square().mean()
        (loss + student(ids[:, 25:], past_key_values=cache).logits.square().mean()).backward()
        gradients.append({n: p.grad.clone() for n, p in student.named_parameters()})
    maps = [tensor for key, tensor in gradients[0].items() if key.endswith("key_map")]
    assert len(maps) == 2
    assert all(tensor.abs().max() > 0 for tensor in maps)
    for key, tensor in gradients[1].items():
        assert_close(gradients[0][key], tensor, "float32_gradient", key)


@torch.no_grad()
def test_other_models_keep_their_cache():
    """Where nothing is mapped there is nothing to keep: plain distances, α alone of a distance of differences."""
    for build, spec in (
        (llama, AttentionSpec("l1")),
        (gpt2, AttentionSpec("l2", transform="scalar")),
        (gpt2, AttentionSpec("sqeuclidean", lift=True)),
    ):
        cache = convert(build(), spec, init="plain")(torch.randint(3, VOCAB, (1, 5)), use_cache=True).past_key_values
        assert not any(isinstance(layer, DerivedLayer) for layer in cache.layers)


@pytest.mark.parametrize("metric", ["l2", "l1", "cosine", "sqeuclidean", "dot", "chebyshev"])
@pytest.mark.parametrize("num_queries", [1, 3, 40])
@pytest.mark.parametrize("dtype", ["float64", "float32_forward", "bfloat16"])
@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
def test_keys_that_share_values(metric, num_queries, dtype, backend):
    """Six key heads, two value heads: what comes out is that of values written out for each key head."""
    kind = {"float32_forward": torch.float32}.get(dtype) or getattr(torch, dtype)
    query, key = torch.randn(2, 6, num_queries, 8).to(kind), torch.randn(2, 6, 50, 8).to(kind)
    # Rows of a larger tensor, as in a cache that has room.
    value = torch.randn(2, 2, 70, 5).to(kind)[:, :, :50]
    keep = torch.rand(2, 1, 1, 50) < 0.8

    def attend(value):
        inputs = AttentionInputs(query, key, value, get_metric(metric), 2.0, 0.4, None, keep)
        return run_attention(inputs, backend)

    expected = attend(value.repeat_interleave(3, dim=1))
    assert_close(attend(value), expected, "equal" if num_queries == 40 or backend != "auto" else "float32_forward")
