"""Caches that do not grow: what they hold, what transformers does to them, and the text that comes out."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache

from distattn_hf import AttentionFactory
from distattn_hf.core.constant_cache import RecurrentLayer
from distattn_hf.core.mechanisms import MECHANISMS
from tests.core.mechanism_oracles import MechanismCase, naive_attention
from tests.test_chunks import check
from tests.tolerances import CACHED_LOGITS, HALF_ERROR_RATIO, assert_close

from .choices import OPTIONS, VOCAB, make_model, tokens

RECURRENT = ("linear", "performer")
CONSTANT = (*RECURRENT, "local", "strided")
GREEDY = {"do_sample": False, "eos_token_id": None}


def held(cache) -> list[int]:
    """The bytes of each layer's tensors, with all of the memory that they keep alive."""
    return [
        sum(
            storage.nbytes()
            for storage in {
                t.untyped_storage().data_ptr(): t.untyped_storage()
                for t in (layer.keys, layer.values, *(getattr(layer, "state", None) or ()))
            }.values()
        )
        for layer in cache.layers
    ]


def model_of(mechanism: str, encoding: str = "rotary", **settings):
    return make_model(mechanism, encoding, "causal", max_position_embeddings=64, **settings)


@torch.no_grad()
def full(model, ids, **inputs) -> torch.Tensor:
    return model(ids, use_cache=False, **inputs).logits


@pytest.mark.parametrize("mechanism", RECURRENT)
def test_a_state_in_parts_is_the_oracles_attention(mechanism):
    """Chunks through one layer, against loops over single queries and keys in float64, padding in and between."""
    module = MechanismCase(mechanism, {"num_features": 6} if mechanism == "performer" else {}).make()
    torch.manual_seed(1)
    # Keys that grow: the stabiliser of one chunk is not that of the next.
    query, key, value = (torch.randn(2, 2, 90, 4, dtype=torch.float64) for _ in range(3))
    key = key * torch.linspace(0.2, 6, 90, dtype=torch.float64)[:, None]
    key[1] = key[1].flip(1)
    keep = torch.ones(2, 90, dtype=torch.bool)
    keep[0, :7] = keep[1, 40:44] = False
    layer, outputs, start = RecurrentLayer(), [], 0
    for size in (5, 70, 1, 14):
        new = slice(start, start := start + size)
        new_key, new_value = layer.update(key[:, :, new], value[:, :, new])
        call = {"keep": keep[:, new], "is_causal": True, "memory": layer}
        outputs.append(module(query[:, :, new], new_key, new_value, **call)[0])
        assert layer.keys.shape[2] == 0
    expected = naive_attention(module, query, key, value, keep, "causal")[0]
    seen = keep.cumsum(1) > 0
    found = torch.cat(outputs, dim=2)
    assert_close(found.transpose(1, 2)[seen], expected.transpose(1, 2)[seen], "float64")


@pytest.mark.parametrize("mechanism", CONSTANT)
def test_it_does_not_grow(mechanism):
    model = model_of(mechanism)
    sizes = []
    with torch.no_grad():
        output = model(tokens(length=30), use_cache=True)
        for step in range(12):
            sizes.append(held(output.past_key_values))
            assert output.past_key_values.get_seq_length() == 30 + step
            output = model(tokens(length=1, seed=step), past_key_values=output.past_key_values)
    assert sizes[1] == sizes[-1]
    assert max(sizes[0]) <= max(sizes[-1]), "the prompt is still there"


@pytest.mark.parametrize("mechanism", RECURRENT)
def test_sums_of_half_precision_are_float32(mechanism):
    """Of 3,000 keys, which bfloat16 could not count: its sums stop at 256."""
    module = MECHANISMS.get(mechanism)(2, 8)
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, 3000, 8).bfloat16() for _ in range(3)]
    query, key, value = tensors
    layer, outputs = RecurrentLayer(), []
    for part in range(0, 3000, 750):
        new = slice(part, part + 750)
        new_key, new_value = layer.update(key[:, :, new], value[:, :, new])
        outputs.append(module(query[:, :, new], new_key, new_value, is_causal=True, memory=layer)[0])
    assert {t.dtype for t in layer.state} == {torch.float32}
    exact = module.double()(*(t.double() for t in tensors), is_causal=True)[0]
    error = (torch.cat(outputs, dim=2).double() - exact).square().mean().sqrt()
    # That of rounding the exact output.
    assert error <= HALF_ERROR_RATIO * (exact.bfloat16().double() - exact).square().mean().sqrt()


