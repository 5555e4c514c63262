"""Training native models with what transformers and PEFT offer: checkpointing, half precision, adapters, resizing."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForMultipleChoice, AutoModelForSequenceClassification

from distattn_hf.core.nystrom_cache import NystromLayer
from tests.tolerances import HALF_ERROR_RATIO, TOLERANCES, assert_close

from .choices import CAUSAL, HAS, VOCAB, make_config, make_model, tokens

CHECKPOINTED = [
    ("dot", "relative"), ("l2", "relative"), ("nystrom", "relative"), ("l1", "alibi"), ("linear", "rotary"),
    ("retrieval", "relative"),
]  # fmt: skip


def gradients(model, **inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("mechanism", "encoding"), CHECKPOINTED)
@pytest.mark.parametrize("form", ["causal", "cross"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(mechanism, encoding, form, reentrant):
    model, ids = make_model(mechanism, encoding, form).train(), tokens()
    expected = gradients(model, input_ids=ids, labels=ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients(model, input_ids=ids, labels=ids)
    tolerance = TOLERANCES["float32_gradient"]
    torch.testing.assert_close(found, expected, rtol=tolerance.rtol, atol=tolerance.atol)


def half_precision_errors(folder, mechanism, form) -> tuple[torch.Tensor, torch.nn.Module]:
    """Relative errors of the logits with weights in bfloat16 and under autocast; the model with weights in bfloat16."""
    model, ids = make_model(mechanism, "rotary", form), tokens()
    model.save_pretrained(folder)
    half = type(model).from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(ids).logits
        found = [half(ids).logits]
        with torch.autocast("cpu", torch.bfloat16):
            found.append(model(ids).logits)
    return torch.stack([(logits.float() - expected).norm() / expected.norm() for logits in found]), half


@pytest.mark.parametrize("mechanism", HAS)
@pytest.mark.parametrize("form", ["causal", "bidirectional"])
def test_half_precision(tmp_path, mechanism, form):
    """As near float32 as transformers' own attention, with finite gradients; λ and landmarks stay in float32."""
    if form not in HAS[mechanism][0]:
        pytest.skip("refused: see test_trains_or_is_refused_by_name")
    errors, half = half_precision_errors(tmp_path / "ours", mechanism, form)
    if mechanism not in ("landmark", "retrieval"):  # which look at other blocks once rounding changes their order
        theirs, _ = half_precision_errors(tmp_path / "theirs", "dot", form)
        assert (errors <= HALF_ERROR_RATIO * theirs).all(), f"relative errors {errors}, transformers' own {theirs}"
    assert {p.dtype for name, p in half.named_parameters() if ".distattn." in name} <= {torch.float32}
    ids = tokens()
    for name, grad in gradients(half.train(), input_ids=ids, labels=ids).items():
        assert grad.isfinite().all(), name


@pytest.mark.parametrize("form", ["causal", "bidirectional", "cross"])
def test_losses_of_parts_of_a_batch_add_up(form):
    """Trainer accumulates gradients so: each part's sum over the number of labels in the whole batch."""
    model, ids = make_model("l2", "rotary", form), tokens()
    labels = ids.clone()
    labels[0, 3:] = labels[1, :5] = -100
    items = int((labels[:, 1:] if form == "causal" else labels).ne(-100).sum())
    with torch.no_grad():
        whole = model(input_ids=ids, labels=labels).loss
        parts = [
            model(input_ids=ids[rows], labels=labels[rows], num_items_in_batch=torch.tensor(items)).loss
            for rows in (slice(0, 1), slice(1, 3))
        ]
    assert_close(sum(parts), whole, "float32_forward")


