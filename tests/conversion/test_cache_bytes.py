"""The bytes of a cache that a report names: those that caches of the models hold."""

import pytest
import torch
from transformers import DynamicCache

from distattn_hf import AttentionSpec, convert
from distattn_hf.conversion.cache_bytes import cache_bytes, held_bytes
from distattn_hf.conversion.convert import current_report
from distattn_hf.core.retrieval import encode
from distattn_hf.core.retrieval_cache import KeyClusters
from distattn_hf.experiments import architectures
from tests.conversion.models import VOCAB, bert, token_batch
from tests.conversion.nystrom_cases import QUICK, build, nystrom, taken

# Two whole panels of codes and four.
LENGTHS = 512, 1024


def tensors_bytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@torch.no_grad()
def cache_of(model, length: int) -> DynamicCache:
    ids = torch.randint(3, VOCAB, (1, length))
    cache = DynamicCache(config=model.config)
    model(ids, position_ids=torch.arange(length)[None].clamp_max(127), past_key_values=cache)
    # What is made of clustered keys is made for the steps after the text.
    model(ids[:, :1], position_ids=torch.full((1, 1), 127), past_key_values=cache)
    return cache


def grown(sizes: list[int]) -> float:
    """Bytes of 1,000 tokens, of the bytes at both lengths."""
    return 1000 * (sizes[1] - sizes[0]) / (LENGTHS[1] - LENGTHS[0])


def derived_bytes(layer) -> int:
    """What is made of a layer's keys without room for more, and without the bit for a block that it has keys."""
    if not layer.derived:
        return 0
    if clusters := [made for made in layer.derived.values() if isinstance(made, KeyClusters)]:
        (clusters,) = clusters
        units = sum(count for _, count in clusters._segments[0])
        made = {name: tensor for name, tensor in vars(clusters.made).items() if name != "real"}
        return tensors_bytes(tensor[:, :, :units] for tensor in made.values())
    length = layer.keys.shape[2]
    made = [t for name, kept in layer.derived.items() if name != "codes" for t in kept.made.lines(length // 16)]
    if "codes" not in layer.derived:
        return tensors_bytes(made)
    length = length // 16 * 16
    codes = encode(layer.keys[:, :, :length], torch.ones(1, length, dtype=torch.bool), 16)
    return tensors_bytes([codes.mean, codes.variance, codes.spread, codes.scale, codes.code, *made])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_of_nystrom_and_retrieval_heads(family):
    teacher, student = build(family), taken(family, block_size=16, num_blocks=1)
    said = cache_bytes(student)
    whole = [tensors_bytes(t for x in cache_of(teacher, n).layers for t in (x.keys, x.values)) for n in LENGTHS]
    assert said["teacher"] == grown(whole)
    kept, constant = [], []
    for length in LENGTHS:
        layers = cache_of(student, length).layers
        kept.append(
            sum(tensors_bytes([x.retrieved.keys, x.retrieved.values]) + derived_bytes(x.retrieved) for x in layers)
        )
        # Which keys of the window count, and where sinks stand.
        held = [[x.keys, x.values, x.state.total, x.state.weight, x.state.sink_key, x.state.sink_value] for x in layers]
        beginnings = [t for x in layers for t in x.retrieved.first_queries.tensors()]
        constant.append(sum(map(tensors_bytes, held)) + tensors_bytes(beginnings))
    assert said["growing"] == grown(kept) < said["teacher"]
    assert constant == [said["constant"]] * 2


@pytest.mark.parametrize("cluster_keys", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        {}, {"metric": "cosine"}, {"metric": "l2"}, {"metric": "l2", "transform": "maps"}, {"num_blocks": 0},
        {"metric": "cosine", "softening": "fit"}, {"metric": "cosine", "transform": "maps"}, {"heads": [0]},
        {"far_field": False},
    ],
    ids=str,
)  # fmt: skip
def test_of_retrieval_alone_and_of_distances(cluster_keys, fields):
    teacher = build("llama")
    spec = AttentionSpec(**{"mechanism": "retrieval", "num_blocks": 1, "cluster_keys": cluster_keys, **fields})
    fit = {"calibration": [token_batch(teacher, length=40)], "options": QUICK} if "metric" in fields else {}
    student = convert(teacher, spec, **fit)
    kept = []
    for length in LENGTHS:
        layers = cache_of(student, length).layers
        kept.append(sum(tensors_bytes([layer.keys, layer.values]) + derived_bytes(layer) for layer in layers))
        constant = tensors_bytes(t for x in layers for t in x.first_queries.tensors())
    said = student.conversion_report.cache_bytes
    assert said == {"growing": grown(kept), "teacher": said["teacher"], "constant": constant}
    line = f"cache {said['growing']:,} bytes per 1,000 tokens (the teacher's {said['teacher']:,})"
    assert line in student.conversion_report.summary() == current_report(student).summary()
    exact = convert(teacher, AttentionSpec("l2"), init="plain").conversion_report.cache_bytes
    assert exact == {"growing": said["teacher"], "teacher": said["teacher"], "constant": 0}
    half = convert(teacher.to(torch.bfloat16), AttentionSpec("l2"), init="plain").conversion_report.cache_bytes
    assert half["teacher"] == said["teacher"] / 2


def test_of_a_model_without_a_cache():
    teacher = bert()
    student = convert(teacher, nystrom(9), calibration=[token_batch(teacher, length=40)], options=QUICK)
    assert student.conversion_report.cache_bytes is None
    assert "cache" not in student.conversion_report.summary()


def test_held_bytes_count_the_states_of_linear_attention_too():
    """Of a hybrid model: all tensors of its cache's layers, whatever they are called."""
    model = architectures.build("qwen3_next")
    with torch.no_grad():
        cache = model(torch.arange(1, 8)[None], use_cache=True).past_key_values
    held = []
    for layer in cache.layers:
        for value in vars(layer).values():
            held += [t for t in (value.values() if isinstance(value, dict) else [value]) if isinstance(t, torch.Tensor)]
    assert any(not hasattr(layer, "keys") for layer in cache.layers)
    assert held_bytes(cache) == sum(tensor.nbytes for tensor in held) > 0
