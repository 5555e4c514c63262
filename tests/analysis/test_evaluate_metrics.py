"""The packaged metrics against numpy, through files, in two processes, combined, and without any network."""

import os
import subprocess
import sys

import evaluate
import numpy as np
import pytest
import torch

from distattn_hf.evaluation.score import retrieval_scores
from distattn_hf.evaluation.task_metrics import AttentionFidelity, Perplexity, Retrieval

# float32 sums of up to a hundred terms, against float64.
CLOSE = {"rel": 1e-5}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "metrics"))


def log_softmax(x):
    x = np.asarray(x, dtype=np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def language_batches():
    generator = np.random.default_rng(0)
    for rows, length in ((3, 7), (2, 5)):
        logits = generator.normal(size=(rows, length, 11)).astype(np.float32) * 3
        labels = generator.integers(0, 11, size=(rows, length))
        labels[0, -2:] = -100
        yield logits, labels


def mean_loss(batches, shift):
    losses = []
    for logits, labels in batches:
        for row in range(labels.shape[0]):
            for i in range(labels.shape[1] - shift):
                label = labels[row, i + shift]
                if label != -100:
                    losses.append(-log_softmax(logits[row, i])[label])
    return np.mean(losses), len(losses)


@pytest.mark.parametrize(("config_name", "shift"), [(None, 1), ("default", 1), ("aligned", 0)])
def test_perplexity_against_numpy(config_name, shift):
    metric = Perplexity(config_name)
    for logits, labels in language_batches():
        metric.add_batch(predictions=torch.tensor(logits), references=torch.tensor(labels))
    loss, count = mean_loss(language_batches(), shift)
    scores = metric.compute()
    assert scores["loss"] == pytest.approx(loss, **CLOSE)
    assert scores["perplexity"] == pytest.approx(np.exp(loss), **CLOSE)
    assert scores["num_tokens"] == count


def test_perplexity_is_the_models_own_loss():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=30, n_positions=16)).eval()
    ids = torch.randint(0, 30, (3, 16))
    labels = ids.masked_fill(torch.rand(3, 16) < 0.3, -100)
    with torch.no_grad():
        output = model(input_ids=ids, labels=labels)
    scores = Perplexity().compute(predictions=output.logits, references=labels)
    assert scores["loss"] == pytest.approx(float(output.loss), **CLOSE)


@pytest.mark.parametrize("form", ["numpy", "lists", "bfloat16"])
def test_perplexity_takes_what_users_have(form):
    logits, labels = next(language_batches())
    logits = torch.tensor(logits).bfloat16().float().numpy()  # representable in every form
    shown = {"numpy": logits, "lists": logits.tolist(), "bfloat16": torch.tensor(logits).bfloat16()}[form]
    scores = Perplexity(keep_in_memory=True).compute(predictions=shown, references=labels.tolist())
    assert scores["loss"] == pytest.approx(mean_loss([(logits, labels)], 1)[0], **CLOSE)


def test_perplexity_row_by_row_equals_batches():
    single, batched = Perplexity(), Perplexity()
    for logits, labels in language_batches():
        batched.add_batch(predictions=logits, references=labels)
        for row, label in zip(logits, labels, strict=True):
            single.add(prediction=row, reference=label)
    assert single.compute() == pytest.approx(batched.compute(), **CLOSE)


def attention(heads=2, queries=5, keys=5, sharpness=2.0, seed=0):
    generator = np.random.default_rng(seed)
    return np.exp(log_softmax(generator.normal(size=(3, heads, queries, keys)) * sharpness))


def test_fidelity_of_maps_against_numpy():
    student, teacher = attention(seed=1), attention(seed=2)
    metric = AttentionFidelity("maps")
    metric.add_batch(predictions=torch.tensor(student[:2]), references=torch.tensor(teacher[:2]))
    metric.add_batch(predictions=torch.tensor(student[2:]), references=torch.tensor(teacher[2:]))
    scores = metric.compute()
    cosine = (student * teacher).sum(-1) / np.sqrt((student**2).sum(-1) * (teacher**2).sum(-1))
    assert scores["kl"] == pytest.approx((teacher * np.log(teacher / student)).sum(-1).mean(), rel=1e-9)
    assert scores["cosine"] == pytest.approx(cosine.mean(), rel=1e-9)
    error = np.sqrt(((student - teacher) ** 2).sum() / (teacher**2).sum())
    assert scores["relative_error"] == pytest.approx(error, rel=1e-9)


def test_fidelity_of_equal_outputs_is_perfect_and_of_half_the_output_is_half_off():
    outputs = torch.randn(2, 3, 4, 8)
    scores = AttentionFidelity().compute(predictions=outputs, references=outputs)
    assert scores == pytest.approx({"cosine": 1.0, "relative_error": 0.0})
    scores = AttentionFidelity().compute(predictions=0.5 * outputs, references=outputs)
    assert scores == pytest.approx({"cosine": 1.0, "relative_error": 0.5})


