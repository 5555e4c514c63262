"""Conversion to linear attention: what is refused, calibration, training, and half precision."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralConfig, MistralForCausalLM

from distattn_hf import AttentionSpec, convert
from distattn_hf.conversion import calibrate_nystrom
from distattn_hf.conversion.beyond import beyond_heads, take_beyond
from distattn_hf.conversion.calibrate import CalibrationOptions
from distattn_hf.conversion.convert import current_report
from tests.conversion.models import FAMILIES, SPECIAL, VOCAB, gpt2, llama, t5, token_batch
from tests.conversion.nystrom_cases import (
    EVERY_FAMILY,
    GENERATION,
    QUICK,
    SHORT_BIAS,
    build,
    converted,
    nystrom,
    padded,
)


def test_two_kinds_of_linear_heads_in_one_module_are_refused():
    """Their states would share one cache layer."""
    specs = [nystrom(3, heads=[0, 1]), nystrom(9, heads=[2, 3])]
    with pytest.raises(ValueError, match="two specs with mechanism='nystrom' claim heads of 'h.0.attn'"):
        converted(gpt2(), specs)
    converted(gpt2(), [nystrom(3, layers=[0]), nystrom(9, layers=[1])])


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "dropout_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


@EVERY_FAMILY
@pytest.mark.parametrize("lift", [True, False])
def test_training_step_reaches_every_parameter_and_checkpointing_changes_nothing(family, lift):
    teacher = build(family)
    student = without_dropout(converted(teacher, nystrom(9, lift=lift)).train())
    batch = token_batch(student, length=40, padded=True)
    labels = batch["decoder_input_ids"] if family == "t5" else batch["input_ids"]
    gradients = []
    for checkpointing in (False, True):
        student.zero_grad()
        if checkpointing:
            student.gradient_checkpointing_enable()
        student(**batch, labels=labels).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None})
    ours = [name for name, _ in student.named_parameters() if ".distattn." in name]
    # Twice 5 in the lifted form; λ, α and c besides in the other.
    assert len(ours) == len(student.attention_states) * (5 if lift else 8)
    for name in ours:
        gradient = gradients[0][name]
        assert bool(gradient.isfinite().all()), name
        assert bool((gradient != 0).any()), name
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-3, atol=1e-5)


def test_gradients_are_those_of_the_reference():
    student = without_dropout(converted(llama(), nystrom()).train())
    batch, gradients = padded(40), []
    for implementation in ("sdpa", "eager"):
        student.set_attn_implementation(implementation)
        student.zero_grad()
        logits = student(**batch).logits[batch["attention_mask"].bool()]
        logits.square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in student.named_parameters()})
    for name, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-3, atol=1e-5, msg=name)


def test_dropout_of_the_model_reaches_the_attention():
    student = converted(gpt2(attn_pdrop=0.5, resid_pdrop=0.0, embd_pdrop=0.0), nystrom())
    batch = padded(20)
    with torch.no_grad():
        assert torch.equal(student(**batch).logits, student(**batch).logits)
        student.train()
        assert not torch.equal(student(**batch).logits, student(**batch).logits)


@pytest.mark.parametrize("init", ["exact", "plain"])
def test_other_initialisations_are_refused(init):
    with pytest.raises(ValueError, match=f"mechanism='nystrom' needs init='calibrated'.*got '{init}'"):
        convert(gpt2(), nystrom(), init=init)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metric": "l2"}, "mechanism='nystrom' needs metric 'sqeuclidean'.*got 'l2'"),
        ({"backend": "sdpa"}, "backend must be 'auto' with mechanism='nystrom', got 'sdpa'"),
        ({"transform": "maps"}, "transform must be 'none', 'scalar' or None with mechanism='nystrom', got 'maps'"),
        ({"lift": True, "lam": 0.7}, "lift=True sets lam=0.5 and transform='none', got lam=0.7"),
        ({"lift": True, "transform": "scalar"}, "lift=True sets lam=0.5.*transform='scalar'"),
        ({"num_landmarks": 0}, "num_landmarks must be an integer >= 1, got 0"),
        ({"num_landmarks": 2.0}, "num_landmarks must be an integer >= 1, got 2.0"),
        ({"window_size": -1}, "window_size must be an integer >= 0, got -1"),
        ({"num_sinks": True}, "num_sinks must be an integer >= 0, got True"),
        ({"landmarks": 3}, "landmarks must be a strategy's name"),
        ({"beyond": "window"}, "beyond must be one of retrieval, exact or None, got 'window'"),
        ({"num_blocks": 3}, "num_blocks belongs to mechanism='retrieval' or beyond='retrieval', got num_blocks=3"),
        ({"block_size": 4, "beyond": "exact"}, "block_size belongs to mechanism='retrieval' or beyond='retrieval'"),
        ({"num_blocks": -1, "beyond": "retrieval"}, "num_blocks must be an integer >= 0, got -1"),
        ({"mechanism": "retrieval", "beyond": "exact"}, "beyond belongs to mechanism='nystrom', got beyond='exact'"),
        ({"mechanism": "distance"}, "window_size belongs to mechanism='nystrom' or mechanism='retrieval', got"),
        ({"mechanism": "nystroem"}, "mechanism must be one of distance, nystrom, retrieval, got 'nystroem'"),
    ],
)
def test_bad_specs(fields, message):
    with pytest.raises(ValueError, match=message):
        AttentionSpec(**{"mechanism": "nystrom", "window_size": 6, **fields})


def test_unknown_strategy_is_refused_before_anything_is_built():
    with pytest.raises(ValueError, match="unknown landmark strategy 'lloyd'"):
        converted(gpt2(), nystrom(landmarks="lloyd"))


def test_a_sliding_window_of_the_model_is_refused():
    torch.manual_seed(0)
    config = MistralConfig(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32, intermediate_size=64,
        vocab_size=VOCAB, sliding_window=4, **SPECIAL,
    )  # fmt: skip
    with pytest.raises(ValueError, match="layers.0.self_attn' has sliding_attention, which mechanism='nystrom' cannot"):
        converted(MistralForCausalLM(config).eval(), nystrom())
    config.sliding_window = None
    student = converted(MistralForCausalLM(config).eval(), nystrom())
    assert bool(student(**padded(20)).logits.isfinite().all())


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (4, "window_size=4 is too small for this model's relative position bias.*relative_attention_max_distance"),
        (0, "window_size=0 cannot carry a relative position bias"),
    ],
)
def test_a_window_too_small_for_the_position_bias_is_refused(window, message):
    with pytest.raises(ValueError, match=message):
        converted(t5(**SHORT_BIAS), nystrom(window))


@pytest.mark.parametrize("lift", [True, False])
def test_calibration_depends_on_the_seed_alone(lift):
    def tensors(seed):
        options = CalibrationOptions(steps=3, progress=False, seed=seed)
        teacher = gpt2()
        batches = [token_batch(teacher, length=40, seed=s) for s in range(4)]
        torch.manual_seed(int(torch.randint(1000, ())))
        student = convert(teacher, nystrom(lift=lift), calibration=batches, options=options)
        return {n: t for n, t in student.state_dict().items() if ".distattn." in n}

    first, second, other = tensors(1), tensors(1), tensors(2)
    assert len(first) == 2 * (5 if lift else 8)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_calibration_reports_what_was_lost_and_lowers_it():
    teacher = gpt2()
    batches = [token_batch(teacher, length=40, seed=seed) for seed in range(4)]
    errors = []
    for steps in (0, 60):
        options = CalibrationOptions(steps=steps, progress=False)
        report = convert(teacher, nystrom(), calibration=batches, options=options).conversion_report
        errors.append([sum(group["output_error"]) for group in report["groups"]])
        for group in report["groups"]:
            assert len(group["output_error"]) == len(group["divergence_after"]) == 4
    assert errors[1][0] < errors[0][0]


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_model_runs_trains_and_generates(family):
    student = converted(build(family), nystrom(9))
    batch = token_batch(student, length=40, padded=True)
    expected = student(**batch).logits
    half = student.to(torch.bfloat16)
    logits = half(**batch).logits
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in half.parameters() if p.grad is not None)
    real = slice(None) if family == "t5" else batch["attention_mask"].bool()
    assert torch.nn.functional.cosine_similarity(logits.float()[real], expected[real], dim=-1).mean() > 0.99
    if half.can_generate() and family != "bert":
        batch.pop("decoder_input_ids", None)
        tokens = half.generate(**batch, **GENERATION)
        assert tokens.shape == (2, 26 if family == "t5" else 65)


class LargestTensor(TorchDispatchMode):
    """Notes how many entries the largest result of an operation has."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                # What is expanded takes no memory.
                self.entries = max(self.entries, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_a_fit_of_long_texts_holds_no_square(monkeypatch):
    """Figures are of all rows and keys of the held-out text: some rows at a time, with the same result."""
    teacher = llama()
    batch = token_batch(teacher, length=250)
    reports = []
    for entries in (2**24, 30_000):
        monkeypatch.setattr(calibrate_nystrom, "_ENTRIES", entries)
        options = CalibrationOptions(steps=2, rows=16, progress=False)
        with LargestTensor() as largest:
            reports.append(convert(teacher, nystrom(9), calibration=[batch], options=options).conversion_report)
        is_square = largest.entries >= 4 * 249 * 250
        assert is_square == (entries == 2**24), largest.entries
    for whole, parts in zip(*(report.groups for report in reports), strict=True):
        for name in ("divergence_after", "window_error", "output_error", "rows_off"):
            assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-4, abs=1e-6)


