"""The experiment `native_decoding` in its quick setting: which caches grow."""

import pytest

from distattn_hf.experiments.run_experiment import run_experiment


def test_rows(tmp_path):
    rows = run_experiment("native_decoding", tmp_path, ["rounds=2"], quick=True).rows
    sizes = {}
    for row in rows:
        sizes.setdefault(row["mechanism"], []).append(row["cache_bytes"])
        assert row["milliseconds"] > 0
        assert row["times_dot"] > 0
    assert {row["times_first"] for row in rows if row["length"] == 64} == {1.0}
    assert {row["times_dot"] for row in rows if row["mechanism"] == "dot"} == {1.0}
    constant = {name for name, each in sizes.items() if len(set(each)) == 1}
    # local's window of 128 and strided's 64·64 are not full yet after 64 tokens, two rounds and an uncounted one.
    assert constant == {"linear", "performer", "nystrom"}
    assert sizes["dot"] == [2 * 4 * 32 * (n + 3) for n in (64, 192)]
    assert sizes["local"] == [2 * 4 * 32 * (n + 3) for n in (64, 124)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("lengths=64,32", "lengths must be positive and ascending"),
        ("rounds=0", "rounds must be >= 1, got 0"),
        ("mechanisms=linformer", "no causal form"),
        ("mechanisms=lineer", "unknown mechanism 'lineer'"),
    ],
)
def test_bad_options(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_experiment("native_decoding", tmp_path / "out", [given], quick=True)