def test_fidelity_of_a_map_with_zeros_is_finite_and_zero_when_equal():
    weights = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
    assert AttentionFidelity("maps").compute(predictions=weights, references=weights)["kl"] == pytest.approx(
        0, abs=1e-12
    )
    other = torch.tensor([[[[0.0, 1.0], [0.5, 0.5]]]])
    kl = AttentionFidelity("maps").compute(predictions=other, references=weights)["kl"]
    assert 40 < kl < 100  # half of the logarithm of the smallest normal float32, 87.3


def test_fidelity_leaves_padding_out():
    student, teacher = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]])
    metric = AttentionFidelity()
    metric.add_batch(predictions=student, references=teacher, mask=mask)
    expected = metric.compute()
    student[1, :, 0], student[1, :, 3] = 1e6, float("nan")
    metric.add_batch(predictions=student, references=teacher, mask=mask)
    assert metric.compute() == expected
    kept = [torch.cat([x[0].flatten(0, 1), x[1, :, 1:3].flatten(0, 1)]).double() for x in (student, teacher)]
    assert expected["cosine"] == pytest.approx(float(torch.cosine_similarity(*kept, dim=-1).mean()))


def test_retrieval_against_numpy_and_the_function_of_the_evaluation():
    generator = np.random.default_rng(0)
    passages = generator.normal(size=(40, 6)).astype(np.float32)
    queries = passages + generator.normal(size=(40, 6)).astype(np.float32)
    ranks = np.array([1 + sum(p @ q > passages[i] @ q for p in passages) for i, q in enumerate(queries)])
    metric = Retrieval(at=(1, 3))
    for start in range(0, 40, 16):
        metric.add_batch(predictions=queries[start : start + 16], references=passages[start : start + 16])
    scores = metric.compute()
    assert 1 < ranks.mean() < 20, "the case must hold ranks of several kinds"
    expected = {"mrr": (1 / ranks).mean(), "retrieval_at_1": (ranks == 1).mean(), "retrieval_at_3": (ranks <= 3).mean()}
    assert scores == pytest.approx(expected, **CLOSE)
    same = retrieval_scores(torch.tensor(queries), torch.tensor(passages))
    assert {name: scores[name] for name in same} == pytest.approx(same, **CLOSE)


def test_retrieval_in_parts_is_retrieval_at_once(monkeypatch):
    from distattn_hf.evaluation import task_metrics as evaluate_metrics

    queries, passages = torch.randn(50, 8), torch.randn(50, 8)
    whole = Retrieval().compute(predictions=queries, references=passages)
    parts = evaluate_metrics._parts
    monkeypatch.setattr(evaluate_metrics, "_parts", lambda queries: parts(queries, 7))
    assert Retrieval().compute(predictions=queries, references=passages) == whole


def test_retrieval_gives_collapsed_embeddings_no_credit():
    same = torch.ones(20, 4)
    scores = Retrieval(at=(1, 20)).compute(predictions=same, references=same)
    assert scores == pytest.approx({"mrr": 1 / 20, "retrieval_at_1": 0.0, "retrieval_at_20": 1.0})


def test_combine():
    logits, labels = next(language_batches())
    both = evaluate.combine({"shifted": Perplexity(), "aligned": Perplexity("aligned")})
    both.add_batch(predictions=logits, references=labels)
    scores = both.compute()
    assert scores["shifted_loss"] == pytest.approx(mean_loss([(logits, labels)], 1)[0], **CLOSE)
    assert scores["aligned_loss"] == pytest.approx(mean_loss([(logits, labels)], 0)[0], **CLOSE)
    vectors = torch.randn(6, 3, 4)
    pair = evaluate.combine([AttentionFidelity(), AttentionFidelity()])
    pair.add_batch(predictions=vectors, references=vectors)
    assert pair.compute()["attention_fidelity_0_cosine"] == pytest.approx(1.0)


def test_instances_side_by_side_keep_their_own_numbers():
    first, second = Retrieval(at=(1,)), Retrieval(at=(1,))
    good, bad = torch.eye(4), torch.eye(4).roll(1, 0)
    first.add_batch(predictions=good, references=good)
    second.add_batch(predictions=good, references=bad)
    first.add_batch(predictions=2 * good, references=2 * good)
    assert len(first) == 8
    assert second.compute()["retrieval_at_1"] == 0.0
    assert first.compute()["mrr"] == pytest.approx(1 / 2 * 0.5 + 1 / 2, abs=0.26)


