"""What the tests of linear attention inside models share: students of the small models, and ways to run them."""

from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from distattn_hf import AttentionSpec, convert
from distattn_hf.conversion.beyond import take_beyond
from distattn_hf.conversion.calibrate import CalibrationOptions
from distattn_hf.core.nystrom_cache import NystromLayer
from tests.conversion.models import FAMILIES, VOCAB, token_batch
from tests.tolerances import CACHED_LOGITS

QUICK = CalibrationOptions(steps=2, progress=False)
NONE_CHOSEN = CalibrationOptions(steps=2, progress=False, max_error=1e9)
DECODERS = pytest.mark.parametrize("family", ["gpt2", "llama"])
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
AUTO = {
    "gpt2": AutoModelForCausalLM,
    "llama": AutoModelForCausalLM,
    "bert": AutoModelForMaskedLM,
    "t5": AutoModelForSeq2SeqLM,
}
# T5's bias is constant from a distance of 8 on, so a window of 9 holds all of it.
SHORT_BIAS = {"relative_attention_max_distance": 8, "relative_attention_num_buckets": 6}
GENERATION = {"max_new_tokens": 25, "min_new_tokens": 25, "do_sample": False}


def build(family: str):
    return FAMILIES[family](**(SHORT_BIAS if family == "t5" else {}))


def nystrom(window_size: int = 6, **kwargs) -> AttentionSpec:
    return AttentionSpec(mechanism="nystrom", window_size=window_size, **{"num_landmarks": 8, "num_sinks": 2, **kwargs})


def converted(teacher, spec, **kwargs):
    batches = [token_batch(teacher, length=40, seed=seed) for seed in range(2)]
    return convert(teacher, spec, calibration=batches, options=QUICK, **kwargs)


@cache
def student_of(family: str, lift: bool = True):
    """For tests that change nothing in it."""
    return converted(build(family), nystrom(9, lift=lift))


def taken(family: str, beyond: str = "retrieval", dtype=torch.float32, **kwargs):
    """A student in which the second key head of every even module, and the first of every odd one, is not Nyström's."""
    teacher = build(family).to(dtype)
    batches = [token_batch(teacher, length=40, seed=seed) for seed in range(2)]
    student = convert(teacher, nystrom(9, beyond=beyond, **kwargs), calibration=batches, options=NONE_CHOSEN)
    share = 2 if family == "llama" else 1
    for number, (name, state) in enumerate(student.attention_states.items()):
        first = share if number % 2 == 0 else 0
        take_beyond(student, name, state, [{}], list(range(first, first + share)))
    return student


def padded(length: int, rows: int = 2) -> dict[str, torch.Tensor]:
    """Random tokens; the first row has padding for a quarter of the length to its left."""
    ids = torch.randint(3, VOCAB, (rows, length))
    mask = torch.ones_like(ids)
    ids[0, : length // 4], mask[0, : length // 4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}


def in_chunks(model, batch, sizes, past=None):
    """(logits, cache) of a batch that comes a chunk of columns at a time."""
    start, logits = 0, []
    for size in sizes:
        stop = start + size
        chunk = {name: tensor[:, start:stop] for name, tensor in batch.items() if name != "attention_mask"}
        output = model(**chunk, attention_mask=batch["attention_mask"][:, :stop], past_key_values=past, use_cache=True)
        past, start = output.past_key_values, stop
        logits.append(output.logits)
    return torch.cat(logits, dim=1), past


def layers_of(past) -> list[NystromLayer]:
    layers = getattr(past, "self_attention_cache", past).layers
    assert all(type(layer) is NystromLayer for layer in layers)
    return layers


@torch.no_grad()
def check_reload_and_reference(model, batch, full, folder):
    """A decoder's logits are `full`, bit for bit, after a reload; and with "eager", whose weights sum to 1 in a row."""
    real = batch["attention_mask"].bool()
    model.save_pretrained(folder)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder).eval()(**batch, use_cache=False).logits, full)
    model.set_attn_implementation("eager")
    slow = model(**batch, use_cache=False, output_attentions=True)
    assert (slow.logits - full)[real].abs().max() <= CACHED_LOGITS
    for weights in slow.attentions:
        rows = weights.sum(-1).transpose(1, 2)[real]
        torch.testing.assert_close(rows, torch.ones_like(rows), atol=1e-6, rtol=0)
