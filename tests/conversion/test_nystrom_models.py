"""Linear attention inside models: its cache of constant size, generation, saving, training, and what is refused."""

import subprocess
import sys
from functools import cache

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)

from distattn_hf import AttentionSpec, convert, revert
from distattn_hf.conversion.calibrate import CalibrationOptions
from distattn_hf.core.cache import NystromLayer
from tests.conversion.models import FAMILIES, SPECIAL, VOCAB, gpt2, llama, t5, token_batch
from tests.conversion.test_save_load import LOADER
from tests.tolerances import CACHED_LOGITS

QUICK = CalibrationOptions(steps=2, progress=False)
DECODERS = pytest.mark.parametrize("family", ["gpt2", "llama"])
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
AUTO = {
    "gpt2": AutoModelForCausalLM,
    "llama": AutoModelForCausalLM,
    "bert": AutoModelForMaskedLM,
    "t5": AutoModelForSeq2SeqLM,
}
# T5's bias is constant from a distance of 8 on, so a window of 9 holds all of it.
SHORT_BIAS = {"relative_attention_max_distance": 8, "relative_attention_num_buckets": 6}


def build(family: str):
    return FAMILIES[family](**(SHORT_BIAS if family == "t5" else {}))


def nystrom(window_size: int = 6, **kwargs) -> AttentionSpec:
    return AttentionSpec(mechanism="nystrom", window_size=window_size, **{"num_landmarks": 8, "num_sinks": 2, **kwargs})


def converted(teacher, spec, **kwargs):
    batches = [token_batch(teacher, length=40, seed=seed) for seed in range(2)]
    return convert(teacher, spec, calibration=batches, options=QUICK, **kwargs)


@cache
def student_of(family: str, lift: bool = True):
    """For tests that change nothing in it."""
    return converted(build(family), nystrom(9, lift=lift))


def mixed_student(family: str):
    """Layers: linear, l2, untouched, linear."""
    layers = {"gpt2": "n_layer", "llama": "num_hidden_layers"}[family]
    teacher = FAMILIES[family]()
    config = type(teacher.config).from_dict({**teacher.config.to_dict(), layers: 4})
    torch.manual_seed(0)
    return converted(type(teacher)(config).eval(), [nystrom(layers=[0, 3]), AttentionSpec("l2", layers=[1])])


