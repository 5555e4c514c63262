"""Annealing: the values at each step, what it does to a model, and that the end is what the schedule promised."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from distattn_hf import AttentionSpec, CalibrationOptions, convert
from distattn_hf.conversion.observe import observed, teacher_attention
from distattn_hf.training.annealing import (
    Annealing,
    AnnealingOptions,
    fading,
    integer_linear,
    landmark_use,
    log_linear,
    progress,
    remove_landmarks,
)
from tests.conversion.models import bert, gpt2, llama, t5, token_batch
from tests.conversion.nystrom_cases import taken
from tests.training.rows import collate, rows


def nystrom(window=8, landmarks=6, model=None):
    text = torch.stack([row["input_ids"] for row in rows("causal-lm", 8, 64)])
    spec = AttentionSpec(mechanism="nystrom", num_landmarks=landmarks, window_size=window, num_sinks=1)
    options = CalibrationOptions(steps=3, progress=False)
    return convert(model or gpt2(), spec, calibration={"input_ids": text}, options=options)


def groups(student):
    return [group for state in student.attention_states.values() for group in state.groups]


def test_progress_holds_then_moves_then_holds():
    values = [progress(step, 10, warmup=0.2, hold=0.3) for step in range(11)]
    expected = [0, 0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1]
    assert values == pytest.approx(expected)
    assert progress(0, 0) == 0.0
    assert progress(1, 0) == 1.0


def test_log_linear_and_integer_and_fading():
    start = torch.tensor([math.log(0.25), math.log(0.5)])
    torch.testing.assert_close(log_linear(start, 1.0, 0.5).exp(), torch.tensor([0.5, math.sqrt(0.5)]))
    torch.testing.assert_close(log_linear(start, 0.1, 1.0).exp(), torch.tensor([0.1, 0.1]))
    assert [integer_linear(64, 16, done) for done in (0, 0.25, 1 / 3, 1)] == [64, 52, 48, 16]
    assert math.exp(fading(0.75)) == pytest.approx(0.25)
    assert math.exp(fading(1.0)) < 1e-11


def test_alpha_goes_to_its_target_and_does_not_train():
    student = convert(gpt2(), AttentionSpec("l2", transform="scalar"), init="plain")
    starts = []
    for number, group in enumerate(groups(student)):
        with torch.no_grad():
            group.log_alpha.copy_(torch.linspace(-2, -1 - number, 4))
        starts.append(group.log_alpha.detach().clone())
    annealing = Annealing(student, AnnealingOptions(alpha=1.0, hold=0.0))
    assert all(not group.log_alpha.requires_grad for group in groups(student))
    assert all(group.log_lambda.requires_grad for group in groups(student))
    annealing.apply(5, 10)
    for group, start in zip(groups(student), starts, strict=True):
        torch.testing.assert_close(group.log_alpha, start / 2)
    annealing.finish(10)
    assert all(torch.equal(group.log_alpha, torch.zeros(4)) for group in groups(student))


def small_alpha(metric="l2"):
    """A causal model whose heads are far from α = 1, and rows for it."""
    student = convert(llama(), AttentionSpec(metric, transform="scalar"), init="plain").eval()
    for number, group in enumerate(groups(student)):
        with torch.no_grad():
            group.log_alpha.copy_(torch.linspace(-2, -1.5 + number / 10, group.num_heads))
            group.shift.normal_()
    batches = [{k: v for k, v in collate(rows("causal-lm", 3, 20, seed)).items() if k != "labels"} for seed in (0, 1)]
    return student, batches


@pytest.mark.parametrize("metric", ["l2", "l1", "chebyshev"])
def test_lambda_follows_alpha_by_the_sizes_of_query_and_key(metric):
    student, batches = small_alpha(metric)
    seen = {state: [] for state in student.attention_states.values()}

    def note(state, query, key, value, call):
        seen[state].append((query, key))
        return teacher_attention(query, key, value, call)

    with torch.no_grad(), observed(student, note):
        for batch in batches:
            student(**batch)
    before = [(g.log_lambda.detach().clone(), g.log_alpha.detach().clone()) for g in groups(student)]
    annealing = Annealing(student, AnnealingOptions(alpha=0.8, hold=0.0))
    assert annealing.needs_batches
    annealing.prepare(batches)
    for step in range(4):
        annealing.apply(step, 8)
    # As a run that is killed after its fourth step: the values come from a checkpoint, the sizes are measured again.
    resumed = convert(llama(), AttentionSpec(metric, transform="scalar"), init="plain").eval()
    resumed.load_state_dict(student.state_dict())
    again = Annealing(resumed, AnnealingOptions(alpha=0.8, hold=0.0))
    again.alphas = [(g, a.clone()) for g, (_, a) in zip(groups(resumed), annealing.alphas, strict=True)]
    again.sizes = {g: annealing.sizes[old] for g, old in zip(groups(resumed), groups(student), strict=True)}
    for run in (annealing, again):
        run.apply(4, 8)
        run.finish(8)
    for state, (log_lambda, log_alpha), group in zip(seen, before, groups(student), strict=True):
        for head in range(group.num_heads):
            shift, sizes = group.shift[head].detach(), []
            for alpha in (float(log_alpha[head].exp()), 0.8):
                q = [float(query[:, head].square().sum(-1).flatten().median()) for query, _ in seen[state]]
                k = [float((key[:, head] - shift).square().sum(-1).flatten().median()) for _, key in seen[state]]
                sizes.append(math.sqrt(sum(q) / 2 / alpha**2 + alpha**2 * sum(k) / 2))
            expected = math.exp(log_lambda[head]) * sizes[1] / sizes[0]
            assert float(group.log_lambda[head].detach().exp()) == pytest.approx(expected, rel=1e-4)
    for group, other in zip(groups(student), groups(resumed), strict=True):
        assert torch.equal(group.log_lambda, other.log_lambda)


def test_where_lambda_follows_the_attention_stays_nearer():
    student, batches = small_alpha()
    before = student(**batches[0]).logits.detach()
    distances = {}
    for follows in (True, False):
        changed, _ = small_alpha()
        changed.load_state_dict(student.state_dict())
        annealing = Annealing(changed, AnnealingOptions(alpha=0.5, hold=0.0))
        if follows:
            annealing.prepare(batches)
        annealing.finish(10)
        distances[follows] = float((changed(**batches[0]).logits.detach() - before).norm())
    assert distances[True] < 0.5 * distances[False]


def test_lambda_of_other_metrics_and_fixed_ones_stay():
    for spec in (
        AttentionSpec("sqeuclidean"),
        AttentionSpec("cosine"),
        AttentionSpec("l2", lam=1.0, learnable_lambda=False),
    ):
        student = convert(llama(), replace(spec, transform="scalar"), init="plain")
        annealing = Annealing(student, AnnealingOptions(alpha=1.0))
        assert not annealing.needs_batches


def test_values_depend_on_the_step_alone():
    one, other = (convert(llama(), AttentionSpec("l2", transform="scalar"), init="plain") for _ in range(2))
    for student in (one, other):
        for group in groups(student):
            with torch.no_grad():
                group.log_alpha.fill_(-1.5)
    stepped, jumped = (Annealing(student, AnnealingOptions(alpha=0.9, warmup=0.1)) for student in (one, other))
    for step in range(8):
        stepped.apply(step, 12)
    jumped.apply(7, 12)
    for a, b in zip(groups(one), groups(other), strict=True):
        assert torch.equal(a.log_alpha, b.log_alpha)


def test_the_window_shrinks_in_the_model_and_in_what_it_saves(tmp_path):
    student = nystrom(window=8)
    annealing = Annealing(student, AnnealingOptions(window_size=2, hold=0.0))
    batch = {k: v for k, v in collate(rows("causal-lm", 2, 40)).items() if k != "labels"}
    before = student(**batch).logits
    annealing.apply(5, 10)
    assert {group.spec.window_size for group in groups(student)} == {5}
    assert student.config.distattn["specs"][0]["window_size"] == 5
    annealing.finish(10)
    after = student(**batch).logits
    assert not torch.allclose(before, after)
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path).eval()
    assert groups(again)[0].spec.window_size == 2
    assert torch.equal(again(**batch).logits, after)


@torch.no_grad()
def test_heads_that_retrieve_beside_them_follow_the_window(tmp_path):
    student = taken("llama", block_size=4, num_blocks=1)
    batch = {"input_ids": torch.randint(3, 64, (2, 60))}
    before = student(**batch).logits
    annealing = Annealing(student, AnnealingOptions(window_size=2, hold=0.0))
    annealing.apply(10, 10)
    annealing.finish(10)
    after = student(**batch).logits
    assert not torch.equal(before, after)
    assert {group.spec.window_size for group in groups(student)} == {2}
    student.save_pretrained(tmp_path)
    assert torch.equal(type(student).from_pretrained(tmp_path).eval()(**batch).logits, after)


def test_landmarks_fade_until_taking_them_out_changes_nothing(tmp_path):
    student = nystrom(landmarks=6)
    batches = [{k: v for k, v in collate(rows("causal-lm", 4, 64, seed=5)).items() if k != "labels"}]
    annealing = Annealing(student, AnnealingOptions(num_landmarks=2, hold=0.0))
    annealing.prepare(batches)
    before = student(**batches[0]).logits
    annealing.apply(0, 10)
    torch.testing.assert_close(student(**batches[0]).logits, before)
    annealing.apply(5, 10)
    half = student(**batches[0]).logits
    annealing.apply(10, 10)
    faded = student(**batches[0]).logits
    annealing.finish(10)
    after = student(**batches[0]).logits
    assert not torch.allclose(before, half)
    # What is left of a faded landmark is a share of 1e-12.
    torch.testing.assert_close(after, faded, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, after)
    assert all(tuple(group.landmarks.shape[:2]) == (4, 2) for group in groups(student))
    assert student.config.distattn["specs"][0]["num_landmarks"] == 2
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path).eval()
    assert torch.equal(again(**batches[0]).logits, after)


def test_the_least_used_landmarks_go():
    student = nystrom(landmarks=4)
    for group in groups(student):
        with torch.no_grad():
            group.interpolation_bias[:, 1] = -40.0  # no key goes there
    batches = [{k: v for k, v in collate(rows("causal-lm", 4, 64)).items() if k != "labels"}]
    use = landmark_use(student, batches)
    for group in groups(student):
        torch.testing.assert_close(use[group].sum(-1), torch.ones(4))
        assert bool((use[group].argmin(-1) == 1).all())
    annealing = Annealing(student, AnnealingOptions(num_landmarks=3))
    kept = [group.landmarks[:, [0, 2, 3]].detach().clone() for group in groups(student)]
    annealing.prepare(batches)
    annealing.finish(4)
    for group, expected in zip(groups(student), kept, strict=True):
        assert torch.equal(group.landmarks, expected)


def test_heads_lose_landmarks_of_their_own():
    student = nystrom(landmarks=3)
    group = groups(student)[0]
    expected = torch.stack([group.landmark_bias[0, [1, 2]], group.landmark_bias[1, [0, 2]],
                            group.landmark_bias[2, [0, 1]], group.landmark_bias[3, [1, 2]]]).detach()  # fmt: skip
    remove_landmarks(group, torch.tensor([[0], [1], [2], [0]]))
    assert torch.equal(group.landmark_bias, expected)
    assert group.spec.num_landmarks == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alpha": 0.0}, r"anneal.alpha must be in \(0, 1\], got 0.0"),
        ({"alpha": 1.5}, r"anneal.alpha must be in \(0, 1\], got 1.5"),
        ({"softening": 1.0}, r"anneal.softening must be a share in \[0, 1\), got 1.0"),
        ({"softening": -0.1}, r"anneal.softening must be a share in \[0, 1\), got -0.1"),
        ({"window_size": 2.5}, "anneal.window_size must be an integer >= 0, got 2.5"),
        ({"num_landmarks": 0}, "anneal.num_landmarks must be an integer >= 1, got 0"),
        ({"alpha": 1.0, "warmup": 0.6, "hold": 0.4}, "warmup .* < 1, got 0.6"),
        ({"hold": 1.0}, r"anneal.hold must be a fraction in \[0, 1\), got 1.0"),
    ],
)
def test_options_out_of_range(options, said):
    with pytest.raises(ValueError, match=said):
        AnnealingOptions(**options)


def test_models_with_nothing_to_anneal():
    exact = convert(bert(), AttentionSpec("sqeuclidean"), init="exact")
    with pytest.raises(ValueError, match="no converted head has α"):
        Annealing(exact, AnnealingOptions(alpha=1.0))
    with pytest.raises(ValueError, match="anneal.window_size needs a model with mechanism='nystrom'"):
        Annealing(exact, AnnealingOptions(window_size=3))
    with pytest.raises(ValueError, match="at most the model's own 4, got 9"):
        Annealing(nystrom(landmarks=4), AnnealingOptions(num_landmarks=9))


def test_a_window_below_the_relative_position_bias():
    model = t5(relative_attention_max_distance=6, relative_attention_num_buckets=8)
    spec = AttentionSpec(mechanism="nystrom", num_landmarks=4, window_size=8)
    student = convert(model, spec, calibration=token_batch(model), options=CalibrationOptions(steps=1, progress=False))
    for window, said in (
        (0, "cannot carry"),
        (2, "window_size=2 is too small for this model's relative position bias"),
    ):
        with pytest.raises(ValueError, match=f"anneal.window_size={window}: .*{said}"):
            Annealing(student, AnnealingOptions(window_size=window))
    annealing = Annealing(student, AnnealingOptions(window_size=6))
    annealing.finish(4)
    assert student(**token_batch(model, 40)).logits.isfinite().all()


def test_landmark_use_leaves_padding_out_and_is_a_mean_over_batches():
    student = nystrom(landmarks=4)
    batch = token_batch(gpt2(), 20, padded=True)
    other = {**batch, "input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 40)}
    use, changed, twice = (landmark_use(student, given) for given in ([batch], [other], [batch, batch]))
    for group in groups(student):
        torch.testing.assert_close(use[group], changed[group])
        torch.testing.assert_close(use[group], twice[group])
        torch.testing.assert_close(use[group].sum(-1), torch.ones(4))


def test_landmark_use_of_a_decoder_takes_its_padding_from_the_labels():
    model = t5(relative_attention_max_distance=6, relative_attention_num_buckets=8)
    spec = AttentionSpec(mechanism="nystrom", num_landmarks=4, window_size=8)
    student = convert(model, spec, calibration=token_batch(model), options=CalibrationOptions(steps=1, progress=False))
    batch = token_batch(model, 20)
    del batch["decoder_input_ids"]
    labels = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([labels, torch.full((2, 5), -100)], 1)
    short, long = (landmark_use(student, [{**batch, "labels": given}]) for given in (labels, padded))
    cross = {g for s in student.attention_states.values() if s.is_cross for g in s.groups}
    assert cross
    for group in cross:
        torch.testing.assert_close(short[group], long[group])


def softened(metric="l2", **spec):
    """A causal model whose heads have an ε each, and rows for it."""
    spec = AttentionSpec(metric, p=3 if metric == "lp" else None, transform="scalar", softening="fit", **spec)
    batches = [{k: v for k, v in collate(rows("causal-lm", 3, 20, seed)).items() if k != "labels"} for seed in (0, 1)]
    options = CalibrationOptions(steps=2, progress=False)
    return convert(llama(), spec, calibration=batches, options=options).eval(), batches


def test_softening_goes_to_a_share_of_what_it_was_and_does_not_train():
    student, _ = softened()
    starts = [group.log_softening.detach().clone() for group in groups(student)]
    annealing = Annealing(student, AnnealingOptions(softening=0.25, hold=0.0))
    assert all(not group.log_softening.requires_grad for group in groups(student))
    annealing.apply(5, 10)
    for group, start in zip(groups(student), starts, strict=True):
        torch.testing.assert_close(group.log_softening, start + 0.5 * math.log(0.25))
    annealing.finish(10)
    for group, start in zip(groups(student), starts, strict=True):
        torch.testing.assert_close(group.log_softening, start + math.log(0.25))
    assert student.config.distattn["specs"][0]["softening"] == "fit"


@pytest.mark.parametrize("metric", ["l2", "l1", "lp", "chebyshev", "cosine"])
def test_without_softening_it_is_the_plain_distance(metric, tmp_path):
    student, batches = softened(metric)
    annealing = Annealing(student, AnnealingOptions(softening=0.0, hold=0.2))
    annealing.prepare(batches)
    annealing.apply(9, 10)
    held = student(**batches[0]).logits.detach()
    annealing.finish(10)
    assert all(group.spec.softening == 0.0 and group.softening() is None for group in groups(student))
    after = student(**batches[0]).logits.detach()
    # In the last fifth of the steps it trains at an ε that is as good as none: 1e-12, where the softened lp and
    # chebyshev keep 3e-6 of a distance of up to 100.
    torch.testing.assert_close(after, held, rtol=1e-3, atol=1e-3)
    assert not any("softening" in name for name in student.state_dict())
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path).eval()
    assert again.config.attention_specs[0].softening == 0.0
    assert torch.equal(again(**batches[0]).logits, after)
    plain = convert(llama(), replace(again.config.attention_specs[0], softening=None), init="plain").eval()
    plain.load_state_dict(student.state_dict())
    assert torch.equal(plain(**batches[0]).logits, after)
    # The report says what the model is now.
    assert all(entry["softening"] is None for entry in student.report_as_it_is()["groups"])
    annealing.finish(10)
    assert torch.equal(student(**batches[0]).logits.detach(), after)
    with pytest.raises(ValueError, match="anneal.softening=0.5: no converted head has an ε"):
        Annealing(student, AnnealingOptions(softening=0.5))


@pytest.mark.parametrize("metric", ["l2", "l1", "lp", "chebyshev", "cosine"])
def test_where_lambda_follows_softening_the_attention_stays_nearer(metric):
    student, batches = softened(metric)
    before = student(**batches[0]).logits.detach()
    distances = {}
    for follows in (True, False):
        changed, _ = softened(metric)
        changed.load_state_dict(student.state_dict())
        annealing = Annealing(changed, AnnealingOptions(softening=0.0, hold=0.0))
        assert annealing.needs_batches
        if follows:
            annealing.prepare(batches)
        annealing.finish(10)
        distances[follows] = float((changed(**batches[0]).logits.detach() - before).norm())
    assert distances[True] < distances[False]


def test_alpha_and_softening_together_and_a_run_that_goes_on():
    student, batches = softened()
    targets = AnnealingOptions(alpha=0.9, softening=0.1, hold=0.0)
    whole, first = (Annealing(s, targets) for s in (student, copy.deepcopy(student)))
    second = Annealing(copy.deepcopy(student), targets)
    for run in (whole, first, second):
        run.prepare(batches)
    for step in range(8):
        whole.apply(step, 8)
        (first if step < 5 else second).apply(step, 8)
        if step == 4:
            second.student.load_state_dict(first.student.state_dict())
    assert torch.equal(student(**batches[0]).logits, second.student(**batches[0]).logits)
