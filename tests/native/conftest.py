"""Settings for transformers' common tests on the native family."""

from pathlib import Path

from tests.common.conftest import declare_marks, expect_failures, one_thread

from .not_applicable import NOT_APPLICABLE

__all__ = ["one_thread"]


def pytest_configure(config):
    declare_marks(config)


def pytest_collection_modifyitems(items):
    expect_failures(items, Path(__file__).parent, NOT_APPLICABLE)
