"""Global tokens: what a mask with their rows and columns open gives, by a dense softmax over the pattern of loops."""

import pytest
import torch

from distattn_hf.core.mechanisms import MECHANISMS
from tests.tolerances import assert_close

from .mechanism_oracles import MECHANISM_CASES, forms, naive_attention
from .test_mechanisms import flags, padding, problem, small_blocks  # noqa: F401 (a fixture)

CASES = [(c, form) for c in MECHANISM_CASES if MECHANISMS.get(c.name).takes_global for form in forms(c.name)]
every_case = pytest.mark.parametrize(("case", "form"), CASES, ids=[f"{c}-{f}" for c, f in CASES])


def tokens(length: int) -> torch.Tensor:
    """(2, N): in the first row several, one of them padding and one far from the start; in the other one."""
    chosen = torch.zeros(2, length, dtype=torch.bool)
    for row, place in ((0, 1), (0, length // 2), (0, length - 1), (1, (2 * length) // 3)):
        chosen[row, place] = True
    return chosen


def dense(module, form, query, key, value, keep, chosen, bias=None):
    """(output, weights) by a softmax over the keys of the pattern, of global keys, and of global queries."""
    pattern = naive_attention(module, query, key, value, keep, form)[1] > 0
    opened = pattern | chosen[:, None, None] | chosen[:, None, :, None]
    allowed = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
    seen = opened & (allowed.tril() if form == "causal" else allowed)
    seen = seen if keep is None else seen & keep[:, None, None]
    logits = query @ key.mT / query.shape[-1] ** 0.5
    logits = (logits if bias is None else logits + bias).masked_fill(~seen, float("-inf"))
    weights = torch.where(seen.any(-1, keepdim=True), logits, 0.0).softmax(-1) * seen.any(-1, keepdim=True)
    return weights @ value, weights


@every_case
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_equals_the_dense_mask(case, form, padded, small_blocks):  # noqa: F811
    """Output, weights and gradients, with a position bias."""
    module, tensors = case.make(), problem(case, form)
    keep, chosen = padding(tensors) if padded else None, tokens(13)
    tensors["bias"] = torch.randn(1, 2, 13, 13, dtype=torch.float64)
    upstream, results = torch.randn(2, 2, 13, 4, dtype=torch.float64), []
    for by_mask in (True, False):
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        if by_mask:
            output, weights = dense(module, form, **leaves, keep=keep, chosen=chosen)
        else:
            call = {**leaves, "keep": keep, "is_global": chosen, "return_weights": True, **flags(form)}
            output, weights = module(position_bias=call.pop("bias"), **call)
        gradients = torch.autograd.grad(output, list(leaves.values()), upstream)
        results.append({"output": output, "weights": weights, **dict(zip(leaves, gradients))})
    expected, actual = results
    # Queries of padding are nobody's: a pattern may give them anything.
    real = torch.ones(2, 13, dtype=torch.bool) if keep is None else keep
    for name in ("output", "weights"):
        assert_close(*(found[name].transpose(1, 2)[real] for found in (actual, expected)), "float64", name)
    if keep is None:
        for name in leaves:
            assert_close(actual[name], expected[name], "float64", name)


@every_case
def test_none_marked_is_the_pattern_alone_and_all_marked_is_full_attention(case, form, small_blocks):  # noqa: F811
    module, tensors = case.make(), problem(case, form)
    none = torch.zeros(2, 13, dtype=torch.bool)
    marked = none.clone()
    marked[:, 12] = True
    plain = module(**tensors, **flags(form))[0]
    assert_close(module(**tensors, **flags(form), is_global=none)[0], plain, "float64")
    full = torch.nn.functional.scaled_dot_product_attention(*tensors.values(), is_causal=form == "causal")
    assert_close(module(**tensors, **flags(form), is_global=~none)[0], full, "float64")
    last = module(**tensors, **flags(form), is_global=marked)[0]
    assert_close(last[:, :, 12], full[:, :, 12], "float64")
