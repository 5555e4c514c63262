"""What every test shares: no network, and random numbers that are the same in every run."""

import os

# Before any import of transformers or huggingface_hub, which read it once.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

from distattn_hf import MECHANISMS, POSITIONAL_ENCODINGS  # noqa: E402
from distattn_hf.core.metrics import METRICS  # noqa: E402


@pytest.fixture(autouse=True)
def own_registries(monkeypatch):
    """What a test registers is gone after it."""
    for registry in (METRICS, MECHANISMS, POSITIONAL_ENCODINGS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
        monkeypatch.setattr(registry, "_aliases", dict(registry._aliases))


@pytest.fixture(autouse=True)
def fixed_seed():
    """Seed 0 before each test, so that a test gives the same numbers alone and in the whole suite."""
    torch.manual_seed(0)
