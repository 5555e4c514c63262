"""Retrieval attention inside models: conversion, caches, generation, saving."""

import copy
import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Gemma2Config, Gemma2ForCausalLM
from transformers.cache_utils import DynamicLayer

from distattn_hf import AttentionSpec, convert, revert
from distattn_hf.conversion.calibrate import CalibrationOptions
from distattn_hf.core.derived_cache import DerivedLayer
from tests.conversion.absolute_models import FAMILIES as ABSOLUTE
from tests.conversion.models import FAMILIES, VOCAB, gpt2, llama, token_batch
from tests.conversion.nystrom_cases import AUTO, in_chunks, padded
from tests.tolerances import CACHED_LOGITS, EXACT_LOGITS, LIFT_FLOAT64

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
DECODERS = pytest.mark.parametrize("family", ["gpt2", "llama"])


def retrieval(**kwargs) -> AttentionSpec:
    """Blocks of 4 keys, so that few of 100 are read."""
    sizes = {"window_size": 5, "num_sinks": 2, "block_size": 4, "num_blocks": 2, "min_weight": 0.02}
    return AttentionSpec(mechanism="retrieval", **{**sizes, **kwargs})


# Exact attention.
ALL = {"num_blocks": 40, "min_weight": 0.0}
# What the CPU's kernel takes; see test_clustered_keys.py for its clusters, which need longer texts.
WHOLE_PANELS = {"block_size": 16, "num_blocks": 1, "cluster_keys": False}


def student_of(family: str, **kwargs):
    return convert(FAMILIES[family](), retrieval(**kwargs))


def long_batch(model, length: int = 100, **kwargs):
    return token_batch(model, length=length, **kwargs)


@EVERY_FAMILY
@torch.no_grad()
def test_all_blocks_are_the_teacher_and_few_are_not(family):
    """Converted without a text, in place of no weight; padding on the side that the family has it. In float64."""
    teacher = FAMILIES[family]().double()
    batch = long_batch(teacher, padded=True)
    real = batch["attention_mask"].bool()
    real = torch.ones_like(batch["decoder_input_ids"]).bool() if family == "t5" else real
    expected = teacher(**batch).logits[real]
    student = convert(teacher, retrieval(**ALL))
    assert student.conversion_report.init == "exact"
    assert not any(".distattn." in name for name in student.state_dict())
    assert (student(**batch).logits[real] - expected).abs().max() <= LIFT_FLOAT64
    student.set_attention_options(num_blocks=1)
    off = (student(**batch).logits[real] - expected).abs().max()
    assert off > 100 * EXACT_LOGITS, "the control: with one block something is lost"
    back = revert(student)
    assert torch.equal(back(**batch).logits[real], expected)
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)


@EVERY_FAMILY
@pytest.mark.parametrize("options", [{}, WHOLE_PANELS], ids=["operators", "kernel"])
@torch.no_grad()
def test_eager_is_the_same_attention_and_returns_the_weights(family, options):
    student = student_of(family, **options)
    batch = long_batch(student, length=200 if family == "t5" else 100, padded=True)
    real = batch["attention_mask"].bool()
    fast = student(**batch, use_cache=False).logits
    student.set_attn_implementation("eager")
    slow = student(**batch, use_cache=False, output_attentions=True)
    rows = torch.ones(fast.shape[:2]).bool() if family == "t5" else real
    assert (slow.logits - fast)[rows].abs().max() <= CACHED_LOGITS
    weights = slow.decoder_attentions[0] if family == "t5" else slow.attentions[0]
    sums = weights.sum(-1).transpose(1, 2)[rows]
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-6, rtol=0)
    student.set_attention_options(far_field=False)
    without = student(**batch, use_cache=False, output_attentions=True)
    weights = without.decoder_attentions[0] if family == "t5" else without.attentions[0]
    assert (weights[-1, 0, -1] > 0).sum() < weights.shape[-1] * 0.8, "the control: some keys are not read"
    assert family == "t5" or (without.logits - slow.logits)[rows].abs().max() > 1e-3, "the control: the rest counts"


