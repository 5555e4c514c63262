"""Nyström attention in most heads and retrieval in those whose far field loses too much: one module, one cache."""

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer

from distattn_hf import AttentionSpec, convert, retrieval_attention, revert
from distattn_hf.conversion.beyond import take_beyond
from distattn_hf.conversion.calibrate import CalibrationOptions
from distattn_hf.conversion.convert import current_report
from distattn_hf.conversion.observe import observed
from distattn_hf.core.derived_cache import DerivedLayer
from distattn_hf.core.nystrom_cache import NystromLayer
from distattn_hf.training.objectives import student_attention
from tests.conversion.models import VOCAB, llama, token_batch
from tests.conversion.nystrom_cases import (
    AUTO,
    DECODERS,
    EVERY_FAMILY,
    GENERATION,
    NONE_CHOSEN,
    QUICK,
    build,
    check_reload_and_reference,
    in_chunks,
    layers_of,
    nystrom,
    padded,
    taken,
)
from tests.tolerances import CACHED_LOGITS, EXACT_LOGITS, LIFT_FLOAT64

# Blocks of 4 keys, so that few of 100 are read; and what the CPU's kernel takes.
OPERATORS = {"block_size": 4, "num_blocks": 2}
KERNEL = {"block_size": 16, "num_blocks": 1}
SIZES = pytest.mark.parametrize("sizes", [OPERATORS, KERNEL], ids=["operators", "kernel"])


@cache
def student_of(family: str, sizes: tuple = tuple(OPERATORS.items()), **kwargs):
    """For tests that change nothing in it."""
    return taken(family, **dict(sizes), **kwargs)


@torch.no_grad()
def test_each_head_runs_what_it_is():
    """In float64: retrieval heads as the public function runs them on the model's own q, k, v, the others as in a
    student that is Nyström's alone."""
    student = taken("llama", dtype=torch.float64, **OPERATORS)
    batches = [token_batch(student, length=40, seed=seed) for seed in range(2)]
    alone = convert(build("llama").double(), nystrom(9), calibration=batches, options=QUICK)
    others = iter(alone.attention_states.values())
    batch = padded(90)
    real = batch["attention_mask"].bool()
    differences = []

    def expected(state, query, key, value, call):
        output = student_attention(next(others), query, key, value, call)
        (heads,) = (heads for heads, group in state.parts() if group.spec.mechanism == "retrieval")
        search = {"window_size": 9, "num_sinks": 2, **OPERATORS}
        mask = None if call.mask is None else call.mask[:, 0, 0]
        tensors = query[:, heads], key[:, heads[:1]], value[:, heads[:1]]
        output[:, heads] = retrieval_attention(*tensors, scaling=call.scaling, is_causal=True, mask=mask, **search)
        difference = student_attention(state, query, key, value, call) - output
        differences.append(difference.transpose(1, 2)[real].abs().max())
        return output

    with observed(student, expected):
        logits = student(**batch, use_cache=False).logits
    assert len(differences) == 2
    assert max(differences) <= 1e-12
    assert (student(**batch, use_cache=False).logits - logits)[real].abs().max() <= 1e-10


@EVERY_FAMILY
@torch.no_grad()
def test_with_all_blocks_they_are_exact(family):
    """In float64."""
    student = taken(family, dtype=torch.float64, block_size=4, num_blocks=40, min_weight=0.0)
    exact = taken(family, "exact", dtype=torch.float64)
    batch = token_batch(student, length=100, padded=True)
    rows = torch.ones(2, 50).bool() if family == "t5" else batch["attention_mask"].bool()
    expected = exact(**batch).logits
    assert (student(**batch).logits - expected)[rows].abs().max() <= LIFT_FLOAT64
    student.set_attention_options(num_blocks=0)
    assert (student(**batch).logits - expected)[rows].abs().max() > 10 * EXACT_LOGITS, "the control: nothing is chosen"


