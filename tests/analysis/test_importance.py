"""Changing, ranking and pruning single heads."""

import math

import numpy as np
import pytest
import torch

from distattn_hf import AttentionSpec, convert, load_checkpoint
from distattn_hf.analysis.importance import (
    HeadImportance,
    ablation_importance,
    gradient_attribution,
    gradient_importance,
)
from distattn_hf.analysis.intervention import PRUNED, loss_without, mean_outputs, prune_heads, replaced_heads
from distattn_hf.analysis.samples import AnalysisOptions, TextLoss
from distattn_hf.analysis.watch import capture, watched
from tests.analysis.models import PREVIOUS, hand_built, letter_tokenizer
from tests.conversion.models import FAMILIES, bert, gpt2, token_batch
from tests.tolerances import assert_close

# Whole float32 models: rounding through two layers and a softmax, as tests.tolerances.CACHED_LOGITS.
FLOAT32 = {"rtol": 0, "atol": 5e-5}
TEXTS = ["a b " * 8, "c d " * 8, "e f " * 7]


def names_of(model) -> list[str]:
    return list(capture(model, token_batch(model, length=8)))


@pytest.mark.parametrize("replacement", ["zero", "uniform", "mean"])
def test_replaced_heads_give_what_is_said(replacement):
    model = gpt2()
    batch = token_batch(model, padded=True)
    means = mean_outputs(model, [batch]) if replacement == "mean" else None
    plain, seen = capture(model, batch)["h.0.attn"], {}
    projection = model.transformer.h[0].attn.c_proj
    hook = projection.register_forward_pre_hook(lambda m, args: seen.__setitem__("given", args[0]))
    with torch.no_grad(), replaced_heads(model, {0: [2]}, replacement, means):
        model(**batch)
    hook.remove()
    given = seen["given"].unflatten(-1, (4, 8)).transpose(1, 2)
    others = [0, 1, 3]
    assert_close(given[:, others], plain.output[:, others], "equal")
    keep = batch["attention_mask"].bool()
    for item in range(2):
        for i in range(20):
            kept = [j for j in range(i + 1) if keep[item, j]]
            if replacement == "zero":
                expected = torch.zeros(8)
            elif replacement == "mean":
                expected = plain.output[:, 2][keep].mean(0)
            else:
                expected = plain.value[item, 2, kept].mean(0) if kept else torch.zeros(8)
            assert_close(given[item, 2, i], expected, "float32_forward")


def test_the_only_useful_head_comes_first_by_both_importances():
    model, tokenizer = hand_built(), letter_tokenizer()
    loss = TextLoss(model, tokenizer, TEXTS)
    assert loss.value(model) < 1.0, "the case must be one that the model is good at"
    before = {name: p.grad for name, p in model.named_parameters()}
    gradient, ablation = gradient_importance(model, loss), ablation_importance(model, loss)
    for found in (gradient, ablation):
        (module, head, score), *rest = found.ranking()
        assert (module, head) == ("h.0.attn", PREVIOUS)
        assert score > 100 * max(abs(other) for *_, other in rest)
        assert found.loss == pytest.approx(loss.value(model))
        assert HeadImportance.from_dict(found.to_dict()) == found
    assert before == {name: p.grad for name, p in model.named_parameters()}, "no gradient is left behind"
    # Without the head all tokens are alike: the loss is ln 16.
    changed = loss_without(model, loss, {0: [PREVIOUS]})
    assert changed["after"] == pytest.approx(math.log(16), abs=1e-4)
    assert changed["increase"] == pytest.approx(ablation.scores["h.0.attn"][PREVIOUS])


def test_gradient_importance_is_the_slope_of_the_loss():
    """Michel's |∂L/∂ξ| against the difference quotient of a factor on one head, one text at a time."""
    model = gpt2().double()
    tokenizer = letter_tokenizer()
    texts = ["a b c d e f", "g h a b . c k l"]
    found = gradient_importance(model, TextLoss(model, tokenizer, texts))
    step, expected = 1e-5, 0.0
    tokens = [5, 7]
    for text, count in zip(texts, tokens):
        loss, values = TextLoss(model, tokenizer, [text]), []
        for sign in (-1, 1):

            def scale(call, sign=sign):
                factor = torch.ones(4, dtype=torch.float64)
                factor[1] += sign * step
                return call.output * factor[:, None, None] if call.name == "h.1.attn" else None

            with watched(model, scale):
                values.append(sum(float(v.detach()) * w for v, w in loss(model)))
        expected += abs(values[1] - values[0]) / (2 * step) * count / sum(tokens)
    assert found.scores["h.1.attn"][1] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["bert", "t5", "encoder"])
def test_importance_of_other_heads_is_finite_and_not_all_zero(kind):
    from transformers import BertModel

    tokenizer = letter_tokenizer(mask_token="[MASK]")
    model = bert(BertModel) if kind == "encoder" else FAMILIES[kind]()
    texts = ["a b c . d e f g", "h i j k . l m a", "b b b . c c"]
    found = gradient_importance(model, TextLoss(model, tokenizer, texts, AnalysisOptions(max_tokens=4096)))
    scores = np.array([score for row in found.scores.values() for score in row])
    assert np.isfinite(scores).all()
    assert (scores > 0).all()
    assert len(found.scores) == (6 if kind == "t5" else 2)


def test_attribution_finds_the_token_that_is_copied():
    model, tokenizer = hand_built(), letter_tokenizer()
    found = gradient_attribution(model, tokenizer, "c d e f g")
    assert len(found["values"]) == 5
    assert int(np.argmax(found["values"])) == 3, "the token before the last is the answer"
    assert max(map(abs, found["values"][:3])) < 1e-6 * found["values"][3], "nothing else is looked at"
    assert found["score"] < 0


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_models_lose_their_heads_reload_and_generate(family, converted, tmp_path):
    model = FAMILIES[family]()
    if converted:
        model = convert(model, AttentionSpec("l2"), init="plain")
    batch = token_batch(model)
    first, *_, last = names_of(model)
    chosen = {first: [0, 2], last: [3]}
    with torch.no_grad():
        plain = model(**batch).logits
        pruned = prune_heads(model, chosen)
        with replaced_heads(model, chosen):
            expected = model(**batch).logits
        assert torch.equal(model(**batch).logits, plain), "the model itself stays as it is"
        found = pruned(**batch).logits
    torch.testing.assert_close(found, expected, **FLOAT32)
    assert float((found - plain).abs().max()) > 1e-3
    again = prune_heads(pruned, {first: [1]})
    assert getattr(again.config, PRUNED) == {first: [0, 1, 2], last: [3]}
    pruned.save_pretrained(tmp_path / "pruned")
    loaded = load_checkpoint(tmp_path / "pruned")[0]
    assert getattr(loaded.config, PRUNED) == chosen
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, found)
    if family != "bert":
        inputs = {name: value for name, value in batch.items() if not name.startswith("decoder")}
        tokens = loaded.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert torch.equal(tokens, pruned.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False))
        assert tokens.shape[1] >= 5
