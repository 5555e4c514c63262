"""One invariant for every model, metric and mechanism that reads from left to right.

A batch padded on the left and read in four chunks through the cache gives each row what it gives alone, at once and
without padding. A mask that is off by one, a position counted through padding, a state that takes padding in, a chunk
that sees the keys of the next: each breaks it.
"""

import pytest
import torch

from distattn_hf import AttentionSpec, convert
from tests.conversion.models import FAMILIES, VOCAB
from tests.conversion.nystrom_cases import build, converted, nystrom
from tests.core.cases import METRIC_CASES, metric_id
from tests.native.choices import CAUSAL, ENCODINGS, FORMS, HAS, OPTIONS, make_model, possible
from tests.native.choices import VOCAB as NATIVE_VOCAB
from tests.tolerances import CACHED_LOGITS

CHUNKS = (10, 1, 7, 6)
# The first chunk of the second row is padding throughout, and its first token comes alone. Numbers are even, as
# "landmark" counts its blocks of two from the first place of a row, padding or not.
PADDING = (4, 10, 0, 2)

EXACT = {
    metric_id((metric, p)): AttentionSpec(metric, p=p)
    for metric, p in METRIC_CASES
    if metric not in ("dot", "lifted_sqeuclidean")
}
EXACT |= {
    "sqeuclidean lifted": AttentionSpec("sqeuclidean", lift=True),
    "heads apart": [AttentionSpec("l1", heads=[0]), AttentionSpec("cosine", heads=[2, 3])],
    "one layer": AttentionSpec("l2", layers=[1]),
    **{f"{metric} softened": AttentionSpec(metric, softening=3.0) for metric in ("l2", "l1", "chebyshev", "cosine")},
}
SMALL = {"window_size": 3, "num_sinks": 1, "block_size": 2, "num_blocks": 2}
EXACT |= {
    "retrieval": AttentionSpec(mechanism="retrieval", **SMALL),
    "retrieval by the kernel": AttentionSpec(mechanism="retrieval", window_size=1, num_sinks=0, num_blocks=0),
    "retrieval by l1": AttentionSpec("l1", mechanism="retrieval", **SMALL),
    "retrieval beside l2": [AttentionSpec(mechanism="retrieval", heads=[0], **SMALL), AttentionSpec("l2", heads=[1])],
}
NYSTROM = {
    "nystrom": nystrom(5),
    "nystrom, not lifted": nystrom(5, lift=False),
    "nystrom, exact below": nystrom(5, exact_below=12),
    "nystrom, no sinks": nystrom(1, num_sinks=0),
}


def student(family: str, name: str):
    if name in EXACT:
        return convert(FAMILIES[family](), EXACT[name], init="plain")
    # T5's bias has to be constant beyond the window.
    spec = (
        nystrom(9, exact_below=NYSTROM[name].exact_below, lift=NYSTROM[name].lift) if family == "t5" else NYSTROM[name]
    )
    return converted(build(family), spec)


def read(model, ids, mask, encoder) -> torch.Tensor:
    """Logits (B, N, vocabulary) of tokens that come in chunks; `encoder`: what an encoder-decoder reads beside them."""
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    prefix = "decoder_" if encoder else ""
    past, start, logits = None, 0, []
    for size in CHUNKS:
        new = slice(start, start + size)
        chunk = {f"{prefix}input_ids": ids[:, new], f"{prefix}attention_mask": mask[:, : new.stop]}
        # What `generate` passes. Native models count places by the mask; T5 has none.
        if hasattr(model.config, "attention_specs") and not encoder:
            chunk["position_ids"] = positions[:, new]
        output = model(**chunk, **encoder, past_key_values=past, use_cache=True)
        past, start = output.past_key_values, new.stop
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
def check(model, vocabulary: int) -> None:
    model.eval()
    ids = torch.randint(3, vocabulary, (len(PADDING), sum(CHUNKS)))
    mask = torch.ones_like(ids)
    encoder = {}
    if model.config.is_encoder_decoder:
        encoder = {"input_ids": ids.flip(0)[:, :11], "attention_mask": torch.ones(len(ids), 11, dtype=torch.long)}
        encoder["attention_mask"][1, 7:] = 0
    for row, count in enumerate(PADDING):
        ids[row, :count], mask[row, :count] = 0, 0
    logits = read(model, ids, mask, encoder)
    for row, count in enumerate(PADDING):
        text = ids[row : row + 1, count:]
        if encoder:
            words = encoder["input_ids"][row : row + 1, encoder["attention_mask"][row].bool()]
            alone = model(input_ids=words, decoder_input_ids=text).logits[0]
        else:
            alone = model(text, use_cache=False).logits[0]
        scale = alone.abs().max().clamp_min(1)
        difference = (logits[row, count:] - alone).abs().max() / scale
        assert difference <= CACHED_LOGITS, f"row {row}, behind {count} of padding: {difference:.1e}"
        # The control: the logits are not all the same, whatever is read.
        assert alone.std(0).max() > 1e-2


@pytest.mark.parametrize("name", [*EXACT, *NYSTROM])
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_converted_models(family, name):
    check(student(family, name), VOCAB)


@pytest.mark.parametrize("mechanism", CAUSAL)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_native_models(mechanism, encoding):
    if not possible(mechanism, encoding, "causal"):
        pytest.skip("refused: see test_trains_or_is_refused_by_name")
    check(make_model(mechanism, encoding, "causal"), NATIVE_VOCAB)


@pytest.mark.parametrize("mechanism", [name for name, (forms, _) in HAS.items() if forms == FORMS])
def test_native_encoder_decoders(mechanism):
    options = OPTIONS.get(mechanism)
    model = make_model("dot", "rotary", "cross", mechanism=mechanism, mechanism_options=options, cross_mechanism=None)
    check(model, NATIVE_VOCAB)