def padded(length: int, rows: int = 2) -> dict[str, torch.Tensor]:
    """Random tokens; the first row has padding for a quarter of the length to its left."""
    ids = torch.randint(3, VOCAB, (rows, length))
    mask = torch.ones_like(ids)
    ids[0, : length // 4], mask[0, : length // 4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}


def in_chunks(model, batch, sizes, past=None):
    """(logits, cache) of a batch that comes a chunk of columns at a time."""
    start, logits = 0, []
    for size in sizes:
        stop = start + size
        chunk = {name: tensor[:, start:stop] for name, tensor in batch.items() if name != "attention_mask"}
        output = model(**chunk, attention_mask=batch["attention_mask"][:, :stop], past_key_values=past, use_cache=True)
        past, start = output.past_key_values, stop
        logits.append(output.logits)
    return torch.cat(logits, dim=1), past


def layers_of(past) -> list[NystromLayer]:
    layers = getattr(past, "self_attention_cache", past).layers
    assert all(type(layer) is NystromLayer for layer in layers)
    return layers


@DECODERS
@pytest.mark.parametrize("lift", [True, False])
@pytest.mark.parametrize("sizes", [[31, 1, 1, 7, 1, 19, 60], [1] * 9 + [111], [119, 1], [3, 117]], ids=str)
@torch.no_grad()
def test_chunks_with_left_padding_are_one_forward(family, lift, sizes):
    """120 tokens are 13 windows; the first 30 of a row are padding, and no token of it is in some of the chunks."""
    model, batch = student_of(family, lift), padded(120)
    full = model(**batch, use_cache=False).logits
    logits, past = in_chunks(model, batch, sizes)
    assert past.get_seq_length() == 120
    real = batch["attention_mask"].bool()
    assert (logits - full)[real].abs().max() <= CACHED_LOGITS


@torch.no_grad()
def test_chunks_of_a_t5_decoder_are_one_forward():
    model = student_of("t5")
    batch = token_batch(model, length=40, padded=True)
    ids = torch.randint(3, VOCAB, (2, 60))
    full = model(**dict(batch, decoder_input_ids=ids), use_cache=False).logits
    past, start, logits = None, 0, []
    for size in (13, 1, 1, 5, 40):
        output = model(
            **dict(batch, decoder_input_ids=ids[:, start : start + size]), past_key_values=past, use_cache=True
        )
        past, start = output.past_key_values, start + size
        logits.append(output.logits)
    layers_of(past)
    assert (torch.cat(logits, dim=1) - full).abs().max() <= CACHED_LOGITS * full.abs().max()


@EVERY_FAMILY
@torch.no_grad()
def test_reference_equals_the_engine(family):
    """attn_implementation="eager" writes everything out; 60 tokens are 6 windows."""
    model = converted(build(family), nystrom(9))
    batch = token_batch(model, length=60, padded=True)
    fast = model(**batch).logits
    model.set_attn_implementation("eager")
    slow = model(**batch).logits
    real = slice(None) if family == "t5" else batch["attention_mask"].bool()
    assert not torch.equal(fast[real], slow[real])
    assert (fast - slow)[real].abs().max() <= CACHED_LOGITS * slow.abs().max().clamp_min(1)


@EVERY_FAMILY
@torch.no_grad()
def test_padding_changes_no_bit(family):
    model = student_of(family)
    batch = token_batch(model, length=40, padded=True)
    changed = dict(batch, input_ids=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 5))
    neighbour = dict(batch, input_ids=torch.cat([batch["input_ids"][:1], batch["input_ids"][1:].flip(1)]))
    expected = model(**batch).logits
    real = torch.ones_like(expected[..., 0]).bool() if family == "t5" else batch["attention_mask"].bool()
    assert torch.equal(model(**changed).logits[real], expected[real])
    assert torch.equal(model(**neighbour).logits[0][real[0]], expected[0][real[0]])
    assert not torch.equal(model(**neighbour).logits[1], expected[1])


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
@torch.no_grad()
def test_the_future_changes_no_bit(family):
    model = student_of(family)
    batch = token_batch(model, length=80)
    name = "decoder_input_ids" if family == "t5" else "input_ids"
    expected = model(**batch, use_cache=False).logits
    for first in (1, 17, 30):
        future = torch.cat([batch[name][:, :first], (batch[name][:, first:] + 1) % 60 + 3], dim=1)
        logits = model(**dict(batch, **{name: future}), use_cache=False).logits
        assert torch.equal(logits[:, :first], expected[:, :first])
        assert not torch.equal(logits[:, first:], expected[:, first:])


GENERATION = {"max_new_tokens": 25, "min_new_tokens": 25, "do_sample": False}


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}], ids=["greedy", "sampling", "beams"])
def test_generation_is_the_same_without_a_cache(family, options):
    model = student_of(family)
    batch = token_batch(model, length=30, padded=True)
    batch.pop("decoder_input_ids", None)
    results = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        results.append(model.generate(**batch, **{**GENERATION, **options}, use_cache=use_cache))
    assert results[0].shape[1] >= 25
    assert torch.equal(*results)


@DECODERS
def test_generation_goes_on_from_a_returned_cache(family):
    model, batch = student_of(family), padded(30)
    batch.pop("position_ids")
    whole = model.generate(**batch, **{**GENERATION, "max_new_tokens": 30, "min_new_tokens": 30})
    first = model.generate(
        **batch, **{**GENERATION, "max_new_tokens": 10, "min_new_tokens": 10}, return_dict_in_generate=True
    )
    layers_of(first.past_key_values)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 10, dtype=torch.long)], dim=1)
    rest = model.generate(
        first.sequences, attention_mask=mask, past_key_values=first.past_key_values,
        **{**GENERATION, "max_new_tokens": 20, "min_new_tokens": 20},
    )  # fmt: skip
    assert torch.equal(rest, whole)


