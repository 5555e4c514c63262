"""Synthetic tasks by their definition, and the experiment that trains on them in its quick setting."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from distattn_hf.data.synthetic import IGNORED, make_examples
from distattn_hf.experiments import training
from distattn_hf.experiments.run_experiment import run_experiment


def test_recall_asks_for_every_key_once():
    """An oracle that looks keys up answers every query; nothing else is asked."""
    inputs, labels = make_examples("mqar", 50, 64, items=8, vocab_size=64, seed=0)
    assert inputs.shape == labels.shape == (50, 64)
    assert inputs.min() >= 0 and inputs.max() < 64  # noqa: PT018
    for row, wanted in zip(inputs, labels):
        values = dict(zip(row[0:16:2], row[1:16:2]))
        assert len(values) == len(set(values.values())) == 8
        assert max(values) < 32 <= min(values.values())
        assert 0 not in values
        asked = np.flatnonzero(wanted != IGNORED)
        assert asked.min() >= 16
        assert sorted(row[asked]) == sorted(values)
        assert [values[key] for key in row[asked]] == list(wanted[asked])


def test_recall_asks_early_as_in_zoology():
    """Gap g has weight 1/g^0.99: of one query in 24 places, the first has 1/Σ g^-0.99 of the draws."""
    _, labels = make_examples("mqar", 20_000, 50, items=1, vocab_size=64, seed=1)
    places = (labels != IGNORED).argmax(1)
    assert set(places) == set(range(2, 50, 2))
    weights = np.arange(1, 25) ** -0.99
    shares = np.bincount((places - 2) // 2) / 20_000
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=0.01)


def test_induction_asks_what_followed():
    inputs, labels = make_examples("induction", 50, 20, items=1, vocab_size=9, seed=0)
    assert (labels[:, :-1] == IGNORED).all()
    first = (inputs == 0).argmax(1)
    assert ((inputs == 0).sum(1) == 2).all()
    assert (labels[:, -1] == inputs[np.arange(50), first + 1]).all()
    assert (labels[:, -1] > 0).all()
    assert len(set(first)) > 10


def test_copying_keeps_the_order():
    inputs, labels = make_examples("selective_copying", 50, 30, items=5, vocab_size=9, seed=0)
    for row, wanted in zip(inputs, labels):
        assert list(row[:25][row[:25] > 0]) == list(wanted[25:])
        assert set(row[25:]) == {1}
        assert set(wanted[:25]) == {IGNORED}


@pytest.mark.parametrize("task", ["mqar", "induction", "selective_copying"])
def test_examples_depend_on_the_seed_alone(task):
    sizes = {"items": 1, "vocab_size": 16}
    first, again, other = (make_examples(task, 4, 16, seed=seed, **sizes) for seed in (3, 3, 4))
    assert all((a == b).all() for a, b in zip(first, again))
    assert (first[0] != other[0]).any()


def test_rows_of_the_quick_run(tmp_path):
    results = run_experiment("training", tmp_path, quick=True)
    assert [(row["task"], row["items"], row["attention"]) for row in results.rows] == [
        (task, items, attention)
        for task, items in (("mqar", 2), ("selective_copying", 2), ("induction", 1))
        for attention in ("dot", "l2")
    ]
    assert all([step for step, _ in row["curve"]] == [2, 3] for row in results.rows)
    assert (tmp_path / "training_mqar.png").exists()


def test_accuracy_counts_what_is_asked():
    class Repeats(torch.nn.Module):
        def forward(self, input_ids):
            return type("Output", (), {"logits": torch.nn.functional.one_hot(input_ids, 9).float()})

    inputs = torch.tensor([[1, 2, 3], [4, 5, 6]])
    labels = torch.tensor([[1, IGNORED, 0], [IGNORED, 5, 0]])
    assert training.accuracy(Repeats(), inputs, labels, batch_size=1) == 0.5


def test_a_model_learns_and_stops_when_it_has_enough():
    """Copying one token of six kinds is soon learned; the run stops there, not at its last step."""
    options = training.Options(
        tasks=("selective_copying",), attentions=("l2",), items=(1,), length=6, vocab_size=8, hidden_size=16, heads=1,
        layers=1, initializer_range=0.2, steps=400, evaluate_every=10, batch_size=32, learning_rate=1e-2, examples=64,
        test_lengths=(6, 60),
    )  # fmt: skip
    row = training.train(options, "selective_copying", 1, "l2", 0)
    assert row["accuracy"] >= options.enough
    assert row["steps"] < 400
    assert row["curve"][0][1] < row["accuracy"]
    # At its own length it is as good on other examples; among as much noise again it is not.
    (own, at_own), (longer, at_longer) = row["accuracy_at"]
    assert (own, longer) == (6, 60)
    assert at_longer < 0.9 < at_own
    # What has not learned the task is not asked.
    short = replace(options, steps=10)
    assert training.train(short, "selective_copying", 1, "l2", 0)["accuracy_at"] == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("tasks=sorting", "tasks must be among induction, mqar, selective_copying, got 'sorting'"),
        ("items=8", "length must be even and at least 4·items for mqar, got 16 with 8 pairs"),
        ("attentions=dott", "unknown mechanism 'dott'"),
        ("test_lengths=6", "length must be even and at least 4·items for mqar, got 6 with 2 pairs"),
        ("vocab_size=5", "vocab_size must be above 5 for 2 pairs, got 5"),
        ("learning_rate=0.0", "learning_rate must be > 0"),
    ],
)
def test_bad_options(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_experiment("training", tmp_path / "out", [given], quick=True)
    assert not (tmp_path / "out").exists()
