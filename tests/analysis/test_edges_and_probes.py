"""Changing weights, edges, probes of heads, and raw weights: against loops and PyTorch's own gradients."""

import numpy as np
import pytest
import torch

from distattn_hf import AttentionSpec, CalibrationOptions, analyse_weights, convert, measure
from distattn_hf.analysis.edges import edge_attribution
from distattn_hf.analysis.importance import (
    ablation_importance,
    gradient_importance,
    magnitude_importance,
    rollout_importance,
)
from distattn_hf.analysis.intervention import knocked_out, replaced_heads
from distattn_hf.analysis.probes import fold_by_period, induction_scores, pair_scores, periodic_scores
from distattn_hf.analysis.rollout import attention_rollout
from distattn_hf.analysis.samples import AnalysisOptions, LabelLoss, TextLoss
from distattn_hf.analysis.watch import capture
from tests.analysis.models import FIRST, PREVIOUS, UNIFORM, hand_built, letter_tokenizer
from tests.analysis.test_heads import native
from tests.conversion.models import bert, gpt2, llama, token_batch
from tests.tolerances import assert_close

MECHANISMS = {
    "local": {"window_size": 4},
    "strided": {"window_size": 3, "stride": 4},
    "bigbird": {"block_size": 4},
    "landmark": {"block_size": 4, "num_blocks": 1},
    "linear": {},
    "performer": {"num_features": 16},
}
TEXTS = ["a b c d e f g h", "i j k l a . b c"]


def small(mechanism: str, options: dict):
    return native(mechanism=mechanism, mechanism_options=options)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_heads_of_native_mechanisms_are_watched_changed_and_ranked(mechanism):
    """Their weights are what the output is made of, so that a changed weight is a changed output."""
    model = small(mechanism, MECHANISMS[mechanism])
    batch = token_batch(model, length=12)
    plain = model(**batch, use_cache=False).logits
    calls = capture(model, batch)
    assert list(calls) == ["layers.0.self_attn", "layers.1.self_attn"]
    for call in calls.values():
        assert_close((call.full() @ call.value).detach(), call.output.detach(), "float32_forward", call.name)
    with torch.no_grad(), replaced_heads(model, {0: None, 1: None}, lambda weights: weights):
        torch.testing.assert_close(model(**batch, use_cache=False).logits, plain, rtol=0, atol=5e-5)
    loss = TextLoss(model, letter_tokenizer(), TEXTS)
    gradient, ablation = gradient_importance(model, loss), ablation_importance(model, loss)
    assert gradient.loss == pytest.approx(ablation.loss) == pytest.approx(loss.value(model))
    with replaced_heads(model, {1: [1]}):
        assert loss.value(model) - gradient.loss == pytest.approx(ablation.scores["layers.1.self_attn"][1])
    assert min(score for *_, score in gradient.ranking()) > 0
    assert torch.equal(model(**batch, use_cache=False).logits, plain), "nothing is left behind"


def test_a_uniform_head_of_a_window_takes_the_mean_of_its_window():
    model = small("local", MECHANISMS["local"])
    batch = token_batch(model, length=12)
    name = "layers.0.self_attn"
    value = capture(model, batch)[name].value
    with torch.no_grad(), replaced_heads(model, {0: [1]}, "uniform"):
        seen = capture_inside(model, batch, name)
    for query in range(12):
        expected = value[:, 1, max(0, query - 3) : query + 1].mean(1)
        assert_close(seen[:, 1, query], expected.detach(), "float32_forward", f"query {query}")


def test_a_mechanism_that_adds_more_than_values_is_not_changed_by_its_weights():
    model = small("relative", {})
    batch = token_batch(model, length=12)
    assert measure(model, [batch]).modules == ["layers.0.self_attn", "layers.1.self_attn"]
    with torch.no_grad():
        for layer in (model.model if hasattr(model, "model") else model).layers:
            layer.self_attn.mechanism.value_embedding.fill_(1.0)
    with (
        pytest.raises(ValueError, match="mechanism 'relative' are not the sum of the values by its weights"),
        replaced_heads(model, {0: [0]}, lambda weights: weights),
    ):
        model(**batch)


