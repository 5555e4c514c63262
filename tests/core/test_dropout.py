"""Dropout on the weights: which are dropped, how the rest is scaled, and that the backward pass uses the same ones."""

import pytest
import torch

from tests.tolerances import STANDARD_ERRORS, assert_close

from .cases import every_dropout_case, make_tensors

P = 0.3
OPTIONS = {
    "full": {},
    "causal": {"is_causal": True},
    "masked": {"mask": (torch.arange(40)[:, None] + 2 * torch.arange(9))[None] % 5 != 1},
}


@every_dropout_case
@pytest.mark.parametrize("options", OPTIONS)
def test_each_weight_is_dropped_or_scaled(case, options):
    """With the identity for a value the output is the weights: each is 0 or 1/(1-p) of what it was."""
    tensors, options = make_tensors(40, 9, 9, batch=1), dict(OPTIONS[options])
    tensors = {name: tensor.expand(2, -1, -1, -1) for name, tensor in tensors.items()}
    tensors["value"] = torch.eye(9).expand(2, 2, 9, 9)
    weights = case(**tensors, **options)
    dropped = case(**tensors, **options, dropout_p=P)
    kept = dropped != 0
    assert_close(dropped[kept], weights[kept] / (1 - P), "float32_forward")
    possible = weights > 0
    share, count = float((possible & ~kept).sum() / possible.sum()), int(possible.sum())
    assert abs(share - P) < STANDARD_ERRORS * (P * (1 - P) / count) ** 0.5
    # Each item, head and block of 16 queries draws its own.
    patterns = kept[:, :, :32].unflatten(2, (2, 16)).transpose(1, 2).flatten(0, 2)
    assert len({tuple(pattern.flatten().tolist()) for pattern in patterns}) == len(patterns)


@every_dropout_case
def test_mean_over_seeds_is_the_output_without_dropout(case):
    tensors = make_tensors(18, 9, 8)
    # A batch of copies is as good as many seeds: each item draws its own.
    copies = {name: tensor[:1].expand(500, -1, -1, -1) for name, tensor in tensors.items()}
    samples = case(**copies, dropout_p=P)
    expected = case(**{name: tensor[:1] for name, tensor in tensors.items()})[0]
    deviation, error = samples.std(0) / 500**0.5, (samples.mean(0) - expected).abs()
    assert bool((deviation > 0).all())
    assert float((error / deviation).max()) < STANDARD_ERRORS


@every_dropout_case
def test_seed_decides(case):
    tensors = make_tensors(20, 9, 8)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(case(**tensors, dropout_p=P))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@every_dropout_case
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_backward_uses_the_weights_that_forward_kept(case, is_causal):
    """Finite differences under one seed: recomputed blocks with other draws would have another gradient."""
    shapes = ((1, 1, 18, 2), (1, 1, 3, 2), (1, 1, 3, 2)) if case.blocks else ((1, 1, 4, 2), (1, 1, 3, 2), (1, 1, 3, 2))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def attention(query, key, value):
        torch.manual_seed(3)
        return case(query, key, value, dropout_p=P, is_causal=is_causal)

    assert torch.autograd.gradcheck(attention, inputs)


@every_dropout_case
def test_backward_leaves_the_random_stream_alone(case):
    """Other random draws between forward and backward neither matter nor are repeated."""
    tensors = {name: tensor.requires_grad_() for name, tensor in make_tensors(40, 9, 8).items()}
    gradients = []
    for between in (0, 5):
        torch.manual_seed(4)
        output = case(**tensors, dropout_p=P)
        torch.rand(between)
        before = torch.get_rng_state()
        gradients.append(torch.autograd.grad(output.square().sum(), list(tensors.values())))
        assert torch.equal(torch.get_rng_state(), before)
    for first, second in zip(*gradients):
        assert_close(first, second, "equal")


@every_dropout_case
def test_returned_weights_are_those_before_dropout(case):
    tensors = make_tensors(20, 9, 8)
    if case.backend != "reference":
        with pytest.raises(ValueError, match="return_weights"):
            case(**tensors, return_weights=True)
        return
    output, weights = case(**tensors, return_weights=True)
    dropped_output, same_weights = case(**tensors, dropout_p=P, return_weights=True)
    assert_close(same_weights, weights, "equal")
    assert not torch.equal(dropped_output, output)