@DECODERS
@SIZES
@pytest.mark.parametrize("exact_below", [0, 50])
@pytest.mark.parametrize("cut", [[31, 1, 1, 7, 1, 19, 60], [1] * 9 + [111], [119, 1]], ids=str)
@torch.no_grad()
def test_chunks_with_left_padding_are_one_forward(family, sizes, exact_below, cut):
    model, batch = student_of(family, tuple(sizes.items()), exact_below=exact_below), padded(120)
    full = model(**batch, use_cache=False).logits
    logits, past = in_chunks(model, batch, cut)
    layers_of(past)
    real = batch["attention_mask"].bool()
    assert (logits - full)[real].abs().max() <= CACHED_LOGITS


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, options) for family in ("gpt2", "llama") for options in ({}, {"do_sample": True}, {"num_beams": 3})),
        ("t5", {"max_new_tokens": 15, "min_new_tokens": 15}),
    ],
    ids=str,
)
def test_generation_is_the_same_without_a_cache(family, options):
    model = student_of(family, tuple(KERNEL.items()))
    batch = token_batch(model, length=60, padded=True)
    batch.pop("decoder_input_ids", None)
    results = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        results.append(model.generate(**batch, **{**GENERATION, **options}, use_cache=use_cache))
    assert torch.equal(*results)


@DECODERS
@torch.no_grad()
def test_rows_and_copies_of_a_cache(family):
    model, batch = student_of(family, tuple(KERNEL.items())), padded(100, rows=3)
    full = model(**batch, use_cache=False).logits[:, 80:]
    prompt = {name: tensor[:, :80] for name, tensor in batch.items()}
    index = torch.tensor([2, 0, 0])
    changes = {
        "reorder": (lambda past: past.reorder_cache(index), index),
        "repeat": (lambda past: past.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1, 2, 2])),
        "select": (lambda past: past.batch_select_indices(torch.tensor([2, 0])), torch.tensor([2, 0])),
    }

    def rest(past, rows):
        return torch.cat(
            [
                model(
                    input_ids=batch["input_ids"][rows, start:stop], attention_mask=batch["attention_mask"][rows, :stop],
                    position_ids=batch["position_ids"][rows, start:stop], past_key_values=past,
                ).logits
                for start, stop in ((80, 81), (81, 100))
            ],
            dim=1,
        )  # fmt: skip

    for name, (change, rows) in changes.items():
        past = in_chunks(model, prompt, [80])[1]
        change(past)
        assert (rest(past, rows) - full[rows]).abs().max() <= CACHED_LOGITS, name
    past = in_chunks(model, prompt, [80])[1]
    copied, everything = copy.deepcopy(past), torch.arange(3)
    rest(past, everything)
    assert (rest(copied, everything) - full).abs().max() <= CACHED_LOGITS, "the original wrote into its copy"
    past.reset()
    assert (in_chunks(model, batch, [100], past)[0][:, 80:] - full).abs().max() <= CACHED_LOGITS


@torch.no_grad()
def test_goes_on_from_a_plain_cache():
    """A prefix in transformers' own layers: its keys become a window and a state, and those of retrieval heads stay."""
    model, ids = taken("llama", **OPERATORS), torch.randint(3, VOCAB, (2, 100))
    # The queries of the prefix, about which its blocks would be summed up, are not in the cache.
    model.set_attention_options(far_field=False)
    teacher, plain = llama(), DynamicCache()
    past = teacher(ids[:, :70], use_cache=True).past_key_values
    for index, layer in enumerate(past.layers):
        plain.update(layer.keys, layer.values, index)
    assert type(plain.layers[0]) is DynamicLayer
    later = {"input_ids": ids[:, 70:], "attention_mask": torch.ones(2, 100, dtype=torch.long)}
    whole = model(**later, past_key_values=copy.deepcopy(plain)).logits
    parts = [model(ids[:, a:b], past_key_values=plain).logits for a, b in ((70, 71), (71, 100))]
    assert (torch.cat(parts, dim=1) - whole).abs().max() <= CACHED_LOGITS
    # The first module reads the same keys in both; those of its retrieval heads are the prefix's own and the new ones.
    layer = layers_of(plain)[0]
    assert torch.equal(layer.retrieved.keys[:, :, :70], past.layers[0].keys[:, [1]])
    assert layer.retrieved.keys.shape[2] == 100


