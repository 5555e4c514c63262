"""Core tests run on one thread: their tensors are so small that sharing work takes longer than doing it."""

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Beside another job on the same two cores this is 20 s instead of 4 minutes for test_backends.py."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
