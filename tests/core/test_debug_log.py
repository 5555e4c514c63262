"""Logging at DEBUG says what runs an attention, once for shapes; a compiled graph stays one."""

import logging

import pytest
import torch

from distattn_hf import distance_attention, nystrom_attention, retrieval_attention
from distattn_hf.core import inputs
from distattn_hf.core.backends import explain_backend
from tests.native.choices import make_model


@pytest.fixture
def said(caplog, monkeypatch):
    """What the package logs at DEBUG, as `logging.basicConfig(level=logging.DEBUG)` would print it."""
    monkeypatch.setattr(inputs, "_said", {})
    caplog.set_level(logging.DEBUG)
    return lambda: [r.getMessage() for r in caplog.records if r.name.startswith("distattn_hf.core.inputs")]


def test_the_backend_once_for_each_shape(said):
    query, key = torch.randn(2, 4, 10, 8), torch.randn(2, 2, 12, 8)
    for _ in range(3):
        distance_attention(query, key, key, metric="l1")
    chosen = explain_backend(metric="l1", num_queries=10, num_keys=12, batch=2, heads=4, kv_heads=2, head_dim=8).backend
    shapes = "4 heads (2 of keys) of 8, 2 x 10 queries, 12 keys, torch.float32, cpu"
    assert said() == [f"l1 by {chosen}: {shapes}"]
    distance_attention(query, key, key, metric="l1", backend="chunked")
    assert said()[1:] == [f"l1 by chunked: {shapes}"]
    for length in (5, 6, 7):  # steps of generation
        distance_attention(query[:, :, :1], key[:, :, :length], key[:, :, :length], metric="cosine")
    assert len(said()) == 3
    assert "1 queries, M keys" in said()[2]


def test_other_attention(said):
    x = torch.randn(1, 2, 40, 8)
    retrieval_attention(x, x, x, is_causal=True)
    nystrom_attention(x, x, x, landmarks=x[0, :, :4], is_causal=True)
    make_model("local", "rotary", "causal")(torch.ones(1, 5, dtype=torch.long))
    assert [line.partition(" by ")[0] for line in said()] == ["retrieval", "nystrom", "local"]


def test_nothing_is_made_where_nobody_listens(caplog, monkeypatch):
    monkeypatch.setattr(inputs, "_said", set())
    caplog.set_level(logging.INFO)
    distance_attention(*torch.randn(3, 1, 2, 5, 8), metric="l1")
    assert not inputs._said


def test_a_compiled_graph_stays_one(said):
    torch._dynamo.reset()
    tensors = torch.randn(3, 1, 2, 5, 8)
    compiled = torch.compile(lambda q, k, v: distance_attention(q, k, v, metric="l2"), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*tensors), distance_attention(*tensors, metric="l2"))


def test_what_was_said_is_forgotten_in_the_end(said, monkeypatch):
    monkeypatch.setattr(inputs, "_MOST_SAID", 3)
    x = torch.randn(1, 1, 8, 4)
    for length in (4, 5, 6, 7, 4):
        distance_attention(x, x[:, :, :length], x[:, :, :length], metric="cosine")
    assert len(inputs._said) == 3
    assert len(said()) == 5, "the first was forgotten, and is said again"