@DECODERS
@pytest.mark.parametrize("options", [{}, WHOLE_PANELS], ids=["operators", "kernel"])
@pytest.mark.parametrize("sizes", [[31, 1, 1, 7, 1, 19, 60], [1] * 9 + [111], [119, 1]], ids=str)
@torch.no_grad()
def test_chunks_with_left_padding_are_one_forward(family, options, sizes):
    student = student_of(family, **options)
    batch = padded(120)
    full = student(**batch, use_cache=False).logits
    real = batch["attention_mask"].bool()
    logits, cache = in_chunks(student, batch, sizes)
    assert all(type(layer) is DerivedLayer for layer in cache.layers)
    assert (logits - full)[real].abs().max() <= CACHED_LOGITS
    # The control: without padding the first row reads another text.
    assert real.logical_not().any()


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"cache_implementation": "static"},
    ],
    ids=["greedy", "sampling", "beams", "two", "static"],
)
def test_generation_is_the_same_without_a_cache(family, options):
    student = student_of(family, **WHOLE_PANELS)
    batch = padded(60) if family != "t5" else long_batch(student)
    batch = {name: tensor for name, tensor in batch.items() if name in ("input_ids", "attention_mask")}
    lengths = {"max_new_tokens": 25, "min_new_tokens": 25, "do_sample": False}
    torch.manual_seed(3)
    with_cache = student.generate(**batch, **{**lengths, **options})
    torch.manual_seed(3)
    options = {name: value for name, value in options.items() if name != "cache_implementation"}
    without = student.generate(**batch, use_cache=False, **{**lengths, **options})
    assert torch.equal(with_cache, without)


def test_assisted_generation_takes_tokens_back():
    """The cache is cropped; what comes in place of what was removed is found by its own means."""
    student = student_of("llama", **WHOLE_PANELS)
    ids = torch.randint(3, VOCAB, (1, 30)).repeat(1, 3)
    expected = student.generate(ids, max_new_tokens=30, min_new_tokens=30, do_sample=False)
    looked_up = student.generate(ids, max_new_tokens=30, min_new_tokens=30, do_sample=False, prompt_lookup_num_tokens=4)
    assert torch.equal(looked_up, expected)
    assistant = llama()
    assisted = student.generate(ids, max_new_tokens=30, min_new_tokens=30, do_sample=False, assistant_model=assistant)
    assert torch.equal(assisted, expected)


