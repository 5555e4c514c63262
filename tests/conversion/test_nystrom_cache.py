"""Linear attention with a cache: chunks, generation, its constant size, its rows, and the caches that are refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from distattn_hf import AttentionSpec
from distattn_hf.core.nystrom_cache import NystromLayer
from tests.conversion.models import VOCAB, token_batch
from tests.conversion.nystrom_cases import (
    DECODERS,
    GENERATION,
    build,
    converted,
    in_chunks,
    layers_of,
    nystrom,
    padded,
    student_of,
)
from tests.tolerances import CACHED_LOGITS


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
    # An offloaded cache makes one, and without a driver PyTorch's CUDA build cannot; it is refused before its use.
    monkeypatch.setattr(torch, "Stream", object)
    model, batch = student_of(family), padded(12)
    # With places to spare and without.
    for places in (20, 12):
        with pytest.raises(
            ValueError, match="keeps a cache of its own kind in a DynamicCache; got StaticCache with Static"
        ):
            model(**batch, past_key_values=StaticCache(model.config, max_cache_len=places))
    with pytest.raises(ValueError, match="got a DynamicCache with offloading"):
        model(**batch, past_key_values=DynamicCache(config=model.config, offloading=True))
    with pytest.raises(ValueError, match="Leave cache_implementation at its default"):
        model.generate(batch["input_ids"], max_new_tokens=2, cache_implementation="static")
    past = in_chunks(model, batch, [12])[1]
    with pytest.raises(ValueError, match="cannot be cropped"):
        past.crop(-1)
    with pytest.raises(ValueError, match="is not offloaded"):
        past.layers[0].offload()
    with pytest.raises(ValueError, match="output_attentions is not available once keys are in a Nyström cache"):
        model(input_ids=batch["input_ids"][:, :1], past_key_values=past, output_attentions=True)


def test_a_quantised_cache_is_refused():
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


def test_a_static_cache_where_only_exact_modules_use_it():
    """Its places that are not filled yet are not attended to, though the mask of these models says padding only."""
    model = converted(build("t5"), nystrom(9, layers="encoder.*"))
    batch = {"input_ids": token_batch(model, 12)["input_ids"]}
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    static = model.generate(**batch, **options, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, model.generate(**batch, **options))


def test_a_static_cache_is_refused_beside_exact_layers():
    model = converted(build("llama"), [AttentionSpec("l1", layers=[0]), nystrom(9, layers=[1])])
    batch = {"input_ids": token_batch(model, 12)["input_ids"]}
    with pytest.raises(ValueError, match="DynamicCache"):
        model.generate(**batch, max_new_tokens=4, do_sample=False, cache_implementation="static", disable_compile=True)
    assert model.generate(**batch, max_new_tokens=4, do_sample=False).shape[0] == 2