def leave_exact(student, name, state, results, max_error):
    take_beyond(student, name, state, results, beyond_heads(state, results, max_error, groups=1))


@EVERY_FAMILY
def test_heads_beyond_the_limit_of_the_error_stay_the_teachers(family, tmp_path):
    """With a limit that only the best head of the first module meets, the rest of that module keeps dot product."""
    teacher = build(family)
    batches = [token_batch(teacher, length=40, seed=seed) for seed in range(2)]
    free = convert(teacher, nystrom(9), calibration=batches, options=QUICK)
    # The first module is fitted on the same inputs with and without a limit.
    errors = free.conversion_report["groups"][0]["output_error"]
    limit = min(errors) * 1.001
    options = CalibrationOptions(steps=2, progress=False, max_error=limit)
    student = convert(teacher, nystrom(9, beyond="exact"), calibration=batches, options=options)
    report = student.conversion_report
    assert report.groups[0].heads == [errors.index(min(errors))]
    assert report.groups[0].output_error == [min(errors)]
    linear = {group.module: group.heads for group in report.groups}
    assert all(error <= limit for group in report.groups for error in group.output_error)
    for name, state in student.attention_states.items():
        heads = linear.get(name, [])
        assert sorted(heads + report.exact_heads.get(name, [])) == list(range(state.num_heads))
        assert [part for part, group in state.parts() if group is not None] == [heads] * (name in linear)
    assert f" 1/{len(errors)} " in str(report)

    batch = token_batch(teacher, length=40, seed=3)
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch)[0], student(**batch)[0])
        off = [(model(**batch)[0] - teacher(**batch)[0]).abs().mean() for model in (student, free)]
    assert off[0] < off[1]
    assert current_report(again).exact_heads == report.exact_heads

    nothing = CalibrationOptions(steps=2, progress=False, max_error=1e-9)
    with pytest.raises(ValueError, match="max_error=1e-09: no head"):
        convert(teacher, nystrom(9, beyond="exact"), calibration=batches, options=nothing)


