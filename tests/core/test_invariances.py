"""What must not change: padding, the future, the order of the batch; and what the weights add up to."""

import pytest
import torch

from distattn_hf import distance_attention
from tests.tolerances import assert_close

from .cases import METRIC_CASES, every_case, every_metric, make_tensors, metric_id

LENGTH = 40
PADDING = {"left": slice(0, 9), "right": slice(31, 40), "middle": slice(10, 12)}


def exactness(case) -> str:
    """The lift's R is the largest norm of all keys, masked ones too: a constant of the row, but one that rounds."""
    return "float32_forward" if case.metric == "lifted_sqeuclidean" and case.backend != "sdpa" else "equal"


@every_case
@pytest.mark.parametrize(("where", "is_causal"), [("left", True), ("right", False), ("middle", True)])
def test_padding_tokens_change_nothing(case, where, is_causal):
    """Other keys and values in the padding of item 0: no row of either item may notice."""
    tensors = make_tensors(LENGTH, head_dim=16)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, PADDING[where]] = 0
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    changed["key"][0, :, PADDING[where]] = 2 * torch.randn(2, LENGTH, 16)[:, PADDING[where]]
    changed["value"][0, :, PADDING[where]] = 50.0
    before, after = (case(**t, mask=mask, is_causal=is_causal) for t in (tensors, changed))
    assert_close(after, before, exactness(case))
    # Without the mask the same change is plain to see.
    before, after = (case(**t, is_causal=is_causal) for t in (tensors, changed))
    assert float((after - before).abs().max()) > 0.1


@every_case
def test_padding_tokens_get_no_gradient(case):
    tensors = {name: tensor.requires_grad_() for name, tensor in make_tensors(LENGTH, head_dim=16).items()}
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, PADDING["right"]] = 0
    output = case(**tensors, mask=mask)
    for name in ("key", "value"):
        (gradient,) = torch.autograd.grad(output.square().sum(), tensors[name], retain_graph=True)
        padding = gradient[0, :, PADDING["right"]]
        assert_close(padding, torch.zeros_like(padding), "equal", name)
        assert float(gradient[1, :, PADDING["right"]].abs().max()) > 1e-3


@every_case
@pytest.mark.parametrize("cut", [16, 25])
def test_the_future_changes_nothing_before_it(case, cut):
    tensors = make_tensors(LENGTH, head_dim=16)
    before = case(**tensors, is_causal=True)
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    for tensor in changed.values():
        tensor[:, :, cut:] = 5 * torch.randn_like(tensor[:, :, cut:])
    after = case(**changed, is_causal=True)
    assert_close(after[:, :, :cut], before[:, :, :cut], exactness(case))
    assert float((after[:, :, cut] - before[:, :, cut]).abs().min()) > 0


@every_case
def test_causal_flag_equals_the_triangle_as_a_mask(case):
    tensors = make_tensors(LENGTH, 23, 16)
    triangle = torch.ones(1, 1, LENGTH, 23, dtype=torch.bool).tril()
    assert_close(case(**tensors, is_causal=True), case(**tensors, mask=triangle), "float32_forward")


@every_case
def test_rows_follow_the_batch_and_the_heads(case):
    tensors = make_tensors(20, 23, 16, batch=3, heads=4)
    lam = torch.linspace(0.5, 1.5, 4)
    mask, bias = torch.rand(3, 23) > 0.3, torch.randn(3, 4, 20, 23)
    items, heads = torch.tensor([2, 0, 1]), torch.tensor([1, 3, 0, 2])
    expected = case(**tensors, lam=lam, mask=mask, position_bias=bias)[items][:, heads]
    moved = {name: tensor[items][:, heads] for name, tensor in tensors.items()}
    actual = case(**moved, lam=lam[heads], mask=mask[items], position_bias=bias[items][:, heads])
    assert_close(actual, expected, "float32_forward")


@every_case
def test_an_item_alone_gives_what_it_gives_in_a_batch(case):
    tensors = make_tensors(20, 23, 16, batch=3)
    together = case(**tensors)
    for item in range(3):
        alone = case(**{name: tensor[item : item + 1] for name, tensor in tensors.items()})
        assert_close(alone[0], together[item], "float32_forward")


@every_case
def test_queries_one_by_one_give_what_they_give_together(case):
    """Step-by-step decoding over a cache: query i alone, on the keys up to i, is row i of the causal whole."""
    tensors = make_tensors(20, head_dim=16)
    together = case(**tensors, is_causal=True, lam=0.9)
    for i in range(20):
        step = {n: t[:, :, i : i + 1] if n == "query" else t[:, :, : i + 1] for n, t in tensors.items()}
        assert_close(case(**step, lam=0.9), together[:, :, i : i + 1], "float32_forward")


@every_metric
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_rows_of_weights_sum_to_one_and_give_the_output(metric, p, is_causal):
    tensors = make_tensors(20, 23, 16)
    mask = torch.rand(2, 1, 20, 23) > 0.3
    mask[..., 0] = True
    mask[0, :, 7] = False
    options = {"metric": metric, "p": p, "mask": mask, "is_causal": is_causal}
    output, weights = distance_attention(**tensors, **options, return_weights=True)
    assert weights.shape == (2, 2, 20, 23)
    assert bool((weights >= 0).all())
    keep = (mask & torch.ones(20, 23, dtype=torch.bool).tril() if is_causal else mask).expand_as(weights)
    assert bool((weights[~keep] == 0).all())
    assert_close(weights.sum(-1), mask.any(-1).expand(-1, 2, -1).float(), "weights_sum")
    assert_close(output, distance_attention(**tensors, **options), "float32_forward")
    assert_close(torch.matmul(weights, tensors["value"]), output, "float32_forward")


@pytest.mark.parametrize(
    ("metric", "p"),
    [c for c in METRIC_CASES if c[0] != "dot"],
    ids=[metric_id(c) for c in METRIC_CASES if c[0] != "dot"],
)
def test_nearer_keys_weigh_more(metric, p):
    """The sign of the logits, straight from the meaning of a distance."""
    query, near, far = [1.0, 0.5, 0.0, 0.0], [0.9, 0.6, 0.0, 0.0], [-0.6, 0.9, 0.0, 0.0]
    query, key = torch.tensor([[[query]]]), torch.tensor([[[far, near]]])
    _, weights = distance_attention(query, key, key, metric=metric, p=p, return_weights=True)
    assert float(weights[0, 0, 0, 1]) > 0.5 > float(weights[0, 0, 0, 0])


@every_metric
def test_larger_lambda_is_sharper(metric, p):
    tensors = make_tensors(20, 23, 16)
    entropies = []
    for lam in (1e-6, 0.5, 2.0, 1e3):
        _, weights = distance_attention(**tensors, metric=metric, p=p, lam=lam, return_weights=True)
        entropies.append(float(torch.special.entr(weights).sum(-1).mean()))
    assert entropies == sorted(entropies, reverse=True)
    assert entropies[0] == pytest.approx(torch.tensor(23.0).log().item(), abs=1e-4)
    assert entropies[-1] < 0.1