@torch.no_grad()
def test_a_cache_is_cropped_copied_reordered_repeated_and_selected():
    """After each, the next tokens read what a fresh cache of the same tokens reads."""
    student = student_of("gpt2", **WHOLE_PANELS)
    ids = torch.randint(3, VOCAB, (3, 100))

    def fresh(rows, new):
        return student(torch.cat([rows, new], dim=1), use_cache=False).logits[:, -new.shape[1] :]

    def begun():
        cache = DynamicCache(config=student.config)
        student(ids, past_key_values=cache)
        return cache

    new = torch.randint(3, VOCAB, (3, 9))
    cases = {}
    cache = begun()
    cache.crop(-37)
    cases["cropped"] = cache, ids[:, :-37], new
    cache = begun()
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cases["reordered"] = cache, ids[[2, 0, 0]], new
    cache = begun()
    cache.batch_repeat_interleave(2)
    cases["repeated"] = cache, ids.repeat_interleave(2, dim=0), new.repeat_interleave(2, dim=0)
    cache = begun()
    cache.batch_select_indices(torch.tensor([1]))
    cases["selected"] = cache, ids[1:2], new[1:2]
    original = begun()
    cases["copied"] = copy.deepcopy(original), ids, new
    shallow = copy.copy(original)
    shallow.layers = [copy.copy(layer) for layer in original.layers]
    cases["copied, not deeply"] = shallow, ids, new
    for name, (cache, rows, tokens) in cases.items():
        logits = [student(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(tokens.shape[1])]
        assert (torch.cat(logits, dim=1) - fresh(rows, tokens)).abs().max() <= CACHED_LOGITS, name
    other = torch.randint(3, VOCAB, (3, 9))
    logits = student(other, past_key_values=original).logits
    assert (logits - fresh(ids, other)).abs().max() <= CACHED_LOGITS, "a copy wrote into the original"


@torch.no_grad()
def test_a_step_does_not_copy_the_cache():
    """Tokens within the room leave the keys where they are. Breaks if every step concatenates."""
    student = student_of("llama")
    cache = DynamicCache(config=student.config)
    student(torch.randint(3, VOCAB, (1, 80)), past_key_values=cache)
    student(torch.randint(3, VOCAB, (1, 1)), past_key_values=cache)
    before = cache.layers[0].keys.data_ptr()
    for _ in range(10):
        student(torch.randint(3, VOCAB, (1, 1)), past_key_values=cache)
    assert cache.layers[0].keys.data_ptr() == before
    assert cache.get_seq_length() == 91


@torch.no_grad()
def test_goes_on_from_a_plain_cache():
    """A prefix read by another model's cache class, or before: its keys are all there, its first queries are not."""
    student = student_of("llama", **WHOLE_PANELS, far_field=False)
    ids = torch.randint(3, VOCAB, (2, 90))
    cache = DynamicCache(config=student.config)
    student(ids[:, :70], past_key_values=cache)

    def copied():
        plain = DynamicCache(config=student.config)
        for index, layer in enumerate(cache.layers):
            plain.update(layer.keys.clone(), layer.values.clone(), index)
        return plain

    plain = copied()
    assert type(plain.layers[0]) is DynamicLayer
    logits = student(ids[:, 70:], past_key_values=plain).logits
    assert type(plain.layers[0]) is DerivedLayer
    assert (logits - student(ids, use_cache=False).logits[:, 70:]).abs().max() <= CACHED_LOGITS
    student.set_attention_options(far_field=True)
    whole = student(ids, use_cache=False).logits[:, 70:]
    teacher = revert(student)(ids, use_cache=False).logits[:, 70:]
    logits = student(ids[:, 70:], past_key_values=copied()).logits
    assert (logits - teacher).abs().mean() <= 1.5 * (whole - teacher).abs().mean()


@EVERY_FAMILY
@torch.no_grad()
def test_saved_and_loaded_bit_for_bit(family, tmp_path):
    student = student_of(family, num_blocks=3)
    batch = long_batch(student, padded=True)
    expected = student(**batch).logits
    student.save_pretrained(tmp_path)
    loaded = AUTO[family].from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, expected)
    assert loaded.conversion_report.groups[0].attention == "retrieval"
    less = AUTO[family].from_pretrained(tmp_path, num_blocks=0).eval()
    assert less.config.attention_specs[0].num_blocks == 0
    assert not torch.equal(less(**batch).logits, expected)


@pytest.mark.parametrize("beyond", [False, True])
@torch.no_grad()
def test_what_was_saved_before_min_weight_reads_as_many_blocks(beyond, tmp_path):
    """Also by Nyström heads that retrieve. Breaks if the default of new conversions reaches an old config."""
    spec = retrieval(min_weight=0.0)
    if beyond:
        spec = AttentionSpec(
            mechanism="nystrom", window_size=5, num_sinks=2, beyond="retrieval", block_size=4, num_blocks=2,
            min_weight=0.0, num_landmarks=4,
        )  # fmt: skip
    teacher = llama()
    options = CalibrationOptions(steps=1, beyond_share=0.5) if beyond else None
    texts = [token_batch(teacher, length=60)] if beyond else None
    student = convert(teacher, spec, calibration=texts, options=options)
    ids = long_batch(student)["input_ids"]
    expected = student(ids).logits
    student.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["distattn"]["specs"][0].pop("min_weight") == 0.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(type(student).from_pretrained(tmp_path).eval()(ids).logits, expected)
    by_weight = type(student).from_pretrained(tmp_path, min_weight=0.3).eval()
    assert by_weight.config.attention_specs[0].min_weight == 0.3
    assert not torch.equal(by_weight(ids).logits, expected)


