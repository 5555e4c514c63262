"""The table of tests that cannot hold, against the tests there are."""

from tests.common.generation import GenerationTests
from tests.common.upstream import ModelTesterMixin

from . import test_common_causal, test_common_encoder, test_common_seq2seq
from .not_applicable import NOT_APPLICABLE


def test_every_entry_names_a_test():
    for key in NOT_APPLICABLE:
        owner, _, name = key.rpartition(".")
        found = any(hasattr(tests, name) for tests in (ModelTesterMixin, GenerationTests))
        assert found, f"neither transformers nor {GenerationTests.__name__} has a test {name} any more"
        files = (test_common_causal, test_common_encoder, test_common_seq2seq)
        assert not owner or any(hasattr(file, owner) for file in files), f"there is no test class {owner}"