@DECODERS
@torch.no_grad()
def test_cache_has_a_constant_size(family):
    model, batch = student_of(family), padded(400)
    # GPT-2 has a table of 128 positions.
    batch["position_ids"] = batch["position_ids"].clamp_max(127)
    past, sizes = None, {}
    for start in range(0, 400, 50):
        chunk = {name: tensor[:, start : start + 50] for name, tensor in batch.items() if name != "attention_mask"}
        mask = batch["attention_mask"][:, : start + 50]
        past = model(**chunk, attention_mask=mask, past_key_values=past, use_cache=True).past_key_values
        sizes[start + 50] = [layer.nbytes() for layer in layers_of(past)]
    assert past.get_seq_length() == 400
    assert sizes[100] == sizes[400]
    # Window - 1 keys and values (float32) of each key head and their mask; for each head m·(d_v + 1) sums and two
    # sinks; and two positions.
    key_heads = 4 if family == "gpt2" else 2
    expected = 2 * (8 * (2 * key_heads * 8 * 4 + 1) + 4 * (8 * 9 * 4 + 2 * 16 * 4) + 2 * 8)
    assert sizes[400] == [expected] * 2
    # What is held keeps no longer tensor alive.
    for layer in layers_of(past):
        for tensor in (layer.keys, layer.values, layer.keep):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@DECODERS
@torch.no_grad()
def test_rows_of_a_cache_are_reordered_repeated_and_selected(family):
    model, batch = student_of(family), padded(40, rows=3)
    full = model(**batch, use_cache=False).logits[:, 30:]
    index = torch.tensor([2, 0, 0])
    changes = {
        "reorder": (lambda past: past.reorder_cache(index), index),
        "repeat": (lambda past: past.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1, 2, 2])),
        "select": (lambda past: past.batch_select_indices(torch.tensor([2, 0])), torch.tensor([2, 0])),
    }
    for name, (change, rows) in changes.items():
        prompt = {n: t[:, :30] for n, t in batch.items()}
        past = in_chunks(model, prompt, [30])[1]
        change(past)
        output = model(
            input_ids=batch["input_ids"][rows, 30:], attention_mask=batch["attention_mask"][rows],
            position_ids=batch["position_ids"][rows, 30:], past_key_values=past,
        )  # fmt: skip
        assert (output.logits - full[rows]).abs().max() <= CACHED_LOGITS, name


@torch.no_grad()
def test_a_cache_that_is_reset_starts_anew():
    model, batch = student_of("llama"), padded(30)
    expected, past = in_chunks(model, batch, [30])
    past.reset()
    assert past.get_seq_length() == 0
    assert torch.equal(in_chunks(model, batch, [30], past)[0], expected)


@DECODERS
@torch.no_grad()
def test_caches_of_another_kind_are_refused(family, monkeypatch):
    model, batch = student_of(family), padded(12)
    with pytest.raises(
        ValueError, match="keeps a cache of its own kind in a DynamicCache; got StaticCache with Static"
    ):
        model(**batch, past_key_values=StaticCache(model.config, max_cache_len=20))
    with pytest.raises(ValueError, match="got DynamicCache with DynamicLayer"):
        model(**batch, past_key_values=DynamicCache(config=model.config, offloading=True))
    with pytest.raises(ValueError, match="Leave cache_implementation at its default"):
        model.generate(batch["input_ids"], max_new_tokens=2, cache_implementation="static")
    filled = DynamicCache()
    filled.update(torch.ones(2, 4, 5, 8), torch.ones(2, 4, 5, 8), 0)
    with pytest.raises(ValueError, match="the cache of layer 0 holds 5 tokens of exact attention; start Nyström"):
        model(**batch, past_key_values=filled)
    past = in_chunks(model, batch, [12])[1]
    with pytest.raises(ValueError, match="cannot be cropped"):
        past.crop(-1)
    with pytest.raises(ValueError, match="is not offloaded"):
        past.layers[0].offload()
    with pytest.raises(ValueError, match="output_attentions is not available once keys are in a Nyström cache"):
        model(input_ids=batch["input_ids"][:, :1], past_key_values=past, output_attentions=True)


def test_a_quantised_cache_is_refused(monkeypatch):
    """Its packages need not be here: what counts is the class of the layer."""
    from transformers import cache_utils

    class Quantised(cache_utils.BaseQuantizedLayer):
        def __init__(self):
            cache_utils.DynamicLayer.__init__(self)

        _quantize = _dequantize = None

    past = DynamicCache()
    past.layer_class_to_replicate = Quantised
    with pytest.raises(ValueError, match="got DynamicCache with Quantised"):
        student_of("gpt2")(**padded(12), past_key_values=past)


def test_a_placeholder_that_lost_its_cache_is_noticed(monkeypatch):
    """A model that changes the keys after its cache gave them would compute on NaN."""
    update = NystromLayer.update

    def cloned(self, *args, **kwargs):
        return tuple(tensor[:, :, :] for tensor in update(self, *args, **kwargs))

    monkeypatch.setattr(NystromLayer, "update", cloned)
    with pytest.raises(RuntimeError, match="the model changed the keys between its cache and its attention"):
        student_of("llama")(**padded(12), use_cache=True)


