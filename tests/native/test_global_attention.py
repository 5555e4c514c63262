"""global_attention_mask of native models: through every head that reads it, and what cannot have it."""

import copy
import inspect

import pytest
import torch
from transformers import AutoModelForMultipleChoice, StaticCache

from distattn_hf import DistAttnForSequenceClassification
from distattn_hf.core.compatibility import CACHE_NAME, cache_of
from tests.tolerances import CACHED_LOGITS, assert_close

from .choices import OPTIONS, make_config, make_model, tokens

ABLE = ("local", "strided", "bigbird")
MARKED = torch.zeros(3, 12, dtype=torch.long)
MARKED[0, [0, 7]] = MARKED[1, 5] = 1
PADDING = torch.ones(3, 12, dtype=torch.long)
PADDING[0, 9:] = 0
PADDING[2, :4] = 0


@pytest.mark.parametrize("mechanism", ABLE)
@pytest.mark.parametrize("encoding", ["rotary", "alibi"])
@pytest.mark.parametrize("form", ["causal", "bidirectional"])
def test_is_dot_product_attention_under_a_dense_mask(mechanism, encoding, form):
    """Of the same weights, in float64, with the mask that the pattern and the marks make, layer for layer."""
    model, dense = (make_model(name, encoding, form, seed=1).double() for name in (mechanism, "dot"))
    dense.load_state_dict(model.state_dict())
    call = {"attention_mask": PADDING} | ({"use_cache": False} if form == "causal" else {})
    with torch.no_grad():
        found = model(tokens(), global_attention_mask=MARKED, output_attentions=True, **call)
        plain = model(tokens(), output_attentions=True, **call)
        marked = MARKED.bool()
        seen = (plain.attentions[0] > 0) | marked[:, None, None] | marked[:, None, :, None]
        if form == "causal":
            seen &= torch.ones(12, 12, dtype=torch.bool).tril()
        seen &= PADDING.bool()[:, None, None]
        # A row of padding alone would be NaN in PyTorch's attention; no other token sees it.
        seen |= torch.eye(12, dtype=torch.bool) & ~PADDING.bool()[:, None, :, None]
        positions = (PADDING.cumsum(-1) - 1).clamp(min=0)
        bias = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
        expected = dense(tokens(), bias, positions, **({"use_cache": False} if form == "causal" else {}))
    real = PADDING.bool()
    assert_close(found.logits[real], expected.logits[real], "float64")
    assert (found.logits - plain.logits)[real].abs().max() > 1e-3
    assert bool((found.attentions[1].transpose(1, 2)[real][:, :, :].sum(-1) - 1).abs().max() < 1e-6)


@pytest.mark.parametrize("mechanism", ABLE)
def test_marks_of_a_list_of_windows_train(mechanism):
    model = make_model(mechanism, "learned", "bidirectional").train()
    model.gradient_checkpointing_enable()
    model(tokens(), global_attention_mask=MARKED).logits.logsumexp(-1).mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_an_encoder_decoder_reads_them_in_its_encoder():
    settings = {"mechanism": "local", "mechanism_options": OPTIONS["local"]}
    model = make_model("dot", "rotary", "cross", **settings)
    call = {"decoder_input_ids": tokens(length=5)}
    with torch.no_grad():
        encoded = model.model.encoder(tokens(), global_attention_mask=MARKED)
        found = model(tokens(), global_attention_mask=MARKED, **call).logits
        assert_close(found, model(encoder_outputs=encoded, **call).logits, "equal")
        assert not torch.allclose(found, model(tokens(), **call).logits, atol=1e-3)
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "decoder_start_token_id": 1}
        written = model.generate(tokens(), global_attention_mask=MARKED, **options)
        again = model.generate(encoder_outputs=encoded, **options)
    assert written.tolist() == again.tolist()


