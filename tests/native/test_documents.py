"""Packed rows: each document gives what it gives alone, in logits, gradients and weights, with every mechanism."""

import pytest
import torch
from torch.nn import functional as F

from distattn_hf.core.documents import Documents
from tests.tolerances import CACHED_LOGITS

from .choices import CAUSAL, ENCODINGS, make_model, possible, tokens

# Of two rows; some are longer than windows and blocks, one is a single token, and two batches of lengths are full.
ROWS = ((5, 1, 9, 8), (16, 3, 4))
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ROWS])
IDS = tokens(batch=2, length=23)


def alone() -> list[torch.Tensor]:
    return [document[None] for ids, row in zip(IDS, ROWS, strict=True) for document in ids.split(row)]


def packed(model, **options):
    return model(IDS, position_ids=POSITIONS, use_cache=False, **options)


@pytest.mark.parametrize("mechanism", CAUSAL)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_each_is_what_it_is_alone(mechanism, encoding):
    if not possible(mechanism, encoding, "causal"):
        pytest.skip("refused: see test_trains_or_is_refused_by_name")
    model = make_model(mechanism, encoding, "causal")
    with torch.no_grad():
        found = packed(model).logits.flatten(0, 1)
        expected = torch.cat([model(ids, use_cache=False).logits[0] for ids in alone()])
        one_text = model(IDS, use_cache=False).logits.flatten(0, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=CACHED_LOGITS)
    # The control: read as one text they are others.
    assert (one_text - expected).abs().max() > 1e-2


@pytest.mark.parametrize("mechanism", CAUSAL)
def test_gradients_are_those_of_documents(mechanism):
    model, gradients = make_model(mechanism, "rotary", "causal").double().train(), []
    for read in (
        lambda: packed(model).logits.flatten(0, 1),
        lambda: torch.cat([model(ids, use_cache=False).logits[0] for ids in alone()]),
    ):
        model.zero_grad()
        F.cross_entropy(read(), IDS.flatten()).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mechanism", CAUSAL)
def test_weights_stay_within_documents(mechanism):
    model = make_model(mechanism, "rotary", "causal")
    with torch.no_grad():
        weights = packed(model, output_attentions=True).attentions[1]
        start = 0
        for ids, length in zip(alone()[:4], ROWS[0], strict=True):
            own = model(ids, use_cache=False, output_attentions=True).attentions[1][0]
            here = slice(start, start + length)
            torch.testing.assert_close(weights[0, :, here, here], own, rtol=0, atol=CACHED_LOGITS)
            start += length
    same = torch.block_diag(*(torch.ones(n, n) for n in ROWS[1])).bool()
    assert not weights[1][:, ~same].any()


def test_batches_of_documents_waste_less_than_they_hold():
    """One long document and many short ones do not become a batch of long ones."""
    positions = torch.cat([torch.arange(1000), *(torch.arange(n) for n in [3, 5, 2, 7, 1] * 20)])[None]
    documents = Documents.of(positions)
    assert sum(places.numel() for places, _ in documents.parts) < 2 * positions.numel()
    assert torch.cat([places[exists] for places, exists in documents.parts]).sort().values.tolist() == list(
        range(positions.numel())
    )
    assert Documents.of(torch.arange(7).expand(2, -1)) is None


def test_features_are_drawn_once_for_all_documents_of_a_call():
    """Else gradient checkpointing would meet others in its second pass."""
    options = {"num_features": 8, "redraw_interval": 2}
    model = make_model("performer", "rotary", "causal", mechanism_options=options).train()
    for _ in range(3):
        packed(model)
    assert {int(module.mechanism.calls) for module in model.attention_modules().values()} == {3}
    gradients = []
    for checkpointing in (False, True):
        again = make_model("performer", "rotary", "causal", mechanism_options=options).train()
        if checkpointing:
            again.gradient_checkpointing_enable()
        for _ in range(3):
            again.zero_grad()
            packed(again).logits.logsumexp(-1).mean().backward()
        gradients.append([p.grad.clone() for p in again.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
