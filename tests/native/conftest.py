"""Settings for transformers' common tests on the native family."""

from pathlib import Path

import pytest

from tests.common.conftest import UPSTREAM_MARKS, one_thread

from .not_applicable import NOT_APPLICABLE

__all__ = ["one_thread"]


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
