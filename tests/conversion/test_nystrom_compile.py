"""torch.compile keeps Nyström models in one graph, with the numbers and gradients of the plain model."""

import pytest
import torch

from tests.tolerances import CACHED_LOGITS

from .models import token_batch
from .nystrom_cases import build, converted, nystrom, padded

BATCH = ("input_ids", "attention_mask", "position_ids")


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def in_one_graph(model):
    return torch.compile(model, fullgraph=True, backend="aot_eager")


# Tracing takes 7 s each: both forms causally and not, each causal family once.
@pytest.mark.parametrize(
    ("family", "exact_below"), [("llama", 0), ("gpt2", 64), ("bert", 0), ("bert", 64)], ids=lambda value: str(value)
)
def test_forward_and_gradient_in_one_graph(family, exact_below):
    """The text is longer than a block, and its first row padded."""
    model = converted(build(family), nystrom(9, exact_below=exact_below, num_landmarks=4))
    batch = padded(60) if family != "bert" else token_batch(model, length=60, padded=True)
    batch = {name: tensor for name, tensor in batch.items() if name in BATCH}
    options = {} if family == "bert" else {"use_cache": False}
    real, found = batch["attention_mask"].bool(), []
    for run in (model, in_one_graph(model)):
        model.zero_grad()
        with torch.no_grad():
            without_gradient = run(**batch, **options).logits[real]
        logits = run(**batch, **options).logits[real]
        logits.square().mean().backward()
        found.append((without_gradient, logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert found[0][2].keys() == found[1][2].keys()
    for mine, expected in zip(found[1][:2], found[0][:2], strict=True):
        assert (mine - expected).abs().max() <= CACHED_LOGITS
    for name, expected in found[0][2].items():
        torch.testing.assert_close(found[1][2][name], expected, rtol=1e-3, atol=1e-5, msg=name)


@torch.no_grad()
def test_prefill_and_steps_with_a_cache_in_one_graph():
    """With grouped keys; the cache and what is traced of it are one for all families."""
    model, batch = converted(build("llama"), nystrom(9)), padded(30)
    full, run, past, logits = model(**batch, use_cache=False).logits, in_one_graph(model), None, []
    for start, stop in ((0, 27), (27, 28), (28, 30)):
        piece = {name: batch[name][:, start:stop] for name in ("input_ids", "position_ids")}
        mask = batch["attention_mask"][:, :stop]
        output = run(**piece, attention_mask=mask, past_key_values=past, use_cache=True)
        past = output.past_key_values
        logits.append(output.logits)
    assert (torch.cat(logits, dim=1) - full)[batch["attention_mask"].bool()].abs().max() <= CACHED_LOGITS