@EVERY_FAMILY
@pytest.mark.parametrize("lift", [True, False])
def test_reload_is_bit_equal(tmp_path, family, lift):
    model = student_of(family, lift)
    batch = token_batch(model, length=40, padded=True, seed=9)
    model.save_pretrained(tmp_path)
    again = AUTO[family].from_pretrained(tmp_path).eval()
    assert type(again).__name__ == type(model).__name__
    assert again.config.attention_specs == model.config.attention_specs
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert again.conversion_report == model.conversion_report


@pytest.mark.parametrize("mode", ["package", "remote"])
def test_fresh_process(tmp_path, monkeypatch, mode):
    model = student_of("llama")
    batch = token_batch(model, length=40, padded=True, seed=9)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.save((batch, model(**batch).logits), tmp_path / "expected.pt")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    command = [sys.executable, "-c", LOADER, str(tmp_path), "AutoModelForCausalLM", mode]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    result = [line for line in run.stdout.splitlines() if line.startswith("RESULT")]
    assert result == [f"RESULT True True {type(model).__name__}"], run.stderr[-2000:]


@EVERY_FAMILY
@torch.no_grad()
def test_revert_is_bit_equal(family):
    teacher = build(family)
    batch = token_batch(teacher, length=40, padded=True)
    expected = teacher(**batch).logits
    student = converted(teacher, nystrom(9))
    assert not torch.allclose(student(**batch).logits, expected)
    again = revert(student)
    assert type(again) is type(teacher)
    assert torch.equal(again(**batch).logits, expected)


@DECODERS
@torch.no_grad()
def test_output_attentions(family):
    """Rows sum to 1 (padding: 0), nothing ahead of the query, and the weights are those of the reference."""
    model = converted(build(family), nystrom())
    batch = padded(40)
    fast = model(**batch, output_attentions=True)
    model.set_attn_implementation("eager")
    slow = model(**batch, output_attentions=True)
    real = batch["attention_mask"].bool()
    plain = model(**batch).logits
    assert (fast.logits - plain)[real].abs().max() <= CACHED_LOGITS
    assert len(fast.attentions) == 2
    for ours, theirs in zip(fast.attentions, slow.attentions, strict=True):
        rows = ours.sum(-1).transpose(1, 2)[real]
        torch.testing.assert_close(rows, torch.ones_like(rows), atol=1e-6, rtol=0)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
        assert bool((ours.triu(1) == 0).all())
        assert bool((ours.transpose(-1, -2)[0][:, ~real[0]] == 0).all())


@torch.no_grad()
def test_output_attentions_of_an_encoder_decoder():
    model = student_of("t5")
    output = model(**token_batch(model, length=30, padded=True), output_attentions=True)
    for name in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        for weights in getattr(output, name):
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), atol=1e-6, rtol=0)


@DECODERS
@torch.no_grad()
def test_mixed_layers(family, tmp_path):
    """Linear, l2 and dot-product layers share one cache; padding, steps, the reference and a reload."""
    model, batch = mixed_student(family), padded(60)
    real = batch["attention_mask"].bool()
    full = model(**batch, use_cache=False).logits
    logits, past = in_chunks(model, batch, [21, 1, 1, 1, 7, 29])
    assert [type(layer) is NystromLayer for layer in past.layers] == [True, False, False, True]
    assert (logits - full)[real].abs().max() <= CACHED_LOGITS
    changed = dict(batch, input_ids=batch["input_ids"].masked_fill(~real, 5))
    assert (model(**changed).logits - full)[real].abs().max() <= CACHED_LOGITS
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(**batch, use_cache=False).logits, full)
    model.set_attn_implementation("eager")
    slow = model(**batch, use_cache=False, output_attentions=True)
    assert (slow.logits - full)[real].abs().max() <= CACHED_LOGITS
    for weights in slow.attentions:
        rows = weights.sum(-1).transpose(1, 2)[real]
        torch.testing.assert_close(rows, torch.ones_like(rows), atol=1e-6, rtol=0)


HEAD_PLANS = {
    "beside dot product": [nystrom(heads=[0, 2, 3])],
    "beside l2": [AttentionSpec("l2", heads=[1]), nystrom(heads=[0, 2, 3])],
    "one of four": [nystrom(heads=[2]), AttentionSpec("l1", heads=[0])],
}


