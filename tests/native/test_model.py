"""Every choice of mechanism, encoding and form: it trains, or is refused by name; cache, padding and batches."""

import pytest
import torch

from distattn_hf.core.encodings import POSITIONAL_ENCODINGS
from distattn_hf.core.mechanisms import MECHANISMS
from distattn_hf.core.metrics import METRICS
from distattn_hf.core.native_attention import DistAttnAttention
from tests.tolerances import CACHED_LOGITS, assert_close

from .choices import CAUSAL, ENCODINGS, FORMS, HAS, OPTIONS, make_model, possible, tokens

every_mechanism = pytest.mark.parametrize("mechanism", HAS)
every_encoding = pytest.mark.parametrize("encoding", ENCODINGS)
# One encoding of each kind.
SOME_ENCODINGS = ("learned", "rotary", "relative")


def inputs_of(form: str) -> dict:
    ids = tokens()
    return {"input_ids": ids, "labels": ids if form != "cross" else tokens(length=7, seed=1)}


def test_the_table_has_every_mechanism_and_encoding():
    metrics = set(METRICS) - {"dot", "lifted_sqeuclidean"}
    assert set(HAS) == {"dot", "nystrom", "retrieval", *metrics, *MECHANISMS}
    assert set(ENCODINGS) == set(POSITIONAL_ENCODINGS)


@every_mechanism
@every_encoding
@pytest.mark.parametrize("form", FORMS)
def test_trains_or_is_refused_by_name(mechanism, encoding, form):
    if not possible(mechanism, encoding, form):
        named = rf"mechanism='{mechanism}' with positional_encoding='{encoding}' in {form}.?attention"
        with pytest.raises(ValueError, match=named):
            make_model(mechanism, encoding, form)
        return
    model = make_model(mechanism, encoding, form).train()
    inputs = inputs_of(form)
    before = model(**inputs).loss
    before.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad.isfinite().all(), name
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(1e-2 / norm * parameter.grad)
    assert model(**inputs).loss < before


@pytest.mark.parametrize("mechanism", CAUSAL)
@pytest.mark.parametrize("encoding", SOME_ENCODINGS)
def test_prefill_and_steps_are_the_full_forward(mechanism, encoding):
    if not possible(mechanism, encoding, "causal"):
        pytest.skip("refused: see test_trains_or_is_refused_by_name")
    # By another seed two blocks of a row hold the same two tokens, and rounding decides which one landmarks choose.
    model, ids = make_model(mechanism, encoding, "causal"), tokens(length=14, seed=1)
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, :1] = 0
    with torch.no_grad():
        full = model(ids, attention_mask=mask, use_cache=False).logits
        parts, cache, start = [], None, 0
        for size in (6, 1, 1, 3, 1, 2):
            new = slice(start, start + size)
            output = model(ids[:, new], attention_mask=mask[:, : new.stop], past_key_values=cache, use_cache=True)
            parts.append(output.logits)
            cache, start = output.past_key_values, new.stop
    kept = mask.bool()
    torch.testing.assert_close(torch.cat(parts, dim=1)[kept], full[kept], rtol=0, atol=CACHED_LOGITS)


@pytest.mark.parametrize("mechanism", CAUSAL)
def test_generation_with_left_padding_and_beams_is_the_full_forward(mechanism):
    """Greedy tokens are the best of a full forward; a beam's score is the mean log probability of its tokens."""
    model, ids = make_model(mechanism, "rotary", "causal"), tokens(length=6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        greedy = model.generate(ids, **options)
        longer = torch.cat([mask, torch.ones(3, 4, dtype=torch.long)], dim=1)
        logits = model(greedy, attention_mask=longer, use_cache=False).logits[:, 5:-1]
        assert logits.argmax(-1).tolist() == greedy[:, 6:].tolist()
        beams = model.generate(ids, **options, num_beams=3, return_dict_in_generate=True, output_scores=True)
        found = model(beams.sequences, attention_mask=longer, use_cache=False).logits[:, 5:-1].log_softmax(-1)
        scores = found.gather(-1, beams.sequences[:, 6:, None]).sum(dim=(1, 2)) / 4
    torch.testing.assert_close(beams.sequences_scores, scores, rtol=0, atol=CACHED_LOGITS)


@pytest.mark.parametrize("mechanism", CAUSAL)
def test_values_of_a_size_of_their_own(mechanism, tmp_path):
    """As many numbers go into the output projection, with and without a cache, saved and loaded."""
    if mechanism == "relative":
        with pytest.raises(ValueError, match=r"value_head_dim must be None or \d+, the size of the embeddings"):
            make_model(mechanism, "rotary", "causal", value_head_dim=5)
        return
    model = make_model(mechanism, "rotary", "causal", value_head_dim=5)
    heads = model.config.num_attention_heads
    layer = next(module for module in model.modules() if isinstance(module, DistAttnAttention))
    assert layer.v_proj.out_features == 5 * model.config.num_key_value_heads
    assert layer.o_proj.in_features == 5 * heads
    ids = tokens(length=6)
    with torch.no_grad():
        greedy = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
        logits = model(greedy, use_cache=False).logits
        assert logits[:, 5:-1].argmax(-1).tolist() == greedy[:, 6:].tolist()
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path).eval()
        assert again.config.value_head_dim == 5
        assert torch.equal(again(greedy, use_cache=False).logits, logits)