def test_each_instance_writes_a_file_of_its_own_from_the_start():
    """`evaluate` waits a second for the lock of a file in use before it takes another name."""
    metrics = [Perplexity(), Perplexity()]
    logits, labels = next(language_batches())
    for metric in metrics:
        metric.add_batch(predictions=logits, references=labels)
    assert len({metric.experiment_id for metric in metrics}) == 2
    assert all(metric.experiment_id in metric.cache_file_name for metric in metrics)
    assert Perplexity(experiment_id="mine").experiment_id == "mine"


def test_a_metric_can_be_used_again_and_leaves_no_file_behind(tmp_path):
    metric = Perplexity()
    logits, labels = next(language_batches())
    first = metric.compute(predictions=logits, references=labels)
    assert metric.compute(predictions=logits, references=labels) == first
    assert not [path for path in (tmp_path / "metrics").rglob("*") if path.is_file()]


TWO_PROCESSES = """
import socket, sys
def refuse(*arguments, **options):
    raise AssertionError("a packaged metric asked for the network")
socket.socket.connect = socket.getaddrinfo = refuse
import numpy as np, torch
from distattn_hf.evaluation.task_metrics import Perplexity, Retrieval
rank, cache = int(sys.argv[1]), sys.argv[2]
generator = torch.Generator().manual_seed(rank)
logits = torch.randn(4, 6, 9, generator=generator)
labels = torch.randint(0, 9, (4, 6), generator=generator)
for options in ({"num_process": 2, "process_id": rank, "experiment_id": "one"}, {}):
    metric = Perplexity(cache_dir=cache, **options)
    for part in (slice(0, 3), slice(3, 4)):
        metric.add_batch(predictions=logits[part], references=labels[part])
    print("scores", repr(metric.compute()))
"""


def test_two_processes(tmp_path):
    """Together: process 0 sees the rows of both. Then apart: each sees its own, although both write at once."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", TWO_PROCESSES]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    found = []
    for process in running:
        output, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        found.append([eval(line[7:]) for line in output.splitlines() if line.startswith("scores")])
    (together, other), apart = zip(*found, strict=True)
    batches = []
    for rank in (0, 1):
        generator = torch.Generator().manual_seed(rank)
        logits = torch.randn(4, 6, 9, generator=generator).numpy()
        batches.append((logits, torch.randint(0, 9, (4, 6), generator=generator).numpy()))
    loss, count = mean_loss(batches, 1)
    assert together["num_tokens"] == count
    assert together["loss"] == pytest.approx(loss, **CLOSE)
    assert other is None
    for scores, batch in zip(apart, batches, strict=True):
        assert scores["loss"] == pytest.approx(mean_loss([batch], 1)[0], **CLOSE)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: Perplexity("shifted"), "config_name must be one of default, aligned, got 'shifted'"),
        (lambda: Retrieval("maps"), "config_name must be one of default, got 'maps'"),
        (lambda: Perplexity(num_process=2, process_id=0), "experiment_id must be given"),
        (lambda: Retrieval(at=(0,)), "at must hold integers >= 1"),
        (lambda: score(Perplexity(), torch.randn(2, 3), torch.ones(2, 3)), r"predictions must have shape \(B, N, V\)"),
        (lambda: score(Perplexity(), torch.randn(2, 3, 4), torch.ones(2, 2)), r"references must have shape \(2, 3\)"),
        (lambda: score(Perplexity(), torch.randn(2, 3, 4), torch.full((2, 3), 4)), "ids below V=4, got 4 to 4"),
        (lambda: score(Perplexity(), torch.randn(2, 3, 4), torch.full((2, 3), -1)), "ids below V=4, got -1"),
        (lambda: score(Perplexity(), torch.randn(2, 3, 4), torch.full((2, 3), -100)), "all are -100"),
        (lambda: score(AttentionFidelity(), torch.randn(2, 3, 4), torch.randn(2, 3, 5)), r"shape \(2, 3, 5\)"),
        (lambda: score(AttentionFidelity("maps"), torch.randn(2, 3, 4), torch.randn(2, 3, 4)), "rows of sum 1"),
        (lambda: score(AttentionFidelity(), torch.full((1, 2, 3), torch.nan), torch.ones(1, 2, 3)), "must be finite"),
        (lambda: score(AttentionFidelity(), torch.ones(1, 2, 3), torch.zeros(1, 2, 3)), "all zero"),
        (lambda: score(Retrieval(), torch.ones(2, 3), torch.ones(2, 4)), r"shape \(2, 4\)"),
        (lambda: score(Retrieval(), torch.ones(1, 3), torch.ones(1, 3)), "at least 2 queries"),
        (lambda: score(Retrieval(), torch.full((2, 3), torch.inf), torch.ones(2, 3)), "must be finite"),
    ],
)
def test_errors_say_what_is_allowed(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def score(metric, predictions, references):
    return metric.compute(predictions=predictions, references=references)