@EVERY_FAMILY
def test_a_module_without_any_head_within_the_limit_is_the_teachers(family, tmp_path):
    teacher = build(family)
    student = converted(teacher, nystrom(9))
    groups = {group["module"]: group["output_error"] for group in student.conversion_report["groups"]}
    best = {name: min(errors) for name, errors in groups.items()}
    limit = max(best.values()) * 0.999
    for name, state in student.attention_states.items():
        leave_exact(student, name, state, [{"output_error": torch.tensor(groups[name])}], limit)
    emptied = [name for name, state in student.attention_states.items() if not state.groups]
    assert emptied == [name for name in groups if best[name] > limit] != []
    batch = token_batch(teacher, length=40, seed=3)
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch)[0], student(**batch)[0])
    # With only the emptied modules converted, the model is the teacher.
    for name, state in student.attention_states.items():
        if state.groups:
            leave_exact(student, name, state, [{"output_error": torch.full((len(state.parts()[0][0]),), 9.0)}], 1.0)
    with torch.no_grad():
        torch.testing.assert_close(student(**batch)[0], teacher(**batch)[0], rtol=1e-4, atol=1e-4)
    if teacher.can_generate() and family != "bert":
        batch.pop("decoder_input_ids", None)
        ours, theirs = (model.generate(**batch, **GENERATION) for model in (student, teacher))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_error": 0}, "max_error must be None or > 0, got 0"),
        ({"max_length": 1}, "max_length must be None or an integer >= 2, got 1"),
        ({"max_tokens": "all"}, "max_tokens must be None or an integer >= 2, got 'all'"),
    ],
)
def test_bad_calibration_options(fields, message):
    with pytest.raises(ValueError, match=message):
        CalibrationOptions(**fields)


def test_a_limit_keeps_the_precision_of_the_model():
    student = converted(build("gpt2").double(), nystrom(9))
    kinds = {p.dtype for name, p in student.named_parameters() if ".distattn." in name}
    (errors, *_) = (group["output_error"] for group in student.conversion_report["groups"])
    name, state = next(iter(student.attention_states.items()))
    leave_exact(student, name, state, [{"output_error": torch.tensor(errors)}], sorted(errors)[1])
    assert {p.dtype for p in state.parameters()} <= kinds
    assert state.groups[0].num_heads < state.num_heads
