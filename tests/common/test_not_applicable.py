"""The table of tests that cannot hold, against the tests there are."""

from .not_applicable import NOT_APPLICABLE
from .upstream import ModelTesterMixin


def test_every_entry_names_a_test():
    for key in NOT_APPLICABLE:
        assert hasattr(ModelTesterMixin, key.rpartition(".")[2]), f"transformers has no test {key} any more"