@DECODERS
@torch.no_grad()
def test_a_cache_grows_by_the_keys_of_retrieval_heads_alone(family):
    model, batch = student_of(family, tuple(KERNEL.items())), padded(384)
    batch["position_ids"] = batch["position_ids"].clamp_max(127)
    bytes_at = {}
    for length in (128, 384):
        past = in_chunks(model, {name: tensor[:, :length] for name, tensor in batch.items()}, [length])[1]
        bytes_at[length] = [layer.nbytes() for layer in layers_of(past)]
        assert [layer.retrieved.keys.shape[1] for layer in layers_of(past)] == [1, 1]
        assert all(not layer.all_keys.numel() for layer in layers_of(past))
    keys = 2 * 256 * 2 * 8 * 4
    for before, after in zip(bytes_at[128], bytes_at[384], strict=True):
        # Codes have room for a panel of 16 blocks and a quarter more; they are less than a third of keys this small.
        assert keys <= after - before <= 1.7 * keys


@EVERY_FAMILY
@torch.no_grad()
def test_a_limit_of_the_error_takes_whole_key_heads(family, tmp_path):
    """The limit is between the errors of two query heads; what shares a key head with the worse one retrieves, too."""
    teacher = build(family)
    batches = [token_batch(teacher, length=40, seed=seed) for seed in range(2)]
    free = convert(teacher, nystrom(9), calibration=batches, options=QUICK)
    assert free.config.attention_specs[0].beyond is None
    # The first module is fitted on the same inputs with and without a limit.
    errors = free.conversion_report["groups"][0]["output_error"]
    options = CalibrationOptions(steps=2, progress=False, max_error=sorted(errors)[-2] * 1.001)
    student = convert(teacher, nystrom(9), calibration=batches, options=options)
    spec, report = student.config.attention_specs[0], student.conversion_report
    assert (spec.beyond, spec.block_size, spec.num_blocks, spec.min_weight) == ("retrieval", 16, 64, 0.003)
    worst, share = errors.index(max(errors)), 2 if family == "llama" else 1
    expected = [head for head in range(4) if head // share == worst // share]
    first = [group for group in report.groups if group.module == report.groups[0].module]
    assert [group.mechanism for group in first] == ["nystrom", "retrieval"]
    assert first[1].heads == expected
    assert sorted(first[0].heads + first[1].heads) == list(range(4))
    assert not report.exact_heads
    # Of forty tokens what has next to no weight is not read.
    assert min(first[1].caught) >= 1 - 3 * spec.min_weight
    assert "heads retrieve" in report.summary()
    assert f" {len(expected)}/4 " in str(report)

    batch = token_batch(teacher, length=100, padded=True)
    logits = student(**batch).logits
    student.save_pretrained(tmp_path)
    again = AUTO[family].from_pretrained(tmp_path).eval()
    assert torch.equal(again(**batch).logits, logits)
    assert current_report(again).to_dict() == {**report.to_dict(), "groups": current_report(again).to_dict()["groups"]}
    assert [g.heads for g in current_report(again).groups] == [g.heads for g in report.groups]
    back = revert(again)
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)


@torch.no_grad()
def test_a_module_of_retrieval_heads_alone_keeps_their_cache(tmp_path):
    """Converted and reloaded: layers without a Nyström head hold keys that can be found, beside Nyström layers."""
    student = taken("llama", **KERNEL)
    name, state = next(iter(student.attention_states.items()))
    take_beyond(student, name, state, [{}, {}], [0, 1])
    batch = padded(100)
    real = batch["attention_mask"].bool()
    full = student(**batch, use_cache=False).logits
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**batch, use_cache=False).logits, full)
    for model in (student, again):
        logits, past = in_chunks(model, batch, [60, 1, 39])
        assert [type(layer) for layer in past.layers] == [DerivedLayer, NystromLayer]
        assert (logits - full)[real].abs().max() <= CACHED_LOGITS


@SIZES
@torch.no_grad()
def test_eager_is_the_same_and_weights_sum_to_one(sizes, tmp_path):
    model, batch = taken("llama", **sizes), padded(80)
    check_reload_and_reference(model, batch, model(**batch, use_cache=False).logits, tmp_path)


@torch.no_grad()
def test_options_reach_all_heads_and_a_reload(tmp_path):
    """Blocks and window of Nyström and retrieval heads are one spec's: what is set is what is saved."""
    student = taken("llama", **OPERATORS)
    batch = padded(100)
    before = student(**batch).logits
    student.set_attention_options(num_blocks=5, window_size=12)
    logits = student(**batch).logits
    assert not torch.equal(logits, before)
    student.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(**batch).logits, logits)
    with pytest.raises(ValueError, match="num_sinks=3 belongs to mechanism='retrieval', which this model does not"):
        student.set_attention_options(num_sinks=3)
    exact = taken("llama", "exact")
    with pytest.raises(ValueError, match="num_blocks=5 belongs to mechanism='retrieval'.*which this model does not"):
        exact.set_attention_options(num_blocks=5)