@pytest.mark.parametrize("metric", ["l2", "cosine", "l1"])
def test_a_fitted_distance_is_retrieved_from(metric):
    """With all blocks it is the exact conversion, with few it comes near; both read a cache."""
    teacher = llama()
    texts = [token_batch(teacher, length=60, seed=seed) for seed in range(2)]
    options = CalibrationOptions(steps=3, progress=False)
    exact = convert(teacher, AttentionSpec(metric), calibration=texts, options=options)
    student = convert(teacher, retrieval(metric=metric, **ALL), calibration=texts, options=options)
    batch = long_batch(teacher)
    with torch.no_grad():
        expected = exact(**batch).logits
        assert (student(**batch).logits - expected).abs().max() <= EXACT_LOGITS
        student.set_attention_options(num_blocks=2)
        full = student(**batch, use_cache=False).logits
        assert (full - expected).abs().max() > EXACT_LOGITS
        logits, _ = in_chunks(student, batch, [50, 1, 1, 48])
        assert (logits - full).abs().max() <= CACHED_LOGITS
    assert student.conversion_report.mean_divergence_after is not None


@EVERY_FAMILY
def test_everything_trains(family):
    """Gradients reach all that they reach in the teacher, and are finite; steps lower the loss."""
    student = student_of(family).eval()  # no dropout, which would decide what a step does
    batch = long_batch(student, length=60)
    labels = batch.get("decoder_input_ids", batch["input_ids"])
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):  # of a few steps one may change what is read, and the loss with it
        loss = student(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    projections = [
        p for n, p in student.named_parameters() if any(k in n for k in ("q_proj", "query.weight", ".q.", "c_attn"))
    ]
    assert projections
    for parameter in projections:
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ABSOLUTE)
@torch.no_grad()
def test_sinks_and_caps(kind):
    """All blocks are the teacher of models with learned sinks or capped logits; sliding layers stay as they are."""
    teacher = ABSOLUTE[kind]()
    student = convert(teacher, retrieval(**ALL))
    ids = torch.randint(3, teacher.config.get_text_config().vocab_size, (2, 60))
    assert (student(ids).logits - teacher(ids).logits).abs().max() <= EXACT_LOGITS


@torch.no_grad()
def test_only_layers_of_full_attention_are_converted():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCAB, "sliding_window": 8}
    config = Gemma2Config(**sizes, attn_logit_softcapping=None, max_position_embeddings=256, initializer_range=0.2)
    torch.manual_seed(0)
    teacher = Gemma2ForCausalLM(config).eval()
    types = teacher.config.layer_types
    student = convert(teacher, retrieval(**ALL))
    full = [i for i, kind in enumerate(types) if kind == "full_attention"]
    assert [group.layer for group in student.conversion_report.groups] == full
    assert len(student.conversion_report.unconverted) == len(types) - len(full)
    batch = padded(60)
    real = batch["attention_mask"].bool()
    assert (student(**batch).logits - teacher(**batch).logits)[real].abs().max() <= EXACT_LOGITS
    logits, _ = in_chunks(student, batch, [20, 1, 1, 38])
    assert (logits - student(**batch, use_cache=False).logits)[real].abs().max() <= CACHED_LOGITS
    with pytest.raises(ValueError, match="sliding_attention, which mechanism='retrieval' cannot honour"):
        convert(teacher, retrieval(layers="sliding_attention"))