@pytest.mark.parametrize("column", ["global_attention_mask", "token_type_ids"])
def test_choices_are_read_with_their_own(column):
    """(B, C, N), as the tokens are."""
    config = make_config("local", "rotary", "bidirectional", type_vocab_size=2)
    torch.manual_seed(0)
    model = AutoModelForMultipleChoice.from_config(config).eval()
    ids = tokens(batch=4).view(2, 2, 12)
    marks = torch.zeros_like(ids)
    marks[0, 1, 3] = marks[1, 0, 8:] = 1
    with torch.no_grad():
        found = model(ids, **{column: marks}).logits
        each = [
            model(ids[b : b + 1, c : c + 1], **{column: marks[b : b + 1, c : c + 1]}).logits
            for b in (0, 1)
            for c in (0, 1)
        ]
    assert_close(found.flatten(), torch.cat(each).flatten(), "float32_forward")
    assert not torch.allclose(found, model(ids).logits, atol=1e-4)


def test_trainer_keeps_the_column():
    assert "global_attention_mask" in inspect.signature(DistAttnForSequenceClassification.forward).parameters


def refused(model, message, marked=MARKED, **call):
    with pytest.raises(ValueError, match=message):
        model(tokens(), global_attention_mask=marked, **call)


@pytest.mark.parametrize(
    "mechanism", ["dot", "l2", "nystrom", "retrieval", "landmark", "linear", "performer", "relative"]
)
def test_mechanisms_without_a_pattern_refuse_it(mechanism):
    name = "distance" if mechanism == "l2" else mechanism
    model = make_model(mechanism, "rotary", "bidirectional")
    refused(model, rf"needs a mechanism with a pattern \(local, strided, bigbird\), got '{name}'")


# A text in parts: the first part's global tokens are far behind when the last ones come.
TEXT, PARTS = tokens(length=30), (12, 1, 9, 1, 7)
TEXT_MARKED = torch.nn.functional.pad(MARKED, (0, 18))
TEXT_MARKED[2, 1] = 1  # padding
TEXT_PADDING = torch.nn.functional.pad(PADDING, (0, 18), value=1)
TEXT_PADDING[0, 9:12] = 0


@torch.no_grad()
def in_parts(model, cache=None, marked=TEXT_MARKED, parts=PARTS):
    """(logits (B, N, vocabulary), cache) of the text through a cache."""
    logits, start = [], 0
    for size in parts:
        stop = start + size
        call = {"attention_mask": TEXT_PADDING[:, :stop], "global_attention_mask": marked[:, :stop], CACHE_NAME: cache}
        output = model(TEXT[:, start:stop], use_cache=True, **call)
        logits.append(output.logits)
        cache, start = cache_of(output), stop
    return torch.cat(logits, dim=1), cache


def of_text(mechanism, encoding="rotary", **settings):
    return make_model(mechanism, encoding, "causal", max_position_embeddings=64, seed=1, **settings)


@torch.no_grad()
def whole(model, marked=TEXT_MARKED):
    return model(TEXT, attention_mask=TEXT_PADDING, global_attention_mask=marked, use_cache=False).logits


@pytest.mark.parametrize("mechanism", ABLE)
@pytest.mark.parametrize("encoding", ["rotary", "alibi", "relative"])
@pytest.mark.parametrize("heads", [{}, {"num_attention_heads": 4, "num_key_value_heads": 2}], ids=["", "grouped"])
def test_a_text_in_parts_is_the_text(mechanism, encoding, heads):
    model, real = of_text(mechanism, encoding, **heads), TEXT_PADDING.bool()
    expected = whole(model)
    dynamic, cache = in_parts(model)
    static = in_parts(model, StaticCache(config=model.config, max_cache_len=40))[0]
    for found in (dynamic, static):
        torch.testing.assert_close(found[real], expected[real], rtol=0, atol=CACHED_LOGITS)
    # The control: what stands far behind is seen.
    unmarked = whole(model, torch.zeros_like(TEXT_MARKED))
    assert (unmarked - expected)[:2, -7:].abs().max() > 1e-3
    found = in_parts(model, marked=torch.zeros_like(TEXT_MARKED))[0]
    torch.testing.assert_close(found[real], unmarked[real], rtol=0, atol=CACHED_LOGITS)
    if mechanism != "bigbird":
        reach = {"local": 2, "strided": 12}[mechanism]
        assert {(layer.keys.shape[2], layer.global_tokens[0].shape[2]) for layer in cache.layers} == {(reach, 2)}


