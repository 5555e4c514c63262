"""What a sequence over devices sends: by hand, and in a small run that compares it with what is counted."""

import pytest

from distattn_hf.experiments.run_experiment import run_experiment
from distattn_hf.experiments.sequence_speed import DEVICES, Shape

SMALL = Shape(heads=4, key_heads=2, size=8, landmarks=16, window=5, sinks=3, blocks=2, width=4)


def test_bytes_by_hand():
    # Of 4 devices, a key head of 17 numbers (key, value, and whether it is kept), 100 tokens a device.
    row = 2 * 17 * 4
    assert SMALL.sent("nystrom", 400, 4) == {
        "halo": 4 * row, "sinks": 2 * 3 * (2 * 3 * 16 * 4) // 4, "state": 3 * 4 * 16 * 9 * 4,
    }  # fmt: skip
    assert SMALL.sent("retrieval", 400, 4)["keys"] == 300 * row
    assert SMALL.sent("exact", 400, 4) == {"keys": 300 * 2 * 16 * 4}
    # Longer texts: the same from Nyström, as much more from retrieval.
    assert SMALL.sent("nystrom", 4000, 4) == SMALL.sent("nystrom", 400, 4)
    assert SMALL.sent("retrieval", 4000, 4)["keys"] == 10 * SMALL.sent("retrieval", 400, 4)["keys"]


@pytest.mark.parametrize(
    ("mechanism", "rounds"), [("nystrom", {2: 4, 4: 8, 8: 11}), ("retrieval", {2: 3, 4: 5}), ("exact", {2: 1, 8: 7})]
)
def test_rounds_by_hand(mechanism, rounds):
    for devices, number in rounds.items():
        assert SMALL.rounds(mechanism, devices) == number


def test_work_is_divided():
    whole, half = (SMALL.operations("nystrom", 4096, devices) for devices in (1, 2))
    assert whole == 2 * half


def test_a_small_run(tmp_path):
    """Stops by itself where bytes, rounds or outputs are not what they should be."""
    rows = run_experiment("sequence_speed", tmp_path, quick=True, echo=lambda line: None).rows
    measured, modelled = ([row for row in rows if row["part"] == part] for part in ("measured", "modelled"))
    assert [(row["mechanism"], row["processes"]) for row in measured] == [("nystrom", 2), ("retrieval", 2)]
    assert all(row["error"] < 1e-5 and row["ratio"] > 0 for row in measured)
    assert [(row["mechanism"], row["devices"]) for row in modelled] == [
        (mechanism, devices) for mechanism in ("nystrom", "retrieval", "exact") for devices in DEVICES
    ]
    for row in modelled:
        assert row["seconds"] == row["seconds_computing"] + row["seconds_moving"]
        assert row["seconds_moving"] == pytest.approx(row["bytes"] / 50e9 + 1e-5 * row["rounds"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("processes=1", "processes must be at least 2 with at least 64 tokens each, got 1"),
        ("length=100", "processes must be at least 2 with at least 64 tokens each, got 2"),
        ("length=1001", "length must be a multiple of processes, got 1001 and 2"),
        ("pairs=0", "pairs must be above 0, got 0"),
        ("latency=-1", "latency must be at least 0 seconds, got -1.0"),
    ],
)
def test_options_that_cannot_be_are_named(tmp_path, given, words):
    with pytest.raises(ValueError, match=words):
        run_experiment("sequence_speed", tmp_path / "out", [given], quick=True)
    assert not (tmp_path / "out").exists()