@torch.no_grad()
def test_some_heads_and_some_layers():
    teacher = llama()
    batch = padded(80)
    real = batch["attention_mask"].bool()
    plans = {
        "key head": [retrieval(**ALL, heads=[0, 1])],
        "part of a key head": [retrieval(**ALL, heads=[1, 2])],
        "beside an exact one": [
            retrieval(**ALL, heads=[0]),
            AttentionSpec("sqeuclidean", lift=True, heads=[1, 2, 3]),
        ],
        "one layer": [retrieval(**ALL, layers=[1])],
    }
    expected = teacher(**batch).logits
    for name, plan in plans.items():
        student = convert(teacher, plan, init="exact")
        assert (student(**batch).logits - expected)[real].abs().max() <= EXACT_LOGITS, name
        student.set_attention_options(num_blocks=1)
        full = student(**batch, use_cache=False).logits
        assert (full - expected)[real].abs().max() > EXACT_LOGITS, name
        logits, _ = in_chunks(student, batch, [30, 1, 49])
        assert (logits - full)[real].abs().max() <= CACHED_LOGITS, name


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_blocks": -1}, "num_blocks must be an integer >= 0, got -1"),
        ({"min_weight": 1.0}, "min_weight must be a number from 0 to below 1, got 1.0"),
        ({"min_weight": True}, "min_weight must be a number from 0 to below 1, got True"),
        ({"block_size": 0}, "block_size must be an integer >= 1, got 0"),
        ({"window_size": 0}, "window_size must be an integer >= 1 with mechanism='retrieval', got 0"),
        ({"num_landmarks": 8}, "num_landmarks belongs to mechanism='nystrom', got num_landmarks=8 with 'retrieval'"),
        ({"backend": "cpp"}, "backend must be 'auto' with mechanism='retrieval', got 'cpp'"),
        ({"lam": 2.0}, "with lift=True sets lam=0.5 and transform='none', got lam=2.0"),
        ({"softening": 1.0}, "softening must be None or 0 with mechanism 'retrieval'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused_by_name(fields, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        retrieval(**fields)


def test_options_of_another_mechanism_are_refused():
    student = student_of("gpt2")
    with pytest.raises(
        ValueError, match="exact_below=5 belongs to mechanism='nystrom', which this model does not have"
    ):
        student.set_attention_options(exact_below=5)
    with pytest.raises(ValueError, match="block_size must be an integer >= 1, got 0"):
        student.set_attention_options(block_size=0)
    assert student.config.attention_specs[0].block_size == 4
    nystrom_too = [retrieval(heads=[0]), AttentionSpec(mechanism="nystrom", heads=[1])]
    with pytest.raises(ValueError, match="has one cache; give them separate layers"):
        convert(gpt2(), nystrom_too, calibration=[token_batch(gpt2(), length=40)])


@torch.no_grad()
def test_half_precision_is_as_good_as_the_teachers():
    """bfloat16 weights: the student's logits are about as far from float32 as the teacher's own."""
    teacher = llama()
    ids = torch.randint(3, VOCAB, (2, 100))
    exact = teacher(ids).logits
    student = convert(teacher, retrieval(**{**WHOLE_PANELS, "num_blocks": 9, "min_weight": 0.0})).to(torch.bfloat16)
    limit = (teacher.to(torch.bfloat16)(ids).logits.float() - exact).square().mean().sqrt()
    cache = DynamicCache(config=student.config)
    read = torch.cat([student(part, past_key_values=cache).logits for part in ids.split([60, 1, 39], dim=1)], dim=1)
    for logits in (student(ids, use_cache=False).logits, read):
        assert logits.dtype == torch.bfloat16
        assert (logits.float() - exact).square().mean().sqrt() <= 1.5 * limit


def test_the_package_loads_it_as_any_model(tmp_path):
    student = student_of("gpt2")
    student.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model).__name__ == "DistAttnGPT2LMHeadModel"
    assert model.config.attention_specs == student.config.attention_specs