@pytest.mark.parametrize("mechanism", ABLE)
def test_a_cache_with_global_tokens_is_changed_as_any_other(mechanism):
    """Rows reordered, repeated and selected, a copy, a reset, tokens taken back."""
    model, after = of_text(mechanism), tokens(batch=6, length=2, seed=3)
    cache = in_parts(model)[1]

    @torch.no_grad()
    def goes_on(cache, rows):
        new = after[: len(rows)]
        ids, mask = torch.cat([TEXT[rows], new], 1), torch.nn.functional.pad(TEXT_PADDING[rows], (0, 2), value=1)
        call = {"attention_mask": mask, "global_attention_mask": torch.nn.functional.pad(TEXT_MARKED[rows], (0, 2))}
        found = model(new, **call, **{CACHE_NAME: cache}).logits
        expected = model(ids, use_cache=False, **call).logits[:, -2:]
        torch.testing.assert_close(found, expected, rtol=0, atol=CACHED_LOGITS)

    for change, rows in (
        (lambda c: c.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda c: c.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
    ):
        changed = copy.deepcopy(cache)
        change(changed)
        goes_on(changed, rows)
    cache.activate_past_recording()
    goes_on(cache, [0, 1, 2])
    cache.crop(-2)
    after = tokens(batch=6, length=2, seed=4)
    goes_on(cache, [0, 1, 2])
    cache.reset()
    assert not any(getattr(layer, "global_tokens", None) for layer in cache.layers)
    with torch.no_grad():
        found = torch.cat([model(part, **{CACHE_NAME: cache}).logits for part in TEXT.split(20, dim=1)], dim=1)
        torch.testing.assert_close(found, model(TEXT, use_cache=False).logits, rtol=0, atol=CACHED_LOGITS)


@pytest.mark.parametrize("mechanism", ABLE)
@torch.no_grad()
def test_global_tokens_that_are_taken_back_are_gone(mechanism):
    model, marked = of_text(mechanism), TEXT_MARKED.clone()
    marked[:, 2:] = 0
    cache = in_parts(model, parts=(2,))[1]
    cache.activate_past_recording()
    draft = marked[:, :3].clone()
    draft[:, 2] = 1
    call = {"attention_mask": TEXT_PADDING[:, :3], "global_attention_mask": draft, CACHE_NAME: cache}
    model(TEXT[:, 2:3], **call)
    cache.crop(-1)
    expected, real = whole(model, marked), TEXT_PADDING.bool()
    for new in (slice(2, 20), slice(20, 30)):
        stop = new.stop
        call = {"attention_mask": TEXT_PADDING[:, :stop], "global_attention_mask": marked[:, :stop], CACHE_NAME: cache}
        found = model(TEXT[:, new], **call).logits
        cache.crop(0)
        torch.testing.assert_close(found[real[:, new]], expected[:, new][real[:, new]], rtol=0, atol=CACHED_LOGITS)


@torch.no_grad()
def test_weights_beside_a_cache_that_keeps_all_keys():
    model, marked = of_text("bigbird"), TEXT_MARKED.clone()
    marked[1, 25] = 1
    call = {"attention_mask": TEXT_PADDING, "global_attention_mask": marked, "output_attentions": True}
    expected = model(TEXT, use_cache=False, **call).attentions[1]
    cache = in_parts(model, marked=marked, parts=(22,))[1]
    found = model(TEXT[:, 22:], **call, **{CACHE_NAME: cache}).attentions[1]
    torch.testing.assert_close(found, expected[:, :, 22:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mechanism", ABLE)
def test_generate(mechanism):
    """With a cache and without, beams, drafts, a prompt in chunks, and going on from a returned cache."""
    model, prompt = of_text(mechanism), {"attention_mask": PADDING, "global_attention_mask": MARKED}
    # A batch is padded on the left.
    prompt["attention_mask"] = PADDING.clone()
    prompt["attention_mask"][0] = 1
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = model.generate(tokens(), **prompt, **options, use_cache=False).tolist()
    plain = model.generate(tokens(), attention_mask=prompt["attention_mask"], **options).tolist()
    assert plain != expected
    for more in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 8}):
        assert model.generate(tokens(), **prompt, **options, **more).tolist() == expected
    beams = [model.generate(tokens(), **prompt, **options, num_beams=3, use_cache=c).tolist() for c in (True, False)]
    assert beams[0] == beams[1]
    one = {"attention_mask": PADDING[1:2], "global_attention_mask": MARKED[1:2]}
    for drafts in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": of_text(mechanism, encoding="none")}):
        assert model.generate(tokens()[1:2], **one, **options, **drafts).tolist() == expected[1:2]
    options["max_new_tokens"] = 5
    first = model.generate(tokens(), **prompt, **options, return_dict_in_generate=True)
    prompt["attention_mask"] = torch.nn.functional.pad(prompt["attention_mask"], (0, 5), value=1)
    options |= {"max_new_tokens": 7, CACHE_NAME: cache_of(first)}
    assert model.generate(first.sequences, **prompt, **options).tolist() == expected


@pytest.mark.parametrize("mechanism", ABLE)
def test_keys_of_a_layer_that_keeps_all_are_gone_on_from(mechanism):
    """What a plain layer holds of global tokens, the layer that takes its place keeps."""
    model, real = of_text(mechanism), TEXT_PADDING.bool()
    with pytest.MonkeyPatch.context() as patch:
        for module in model.attention_modules().values():
            patch.setattr(module.mechanism, "cache_layer", lambda layer: layer)
        first, cache = in_parts(model, parts=PARTS[:2])
    parts, start = [first], 13
    for stop in (20, 30):
        call = {"attention_mask": TEXT_PADDING[:, :stop], "global_attention_mask": TEXT_MARKED[:, :stop]}
        with torch.no_grad():
            parts.append(model(TEXT[:, start:stop], **call, **{CACHE_NAME: cache}).logits)
        start = stop
    torch.testing.assert_close(torch.cat(parts, dim=1)[real], whole(model)[real], rtol=0, atol=CACHED_LOGITS)


def test_what_a_cache_cannot_have():
    local, bigbird = of_text("local"), of_text("bigbird")
    late = TEXT_MARKED.clone()
    late[2, 20] = 1
    message = "a token after the first 13 would see all of them, of which the cache has kept 2"
    with pytest.raises(ValueError, match=message):
        in_parts(local, marked=late)
    # Where all keys are kept it can.
    real = TEXT_PADDING.bool()
    for model, parts in ((bigbird, PARTS), (local, (21, 9))):
        found = in_parts(model, marked=late, parts=parts)[0]
        torch.testing.assert_close(found[real], whole(model, late)[real], rtol=0, atol=CACHED_LOGITS)
    for model in (local, bigbird):
        cache = in_parts(model)[1]
        message = "the cache holds global tokens: give global_attention_mask of all tokens"
        with pytest.raises(ValueError, match=message):
            model(TEXT[:, :1], **{CACHE_NAME: cache})
        with pytest.raises(ValueError, match=r"of shape \(B, M\)=\(3, 31\), .*; got shape \(3, 1\)"):
            model(TEXT[:, :1], global_attention_mask=TEXT_MARKED[:, :1], **{CACHE_NAME: cache})
        assert cache.get_seq_length() == 30
    cache, marked = in_parts(local)[1], torch.nn.functional.pad(TEXT_MARKED, (0, 1))
    with pytest.raises(ValueError, match="once global tokens stand before the keys that the cache"):
        local(TEXT[:, :1], global_attention_mask=marked, output_attentions=True, **{CACHE_NAME: cache})
    marked[0, 1] = 1
    with pytest.raises(ValueError, match="must say of the tokens in the cache what it said when they came"):
        local(TEXT[:, :1], global_attention_mask=marked, **{CACHE_NAME: in_parts(local)[1]})


def test_marks_that_cannot_be():
    model = make_model("local", "rotary", "bidirectional")
    refused(model, r"must hold 0 and 1, of shape \(B, M\)=\(3, 12\), .* got shape \(3, 11\)", MARKED[:, 1:])
    refused(model, r"must hold 0 and 1, .* and values \[0, 2\]", 2 * MARKED)
    row = torch.arange(12).remainder(6)[None]
    model = make_model("local", "rotary", "causal")
    refused(model, r"global_attention_mask beside position_ids that start anew", position_ids=row, use_cache=False)
