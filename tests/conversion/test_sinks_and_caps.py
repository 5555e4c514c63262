"""Models with learned sinks (gpt-oss) and capped logits (Gemma 2): exact, fitted, generating, saved, reverted."""

import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import repeat_kv

from distattn_hf import AttentionSpec, CalibrationOptions, convert, fold_alpha, revert
from distattn_hf.analysis.watch import run_watched
from distattn_hf.conversion.observe import observed, teacher_attention
from distattn_hf.core import interface
from distattn_hf.core.absolute_logits import absolute_shift
from distattn_hf.core.inputs import ModuleCall
from distattn_hf.core.metrics import get_metric
from distattn_hf.core.parameters import HeadParameters
from distattn_hf.experiments import sinks_and_caps
from distattn_hf.experiments.architectures import inputs_for, run_model
from tests.conversion.absolute_models import FAMILIES, OTHERS, gemma2, gpt_oss, in_float64, other
from tests.conversion.models import token_batch
from tests.tolerances import CACHED_LOGITS, EXACT_LOGITS, LIFT_FLOAT64

every_family = pytest.mark.parametrize("family", FAMILIES)
METRICS = ["l2", "sqeuclidean", "cosine", "l1"]


def logits(model, **batch):
    batch = batch or token_batch(model, padded=True, seed=9)
    with torch.no_grad():
        return model(**batch).logits[batch["attention_mask"].bool()]


def fitted(family, metric="l2", steps=8, **options):
    teacher = FAMILIES[family]()
    batches = [token_batch(teacher, seed=seed) for seed in range(4)]
    spec = AttentionSpec(metric, **options)
    return convert(teacher, spec, calibration=batches, options=CalibrationOptions(steps=steps, progress=False))


def without(teacher):
    """The same model with sinks far below every logit and no cap."""
    for module in teacher.modules():
        if getattr(module, "sinks", None) is not None:
            module.sinks.data.fill_(-1e4)
        if getattr(module, "attn_logit_softcapping", None) is not None:
            module.attn_logit_softcapping = None
    return teacher


@every_family
@pytest.mark.parametrize("padded", [False, True])
def test_exact(family, padded):
    teacher = FAMILIES[family]()
    batch = token_batch(teacher, padded=padded)
    expected, got = logits(teacher, **batch), logits(convert(teacher, AttentionSpec(), init="exact"), **batch)
    assert float((got - expected).abs().max()) <= EXACT_LOGITS
    # The test has teeth only if sink and cap matter.
    assert float((logits(without(FAMILIES[family]()), **batch) - expected).abs().max()) > 100 * EXACT_LOGITS


@pytest.mark.parametrize("model_type", OTHERS)
def test_exact_on_every_other_architecture(model_type):
    teacher = other(model_type)
    batch = inputs_for(teacher)
    expected = run_model(teacher, batch)
    got = run_model(convert(teacher, AttentionSpec(), init="exact"), batch)
    assert float((got - expected).abs().max()) <= EXACT_LOGITS * max(1.0, float(expected.abs().max()))
    if model_type != "inkling2_text":  # its sinks come from its inputs
        assert float((run_model(without(other(model_type)), batch) - expected).abs().max()) > 100 * EXACT_LOGITS


@every_family
def test_the_literal_lift_in_float64(family):
    """q·k = const(q) - ½‖q̃ - k̃‖²: distances of d + 1 coordinates, and the constant back."""
    teacher = in_float64(FAMILIES[family]())
    student = in_float64(convert(teacher, AttentionSpec(backend="reference"), init="exact"))
    batch = token_batch(teacher)
    with mock.patch.object(interface, "run_attention", wraps=interface.run_attention) as run_attention:
        got = logits(student, **batch)
    assert {call.args[0].metric.name for call in run_attention.call_args_list} == {"lifted_sqeuclidean"}
    # Gemma 2 has its softmax in float32, whatever the model's dtype.
    limit = LIFT_FLOAT64 if family == "gpt_oss" else CACHED_LOGITS
    assert float((got - logits(teacher, **batch)).abs().max()) <= limit


@every_family
@pytest.mark.parametrize("metric", ["exact", *METRICS])
def test_steps_with_a_cache_are_one_forward_pass(family, metric):
    """Prefill and single steps, left padding, in sliding layers and full ones."""
    student = (
        convert(FAMILIES[family](), AttentionSpec(), init="exact")
        if metric == "exact"
        else fitted(family, metric, steps=2)
    )
    batch = token_batch(student, padded=True)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    whole = student(**batch).logits
    cache, steps = None, []
    for start, stop in ((0, 12), (12, 13), (13, 14), (14, 20)):
        output = student(
            input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True
        )
        cache = output.past_key_values
        steps.append(output.logits)
    valid = mask.bool()
    assert float((torch.cat(steps, 1)[valid] - whole[valid]).abs().max()) <= CACHED_LOGITS