@pytest.mark.parametrize("family", [gpt2, llama, "l2", "nystrom"])
def test_a_function_changes_weights_and_edges_are_knocked_out(family):
    """What a mask that hides the edges gives, by PyTorch's own attention."""
    model = gpt2() if isinstance(family, str) else family()
    if family == "l2":
        model = convert(model, AttentionSpec("l2"), init="plain")
    elif family == "nystrom":
        spec = AttentionSpec("sqeuclidean", mechanism="nystrom", num_landmarks=4, window_size=3, num_sinks=1)
        options = CalibrationOptions(steps=2, progress=False)
        model = convert(model, spec, calibration=[token_batch(model)], options=options)
    batch = token_batch(model, length=10)
    name = list(capture(model, batch))[-1]
    call = capture(model, batch)[name]
    weights = call.full()
    changed = weights.clone()
    for query, key in ((9, 2), (9, 9), (4, 0)):
        changed[:, 1:3, query, key] = 0.0
    changed = changed / changed.sum(-1, keepdim=True)
    seen = {}
    edges = knocked_out([(9, 2), (9, 9), (4, 0)])
    with torch.no_grad(), replaced_heads(model, {name: [1, 2]}, edges):
        seen = capture_inside(model, batch, name)
    expected = (changed @ call.value).detach()
    assert_close(seen[:, 1:3], expected[:, 1:3], "float32_forward")
    assert_close(seen[:, [0, 3]], call.output.detach()[:, [0, 3]], "equal")
    if family == "nystrom":
        with (
            pytest.raises(ValueError, match="with a cache its keys are sums by now"),
            replaced_heads(model, {name: [1, 2]}, edges),
        ):
            model(**batch, use_cache=True)


def capture_inside(model, batch, name):
    """The heads' outputs as the output projection gets them, while they are replaced."""
    module = model.get_submodule(next(full for full, _ in model.named_modules() if full.endswith(name)))
    projection = module.c_proj if hasattr(module, "c_proj") else module.o_proj
    seen = {}
    hook = projection.register_forward_pre_hook(lambda m, args: seen.__setitem__("given", args[0]))
    model(**batch, use_cache=False)
    hook.remove()
    heads = model.config.num_attention_heads
    return seen["given"].unflatten(-1, (heads, -1)).transpose(1, 2)


def test_a_row_without_keys_left_gives_zeros_and_wrong_replacements_are_refused():
    weights = torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]])
    changed = knocked_out([(0, 0), (1, 0)])(weights)
    assert torch.equal(changed, torch.tensor([[[[0.0, 0.0], [0.0, 1.0]]]]))
    with pytest.raises(ValueError, match="edges name key 2, and there are 2"):
        knocked_out([(0, 2)])(weights)
    with pytest.raises(ValueError, match="edges must be pairs"):
        knocked_out([])
    model = gpt2()
    with (
        pytest.raises(ValueError, match=r"must return weights of shape \(2, 1, 20, 20\)"),
        replaced_heads(model, {0: [1]}, lambda weights: weights[..., 0]),
    ):
        model(**token_batch(model))
    with pytest.raises(ValueError, match="one of zero, uniform, mean or a function, got 'halve'"):
        replaced_heads(model, {0: [1]}, "halve").__enter__()


@pytest.mark.parametrize("family", [gpt2, bert])
def test_edges_are_weight_times_pytorchs_gradient(family):
    model = family().double()
    model.set_attn_implementation("eager")
    tokenizer = letter_tokenizer(mask_token="[MASK]")
    loss = TextLoss(model, tokenizer, TEXTS[:1])
    (batch, labels) = loss.batches[0]
    output = model(**batch, output_attentions=True)
    for weights in output.attentions:
        weights.retain_grad()
    shown = output.logits[labels != -100].log_softmax(-1)
    (-shown.gather(-1, labels[labels != -100][:, None]).mean()).backward()
    model.zero_grad()
    expected = torch.stack([weights.detach() * weights.grad for weights in output.attentions])
    everything = edge_attribution(model, loss, top=expected.numel())
    found = torch.zeros_like(expected)
    layers = [*dict.fromkeys(edge.module for edge in everything)]
    assert len(everything) == expected.numel()
    assert len(layers) == 2
    for edge in everything:
        found[edge.layer, edge.text, edge.head, edge.query, edge.key] = edge.value
        kept = output.attentions[edge.layer][edge.text, edge.head, edge.query, edge.key]
        assert edge.weight == pytest.approx(float(kept.detach()), abs=1e-9)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
    best = edge_attribution(model, loss, top=3)
    sizes = expected.abs().flatten().sort(descending=True).values[:3]
    assert [abs(edge.value) for edge in best] == pytest.approx(sizes.tolist(), rel=1e-8)
    assert all(p.grad is None or not bool(p.grad.any()) for p in model.parameters())


