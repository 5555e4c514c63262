"""global_attention_mask of native models: through every head that reads it, and what cannot have it."""

import inspect

import pytest
import torch
from transformers import AutoModelForMultipleChoice

from distattn_hf import DistAttnForSequenceClassification
from distattn_hf.core.compatibility import CACHE_NAME, cache_of
from tests.tolerances import assert_close

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


@pytest.mark.parametrize("mechanism", ABLE)
def test_a_cache_is_refused_before_anything_runs(mechanism):
    model = make_model(mechanism, "rotary", "causal")
    cache = cache_of(model(tokens(), use_cache=True))
    message = f"needs use_cache=False in a causal model: a cache of mechanism '{mechanism}' does not know"
    refused(model, message)
    refused(model, message, use_cache=True, **{CACHE_NAME: cache})
    assert cache.get_seq_length() == 12
    with pytest.raises(ValueError, match="generate takes no global_attention_mask in a causal model"):
        model.generate(tokens(), global_attention_mask=MARKED, max_new_tokens=2)


def test_marks_that_cannot_be():
    model = make_model("local", "rotary", "bidirectional")
    refused(model, r"must hold 0 and 1, of shape \(B, N\)=\(3, 12\), got shape \(3, 11\)", MARKED[:, 1:])
    refused(model, r"must hold 0 and 1, .* and values \[0, 2\]", 2 * MARKED)
    row = torch.arange(12).remainder(6)[None]
    model = make_model("local", "rotary", "causal")
    refused(model, r"global_attention_mask beside position_ids that start anew", position_ids=row, use_cache=False)