@every_family
def test_exact_generates_what_the_teacher_does(family):
    teacher = FAMILIES[family]()
    batch = token_batch(teacher, padded=True)
    student = convert(teacher, AttentionSpec(), init="exact")
    expected, got = (m.generate(**batch, max_new_tokens=20, do_sample=False) for m in (teacher, student))
    assert torch.equal(got, expected)


@every_family
@pytest.mark.parametrize("metric", ["exact", *METRICS])
def test_eager_is_the_same_attention_and_returns_the_weights(family, metric):
    student = (
        convert(FAMILIES[family](), AttentionSpec(), init="exact")
        if metric == "exact"
        else fitted(family, metric, steps=2)
    )
    batch = token_batch(student, padded=True)
    fast, values, outputs = logits(student, **batch), [], []

    def keep(state, query, key, value, call):
        values.append(value)
        outputs.append(interface.attend_groups(state, query, key, value, call)[0])
        return outputs[-1]

    with observed(student, keep):
        student(**batch)
    student.set_attn_implementation("eager")
    assert float((logits(student, **batch) - fast).abs().max()) <= EXACT_LOGITS
    weights = student(**batch, output_attentions=True).attentions
    for weight, value, output in zip(weights, values, outputs, strict=True):
        torch.testing.assert_close(weight @ value, output, atol=CACHED_LOGITS, rtol=0)
        if family == "gpt_oss":
            assert bool((weight.sum(-1) < 0.999).any())


@every_family
def test_output_attentions_are_the_teachers(family):
    teacher = FAMILIES[family]()
    batch = token_batch(teacher)
    student = convert(teacher, AttentionSpec(), init="exact")
    teacher.set_attn_implementation("eager")
    pairs = zip(*(m(**batch, output_attentions=True).attentions for m in (student, teacher)), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, atol=EXACT_LOGITS, rtol=0)


@every_family
@pytest.mark.parametrize("metric", METRICS)
def test_a_fit_helps_and_knows_sink_and_cap(family, metric):
    student = fitted(family, metric, steps=30)
    for group in student.conversion_report.groups:
        assert sum(group.divergence_after) < 0.7 * sum(group.divergence_before)
        assert len(group.logit_shift) == 4
        if family == "gpt_oss":
            for mine, theirs in zip(group.sink_weight, group.teacher_sink_weight, strict=True):
                assert mine == pytest.approx(theirs, abs=0.08)
    assert ("sink:" in student.conversion_report.table()) == (family == "gpt_oss")


@pytest.mark.parametrize("transform", ["scalar", "maps"])
@pytest.mark.parametrize("compares", [{"sink_logit": torch.randn(1, 4, 1, 1)}, {"softcap": 0.6}], ids=["sink", "cap"])
def test_a_small_alpha_is_the_teacher(compares, transform):
    """Distances that count from a key of zeros have the teacher's absolute logits as their limit."""
    query = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 9, 8, dtype=torch.float64).unbind()
    group = HeadParameters(AttentionSpec("sqeuclidean", lam=0.5, transform=transform), 4, 8, has_origin=True).double()
    group.shift.data.normal_()
    group.log_alpha.data.fill_(-9.0)
    call = ModuleCall(0.5, is_causal=True, **compares)
    repeated = query, repeat_kv(key, 2), repeat_kv(value, 2)
    expected = teacher_attention(*repeated, call)
    for backend in ("reference", None):
        got, _ = interface.attend(group, query, key, value, replace(call, backend=backend))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert float((expected - teacher_attention(*repeated, ModuleCall(0.5, is_causal=True))).abs().max()) > 0.01


@every_family
@pytest.mark.parametrize("metric", ["exact", *METRICS])
def test_saved_and_loaded_bit_for_bit(family, metric, tmp_path):
    student = (
        convert(FAMILIES[family](), AttentionSpec(), init="exact")
        if metric == "exact"
        else fitted(family, metric, steps=2)
    )
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(student))
    assert again.conversion_report == student.conversion_report
    own = [name for name, _ in again.named_parameters() if name.endswith((".origin", ".logit_shift"))]
    assert len(own) == (0 if metric == "exact" else 4)