@DECODERS
@pytest.mark.parametrize("plan", HEAD_PLANS)
@torch.no_grad()
def test_linear_and_exact_heads_in_one_module(family, plan, tmp_path):
    """The exact heads' key heads alone are kept in full; grouped keys serve both kinds."""
    model, batch = converted(build(family), HEAD_PLANS[plan]), padded(60)
    real = batch["attention_mask"].bool()
    full = model(**batch, use_cache=False).logits
    logits, past = in_chunks(model, batch, [21, 1, 1, 1, 7, 29])
    assert (logits - full)[real].abs().max() <= CACHED_LOGITS
    exact = {"beside dot product": {1}, "beside l2": {1}, "one of four": {0, 1, 3}}[plan]
    key_heads = exact if family == "gpt2" else {head // 2 for head in exact}
    assert all(layer.all_keys.shape == (2, len(key_heads), 60, 8) for layer in layers_of(past))
    past.batch_select_indices(torch.tensor([1]))
    step = {"input_ids": torch.tensor([[5]]), "position_ids": torch.tensor([[60]])}
    longer = torch.cat([batch["input_ids"][1:], step["input_ids"]], dim=1)
    expected = model(longer, use_cache=False).logits[:, -1]
    assert (model(**step, past_key_values=past).logits[:, -1] - expected).abs().max() <= CACHED_LOGITS
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(**batch, use_cache=False).logits, full)
    model.set_attn_implementation("eager")
    slow = model(**batch, use_cache=False, output_attentions=True)
    assert (slow.logits - full)[real].abs().max() <= CACHED_LOGITS
    for weights in slow.attentions:
        rows = weights.sum(-1).transpose(1, 2)[real]
        torch.testing.assert_close(rows, torch.ones_like(rows), atol=1e-6, rtol=0)


@torch.no_grad()
def test_exact_heads_beside_linear_ones_are_the_teachers():
    """In layer 0, where both see the same: the attention weights of the heads that were left alone."""
    for family in ("gpt2", "llama", "bert"):
        teacher = FAMILIES[family]()
        batch = token_batch(teacher, length=30, padded=True)
        student = converted(teacher, nystrom(heads=[0, 3]))
        teacher.set_attn_implementation("eager")
        expected = teacher(**batch, output_attentions=True).attentions[0]
        actual = student(**batch, output_attentions=True).attentions[0]
        real = batch["attention_mask"].bool()
        for head in range(4):
            error = (actual - expected)[:, head][real].abs().max()
            assert (error <= 1e-5) == (head in (1, 2)), (family, head)


def test_two_kinds_of_linear_heads_in_one_module_are_refused():
    """Their states would share one cache layer."""
    specs = [nystrom(3, heads=[0, 1]), nystrom(9, heads=[2, 3])]
    with pytest.raises(ValueError, match="two specs with mechanism='nystrom' claim heads of 'h.0.attn'"):
        converted(gpt2(), specs)
    converted(gpt2(), [nystrom(3, layers=[0]), nystrom(9, layers=[1])])


@torch.no_grad()
def test_the_untouched_layers_of_a_mixed_model_are_the_teachers():
    """With only layer 1 converted, what layer 0 hands on is what the teacher's hands on."""
    teacher, batch = llama(), padded(30)
    student = converted(teacher, nystrom(layers=[1]))
    expected = teacher(**batch, output_hidden_states=True).hidden_states[1]
    actual = student(**batch, output_hidden_states=True).hidden_states[1]
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(actual[real], expected[real], atol=1e-5, rtol=0)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "dropout_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


@EVERY_FAMILY
@pytest.mark.parametrize("lift", [True, False])
def test_training_step_reaches_every_parameter_and_checkpointing_changes_nothing(family, lift):
    teacher = build(family)
    student = without_dropout(converted(teacher, nystrom(9, lift=lift)).train())
    batch = token_batch(student, length=40, padded=True)
    labels = batch["decoder_input_ids"] if family == "t5" else batch["input_ids"]
    gradients = []
    for checkpointing in (False, True):
        student.zero_grad()
        if checkpointing:
            student.gradient_checkpointing_enable()
        student(**batch, labels=labels).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None})
    ours = [name for name, _ in student.named_parameters() if ".distattn." in name]
    # Twice 5 in the lifted form; λ, α and c besides in the other.
    assert len(ours) == len(student.attention_states) * (5 if lift else 8)
    for name in ours:
        gradient = gradients[0][name]
        assert bool(gradient.isfinite().all()), name
        assert bool((gradient != 0).any()), name
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-3, atol=1e-5)