def test_edges_of_several_batches_name_their_text():
    model, tokenizer = hand_built(), letter_tokenizer()
    loss = TextLoss(model, tokenizer, ["a b " * 6, "c d " * 6, "e f " * 6], AnalysisOptions(batch_size=2))
    edges = edge_attribution(model, loss, top=30)
    assert {edge.text for edge in edges} == {0, 1, 2}
    assert {edge.head for edge in edges} == {PREVIOUS}, "alone it writes"
    edges = [edge for edge in edges if edge.query]
    assert all(edge.key == edge.query - 1 and edge.value < 0 for edge in edges), "what it reads lowers the loss"


def test_label_loss_is_the_models_own_and_weighs_by_labels():
    model = gpt2()
    batches = []
    for length, seed in ((20, 0), (8, 1)):
        batch = token_batch(model, length=length, seed=seed)
        batches.append({**batch, "labels": batch["input_ids"]})
    losses, counts = [float(model(**batch).loss.detach()) for batch in batches], [40, 16]
    loss = LabelLoss(batches)
    assert loss.value(model) == pytest.approx(np.average(losses, weights=counts), rel=1e-6)
    assert gradient_importance(model, loss).loss == pytest.approx(loss.value(model), rel=1e-6)
    with pytest.raises(ValueError, match="every batch must have labels"):
        LabelLoss([token_batch(model)])


@pytest.mark.parametrize("family", [gpt2, llama])
def test_magnitude_is_the_norm_of_what_a_head_adds(family):
    model = family()
    batch = token_batch(model, padded=True)
    keep, calls = batch["attention_mask"].bool(), capture(model, batch)
    found = magnitude_importance(model, [batch])
    for name, call in calls.items():
        path = next(full for full, _ in model.named_modules() if full.endswith(name))
        module = model.get_submodule(path)
        weight = module.c_proj.weight if family is gpt2 else module.o_proj.weight.T
        for head in range(4):
            added = call.output[:, head] @ weight[head * 8 : (head + 1) * 8]
            expected = float(added.detach().norm(dim=-1)[keep].mean())
            assert found.scores[name][head] == pytest.approx(expected, rel=1e-5)
    assert found.loss is None


def test_rollout_importance_is_what_leaving_a_head_out_moves():
    model = bert()
    batch = token_batch(model, length=6, padded=False)
    found = rollout_importance(model, [batch])
    maps = [call.full() for call in capture(model, batch).values()]
    eye = torch.eye(6).expand(2, 6, 6)

    def rolled(layers):
        result = eye
        for layer in layers:
            result = 0.5 * layer.mean(1) @ result + 0.5 * result
        return result

    torch.testing.assert_close(attention_rollout(model, batch), rolled(maps))
    without = [maps[0], maps[1][:, [0, 1, 3]]]
    expected = (rolled(without) - rolled(maps)).abs().sum() / 2 / 6 / 2
    assert list(found.scores.values())[1][2] == pytest.approx(float(expected), rel=1e-4)