@every_family
@pytest.mark.parametrize("init", ["exact", "calibrated"])
def test_revert_is_bit_equal(family, init):
    teacher = FAMILIES[family]()
    student = fitted(family, steps=2) if init == "calibrated" else convert(teacher, AttentionSpec(), init=init)
    original = revert(student)
    assert type(original) is type(teacher)
    state = original.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in teacher.state_dict().items())
    assert torch.equal(logits(original), logits(teacher))


@every_family
@pytest.mark.parametrize(("metric", "transform"), [("l2", "scalar"), ("sqeuclidean", "scalar"), ("l1", "maps")])
def test_folding_changes_nothing(family, metric, transform):
    student = in_float64(fitted(family, metric, transform=transform))
    for state in student.attention_states.values():
        state.groups[0].log_alpha.data += torch.linspace(-0.5, 0.2, 4)
        state.groups[0].origin.data.normal_()
    folded = in_float64(fold_alpha(student))
    assert all(bool((s.groups[0].log_alpha == 0).all()) for s in folded.attention_states.values())
    torch.testing.assert_close(logits(folded), logits(student), rtol=1e-9, atol=1e-9)


@every_family
def test_everything_trains(family):
    """The model's own sinks, too: whatever the heads compare with."""
    for student in (
        fitted(family, steps=2).train(),
        convert(FAMILIES[family](), AttentionSpec(), init="exact").train(),
    ):
        batch = token_batch(student)
        student(**batch, labels=batch["input_ids"]).loss.backward()
        names = (".sinks", ".origin", ".logit_shift")
        gradients = {name: p.grad for name, p in student.named_parameters() if name.endswith(names)}
        assert all(g is not None and bool((g != 0).any()) for g in gradients.values()), gradients
        assert any(name.endswith(".sinks") for name in gradients) == (family == "gpt_oss")


@every_family
def test_some_heads_and_some_layers(family):
    """Heads that stay dot products keep their sinks and their cap, and so do layers that were left out."""
    teacher = FAMILIES[family]()
    lifted = AttentionSpec(heads=[0, 3], layers=[1])
    assert float((logits(convert(teacher, lifted, init="exact")) - logits(teacher)).abs().max()) <= EXACT_LOGITS
    plan = [AttentionSpec("l2", heads=[1], layers=[0]), AttentionSpec("l1", heads=[0, 2], layers=[0])]
    mixed = convert(teacher, plan, init="plain")
    expected = logits(mixed)
    mixed.set_attn_implementation("eager")
    assert float((logits(mixed) - expected).abs().max()) <= EXACT_LOGITS


def test_the_teachers_attention_has_its_sink_and_its_cap():
    """What every fit and every transfer compares with."""
    query, key, value = torch.randn(3, 2, 4, 9, 8).unbind()
    sink = torch.randn(1, 4, 1, 1)
    got = teacher_attention(query, key, value, ModuleCall(0.5, is_causal=True, sink_logit=sink, softcap=0.6))
    products = 0.6 * torch.tanh(0.5 * query @ key.mT / 0.6)
    products = products.masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf"))
    weights = torch.cat([products, sink.expand(2, 4, 9, 1)], -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(got, weights @ value)


def test_a_cap_that_the_conversion_knew_nothing_of_is_an_error():
    student = convert(gemma2(attn_logit_softcapping=None, softcap=None), AttentionSpec("l2"), init="plain")
    for module in student.attention_modules().values():
        module.attn_logit_softcapping = 0.5
    with pytest.raises(
        ValueError, match="passes a softcap to its attention, of which its conversion to metric 'l2' knew"
    ):
        logits(student)


def test_nystrom_refuses_caps_by_name():
    spec = AttentionSpec(mechanism="nystrom", layers="full_attention")
    teacher = gemma2()
    with pytest.raises(ValueError, match="has attn_logit_softcapping=0.7: mechanism='nystrom'"):
        convert(teacher, spec, calibration=[token_batch(teacher)])


def test_keys_that_an_indexer_chose():
    """Models with sparse key selection mask the other keys for transformers' own attention, and leave it to ours."""
    key, indices = torch.randn(2, 1, 7, 4), torch.tensor([[[0, 2], [3, 6], [1, 1]]] * 2)
    for mask in (
        None,
        torch.rand(2, 1, 3, 9) < 0.7,
        torch.zeros(2, 1, 3, 7).masked_fill(torch.rand(3, 7) < 0.3, -1e38),
    ):
        call = ModuleCall(1.0, mask).with_selected_keys(indices, key.shape[2])
        for b, i, j in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(7)).tolist():
            before = True if mask is None else mask[b, 0, i, j]
            before = bool(before) if mask is None or mask.dtype == torch.bool else bool(before > -1)
            after = call.mask[b, 0, i, j]
            after = bool(after) if after.dtype == torch.bool else bool(after > -1)
            assert after == (before and j in indices[b, i].tolist())
    call = ModuleCall(1.0, is_causal=True).with_selected_keys(indices, key.shape[2])
    assert call.mask[0, 0].nonzero().tolist() == [[0, 0], [2, 1]]