@pytest.mark.parametrize("mechanism", ["dot", "l2", "nystrom", "retrieval", "local", "linear"])
def test_dropout_is_for_training_only(mechanism):
    model, ids = make_model(mechanism, "rotary", "causal", attention_dropout=0.5), tokens()
    with torch.no_grad():
        assert_close(model(ids).logits, model(ids).logits, "equal")
        model.train()
        assert (model(ids).logits - model(ids).logits).abs().max() > 1e-3
        model = make_model(mechanism, "rotary", "causal", hidden_dropout=0.5).train()
        assert (model(ids).logits - model(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("mechanism", ["dot", "l2", "nystrom", "retrieval", "performer"])
def test_peft_finds_the_projections(mechanism):
    model = make_model(mechanism, "rotary", "causal")
    adapted = get_peft_model(model, LoraConfig(r=2))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trained} == {"q_proj", "v_proj"}
    ids = tokens()
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings_of_an_encoder_decoder(tied):
    model, ids = make_model("l2", "rotary", "cross", tie_word_embeddings=tied), tokens()
    encoder, decoder = model.model.encoder.embed_tokens, model.model.decoder.embed_tokens
    assert (encoder.weight is decoder.weight) is (model.lm_head.weight is encoder.weight) is tied
    with torch.no_grad():
        before = model(input_ids=ids, decoder_input_ids=ids).logits
        model.resize_token_embeddings(VOCAB + 5)
        new = torch.full_like(ids, VOCAB + 3)
        after = model(input_ids=ids, decoder_input_ids=ids).logits
        assert model(input_ids=new, decoder_input_ids=new).logits.shape == (3, 12, VOCAB + 5)
    assert_close(after[..., :VOCAB], before, "float32_forward")


def test_embeddings_are_tied_unless_told_otherwise():
    for form in ("causal", "bidirectional"):
        for tied in (True, False):
            model = make_model("dot", "rotary", form, tie_word_embeddings=tied)
            assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


@pytest.mark.parametrize("form", ["causal", "bidirectional"])
def test_multiple_choice_scores_each_text_from_its_last_token(form):
    torch.manual_seed(0)
    model = AutoModelForMultipleChoice.from_config(make_config("l1", "rotary", form)).eval()
    ids = tokens(batch=6, length=8).view(2, 3, 8)
    mask = torch.ones_like(ids)
    mask[0, 1, 5:] = 0
    mask[1, 2, :2] = 0
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask, labels=torch.tensor([2, 0]))
        for b in range(2):
            for c in range(3):
                text = ids[b, c][mask[b, c].bool()][None]
                expected = model.score(model.model(text).last_hidden_state[0, -1])
                assert_close(output.logits[b, c : c + 1], expected, "float32_forward")
    expected = torch.nn.functional.cross_entropy(output.logits, torch.tensor([2, 0]))
    assert_close(output.loss, expected, "equal")


def test_classification_reads_the_last_token_that_is_not_padding():
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(make_config("l2", "rotary", "causal", num_labels=3)).eval()
    ids = tokens(batch=2, length=8)
    padded = torch.cat([ids, torch.zeros(2, 3, dtype=torch.long)], dim=1)
    with torch.no_grad():
        found = model(padded, attention_mask=(padded != 0).long()).logits
        expected = model.score(model.model(ids).last_hidden_state[:, -1])
    assert found.shape == (2, 3)
    assert_close(found, expected, "float32_forward")


def test_causal_nystrom_generates_in_constant_memory():
    model = make_model("nystrom", "rotary", "causal")
    sizes = []
    with torch.no_grad():
        output = model(tokens(length=12), use_cache=True)
        for step in range(12):
            assert all(isinstance(layer, NystromLayer) for layer in output.past_key_values.layers)
            sizes.append([layer.nbytes() for layer in output.past_key_values.layers])
            output = model(tokens(length=1, seed=step), past_key_values=output.past_key_values)
    assert sizes[0] == sizes[-1]


@pytest.mark.parametrize("mechanism", CAUSAL)
def test_generation_from_one_token(mechanism):
    model = make_model(mechanism, "rotary", "causal")
    sequence = model.generate(torch.tensor([[5]]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert sequence.shape == (1, 4)