def test_what_was_saved_before_stays_exact():
    """A spec without the field: heads that are nobody's keep dot-product attention."""
    exact = taken("llama", "exact")
    block = exact.config.distattn
    for name in ("beyond", "block_size", "num_blocks"):
        block["specs"][0].pop(name)
    config = type(exact.config).from_dict({**exact.config.to_dict(), "distattn": block})
    again = type(exact)(config).eval()
    again.load_state_dict(exact.state_dict())
    assert config.attention_specs[0].beyond is None
    assert [group for state in again.attention_states.values() for _, group in state.parts()].count(None) == 2
    batch = padded(60)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, exact(**batch).logits)


def test_what_cannot_be_is_refused_by_name():
    teacher = llama()
    batch = token_batch(teacher, length=40)
    with pytest.raises(ValueError, match=r"beyond='retrieval' needs CalibrationOptions\(max_error=...\)"):
        convert(teacher, nystrom(9, beyond="retrieval"), calibration=[batch])
    for options, says in (
        ({"select": "needle"}, "select must be one of error, probe, got 'needle'"),
        ({"beyond_share": 0.0}, "beyond_share must be None or 0 < share <= 1, got 0.0"),
        ({"beyond_share": 0.1, "max_error": 0.4}, "max_error and beyond_share=0.1 both say which heads go"),
        ({"select": "probe", "max_error": 0.4}, "max_error and beyond_share=0.1 both say which heads go"),
        ({"probe_lengths": (0,)}, r"probe_lengths must be integers >= 1, got \(0,\)"),
    ):
        with pytest.raises(ValueError, match=says):
            CalibrationOptions(**options)
    probing = CalibrationOptions(steps=2, progress=False, select="probe")
    for length, says in ((60, "from 108 .* to 256 tokens, got 60"), (257, "from 108 .* to 256 tokens, got 257")):
        with pytest.raises(ValueError, match=f"probe_lengths must be {says}"):
            convert(teacher, nystrom(9), calibration=[batch], options=replace(probing, probe_lengths=(length,)))
    with pytest.raises(ValueError, match="select='probe' needs a causal language model, got DistAttnBertForMaskedLM"):
        convert(build("bert"), nystrom(9), calibration=[batch], options=probing)
    with pytest.raises(ValueError, match="select='probe' is for mechanism='nystrom', which no spec has"):
        convert(teacher, AttentionSpec("l2"), calibration=[batch], options=probing)
    with pytest.raises(ValueError, match="assisted generation .* takes tokens back"):
        student_of("llama").generate(batch["input_ids"], max_new_tokens=3, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="Leave cache_implementation at its default"):
        student_of("llama").generate(batch["input_ids"], max_new_tokens=2, cache_implementation="static")
    past = student_of("llama")(batch["input_ids"], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot be cropped"):
        past.crop(-1)


def test_a_training_step_reaches_every_projection():
    student = taken("llama", **OPERATORS).train()
    batch = padded(60)
    student(**batch, labels=batch["input_ids"]).loss.backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert parameter.grad.abs().max() > 0, name


def test_part_of_a_key_head(tmp_path):
    """A spec that has some query heads only: those of a key head that it has retrieve, each by itself."""
    teacher = llama()
    batches = [token_batch(teacher, length=40, seed=seed) for seed in range(2)]
    spec = nystrom(9, heads=[0, 1, 2], beyond="retrieval", **OPERATORS)
    student = convert(teacher, spec, calibration=batches, options=NONE_CHOSEN)
    for name, state in student.attention_states.items():
        take_beyond(student, name, state, [{}], [2])
    batch = padded(100)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        full = student(**batch, use_cache=False).logits
        logits, _ = in_chunks(student, batch, [60, 1, 39])
    assert (logits - full)[real].abs().max() <= CACHED_LOGITS


def test_spec_is_json():
    spec = AttentionSpec(mechanism="nystrom", beyond="retrieval", num_blocks=7, min_weight=0.1)
    assert AttentionSpec.from_dict(spec.to_dict()) == spec
    assert spec.beyond_spec() == AttentionSpec(mechanism="retrieval", num_blocks=7, min_weight=0.1)