@pytest.mark.parametrize("mechanism", CONSTANT)
def test_a_cache_is_changed_as_any_other(mechanism):
    """Rows reordered, repeated and selected, copies that go on apart, and a reset: each as the text of its rows."""
    model, ids = model_of(mechanism), tokens(length=9)
    after = tokens(batch=6, length=3, seed=3)

    def goes_on(cache, rows):
        found = model(after[: len(rows)], past_key_values=cache).logits
        text = torch.cat([ids[rows], after[: len(rows)]], dim=1)
        torch.testing.assert_close(found, full(model, text)[:, -3:], rtol=0, atol=CACHED_LOGITS)

    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        for change, rows in (
            (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
            (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
            (lambda c: c.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
        ):
            changed = copy.deepcopy(cache)
            change(changed)
            goes_on(changed, rows)
        goes_on(copy.deepcopy(cache), [0, 1, 2])
        goes_on(cache, [0, 1, 2])
        cache.reset()
        assert cache.get_seq_length() == 0
        found = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(found, full(model, ids), rtol=0, atol=CACHED_LOGITS)


@pytest.mark.parametrize("mechanism", CONSTANT)
def test_tokens_are_taken_back_where_the_past_is_recorded(mechanism):
    model, ids = model_of(mechanism), tokens(length=16)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        with pytest.raises((ValueError, RuntimeError), match="activate_past_recording"):
            cache.crop(-2)
        cache.activate_past_recording()
        # Drafts of several calls, of which a part stays; none; all.
        kept = ids
        for drafts, removed in (((2, 1), 2), ((3,), 3), ((1, 1), 0), ((2,), 1)):
            for size in drafts:
                draft = tokens(length=size, seed=len(drafts) + size)
                kept = torch.cat([kept, draft], dim=1)
                found = model(draft, past_key_values=cache).logits
                torch.testing.assert_close(found, full(model, kept)[:, -size:], rtol=0, atol=CACHED_LOGITS)
            cache.crop(-removed)
            kept = kept[:, : kept.shape[1] - removed]
            assert cache.get_seq_length() == kept.shape[1]
    assert cache.is_croppable


@pytest.mark.parametrize("mechanism", CONSTANT)
def test_assisted_generation_is_greedy(mechanism):
    model = model_of(mechanism)
    ids = tokens(batch=1, length=6).repeat(1, 3)
    greedy = model.generate(ids, max_new_tokens=20, **GREEDY)
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": model_of(mechanism, seed=1)}):
        assert model.generate(ids, max_new_tokens=20, **GREEDY, **options).tolist() == greedy.tolist()
    # The control: drafts of the model itself are right, and all of them stay.
    assert model.generate(ids, max_new_tokens=20, **GREEDY, assistant_model=model).tolist() == greedy.tolist()


@pytest.mark.parametrize("mechanism", CONSTANT)
def test_sampling_and_going_on_from_a_returned_cache(mechanism):
    model, ids = model_of(mechanism), tokens(length=8)
    sample = {"do_sample": True, "eos_token_id": None, "max_new_tokens": 8}
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(model.generate(ids, **sample, use_cache=use_cache).tolist())
    assert drawn[0] == drawn[1]
    whole = model.generate(ids, max_new_tokens=12, **GREEDY)
    first = model.generate(ids, max_new_tokens=5, **GREEDY, return_dict_in_generate=True)
    assert first.past_key_values.get_seq_length() == 12
    again = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=7, **GREEDY)
    assert again.tolist() == whole.tolist()


@pytest.mark.parametrize("mechanism", CONSTANT)
@pytest.mark.parametrize("encoding", ["rotary", "learned"])
def test_a_cache_that_keeps_all_keys_is_gone_on_from(mechanism, encoding):
    """Keys put into a plain layer, as PEFT's prefixes are; with a padding mask; and a static cache keeps all keys."""
    model, ids = model_of(mechanism, encoding), tokens(length=14)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    kept = mask[:, 10:].bool()
    expected = full(model, ids, attention_mask=mask)[:, 10:]
    prefix = DynamicCache()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        for module in model.attention_modules().values():
            patch.setattr(module.mechanism, "cache_layer", lambda layer: layer)
        model(ids[:, :10], attention_mask=mask[:, :10], past_key_values=prefix)
        assert prefix.layers[0].keys.shape[2] == 10
    static = StaticCache(config=model.config, max_cache_len=20)
    with torch.no_grad():
        found = model(ids[:, 10:], attention_mask=mask, past_key_values=prefix).logits
        model(ids[:, :10], attention_mask=mask[:, :10], past_key_values=static)
        in_places = model(ids[:, 10:], attention_mask=mask, past_key_values=static).logits
    assert type(prefix.layers[0]) is not type(static.layers[0])
    torch.testing.assert_close(found[kept], expected[kept], rtol=0, atol=CACHED_LOGITS)
    torch.testing.assert_close(in_places[kept], expected[kept], rtol=0, atol=CACHED_LOGITS)


@pytest.mark.parametrize("mechanism", RECURRENT)
def test_weights_of_keys_that_are_sums_are_refused(mechanism):
    model, ids = model_of(mechanism), tokens(length=8)
    with torch.no_grad():
        output = model(ids, use_cache=True, output_attentions=True)
        assert output.attentions[0].shape[-1] == 8
        with pytest.raises(ValueError, match="they are sums by now"):
            model(ids[:, :1], past_key_values=output.past_key_values, output_attentions=True)


def test_features_stay_those_of_a_text():
    """A draw that is due waits until a text ends: its state holds products with the features of before."""
    model = model_of("performer", mechanism_options={"num_features": 8, "redraw_interval": 2}).train()
    modules = [module.mechanism for module in model.attention_modules().values()]
    before = [module.projection.clone() for module in modules]
    cache = model(tokens(length=4)).past_key_values
    for step in range(5):
        model(tokens(length=1, seed=step), past_key_values=cache)
    assert all(torch.equal(module.projection, own) for module, own in zip(modules, before, strict=True))
    for _ in range(2):
        model(tokens(length=4))
    assert not any(torch.equal(module.projection, own) for module, own in zip(modules, before, strict=True))


@pytest.mark.parametrize("mechanism", CONSTANT)
def test_gradients_reach_all_parts_of_a_text(mechanism):
    model, ids = model_of(mechanism).train(), tokens(length=10)
    losses = []
    for sizes in ((10,), (4, 6)):
        model.zero_grad()
        logits, cache, start = [], None, 0
        for size in sizes:
            output = model(ids[:, start : start + size], past_key_values=cache, use_cache=True)
            logits.append(output.logits)
            cache, start = output.past_key_values, start + size
        F.cross_entropy(torch.cat(logits, dim=1)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        losses.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mechanism", CONSTANT)
def test_a_layer_of_pytorch_keeps_as_little(mechanism):
    """Its masks still speak of all tokens."""
    layer = AttentionFactory.create(mechanism, 16, 2, is_causal=True, **OPTIONS.get(mechanism, {})).eval()
    x, keep = torch.randn(2, 30, 16), torch.ones(2, 30, dtype=torch.bool)
    keep[0, :4] = False
    cache, parts = DynamicCache(), []
    with torch.no_grad():
        expected = layer(x, attention_mask=keep)
        for start, stop in ((0, 20), (20, 21), (21, 30)):
            parts.append(layer(x[:, start:stop], attention_mask=keep[:, :stop], past_key_values=cache))
    assert cache.layers[0].keys.shape[2] < 30
    assert_close(torch.cat(parts, dim=1)[keep], expected[keep], "float32_forward")


@pytest.mark.parametrize("mechanism", CONSTANT)
def test_grouped_key_heads(mechanism):
    model, ids = model_of(mechanism, num_attention_heads=4, num_key_value_heads=2), tokens(length=12)
    with torch.no_grad():
        cache = model(ids[:, :7], use_cache=True).past_key_values
        found = model(ids[:, 7:], past_key_values=cache).logits
    torch.testing.assert_close(found, full(model, ids)[:, 7:], rtol=0, atol=CACHED_LOGITS)


@pytest.mark.parametrize("mechanism", [*CONSTANT, "bigbird"])
def test_a_prompt_compiles_to_one_graph(mechanism):
    model, ids = model_of(mechanism), tokens(length=9)
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(model, backend="eager", fullgraph=True)(ids, use_cache=True).logits
    torch.testing.assert_close(found, full(model, ids), rtol=0, atol=CACHED_LOGITS)


@pytest.mark.parametrize("dilation", [[1, 4], [4, 1], (3, 3)])
@pytest.mark.parametrize("encoding", ["rotary", "relative"])
def test_dilation_by_layer(dilation, encoding, tmp_path):
    """As Longformer has it: rings of different reach, whichever layer's is the larger; in parts, saved and loaded."""
    options = {"window_size": 3, "dilation": dilation}
    model = make_model("local", encoding, "causal", mechanism_options=options)
    assert [module.mechanism.dilation for module in model.attention_modules().values()] == list(dilation)
    check(model, VOCAB)
    model.save_pretrained(tmp_path)
    again, ids = type(model).from_pretrained(tmp_path).eval(), tokens(length=14)
    torch.testing.assert_close(full(again, ids), full(model, ids), rtol=1e-5, atol=1e-5)
    other = make_model("local", encoding, "causal", mechanism_options={"window_size": 3, "dilation": [2, 2]})
    other.load_state_dict(model.state_dict())
    assert (full(other, ids) - full(model, ids)).abs().max() > 1e-3
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    assert [layer.keys.shape[2] for layer in cache.layers] == [2 * step for step in dilation]


@pytest.mark.parametrize(
    ("dilation", "message"),
    [
        ([1, 2, 3], r"dilation of mechanism 'local' must be one value, or a list of one for each of 2 layers, got"),
        ([1, 0], "dilation of mechanism 'local' must be an integer >= 1, got 0"),
    ],
)
def test_lists_that_do_not_fit_the_layers_are_refused(dilation, message):
    with pytest.raises(ValueError, match=message):
        make_model("local", "rotary", "causal", mechanism_options={"dilation": dilation})
