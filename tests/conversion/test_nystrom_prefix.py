"""Caches that hold keys before the first call: prefix tuning and caches of exact attention; copies; what goes back."""

import copy

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import DynamicCache

from distattn_hf.core.nystrom_cache import NystromLayer
from tests.conversion.models import VOCAB, gpt2, token_batch
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

HEADS = {"all": {}, "some": {"heads": [0, 3]}, "exact_below": {"exact_below": 20}}


@torch.no_grad()
def exact_cache_of(model, batch, length, monkeypatch) -> DynamicCache:
    """All keys and values of the first tokens, as the model computes them layer by layer."""
    found = []
    update = NystromLayer.update

    def remember(self, key, value, *args, **kwargs):
        found.append((key, value))
        return update(self, key, value, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(NystromLayer, "update", remember)
        in_chunks(model, {name: tensor[:, :length] for name, tensor in batch.items()}, [length])
    cache = DynamicCache()
    for layer, (key, value) in enumerate(found):
        cache.update(key, value, layer)
    return cache


@DECODERS
@pytest.mark.parametrize("fields", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("length", [1, 4, 35])
@torch.no_grad()
def test_keys_in_a_cache_count_as_if_they_had_run_here(family, fields, length, monkeypatch):
    """The first row is padding for a quarter of the text, which the longest prefix holds, the shortest is within."""
    model, batch = converted(build(family), nystrom(9, **fields)), padded(60)
    full = model(**batch, use_cache=False).logits
    past = exact_cache_of(model, batch, length, monkeypatch)
    rest = {name: tensor[:, length:] for name, tensor in batch.items() if name != "attention_mask"}
    first = model(
        **{name: tensor[:, :7] for name, tensor in rest.items()},
        attention_mask=batch["attention_mask"][:, : length + 7], past_key_values=past,
    ).logits  # fmt: skip
    assert past.get_seq_length() == length + 7
    last = model(
        **{name: tensor[:, 7:] for name, tensor in rest.items()},
        attention_mask=batch["attention_mask"], past_key_values=past,
    ).logits  # fmt: skip
    real = batch["attention_mask"].bool()[:, length:]
    assert (torch.cat([first, last], dim=1) - full[:, length:])[real].abs().max() <= CACHED_LOGITS
    held = layers_of(past)
    assert all(layer.keys.shape[2] == 8 for layer in held)


@DECODERS
def test_generation_goes_on_from_a_cache_of_exact_attention(family, monkeypatch):
    model, batch = student_of(family), padded(30)
    past = exact_cache_of(model, batch, 29, monkeypatch)
    batch.pop("position_ids")
    assert torch.equal(
        model.generate(**batch, **GENERATION, past_key_values=past), model.generate(**batch, **GENERATION)
    )


@DECODERS
def test_prefix_tuning_trains_and_generates_as_on_the_teacher(family):
    """A window that holds everything leaves no far field, so teacher and student must agree on any prefix."""
    teacher, batch = build(family), padded(24)
    batch.pop("position_ids")
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    wide = get_peft_model(converted(teacher, nystrom(64)), config).eval()
    tuned = get_peft_model(teacher, config).eval()
    tuned.prompt_encoder.load_state_dict(wide.prompt_encoder.state_dict())
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        assert (wide(**batch).logits - tuned(**batch).logits)[real].abs().max() <= CACHED_LOGITS
        assert torch.equal(*(model.generate(**batch, **GENERATION) for model in (wide, tuned)))
    narrow = get_peft_model(converted(build(family), nystrom(4)), config)
    narrow(**batch, labels=batch["input_ids"]).loss.backward()
    gradient = narrow.prompt_encoder["default"].embedding.weight.grad
    assert bool(gradient.isfinite().all())
    assert bool((gradient != 0).any(1).all())
    assert narrow.eval().generate(**batch, **GENERATION).shape == (2, 49)


@DECODERS
@torch.no_grad()
def test_a_copied_cache_goes_its_own_way(family):
    model, batch = student_of(family), padded(40)
    full = model(**batch, use_cache=False).logits[:, 30:]
    past = in_chunks(model, {n: t[:, :30] for n, t in batch.items()}, [30])[1]
    kept = copy.deepcopy(past)
    rest = {name: tensor[:, 30:] for name, tensor in batch.items() if name != "attention_mask"}
    other = {**rest, "input_ids": torch.randint(3, VOCAB, (2, 10))}
    model(**other, attention_mask=batch["attention_mask"], past_key_values=past)
    again = model(**rest, attention_mask=batch["attention_mask"], past_key_values=kept).logits
    assert (again - full).abs().max() <= CACHED_LOGITS


def test_what_takes_tokens_back_is_refused_before_it_starts():
    model, batch = student_of("gpt2"), token_batch(student_of("gpt2"), length=20)
    prompt = {name: tensor[:1] for name, tensor in batch.items()}
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    handle = model.register_forward_pre_hook(count)
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": gpt2()}):
        with pytest.raises(ValueError, match="assisted generation .*without it, or with a model of exact attention"):
            model.generate(**prompt, max_new_tokens=5, do_sample=False, **options)
    handle.remove()
    assert calls == 0
    assert [m._is_stateful for m in (model, student_of("bert"), gpt2())] == [True, False, False]
    past = in_chunks(model, padded(12), [12])[1]
    assert not past.is_croppable
    past.crop(0)
    with pytest.raises(ValueError, match=r"copy.deepcopy\(cache\)"):
        past.crop(-1)


def test_messages_name_the_kind_of_cache(monkeypatch):
    # As in test_nystrom_cache.py.
    monkeypatch.setattr(torch, "Stream", object)
    model, batch = student_of("gpt2"), token_batch(student_of("gpt2"), length=12)
    for kind, message in (
        ("offloaded", "with offloading.*not 'offloaded'"),
        ("static", "a static, quantized or sliding cache"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(**batch, max_new_tokens=2, cache_implementation=kind)
