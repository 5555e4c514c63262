"""Which heads a share takes: those of the largest errors, or those that a probe finds to look things up."""

import random
from dataclasses import replace

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from distattn_hf import convert
from distattn_hf.conversion.calibrate import CalibrationOptions
from distattn_hf.conversion.probe import key_value_text, probe
from tests.conversion.models import llama, token_batch
from tests.conversion.nystrom_cases import DECODERS, QUICK, build, nystrom, padded


@pytest.mark.parametrize("beyond", ["retrieval", "exact"])
def test_a_share_takes_the_key_heads_of_the_largest_errors(beyond):
    """Of four key heads half: those with the worst query head of all, as the fit without a share reports them."""
    teacher = llama()
    batches = [token_batch(teacher, length=40, seed=seed) for seed in range(2)]
    free = convert(teacher, nystrom(9), calibration=batches, options=QUICK).conversion_report
    worst = {(g.module, k): max(g.output_error[2 * k : 2 * k + 2]) for g in free.groups for k in (0, 1)}
    expected = sorted(sorted(worst, key=worst.get)[-2:])
    student = convert(teacher, nystrom(9, beyond=beyond), calibration=batches, options=replace(QUICK, beyond_share=0.5))
    report = student.conversion_report
    gone = {(g.module, head // 2) for g in report.groups if g.mechanism == "retrieval" for head in g.heads}
    gone |= {(module, head // 2) for module, heads in report.exact_heads.items() for head in heads}
    assert sorted(gone) == expected
    assert bool(report.exact_heads) == (beyond == "exact")
    for group in report.groups:
        if group.mechanism == "nystrom":
            kept = next(g for g in free.groups if g.module == group.module)
            assert group.output_error == [kept.output_error[head] for head in group.heads]


@DECODERS
@torch.no_grad()
def test_the_probe_is_the_loss_with_far_keys_hidden(family):
    """By the teacher's own eager attention with a mask of one key head's queries at the end."""
    teacher = build(family)
    batch = token_batch(teacher, length=40)
    student = convert(teacher, nystrom(9), calibration=[batch], options=QUICK)
    options = CalibrationOptions(progress=False, select="probe", probe_lengths=(120,))
    rises, groups = probe(student, batch, options)
    assert len(rises) == 2 * 4 // groups[next(iter(groups))]
    draw, stream = random.Random(0), batch["input_ids"].flatten()
    ids = torch.tensor([token for token in stream.unique().tolist() if token > 2])
    texts = [key_value_text(stream, ids, 120, (2, 9), draw)[0] for _ in range(2)]
    end = 120 - 48
    place = torch.arange(120)
    causal = place <= place[:, None]
    hidden = causal & ((place[:, None] - place < 9) | (place < 2) | (place[:, None] < end))
    eager = {}

    def masked(module, query, key, value, attention_mask, scaling=None, **kwargs):
        scaling = scaling or query.shape[-1] ** -0.5
        share = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(share, dim=1), value.repeat_interleave(share, dim=1)
        mask = causal.expand(query.shape[1], -1, -1).clone()
        if eager.get("layer") == module.layer_idx:
            mask[eager["head"] * share : (eager["head"] + 1) * share] = hidden
        weights = (scaling * query @ key.mT).masked_fill(~mask, float("-inf")).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("masked_by_test", masked)
    teacher.set_attn_implementation("masked_by_test")

    def loss():
        total = 0.0
        for text in texts:
            nats = torch.nn.functional.cross_entropy(teacher(text).logits[0, :-1], text[0, 1:], reduction="none")
            # Of six tokens at the end the last three are a value.
            total += float(nats[-48:].view(8, 6)[:, 3:].mean()) / 2
        return total

    whole = loss()
    for name, key_head in rises:
        eager.update(layer=int(name.split(".")[1]), head=key_head)
        assert rises[name, key_head] == pytest.approx(loss() - whole, abs=1e-5)
    assert max(map(abs, rises.values())) > 1e-3


def test_key_value_texts_ask_for_what_they_hold():
    """Every pair of the end stands in the text before, outside the first and the last tokens, in some order."""
    stream, ids = torch.arange(100, 160), torch.arange(10, 90)
    text = key_value_text(stream, ids, 300, (4, 64), random.Random(1))[0][0].tolist()
    assert len(text) == 300
    body, question = text[:-48], text[-48:]
    for pair in (question[i : i + 6] for i in range(0, 48, 6)):
        starts = [i for i in range(len(body)) if body[i : i + 6] == pair]
        assert len(starts) == 1
        assert 4 <= starts[0] <= len(body) - 6 - 64
    assert sum(token >= 100 for token in body) == 300 - 96


@torch.no_grad()
def test_a_probe_chooses_before_the_fit(tmp_path):
    """The heads of the largest rises retrieve, and layers above are fitted on what they give."""
    teacher = llama()
    batches = [token_batch(teacher, length=40, seed=seed) for seed in range(2)]
    options = replace(QUICK, select="probe", beyond_share=0.25, probe_lengths=(120, 150))
    student = convert(
        teacher, nystrom(9, beyond="retrieval", block_size=4, num_blocks=2), calibration=batches, options=options
    )
    report = student.conversion_report
    (chosen,) = (group for group in report.groups if group.mechanism == "retrieval")
    rises = {(g.module, head // 2): r for g in report.groups for head, r in zip(g.heads, g.probe_rise, strict=True)}
    assert len(rises) == 4
    assert max(rises, key=rises.get) == (chosen.module, chosen.heads[0] // 2)
    assert "probe" in str(report)
    assert len(chosen.heads) == 2
    batch = padded(100)
    logits = student(**batch).logits
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**batch).logits, logits)
    assert again.conversion_report.to_dict() == report.to_dict()
