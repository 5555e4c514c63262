"""Segments (token_type_ids) of native models: what they add, in each family, and what is refused."""

import inspect

import pytest
import torch
from transformers import AutoModel

from distattn_hf import DistAttnConfig, DistAttnForConditionalGeneration, DistAttnForSequenceClassification
from tests.tolerances import assert_close

from .choices import make_model, tokens

SEGMENTS = torch.tensor([[0] * 5 + [1] * 7] * 3)


@pytest.mark.parametrize("mechanism", ["dot", "l1", "linear"])
def test_a_segments_vector_is_added_to_the_embeddings(mechanism):
    model = make_model(mechanism, "rotary", "bidirectional", type_vocab_size=2)
    with torch.no_grad():
        vectors = model.model.token_type_embeddings.weight
        embeddings = model.model.embed_tokens(tokens()) + vectors[SEGMENTS]
        given = model(tokens(), token_type_ids=SEGMENTS).logits
        # Embeddings that are given get segments, too: here those of segment 0.
        assert_close(given, model(inputs_embeds=embeddings - vectors[0]).logits, "float32_forward")
        assert_close(model(tokens()).logits, model(tokens(), token_type_ids=0 * SEGMENTS).logits, "equal")
        assert not torch.allclose(given, model(tokens()).logits, atol=1e-3)
    model(tokens(), token_type_ids=SEGMENTS).logits.sum().backward()
    assert vectors.grad[1].any()


def test_they_train_save_and_reload(tmp_path):
    model = make_model("l2", "learned", "bidirectional", type_vocab_size=3)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert again.config.type_vocab_size == 3
    assert again.token_type_embeddings.weight.equal(model.model.token_type_embeddings.weight)


def test_a_decoder_goes_on_in_the_last_segment():
    model = make_model("l2", "rotary", "causal", type_vocab_size=2)
    ids = tokens()
    found = model.generate(ids, token_type_ids=SEGMENTS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    for _ in range(4):
        segments = torch.cat([SEGMENTS, torch.ones(3, ids.shape[1] - SEGMENTS.shape[1], dtype=torch.long)], 1)
        ids = torch.cat([ids, model(ids, token_type_ids=segments).logits[:, -1:].argmax(-1)], 1)
    assert found.tolist() == ids.tolist()


def test_an_encoder_decoder_reads_them_in_its_encoder():
    model = make_model("l2", "rotary", "cross", type_vocab_size=2)
    assert isinstance(model, DistAttnForConditionalGeneration)
    assert model.model.decoder.token_type_embeddings is None
    call = {"decoder_input_ids": tokens()}
    with torch.no_grad():
        encoded = model.model.encoder(tokens(), token_type_ids=SEGMENTS)
        found = model(tokens(), token_type_ids=SEGMENTS, **call).logits
        assert_close(found, model(encoder_outputs=encoded, **call).logits, "equal")
        assert not torch.allclose(found, model(tokens(), **call).logits, atol=1e-3)


def test_trainer_keeps_their_column():
    """Its columns are the names in the signature of forward."""
    model = make_model("l2", "rotary", "bidirectional", type_vocab_size=2)
    assert "token_type_ids" in inspect.signature(model.forward).parameters
    assert list(inspect.signature(DistAttnForSequenceClassification.forward).parameters)[:2] == ["self", "input_ids"]


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (torch.full((3, 12), 2), "from 0 to type_vocab_size - 1 = 1, got \\[2\\]"),
        (torch.full((3, 12), -1), "from 0 to type_vocab_size - 1 = 1, got \\[-1\\]"),
        (torch.zeros(3, 11, dtype=torch.long), r"shape \(B, N\)=\(3, 12\), got \(3, 11\)"),
        (torch.zeros(2, 12, dtype=torch.long), r"shape \(B, N\)=\(3, 12\), got \(2, 12\)"),
    ],
)
def test_what_they_cannot_be(segments, message):
    with pytest.raises(ValueError, match=f"token_type_ids must .*{message}"):
        make_model("l2", "rotary", "bidirectional", type_vocab_size=2)(tokens(), token_type_ids=segments)


def test_a_config_without_says_which_field():
    model = make_model("l2", "rotary", "bidirectional")
    with pytest.raises(ValueError, match="give its config type_vocab_size=2"):
        model(tokens(), token_type_ids=SEGMENTS)
    with pytest.raises(ValueError, match="type_vocab_size must be an integer >= 1 or None, got 0"):
        DistAttnConfig(type_vocab_size=0)


def test_a_compiled_graph_refuses_them_too():
    """It cannot look, and left them out without a word."""
    model = make_model("l1", "rotary", "bidirectional")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(tokens(), token_type_ids=0 * SEGMENTS).logits
        assert_close(found, model(tokens()).logits, "float32_forward")
        with pytest.raises(RuntimeError, match="token_type_ids mark a second segment"):
            compiled(tokens(), token_type_ids=SEGMENTS)


def test_a_compiled_graph_refuses_a_mask_that_does_not_fit():
    """transformers would take what a mask lacks for padding."""
    model = make_model("l1", "rotary", "causal")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    mask = torch.ones_like(tokens())
    with torch.no_grad():
        for length in (12, 9):
            call = {"attention_mask": mask[:, :length], "use_cache": False}
            found, expected = compiled(tokens()[:, :length], **call), model(tokens()[:, :length], **call)
            assert_close(found.logits, expected.logits, "float32_forward")
        wrong = (ValueError, torch._dynamo.exc.Unsupported)  # the second quotes the first
        with pytest.raises(wrong, match=r"attention_mask must have shape \(B, M\)"):
            compiled(tokens(), attention_mask=mask[:, :7], use_cache=False)
