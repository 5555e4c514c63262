"""Retrieval heads whose older keys stand in blocks by their likeness, inside models: caches, generation, saving.

test_retrieval_models.py has the same for blocks of four keys, whose units are 64; here are the kernel's units of 256
and segments of several units.
"""

import copy
import json

import pytest
import torch
from transformers import DynamicCache

from distattn_hf import AttentionSpec, convert
from distattn_hf.core.retrieval_cache import KeyClusters
from distattn_hf.evaluation.scorecard import without_far_field
from tests.conversion.models import VOCAB, gpt2, llama
from tests.conversion.nystrom_cases import in_chunks
from tests.tolerances import CACHED_LOGITS

# 1,180 keys: four units of the kernel's blocks and 12 of small ones, whose segments are merged on the way.
KERNEL = {"block_size": 16, "num_blocks": 4, "window_size": 20}
SMALL = {"block_size": 2, "num_blocks": 6, "window_size": 7}
CASES = pytest.mark.parametrize(("options", "length"), [(KERNEL, 1180), (SMALL, 400)], ids=["kernel", "operators"])


def student_of(options, teacher=None, **kwargs):
    spec = AttentionSpec(mechanism="retrieval", num_sinks=3, **{"min_weight": 0.002, **options, **kwargs})
    return convert(llama() if teacher is None else teacher, spec)


def batch_of(length: int, padding=(37, 0)) -> dict[str, torch.Tensor]:
    """Random tokens with so much padding to the left of each row."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(len(padding), length, dtype=torch.long)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    return {"input_ids": torch.randint(3, VOCAB, mask.shape, generator=generator), "attention_mask": mask}


def clusters_of(cache) -> list[KeyClusters]:
    return [layer.derived["clusters", 0] for layer in cache.layers]


@CASES
@pytest.mark.parametrize("metric", ["sqeuclidean", "l2", "cosine"])
@torch.no_grad()
def test_chunks_with_left_padding_are_one_forward(metric, options, length):
    """Rows' units begin at other keys; segments grow while the cache does. Breaks if one is not taken anew."""
    plain = {} if metric == "sqeuclidean" else {"init": "plain"}
    spec = AttentionSpec(metric, "retrieval", num_sinks=3, min_weight=0.002, **options)
    student = convert(llama(), spec, **plain)
    batch = batch_of(length)
    full = student(**batch, use_cache=False).logits
    real = batch["attention_mask"].bool()
    sizes = [length // 3, 1, 1, 7, length // 2 + 3]
    logits, cache = in_chunks(student, batch, [*sizes, length - sum(sizes)])
    assert (logits - full)[real].abs().max() <= CACHED_LOGITS
    made = clusters_of(cache)
    assert all(clusters.counted == length for clusters in made)
    units = (length - 1) // options["block_size"] // 16
    assert {start + count for start, count in made[0]._segments[1]} >= {4, units - units % 4 or 4}
    in_text = student_of(options, cluster_keys=False)
    assert (in_text(**batch).logits - full)[real].abs().max() > 1e-4 or metric != "sqeuclidean"


@torch.no_grad()
def test_a_unit_may_begin_before_the_first_queries_are_all_there():
    """Of small blocks, 53 keys from the longest row's first: fewer than the queries that blocks are expanded about."""
    student, batch = student_of({**SMALL, "window_size": 5}), batch_of(160, padding=(0, 17))
    full = student(**batch, use_cache=False).logits
    logits, _ = in_chunks(student, batch, [30, 90, 40])
    assert (logits - full)[batch["attention_mask"].bool()].abs().max() <= CACHED_LOGITS


@torch.no_grad()
def test_a_token_at_a_time_over_units():
    """Each step of 130 tokens over four units, and what a copy and other rows of the cache go on with."""
    student, batch = student_of(SMALL), batch_of(160, padding=(5, 0, 0))
    full = student(**batch, use_cache=False).logits
    real = batch["attention_mask"].bool()
    logits, cache = in_chunks(student, batch, [30] + [1] * 130)
    assert (logits - full)[real].abs().max() <= CACHED_LOGITS
    other = copy.deepcopy(cache)
    rows = torch.tensor([2, 0, 2])
    other.reorder_cache(rows)
    step = torch.full((3, 1), 7)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1)
    after = student(step, attention_mask=mask[rows], past_key_values=other).logits
    ids = torch.cat([batch["input_ids"][rows], step], dim=1)
    expected = student(ids, attention_mask=mask[rows], use_cache=False).logits[:, -1:]
    assert (after - expected).abs().max() <= CACHED_LOGITS


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0, 1])), [1, 0, 1]),
    ],
    ids=["repeat", "select", "reorder"],
)
@torch.no_grad()
def test_other_rows_of_a_cache_go_on(change, rows):
    """Rows' segments are of other units. Breaks if what is noted of each row stays the old row's."""
    student, batch = student_of(SMALL), batch_of(160, padding=(45, 0, 20))
    # The next query's window begins the shortest row's second unit: a segment that the longest row has already.
    count = 45 + 2 * (3 + 32)
    _, cache = in_chunks(student, {name: t[:, :count] for name, t in batch.items()}, [count - 3, 3])
    change(cache)
    assert all(len(clusters._segments) == len(rows) for clusters in clusters_of(cache))
    ids, mask = batch["input_ids"][rows], batch["attention_mask"][rows]
    steps = [
        student(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache).logits
        for i in range(count, 160)
    ]
    full = student(ids, attention_mask=mask, use_cache=False).logits[:, count:]
    assert (torch.cat(steps, dim=1) - full).abs().max() <= CACHED_LOGITS