@EVERY_FAMILY
def test_the_report_says_how_much_was_caught(family):
    """With text: the share of the teacher's own weights on the keys that are read, as the weights themselves say."""
    teacher = FAMILIES[family]()
    batch = long_batch(teacher, padded=True)
    whole = convert(teacher, retrieval(**ALL), calibration=[batch])
    student = convert(teacher, retrieval(num_blocks=1, far_field=False), calibration=[batch])
    with_far_field = convert(teacher, retrieval(num_blocks=1), calibration=[batch])
    assert with_far_field.conversion_report.groups[0].caught == student.conversion_report.groups[0].caught
    for group in whole.conversion_report.groups:
        assert min(group.caught) >= 1 - 1e-5
    caught = student.conversion_report.groups[0].caught
    assert "of the attention's weight caught" in student.conversion_report.summary()
    teacher.set_attn_implementation("eager")
    student.set_attn_implementation("eager")
    with torch.no_grad():
        exact, read = (model(**batch, output_attentions=True) for model in (teacher, student))
    name = "encoder_attentions" if family == "t5" else "attentions"
    seen = (getattr(read, name)[0] > 0) & batch["attention_mask"][:, None, :, None].bool()
    weights = getattr(exact, name)[0]
    share = (weights * seen).sum(-1)
    expected = share.sum((0, 2)) / (share > 0).sum((0, 2))
    assert (torch.tensor(caught) - expected).abs().max() <= EXACT_LOGITS
    assert 0.2 < expected.min() < 0.999


@DECODERS
@torch.no_grad()
def test_what_analyses_watch_is_what_runs(family):
    """Weights of heads as analyses see them, keys repeated: those that the model applies."""
    from distattn_hf.analysis.watch import watched

    student = student_of(family)
    batch = padded(90)
    seen = {}
    with watched(student, lambda call: seen.update({call.name: call.full()})):
        logits = student(**batch, use_cache=False).logits
    assert torch.isfinite(logits).all()
    student.set_attn_implementation("eager")
    weights = student(**batch, use_cache=False, output_attentions=True).attentions
    real = batch["attention_mask"].bool()
    for own, applied in zip(seen.values(), weights, strict=True):
        difference = (own - applied).abs().amax((1, 3))[real]
        assert difference.max() <= CACHED_LOGITS


def test_attention_transfer_trains_what_runs():
    """The student of a transfer chooses blocks as the model does, key heads shared."""
    from distattn_hf.training.objectives import student_attention

    student = student_of("llama")
    batch = long_batch(student)
    outputs = []

    def observe(state, query, key, value, call):
        outputs.append(student_attention(state, query, key, value, call))
        return outputs[-1]

    from distattn_hf.conversion.observe import observed

    with torch.no_grad():
        expected = student(**batch, use_cache=False).logits
        with observed(student, observe):
            logits = student(**batch, use_cache=False).logits
    assert len(outputs) == 2
    assert (logits - expected).abs().max() <= CACHED_LOGITS


