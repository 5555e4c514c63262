"""Settings for transformers' common tests."""

from pathlib import Path

import pytest
import torch

from .not_applicable import NOT_APPLICABLE

# Marks that the tests carry, and that say nothing here.
UPSTREAM_MARKS = (
    "accelerate_tests",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_test",
    "is_training_test",
    "torch_compile_test",
)


def declare_marks(config):
    """Make `UPSTREAM_MARKS` known to pytest."""
    for mark in UPSTREAM_MARKS:
        config.addinivalue_line("markers", f"{mark}: of transformers' common tests")


def expect_failures(items, folder: Path, reasons: dict[str, str]):
    """Strict xfail for the tests of a folder that `reasons` names, by test or class.test."""
    for item in items:
        if item.path.parent != folder or item.cls is None:
            continue
        for name in (item.name, f"{item.cls.__name__}.{item.name}"):
            if name in reasons:
                item.add_marker(pytest.mark.xfail(reason=reasons[name], strict=True))


def pytest_configure(config):
    declare_marks(config)


def pytest_collection_modifyitems(items):
    expect_failures(items, Path(__file__).parent, NOT_APPLICABLE)


@pytest.fixture(autouse=True)
def one_thread():
    """The models are tiny: two threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
