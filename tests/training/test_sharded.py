"""Two processes under FSDP2 compute what one computes: parameters are gathered around `forward`, and read there."""

import sys

import pytest
import torch

from tests.training.sharded_worker import CASES, STEPS, build, steps
from tests.training.test_distributed import start


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(losses, gradients of the first step) of each case."""
    out = tmp_path_factory.mktemp("sharded") / "found.pt"
    start(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
          "--rdzv-endpoint", "localhost:0", "-m", "tests.training.sharded_worker", str(out))  # fmt: skip
    return torch.load(out)


@pytest.mark.parametrize("case", CASES)
def test_sharded_steps_are_the_steps_of_one_process(two, case):
    assert not isinstance(two[case], str), two[case]
    losses, gradients = two[case]
    expected_losses, expected = steps(*build(case))
    # transformers takes the logits of a loss to float32; from the second on, what Adam made of that rounding.
    assert losses[0] == pytest.approx(float(expected_losses[0]), rel=1e-5)
    assert losses == pytest.approx([float(loss) for loss in expected_losses], rel=1e-5)
    assert len(losses) == STEPS
    assert losses[0] - losses[-1] > 0.05
    assert set(gradients) == set(expected)
    assert any(".distattn." in name for name in expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max() + 1))
