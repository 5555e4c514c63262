"""Which keys stretches of a text read, by the weights that a model returns; shares, bytes by hand; a small run."""

import pytest
import torch

from distattn_hf import AttentionSpec, convert
from distattn_hf.conversion.observe import keys_read
from distattn_hf.experiments.run_experiment import run_experiment
from distattn_hf.experiments.sequence_reads import fetched, share_read
from distattn_hf.experiments.sequence_speed import THERE
from tests.conversion.models import VOCAB, gpt2, llama
from tests.experiments.test_sequence_speed import SMALL
from tests.fixtures.load import GPT2_ENGLISH


@pytest.mark.parametrize("clustered", [True, False])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_keys_that_are_read_are_those_with_weight(make, clustered, monkeypatch):
    """Of two layers in three; without a far field all weight is on keys that are read."""
    options = {"far_field": False, "window_size": 4, "num_sinks": 1, "block_size": 2, "min_weight": 0.0}
    spec = AttentionSpec(mechanism="retrieval", num_blocks=1, cluster_keys=clustered, **options)
    teacher = make()
    model = convert(teacher, spec).eval()
    length = min(200, teacher.config.max_position_embeddings)
    starts = [0, length - 40, length - 12]
    ids = torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(0))
    names = list(model.attention_states)
    # Queries are looked at in parts, of which the last stretch's second has one.
    monkeypatch.setattr("distattn_hf.conversion.observe._ROWS", 11)
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions
    found = keys_read(model, ids, starts, names[1:])
    assert [name for name, _ in found] == names[1:]
    key_heads = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)
    for (_, read), of_layer in zip(found, weights[1:]):
        assert read.shape == (len(starts), key_heads, length)
        for number, (start, stop) in enumerate(zip(starts, [*starts[1:], length])):
            expected = (of_layer[0, :, start:stop] > 0).any(1).unflatten(0, (key_heads, -1)).any(1)
            assert torch.equal(read[number], expected)
        # Few enough are read for the comparison to mean something.
        assert 0.1 < read[-1].double().mean() < 0.9


def test_shares_by_hand():
    # Four pieces of two tokens, one head; stretches of two pieces: the second reads 1 of the 4 keys before it.
    read = torch.zeros(4, 1, 8, dtype=torch.bool)
    read[3, 0, 1] = read[2, 0, 4] = read[0, 0, 7] = True
    assert share_read(read, 2) == (0.25, 0.25)
    # Four stretches: 0 of 2, 0 of 4 and 1 of 6 keys.
    assert share_read(read, 4) == pytest.approx((1 / 12, 1 / 6))


def test_bytes_by_hand():
    # 3 x 100 earlier keys; of each of 2 key heads 4 bytes of codes (8 coordinates), 4 of a scale, 8·4/16 of a mean; of
    # each of 4 query heads (2·8 + 1)·4 bytes for 16 keys.
    found = fetched(SMALL, 400, 4, 0.5, False)
    assert found["choosing"] == 300 * (2 * (4 + 4 + 2) + 4 * 17 * 4 / 16)
    # Of alike keys 8 + 4 bytes of variance and (8 + 1)·4 of value and bias for 16 keys of a key head.
    assert fetched(SMALL, 400, 4, 0.5, True)["choosing"] == 300 * 2 * (4 + 4 + (8 * 4 + 12 + 36) / 16)
    assert found["gathered"] == SMALL.sent("retrieval", 400, 4)["keys"] == 2 * found["rows"]


def test_a_small_run(tmp_path):
    """Also gone on with, of a checkpoint and a file: what stretches read does not depend on which others are asked."""
    given = [f"checkpoint={GPT2_ENGLISH}", f"data={GPT2_ENGLISH / 'heldout.txt'}", "modules=2"]
    quiet = {"quick": True, "echo": lambda line: None}
    first = run_experiment("sequence_reads", tmp_path, [*given, "lengths=256"], **quiet).rows
    rows = run_experiment("sequence_reads", tmp_path, [*given, "lengths=256", "processes=2,4"], **quiet).rows
    whole = run_experiment("sequence_reads", tmp_path / "b", [*given, "lengths=256", "processes=2,4"], **quiet).rows
    assert rows[:2] == first
    assert sorted(rows, key=str) == sorted(whole, key=str)
    assert {(row["processes"], row["cluster_keys"]) for row in rows} == {(p, c) for p in (2, 4) for c in (True, False)}
    for row in rows:
        assert 0 < row["least_head"] <= row["share"] <= row["most_head"] <= 1
        expected = fetched(THERE, 2**20, row["processes"], row["share"], row["cluster_keys"])
        assert {name: row[name] for name in expected} == expected
        assert (row["modules"], row["num_blocks"]) == (2, 64)


def test_to_see_it_run_needs_nothing(tmp_path):
    rows = run_experiment("sequence_reads", tmp_path, quick=True, echo=lambda line: None).rows
    assert [(row["length"], row["cluster_keys"]) for row in rows] == [
        (128, True), (256, True), (128, False), (256, False),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"lengths must be at most the .* tokens of data=made, got 1,000,000"):
        run_experiment("sequence_reads", tmp_path / "b", ["lengths=1000000"], quick=True)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("processes=1,2", "processes must be at least 2 and divide the largest of them, got 1"),
        ("processes=3,4", "processes must be at least 2 and divide the largest of them, got 3"),
        ("processes=[]", "processes must be at least 2 and divide the largest of them, got none"),
        ("lengths=127", "lengths must be at least 64 tokens a process, got 127"),
        ("lengths=1001", "lengths must be multiples of the largest of processes, got 1001"),
        ("modules=0", "modules must be >= 1, got 0"),
    ],
)
def test_options_that_cannot_be_are_named(tmp_path, given, words):
    with pytest.raises(ValueError, match=words):
        run_experiment("sequence_reads", tmp_path / "out", [given], quick=True)
    assert not (tmp_path / "out").exists()