def induction_model():
    """Two layers by hand: a previous-token head writes the token before into ANSWER; a head of the next layer looks
    for its own token there. Llama's shape would rotate; GPT-2's positions are learned, so the case is exact."""
    from transformers import GPT2Config, GPT2LMHeadModel

    size, length = 16, 16
    config = GPT2Config(
        n_layer=2, n_head=3, n_embd=3 * size, n_positions=length, vocab_size=size, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    eye = torch.eye(size)
    position, token, before = (slice(i * size, (i + 1) * size) for i in range(3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for block in model.transformer.h:
            block.ln_1.weight.fill_(1.0), block.ln_2.weight.fill_(1.0)
        model.transformer.wpe.weight[:, position] = eye
        model.transformer.wte.weight[:, token] = eye
        first = model.transformer.h[0].attn.c_attn.weight.view(3 * size, 3, 3, size)
        first[position, 0, 0], first[position, 1, 0], first[token, 2, 0] = 6 * eye, eye.roll(1, 1), eye
        model.transformer.h[0].attn.c_proj.weight[position, before] = eye
        second = model.transformer.h[1].attn.c_attn.weight.view(3 * size, 3, 3, size)
        second[token, 0, 1], second[before, 1, 1] = 6 * eye, eye
    return model


def test_induction_heads_are_found():
    found = induction_scores(induction_model(), length=8, texts=3)
    module, head, score = found.ranking()[0]
    assert (module, head) == ("h.1.attn", 1)
    assert score > 0.9
    others = [value for name, number, value in found.ranking() if (name, number) != (module, head)]
    # Uniform over 9 to 16 keys, but for the previous-token head, which looks one place before.
    assert max(others) < 0.15
    assert found.scores["h.0.attn"][0] < 0.05
    with pytest.raises(ValueError, match="induction heads are those of causal models"):
        induction_scores(bert(), length=8)


def test_periods_of_heads():
    wave = torch.tensor([1.0 if (offset + 1) % 5 == 0 else 0.1 for offset in range(40)])
    assert fold_by_period(wave, 12).period == 5
    assert fold_by_period(wave, 12).strength > 0.95
    offsets = torch.arange(1, 41.0)
    for smooth in (0.9**offsets, 1 / offsets, torch.ones(40), offsets <= 4):
        assert fold_by_period(smooth.float(), 12).strength < 0.3
    noise = [fold_by_period(torch.randn(96, generator=torch.Generator().manual_seed(i)), 32).strength for i in range(9)]
    assert max(noise) < 0.5
    # The strided mechanism looks at every fourth key.
    model = small("strided", {"window_size": 1, "stride": 4})
    with torch.no_grad():
        for layer in model.model.layers if hasattr(model, "model") else model.layers:
            layer.self_attn.q_proj.weight.zero_()
    found = periodic_scores(model, [token_batch(model, length=28)], longest=8)
    for head in found["layers.0.self_attn"]:
        assert head.period == 4
        assert head.strength > 0.8
    with pytest.raises(ValueError, match="texts of 7 tokens or more"):
        periodic_scores(model, [token_batch(model, length=5)])


def test_given_pairs_name_the_head_that_connects_them():
    model, tokenizer = hand_built(), letter_tokenizer()
    batch = dict(tokenizer(["a b c d e f", "g h i j"], padding=True, return_tensors="pt"))
    batch.pop("token_type_ids", None)
    pairs = [[(3, 2), (5, 4)], [(2, 1)]]
    best, *rest = pair_scores(model, [batch], pairs)
    assert (best.head, best.accuracy, best.pairs) == (PREVIOUS, 1.0, 3)
    weights = capture(model, batch)["h.0.attn"].full()
    kept = [weights[0, :, 3, 2], weights[0, :, 5, 4], weights[1, :, 2, 1]]
    for score in (best, *rest):
        assert score.weight == pytest.approx(float(torch.stack(kept)[:, score.head].mean()), rel=1e-5)
    assert best.chance == pytest.approx((1 / 4 + 1 / 6 + 1 / 3) / 3)
    assert {score.head for score in rest} == {FIRST, UNIFORM}
    first = [[(3, 0)], [(1, 0)]]
    assert pair_scores(model, [batch], first)[0].head == FIRST
    with pytest.raises(ValueError, match=r"text 1 has no token 5 \(from\); it has 4 without padding"):
        pair_scores(model, [batch], [[], [(5, 4)]])
    with pytest.raises(ValueError, match="one list for each text, got 1 for 2"):
        pair_scores(model, [batch], [[(1, 0)]])
    with pytest.raises(ValueError, match="holds no pair"):
        pair_scores(model, [batch], [[], []])


@pytest.mark.parametrize("padded", [False, True])
def test_raw_weights_have_the_statistics_of_their_model(padded):
    model = gpt2()
    batch = token_batch(model, padded=padded)
    maps = [call.full() for call in capture(model, batch).values()]
    found = analyse_weights(maps, batch["attention_mask"])
    expected = measure(model, [batch])
    assert found.modules == ["0", "1"]
    for ours, theirs in zip(found.heads, expected.heads, strict=True):
        for name in ("rows", "entropy", "sparsity", "maximum", "distance", "diversity", "strength", "collapsed_rows"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-5, abs=1e-7), name
        assert ours.pattern == theirs.pattern
    assert analyse_weights(maps[0]).num_tokens == 40


def test_raw_weights_with_tokens_know_separators_and_bad_ones_are_refused():
    weights = torch.full((1, 1, 6, 6), 0.01)
    weights[..., 2] = 0.95
    head = analyse_weights(weights, tokens=["a", "b", ".", "c", "d", "e"]).heads[0]
    assert head.pattern == "separator"
    assert analyse_weights(weights).heads[0].pattern == "mixed"
    for bad, match in (
        (torch.zeros(2, 6, 6), "must be floating-point"),
        ([], "weights is empty"),
        (-weights, "not negative"),
    ):
        with pytest.raises(ValueError, match=match):
            analyse_weights(bad)
    with pytest.raises(ValueError, match=r"mask must have shape \(B, M\)=\(1, 6\)"):
        analyse_weights(weights, torch.ones(1, 5))
    with pytest.raises(ValueError, match="one text for each of 6 keys, got 1"):
        analyse_weights(weights, tokens=["a"])
