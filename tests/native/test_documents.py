"""Packed rows: each document gives what it gives alone, in logits, gradients and weights, with every mechanism."""

import pytest
import torch
from torch.nn import functional as F
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

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


@pytest.mark.parametrize("mechanism", ["l1", "linear", "local", "nystrom"])
def test_transformers_collator_of_packed_rows(mechanism, tmp_path):
    """`DataCollatorWithFlattening` packs a batch into a row: the loss is that of the texts, and Trainer takes it."""
    model = make_model(mechanism, "rotary", "causal")
    texts = [{"input_ids": tokens(1, length, seed=length)[0].tolist()} for length in (5, 9, 3, 12)]
    with pytest.raises(ValueError, match="packed documents.*: pass use_cache=False"):
        model(**DataCollatorWithFlattening()(texts))
    model.config.use_cache = False
    total = 0.0
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([text["input_ids"]])
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        expected = total / sum(len(text["input_ids"]) - 1 for text in texts)
        assert float(model(**DataCollatorWithFlattening()(texts)).loss) == pytest.approx(expected, rel=1e-5)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, use_cpu=True, report_to="none", per_device_train_batch_size=4, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=texts, data_collator=DataCollatorWithFlattening())
    assert trainer.train().training_loss == pytest.approx(expected, rel=1e-4)


# Rows of documents with padding on both sides, holes, and a border of a document that a hole follows.
MASK = torch.tensor([[0] * 5 + [1] * 13 + [0, 0, 1, 1, 0], [1] * 16 + [1, 0, 1] + [1, 1, 0, 0]])


@pytest.mark.parametrize("mechanism", CAUSAL)
@pytest.mark.parametrize("encoding", ["rotary", "learned", "alibi"])
def test_beside_a_mask_each_is_what_it_is_alone(mechanism, encoding):
    """With its own part of the mask; padding before the first token is apart from it."""
    if not possible(mechanism, encoding, "causal"):
        pytest.skip("refused: see test_trains_or_is_refused_by_name")
    model = make_model(mechanism, encoding, "causal")
    # The first row's first document is padding, so that its text begins in the middle of a batch's row.
    positions = POSITIONS.masked_fill(MASK == 0, 1)
    positions[1, 17] = 1
    with torch.no_grad():
        found = packed(model, attention_mask=MASK) if encoding == "rotary" else None
        other = model(IDS, position_ids=positions, attention_mask=MASK, use_cache=False).logits
        expected = []
        for ids, mask, row in zip(IDS, MASK, ROWS, strict=True):
            for document, own in zip(ids.split(row), mask.split(row), strict=True):
                call = {"position_ids": torch.arange(len(document))[None], "use_cache": False}
                expected.append(model(document[None], attention_mask=own[None], **call).logits[0])
        one_text = model(IDS, attention_mask=MASK, use_cache=False).logits
    expected, real = torch.cat(expected).unflatten(0, MASK.shape), MASK.bool()
    torch.testing.assert_close(other[real], expected[real], rtol=0, atol=CACHED_LOGITS)
    if found is not None:
        torch.testing.assert_close(found.logits[real], expected[real], rtol=0, atol=CACHED_LOGITS)
    assert (one_text[real] - expected[real]).abs().max() > 1e-2


@pytest.mark.parametrize("mechanism", ["dot", "l2", "linear", "local", "nystrom"])
def test_a_mask_of_ones_changes_nothing(mechanism):
    model = make_model(mechanism, "rotary", "causal")
    with torch.no_grad():
        plain, masked = packed(model).logits, packed(model, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(masked, plain, rtol=0, atol=CACHED_LOGITS)


def test_what_a_mask_makes_of_positions():
    """Holes and padding are no borders; a document of one token is."""
    keep = torch.tensor([[0, 0, 1, 1, 0, 1, 1], [1, 1, 1, 0, 1, 1, 0]]).bool()
    assert Documents.beginnings(keep.cumsum(-1) - 1, keep) is None
    assert Documents.beginnings(torch.arange(7).expand(2, -1), keep) is None
    begins = Documents.beginnings(torch.tensor([[1, 1, 0, 1, 1, 0, 0], [0, 1, 2, 1, 3, 0, 1]]), keep)
    assert begins.int().tolist() == [[1, 0, 1, 0, 0, 1, 1], [1, 0, 0, 0, 0, 1, 0]]


@pytest.mark.parametrize(("mechanism", "masked"), [("dot", True), ("l2", False)])
def test_a_compiled_graph_keeps_them_apart_by_a_mask(mechanism, masked):
    """It cannot look whether there are any; beside a mask it read them as one text."""
    model = make_model(mechanism, "rotary", "causal")
    mask = {"attention_mask": MASK} if masked else {}
    real = MASK.bool() if masked else torch.ones_like(IDS, dtype=torch.bool)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for positions in (POSITIONS, torch.arange(23).expand(2, -1)):
            call = {"position_ids": positions, "use_cache": False, **mask}
            found, expected = compiled(IDS, **call).logits, model(IDS, **call).logits
            torch.testing.assert_close(found[real], expected[real], rtol=0, atol=CACHED_LOGITS)


@pytest.mark.parametrize(
    ("mechanism", "use_cache", "masked"),
    [("linear", False, False), ("nystrom", False, True), ("dot", True, False), ("dot", True, True)],
)
def test_where_no_mask_can_a_compiled_graph_stops(mechanism, use_cache, masked):
    model = make_model(mechanism, "rotary", "causal")
    call = {"use_cache": use_cache} | ({"attention_mask": MASK} if masked else {})
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    one_text = torch.arange(23).expand(2, -1)
    with torch.no_grad():
        found, expected = (each(IDS, position_ids=one_text, **call).logits for each in (compiled, model))
        real = MASK.bool() if masked else torch.ones_like(IDS, dtype=torch.bool)
        torch.testing.assert_close(found[real], expected[real], rtol=0, atol=CACHED_LOGITS)
        with pytest.raises(RuntimeError, match="packed documents"):
            compiled(IDS, position_ids=POSITIONS, **call)


def test_flash_attention_beside_a_mask_is_refused():
    """It reads borders from the positions where no mask is given, and nowhere else."""
    model = make_model("dot", "rotary", "causal")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="beside attention_mask, which attn_implementation='flash_attention_2' cannot"):
        packed(model, attention_mask=MASK)


def test_batches_of_documents_waste_less_than_they_hold():
    """One long document and many short ones do not become a batch of long ones."""
    positions = torch.cat([torch.arange(1000), *(torch.arange(n) for n in [3, 5, 2, 7, 1] * 20)])[None]
    documents = Documents(Documents.beginnings(positions))
    assert sum(places.numel() for places, *_ in documents.parts) < 2 * positions.numel()
    assert torch.cat([places[exists] for places, exists, _ in documents.parts]).sort().values.tolist() == list(
        range(positions.numel())
    )
    assert Documents.beginnings(torch.arange(7).expand(2, -1)) is None


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