def test_adapters_train_and_merge():
    """LoRA on a converted model: its targets are found by the base model's type, and merging changes nothing."""
    from peft import LoraConfig, get_peft_model

    student = student_of("llama")
    batch = long_batch(student, length=60)
    model = get_peft_model(student, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.train()
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    gradients = [p.grad for n, p in model.named_parameters() if "lora_" in n]
    assert gradients
    assert all(g is not None and g.isfinite().all() and g.abs().max() > 0 for g in gradients)
    model.eval()
    with torch.no_grad():
        expected = model(**batch).logits
        merged = model.merge_and_unload()
        assert (merged(**batch).logits - expected).abs().max() <= EXACT_LOGITS


@pytest.mark.parametrize("family", ["llama", "bert"])
@torch.no_grad()
def test_compiled_models_give_the_same(family):
    """Graphs may break, where the padding's values say where blocks begin; the numbers are the same."""
    student = student_of(family)
    batch = long_batch(student, length=60, padded=True)
    real = batch["attention_mask"].bool()
    expected = student(**batch, use_cache=False).logits[real]
    torch._dynamo.reset()
    compiled = torch.compile(student, backend="aot_eager")
    assert (compiled(**batch, use_cache=False).logits[real] - expected).abs().max() <= CACHED_LOGITS


class TestACacheThatWasTouched:
    """What a `DynamicCache` allows: after each, new tokens read what a fresh cache of the same keys reads."""

    def begun(self, length=100):
        student = student_of("llama", **WHOLE_PANELS)
        ids = torch.randint(3, VOCAB, (2, length + 40))
        with torch.no_grad():
            cache = student(ids[:, :length], use_cache=True).past_key_values
        return student, ids, cache

    def after(self, student, cache, tokens):
        with torch.no_grad():
            return torch.cat(
                [student(t, past_key_values=cache).logits for t in tokens.split([1, tokens.shape[1] - 1], 1)], 1
            )

    def fresh(self, student, rows, tokens):
        with torch.no_grad():
            return student(torch.cat([rows, tokens], 1), use_cache=False).logits[:, -tokens.shape[1] :]

    def test_filled_under_inference_mode(self):
        student, ids, _ = self.begun()
        with torch.inference_mode():
            cache = student(ids[:, :100], use_cache=True).past_key_values
        logits = self.after(student, cache, ids[:, 100:])
        assert (logits - self.fresh(student, ids[:, :100], ids[:, 100:])).abs().max() <= CACHED_LOGITS

    def test_filled_under_autocast(self):
        """Later keys keep their precision, as `torch.cat` would have it."""
        student, ids, _ = self.begun()
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            cache = student(ids[:, :100], use_cache=True).past_key_values
        logits = self.after(student, cache, ids[:, 100:])
        assert logits.dtype == torch.float32
        assert cache.layers[0].keys.dtype == torch.float32

    def test_cut_or_changed_by_hand(self):
        student, ids, cache = self.begun()
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :70], layer.values[:, :, :70]
        logits = self.after(student, cache, ids[:, 100:])
        assert (logits - self.fresh(student, ids[:, :70], ids[:, 100:])).abs().max() <= CACHED_LOGITS

    def test_another_padding_of_the_same_keys(self):
        """A mask that says less of earlier keys than before: with all blocks chosen it is the teacher's."""
        teacher = llama()
        student = convert(teacher, retrieval(**{**WHOLE_PANELS, **ALL}))
        ids = torch.randint(3, VOCAB, (1, 140))
        hidden, open_mask = torch.ones(2, 1, 140, dtype=torch.long)
        hidden[:, 20:90] = 0
        hidden[:, :3] = open_mask[:, :3] = 0
        results = []
        for model in (teacher, student):
            cache = DynamicCache(config=model.config)
            with torch.no_grad():
                model(ids[:, :120], attention_mask=hidden[:, :120], past_key_values=cache)
                results.append(model(ids[:, 120:], attention_mask=open_mask, past_key_values=cache).logits)
        assert (results[0] - results[1]).abs().max() <= EXACT_LOGITS

    def test_who_holds_earlier_keys_keeps_them(self):
        student, ids, cache = self.begun(60)
        held = cache.layers[0].keys
        before = held.clone()
        cache.crop(-1)
        self.after(student, cache, ids[:, 80:])
        assert torch.equal(held, before)

    def test_a_mask_that_ends_before_the_new_tokens(self):
        """transformers' own rule, also of a static cache: what the mask does not reach is not there."""
        teacher = llama()
        student = convert(teacher, retrieval(**ALL))
        ids = torch.randint(3, VOCAB, (2, 70))
        results = []
        for model in (teacher, student):
            cache = DynamicCache(config=model.config)
            with torch.no_grad():
                model(ids[:, :60], past_key_values=cache)
                mask = torch.ones(2, 60, dtype=torch.long)
                results.append(model(ids[:, 60:], attention_mask=mask, past_key_values=cache).logits)
        assert (results[0] - results[1]).abs().max() <= EXACT_LOGITS


def test_what_is_caught_is_of_the_keys_weight():
    """A learned sink takes its share before: with all blocks everything is caught."""
    teacher = ABSOLUTE["gpt_oss"]()
    batch = {"input_ids": torch.randint(3, teacher.config.vocab_size, (2, 60))}
    student = convert(teacher, retrieval(**ALL), calibration=[batch])
    for group in student.conversion_report.groups:
        assert min(group.caught) >= 1 - 1e-5