def test_gradients_are_those_of_the_reference():
    student = without_dropout(converted(llama(), nystrom()).train())
    batch, gradients = padded(40), []
    for implementation in ("sdpa", "eager"):
        student.set_attn_implementation(implementation)
        student.zero_grad()
        logits = student(**batch).logits[batch["attention_mask"].bool()]
        logits.square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in student.named_parameters()})
    for name, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-3, atol=1e-5, msg=name)


def test_dropout_of_the_model_reaches_the_attention():
    student = converted(gpt2(attn_pdrop=0.5, resid_pdrop=0.0, embd_pdrop=0.0), nystrom())
    batch = padded(20)
    with torch.no_grad():
        assert torch.equal(student(**batch).logits, student(**batch).logits)
        student.train()
        assert not torch.equal(student(**batch).logits, student(**batch).logits)


@pytest.mark.parametrize("init", ["exact", "plain"])
def test_other_initialisations_are_refused(init):
    with pytest.raises(ValueError, match=f"mechanism='nystrom' needs init='calibrated'.*got '{init}'"):
        convert(gpt2(), nystrom(), init=init)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metric": "l2"}, "mechanism='nystrom' needs metric 'sqeuclidean'.*got 'l2'"),
        ({"backend": "sdpa"}, "backend must be 'auto' with mechanism='nystrom', got 'sdpa'"),
        ({"transform": "linear"}, "transform must be 'none', 'scalar' or None with mechanism='nystrom', got 'linear'"),
        ({"lift": True, "lam": 0.7}, "lift=True sets lam=0.5 and transform='none', got lam=0.7"),
        ({"lift": True, "transform": "scalar"}, "lift=True sets lam=0.5.*transform='scalar'"),
        ({"num_landmarks": 0}, "num_landmarks must be an integer >= 1, got 0"),
        ({"num_landmarks": 2.0}, "num_landmarks must be an integer >= 1, got 2.0"),
        ({"window_size": -1}, "window_size must be an integer >= 0, got -1"),
        ({"num_sinks": True}, "num_sinks must be an integer >= 0, got True"),
        ({"landmarks": 3}, "landmarks must be a strategy's name"),
        ({"mechanism": "distance"}, "belongs to mechanism='nystrom', got"),
        ({"mechanism": "nystroem"}, "mechanism must be one of distance, nystrom, got 'nystroem'"),
    ],
)
def test_bad_specs(fields, message):
    with pytest.raises(ValueError, match=message):
        AttentionSpec(**{"mechanism": "nystrom", "window_size": 6, **fields})


def test_unknown_strategy_is_refused_before_anything_is_built():
    with pytest.raises(ValueError, match="unknown landmark strategy 'lloyd'"):
        converted(gpt2(), nystrom(landmarks="lloyd"))


def test_a_sliding_window_of_the_model_is_refused():
    torch.manual_seed(0)
    config = MistralConfig(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32, intermediate_size=64,
        vocab_size=VOCAB, sliding_window=4, **SPECIAL,
    )  # fmt: skip
    with pytest.raises(
        ValueError, match="Nyström attention takes causal and bidirectional masks with padding.*sliding"
    ):
        converted(MistralForCausalLM(config).eval(), nystrom())
    config.sliding_window = None
    student = converted(MistralForCausalLM(config).eval(), nystrom())
    assert bool(student(**padded(20)).logits.isfinite().all())


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (4, "window_size=4 is too small for this model's relative position bias.*relative_attention_max_distance"),
        (0, "window_size=0 cannot carry a relative position bias"),
    ],
)
def test_a_window_too_small_for_the_position_bias_is_refused(window, message):
    with pytest.raises(ValueError, match=message):
        converted(t5(**SHORT_BIAS), nystrom(window))


@torch.no_grad()
def test_a_window_as_long_as_the_text_is_the_teacher():
    """Nothing is far: all of T5's bias, sinks and padding, exactly."""
    for family in FAMILIES:
        teacher = FAMILIES[family]()
        batch = token_batch(teacher, length=30, padded=True)
        student = converted(teacher, nystrom(64, attention="self"))
        expected, actual = teacher(**batch).logits, student(**batch).logits
        real = slice(None) if family == "t5" else batch["attention_mask"].bool()
        assert (actual - expected)[real].abs().max() <= CACHED_LOGITS * expected.abs().max().clamp_min(1), family


