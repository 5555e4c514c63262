"""What every test shares: its tier, no network, and random numbers that are the same in every run."""

import os
from logging import getLogger

# Before any import of transformers or huggingface_hub, which read it once.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

from distattn_hf import MECHANISMS, POSITIONAL_ENCODINGS  # noqa: E402
from distattn_hf.core.metrics import METRICS  # noqa: E402
from tests import tiers  # noqa: E402

LEFT_OUT = pytest.StashKey[dict]()
COLLECTED = pytest.StashKey[list]()


def pytest_configure(config):
    config.stash[LEFT_OUT] = {}
    for tier, meaning in tiers.TIERS.items():
        config.addinivalue_line("markers", f"{tier}: {meaning}")
    config.addinivalue_line("markers", "slow: of transformers' common tests, which skip those themselves")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    config.stash[COLLECTED] = names = [item.nodeid for item in items]
    beyond = tiers.beyond_the_sample(names)
    for item in items:
        item.add_marker("system" if item.nodeid in beyond else tiers.tier_of(item.nodeid))


def _tier(item) -> str:
    return next(tier for tier in tiers.TIERS if item.get_closest_marker(tier))


def pytest_deselected(items):
    """Keep what `-m` left out; what a caller's own `-k` leaves out is his."""
    chosen = items[0].config.option.markexpr.split() if items else ()
    other = [(item.nodeid, _tier(item)) for item in items if _tier(item) not in chosen]
    if chosen and other:
        items[0].config.stash[LEFT_OUT] = tiers.left_out(other)


def pytest_sessionfinish(session):
    """Tell the process that prints: with pytest-xdist, another one than that which chose."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash[LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return tiers.scheduler(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", {})


def pytest_terminal_summary(terminalreporter, config):
    for line in tiers.lines(config.stash[LEFT_OUT]):
        terminalreporter.write_line(line)


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


@pytest.fixture(autouse=True)
def same_log_levels():
    """What is called leaves how much is logged as it found it, or tests of warnings fail after it."""
    levels = {name: getLogger(name).level for name in ("transformers", "distattn_hf")}
    yield
    assert {name: getLogger(name).level for name in levels} == levels