@CASES
@torch.no_grad()
def test_a_cache_that_is_cut_and_goes_on_otherwise(options, length):
    """Back over the start of a unit; other tokens come in place of those taken back."""
    student = student_of(options)
    ids = batch_of(length, padding=(0,))["input_ids"]
    cache = DynamicCache(config=student.config)
    student(ids[:, : length - 30], past_key_values=cache)
    student(ids[:, length - 30 : length - 20], past_key_values=cache)
    kept = length // 2
    cache.crop(kept - (length - 20))
    other = torch.cat([ids[:, :kept], ids[:, :50].flip(1)], dim=1)
    logits = [student(part, past_key_values=cache).logits for part in other[:, kept:].split([1, 45, 4], dim=1)]
    expected = student(other, use_cache=False).logits[:, kept:]
    assert (torch.cat(logits, dim=1) - expected).abs().max() <= CACHED_LOGITS


@pytest.mark.parametrize(
    "given",
    [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 4}],
    ids=["greedy", "beams", "static", "assisted"],
)
def test_generation_is_the_same_without_a_cache(given):
    student = student_of(SMALL)
    batch = batch_of(120, padding=(0,) if "prompt_lookup_num_tokens" in given else (9, 0))
    batch["input_ids"][:, 60:] = batch["input_ids"][:, :60]
    lengths = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    found = student.generate(**batch, **lengths, **given)
    beams = {"num_beams": given.get("num_beams", 1)}
    assert torch.equal(found, student.generate(**batch, **lengths, **beams, use_cache=False))


@torch.no_grad()
def test_weights_of_chunks_are_those_of_one_forward():
    student = student_of(SMALL)
    student.set_attn_implementation("eager")
    batch = batch_of(150)
    full = student(**batch, use_cache=False, output_attentions=True)
    assert torch.allclose(
        full.attentions[0].sum(-1)[batch["attention_mask"].bool()[:, None].expand(-1, 4, -1)], torch.ones(())
    )
    cache = DynamicCache(config=student.config)
    student(batch["input_ids"][:, :60], attention_mask=batch["attention_mask"][:, :60], past_key_values=cache)
    rest = student(
        batch["input_ids"][:, 60:],
        attention_mask=batch["attention_mask"],
        past_key_values=cache,
        output_attentions=True,
    )
    assert (rest.attentions[0] - full.attentions[0][:, :, 60:]).abs().max() <= CACHED_LOGITS


@torch.no_grad()
def test_what_was_saved_before_reads_blocks_of_the_text(tmp_path):
    """Breaks if the default of new conversions reaches an old config."""
    student = student_of(SMALL, gpt2(), cluster_keys=False)
    ids = batch_of(100, padding=(0,))["input_ids"]
    expected = student(ids).logits
    student.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["distattn"]["specs"][0].pop("cluster_keys") is False
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(type(student).from_pretrained(tmp_path).eval()(ids).logits, expected)
    clustered = type(student).from_pretrained(tmp_path, cluster_keys=True).eval()
    assert clustered.config.attention_specs[0].cluster_keys
    assert not torch.equal(clustered(ids).logits, expected)


@torch.no_grad()
def test_the_control_is_sinks_and_window_alone():
    """Not the rest of the window's unit, which clusters read."""
    student, ids = student_of(SMALL), batch_of(130, padding=(0,))["input_ids"]
    alone = without_far_field(student)(ids, output_attentions=True).attentions[0] > 0
    place = torch.arange(130)
    own = (place // 2)[:, None] - (place // 2)[None]
    near = (own >= 0) & ((own <= 3) | (place < 4)) & (place <= place[:, None])
    assert torch.equal(alone, near.expand_as(alone))


def test_training_follows_the_kernels_forward():
    """Gradients by operators, of the same output as inference gives."""
    student = student_of(KERNEL).train()
    ids = batch_of(600, padding=(0,))["input_ids"]
    trained = student(ids, labels=ids)
    trained.loss.backward()
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)
    with torch.no_grad():
        assert (student.eval()(ids, use_cache=False).logits - trained.logits).abs().max() <= CACHED_LOGITS