@pytest.mark.parametrize("lift", [True, False])
def test_calibration_depends_on_the_seed_alone(lift):
    def tensors(seed):
        options = CalibrationOptions(steps=3, progress=False, seed=seed)
        teacher = gpt2()
        batches = [token_batch(teacher, length=40, seed=s) for s in range(4)]
        torch.manual_seed(int(torch.randint(1000, ())))
        student = convert(teacher, nystrom(lift=lift), calibration=batches, options=options)
        return {n: t for n, t in student.state_dict().items() if ".distattn." in n}

    first, second, other = tensors(1), tensors(1), tensors(2)
    assert len(first) == 2 * (5 if lift else 8)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_calibration_reports_what_was_lost_and_lowers_it():
    teacher = gpt2()
    batches = [token_batch(teacher, length=40, seed=seed) for seed in range(4)]
    errors = []
    for steps in (0, 60):
        options = CalibrationOptions(steps=steps, progress=False)
        report = convert(teacher, nystrom(), calibration=batches, options=options).conversion_report
        errors.append([sum(group["output_error"]) for group in report["groups"]])
        for group in report["groups"]:
            assert len(group["output_error"]) == len(group["divergence_after"]) == 4
    assert errors[1][0] < errors[0][0]


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_model_runs_trains_and_generates(family):
    student = converted(build(family), nystrom(9))
    batch = token_batch(student, length=40, padded=True)
    expected = student(**batch).logits
    half = student.to(torch.bfloat16)
    logits = half(**batch).logits
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in half.parameters() if p.grad is not None)
    real = slice(None) if family == "t5" else batch["attention_mask"].bool()
    assert torch.nn.functional.cosine_similarity(logits.float()[real], expected[real], dim=-1).mean() > 0.99
    if half.can_generate() and family != "bert":
        batch.pop("decoder_input_ids", None)
        tokens = half.generate(**batch, **GENERATION)
        assert tokens.shape == (2, 26 if family == "t5" else 65)


def test_half_precision_reload_keeps_the_far_field_in_float32(tmp_path):
    model = student_of("llama")
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert {p.dtype for n, p in half.named_parameters() if ".distattn." in n} == {torch.float32}
    batch = padded(30)
    with torch.no_grad():
        past = in_chunks(half, batch, [20, 1, 9])[1]
    layer = layers_of(past)[0]
    assert (layer.keys.dtype, layer.state.total.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "t5"])
def test_heads_beyond_the_limit_of_the_error_stay_the_teachers(family, tmp_path):
    """With a limit no head can meet, the best head of each module is linear and every other one keeps dot product."""
    teacher = build(family)
    batches = [token_batch(teacher, length=40, seed=seed) for seed in range(2)]
    options = CalibrationOptions(steps=2, progress=False, max_error=1e-9)
    student = convert(teacher, nystrom(9), calibration=batches, options=options)
    free = convert(teacher, nystrom(9), calibration=batches, options=QUICK)
    for group, state in zip(student.conversion_report["groups"], student.attention_states.values(), strict=True):
        assert state.head_lists == [group["heads"]]
        assert len(group["heads"]) == len(group["output_error"]) == state.groups[0].num_heads == 1
    # The first module is fitted on the same inputs either way: its best head is the one that stays.
    errors = free.conversion_report["groups"][0]["output_error"]
    first = student.conversion_report["groups"][0]
    assert first["heads"] == [errors.index(min(errors))]
    assert first["output_error"] == [min(errors)]

    batch = token_batch(teacher, length=40, seed=3)
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch)[0], student(**batch)[0])
        off = [(model(**batch)[0] - teacher(**batch)[0]).abs().mean() for model in (student, free)]
    assert off[0] < off[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_error": 0}, "max_error must be None or > 0, got 0"),
        ({"max_length": 1}, "max_length must be None or an integer >= 2, got 1"),
        ({"max_tokens": "all"}, "max_tokens must be None or an integer >= 2, got 'all'"),
    ],
)
def test_bad_calibration_options(fields, message):
    with pytest.raises(ValueError, match=message):
        CalibrationOptions(**fields)
