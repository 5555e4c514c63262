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


def pytest_configure(config):
    for mark in UPSTREAM_MARKS:
        config.addinivalue_line("markers", f"{mark}: of transformers' common tests")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent != Path(__file__).parent or item.cls is None:
            continue
        for name in (item.name, f"{item.cls.__name__}.{item.name}"):
            if name in NOT_APPLICABLE:
                item.add_marker(pytest.mark.xfail(reason=NOT_APPLICABLE[name], strict=True))


@pytest.fixture(autouse=True)
def one_thread():
    """The models are tiny: two threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