def test_gpt_oss_and_gemma_2_name_their_modules():
    student = convert(gpt_oss(), "l2", init="plain")
    assert all(entry["sink"] and "softcap" not in entry for entry in student.config.distattn["modules"].values())
    student = convert(gemma2(), "l2", init="plain")
    assert all(entry["softcap"] and "sink" not in entry for entry in student.config.distattn["modules"].values())


@pytest.mark.parametrize("kind", ["sinks", "caps"])
def test_a_fit_of_a_trained_model_beats_the_control(kind):
    """As the experiment has it, on triples that repeat: most of what the control loses comes back."""
    text = torch.randint(3, 19, (4000, 3), generator=torch.Generator().manual_seed(0)).repeat(1, 8).flatten()
    teacher = sinks_and_caps.train(sinks_and_caps.build(kind), text, steps=60)
    plain = convert(teacher, AttentionSpec("l2"), init="plain")
    options = CalibrationOptions(steps=30, progress=False)
    student = convert(teacher, AttentionSpec("l2"), calibration=sinks_and_caps.calibration(text), options=options)
    scores = [math.log(sinks_and_caps.perplexity(model, text)) for model in (teacher, student, plain)]
    assert scores[2] - scores[0] > 0.05
    assert scores[1] - scores[0] < 0.25 * (scores[2] - scores[0])


@pytest.mark.parametrize("transform", ["scalar", "maps"])
@pytest.mark.parametrize("metric", [*METRICS, "chebyshev", "lifted"])
def test_folded_and_mapped_count_from_one_origin(metric, transform):
    """What attention computes with and what fits and analyses compute with: equal absolute logits, of grouped keys."""
    lift = metric == "lifted"
    spec = AttentionSpec("sqeuclidean" if lift else metric, transform=transform, lift=lift, lam=0.7, softening=None)
    group = HeadParameters(spec, 4, 8, has_origin=True).double()
    for parameter in group.parameters():
        parameter.data.normal_(std=0.5)
    query, key = torch.randn(2, 4, 5, 8, dtype=torch.float64), torch.randn(2, 2, 6, 8, dtype=torch.float64)
    call, metric = ModuleCall(0.5, softcap=2.0), get_metric(group.metric)

    def logits(heads):
        lam, keys = heads.lam[:, None, None] if isinstance(heads.lam, torch.Tensor) else heads.lam, heads.key
        keys = keys if keys.shape[1] == 4 else repeat_kv(keys, 2)
        shift = absolute_shift(heads, metric, None, call)
        if lift:
            return 2 * lam * 0.5 * heads.query @ keys.mT + shift
        return shift - lam * 0.5 * metric.distance(heads.query, keys)

    folded, mapped = group(query, key), group(query, repeat_kv(key, 2), "mapped")
    torch.testing.assert_close(logits(folded), logits(mapped), rtol=1e-9, atol=1e-9)
    if not lift:
        # The origin is a key like others, and its logit is logit_shift.
        at_origin = logits(group(query, group.origin[None, :, None].expand(2, -1, -1, -1), "mapped"))
        torch.testing.assert_close(at_origin, group.logit_shift[:, None, None].expand_as(at_origin), rtol=0, atol=1e-9)


def test_chosen_keys_are_those_that_an_analysis_sees():
    """Of modules that were converted and of others: weights times values give the output."""
    teacher = other("hy_v4")
    teacher.config.index_topk = 4
    for module in teacher.modules():
        if hasattr(module, "index_topk"):
            module.index_topk = 4
    student, seen = convert(teacher, AttentionSpec(layers=[0]), init="exact"), {}

    def watch(call):
        seen[call.name] = (call.full(), call.full() @ call.value - call.output)

    run_watched(student, inputs_for(teacher), watch)
    assert len(seen) > 1
    for weights, difference in seen.values():
        assert int((weights > 1e-6).sum(-1).max()) <= 4
        assert float(difference.abs().max()) <= 1e-4
