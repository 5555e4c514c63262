"""Two processes under FSDP2 compute what one computes: parameters are gathered around `forward`, and read there."""

import sys

import pytest
import torch

from tests.training.sharded_worker import CASES, build, step
from tests.training.test_distributed import start


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(loss, gradients) of each case."""
    out = tmp_path_factory.mktemp("sharded") / "found.pt"
    start(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
          "--rdzv-endpoint", "localhost:0", "-m", "tests.training.sharded_worker", str(out))  # fmt: skip
    return torch.load(out)


@pytest.mark.parametrize("case", CASES)
def test_a_sharded_step_is_the_step_of_one_process(two, case):
    assert not isinstance(two[case], str), two[case]
    loss, gradients = two[case]
    model, batch = build(case)
    expected = dict(model.named_parameters())
    # float32 sums of two rows in another order.
    assert loss == pytest.approx(float(step(model, batch)), rel=1e-5)
    trained = {name for name, p in expected.items() if p.grad is not None}
    assert set(gradients) == trained
    assert any(".distattn." in name for name in trained)
    for name in trained:
        gradient = expected[name].grad
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max() + 1))
