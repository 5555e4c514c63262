"""What a sequence over devices sends: by hand, and in a small run that compares it with what is counted."""

import json

import pytest

from distattn_hf.experiments.sequence_speed import Shape, main, parse

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
    main(parse([str(tmp_path / "out.json"), "--length", "256", "--processes", "2", "--pairs", "1"]))
    found = json.loads((tmp_path / "out.json").read_text())
    assert [row["mechanism"] for row in found["measured"]] == ["nystrom", "retrieval"]
    assert all(row["error"] < 1e-5 and row["ratio"] > 0 for row in found["measured"])
    assert len(found["modelled"]) == 3 * 8


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--processes", "1"], "--processes must be at least 2 with at least 64 tokens each, got 1"),
        (["--length", "100"], "--processes must be at least 2 with at least 64 tokens each, got 2"),
        (["--length", "1001"], "--length must be a multiple of --processes, got 1001 and 2"),
    ],
)
def test_flags_that_cannot_be_are_named(tmp_path, flags, words):
    with pytest.raises(ValueError, match=words):
        main(parse([str(tmp_path / "out.json"), *flags]))
    assert not (tmp_path / "out.json").exists()