@pytest.mark.parametrize("mechanism", CAUSAL)
def test_padding_on_the_left_changes_nothing(mechanism):
    """Each row with as much padding of its own: blocks, windows and strides are counted from its first token."""
    model, ids = make_model(mechanism, "rotary", "causal"), tokens(length=14)
    padded = torch.full((len(ids), 14 + 7), 7)
    mask = torch.zeros_like(padded)
    for row, start in enumerate((7, 3, 5)):
        padded[row, start : start + 14], mask[row, start : start + 14] = ids[row], 1
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        found = model(padded, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(found[mask.bool()].view_as(expected), expected, rtol=0, atol=CACHED_LOGITS)


@pytest.mark.parametrize("mechanism", [name for name, (forms, _) in HAS.items() if forms == FORMS])
@pytest.mark.parametrize("encoding", SOME_ENCODINGS)
def test_an_encoder_decoder_of_one_mechanism_generates_its_full_forward(mechanism, encoding):
    if not possible(mechanism, encoding, "causal"):
        pytest.skip("refused: see test_trains_or_is_refused_by_name")
    options = OPTIONS.get(mechanism)
    model = make_model("dot", encoding, "cross", mechanism=mechanism, mechanism_options=options, cross_mechanism=None)
    kinds = {type(m.distattn if hasattr(m, "distattn") else m.mechanism) for m in attention_modules(model)}
    assert len(kinds) == 1
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, -4:] = mask[1, :3] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    generated = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        logits = model(**inputs, decoder_input_ids=generated).logits
        longer = {"input_ids": torch.cat([ids, ids], dim=1), "attention_mask": torch.cat([mask, 0 * mask], dim=1)}
        behind = model(**longer, decoder_input_ids=generated).logits
    assert logits[:, :-1].argmax(-1).tolist() == generated[:, 1:].tolist()
    torch.testing.assert_close(behind, logits, rtol=0, atol=CACHED_LOGITS)


def attention_modules(model) -> list:
    found = [module for module in model.modules() if isinstance(module, DistAttnAttention)]
    assert sum(module.is_cross_attention for module in found) == model.config.decoder_layers
    return found


@every_mechanism
@pytest.mark.parametrize("form", FORMS)
def test_padding_and_neighbours_change_nothing(mechanism, form):
    if form not in HAS[mechanism][0]:
        pytest.skip("refused: see test_trains_or_is_refused_by_name")
    model, ids = make_model(mechanism, "rotary", form), tokens()
    mask = torch.ones_like(ids)
    mask[0, -4:] = 0
    mask[1, :3] = 0
    other = ids.masked_fill(mask == 0, 7)
    more = {"decoder_input_ids": tokens(length=5, seed=1)} if form == "cross" else {}
    kept = mask.bool() if form != "cross" else torch.ones(3, 5, dtype=torch.bool)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, **more).logits
        changed = model(input_ids=other, attention_mask=mask, **more).logits
        assert_close(changed[kept], logits[kept], "equal", "padding matters")
        for row in range(3):
            mine = {name: value[row : row + 1] for name, value in more.items()}
            alone = model(input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1], **mine).logits
            # Other shapes, other orders of summation.
            torch.testing.assert_close(alone[0][kept[row]], logits[row][kept[row]], rtol=0, atol=CACHED_LOGITS)


# Blocks and strides of the others are counted from the first place of the row, padding or not.
@pytest.mark.parametrize("mechanism", ["dot", "l2", "nystrom", "retrieval", "local", "linear", "performer", "relative"])
@every_encoding
@pytest.mark.parametrize("form", ["causal", "bidirectional"])
def test_a_text_is_the_same_behind_padding(mechanism, encoding, form):
    if not possible(mechanism, encoding, form):
        pytest.skip("refused: see test_trains_or_is_refused_by_name")
    model, ids = make_model(mechanism, encoding, form), tokens()
    padded = torch.cat([tokens(length=3, seed=2), ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    with torch.no_grad():
        plain, behind = model(ids).logits, model(padded, attention_mask=mask).logits[:, 3:]
    torch.testing.assert_close(behind, plain, rtol=0, atol=CACHED_LOGITS)


@pytest.mark.parametrize("mechanism", CAUSAL)
def test_the_future_is_not_seen(mechanism):
    model, ids = make_model(mechanism, "rotary", "causal"), tokens()
    other = ids.clone()
    other[:, 7:] = tokens(length=5, seed=5)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[:, :7], model(other).logits[:, :7], rtol=0, atol=CACHED_LOGITS)
        assert (model(ids).logits[:, 7] - model(other).logits[:, 7]).abs().max() > 1e-3


@every_mechanism
@pytest.mark.parametrize("form", FORMS)
def test_true_weights_and_hidden_states(mechanism, form):
    if form not in HAS[mechanism][0]:
        pytest.skip("refused: see test_trains_or_is_refused_by_name")
    model = make_model(mechanism, "rotary", form)
    with torch.no_grad():
        output = model(**inputs_of(form), output_attentions=True, output_hidden_states=True)
        plain = model(**inputs_of(form))
    weights = output.cross_attentions if form == "cross" else output.attentions
    states = output.decoder_hidden_states if form == "cross" else output.hidden_states
    shape = (3, 2, 7, 12) if form == "cross" else (3, 2, 12, 12)
    assert [tuple(each.shape) for each in weights] == [shape] * 2
    assert [tuple(each.shape) for each in states] == [(3, shape[2], 16)] * 3
    for each in weights:
        if mechanism != "linformer":  # which mixes values in proportions that are no distribution over the keys
            assert_close(each.sum(-1), torch.ones(shape[:3]), "weights_sum")
        if form == "causal":
            assert not each.triu(1).any()
    torch.testing.assert_close(output.logits, plain.logits, rtol=0, atol=CACHED_LOGITS)
