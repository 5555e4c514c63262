"""Every attention mechanism of the native family, through one table of cases, against loops over queries and keys."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from distattn_hf.core import mechanism_landmark, mechanism_linear, mechanism_windows, retrieval_blocks
from distattn_hf.core.mechanisms import MECHANISMS
from tests.tolerances import HALF_ERROR_RATIO, STANDARD_ERRORS, assert_close

from .mechanism_oracles import MECHANISM_CASES, MechanismCase, forms, naive_attention
from .test_half_precision import DTYPES, errors, pytorch_errors

CASE_FORMS = [(case, form) for case in MECHANISM_CASES for form in forms(case.name)]
every_case = pytest.mark.parametrize("case", MECHANISM_CASES, ids=str)
every_form = pytest.mark.parametrize(("case", "form"), CASE_FORMS, ids=[f"{c}-{f}" for c, f in CASE_FORMS])
every_causal_case = pytest.mark.parametrize("case", [c for c, f in CASE_FORMS if f == "causal"], ids=str)
# One case of each mechanism where the parts of its pattern do not matter.
ONE_OF_EACH = list({(case.name, form): (case, form) for case, form in reversed(CASE_FORMS)}.values())
one_of_each = pytest.mark.parametrize(("case", "form"), ONE_OF_EACH, ids=[f"{c}-{f}" for c, f in ONE_OF_EACH])


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks and parts of a few queries, so that short sequences have several, and the last is not full."""
    monkeypatch.setattr(mechanism_linear, "_BLOCK", 4)
    monkeypatch.setattr(mechanism_windows, "_FEWEST", 2)
    monkeypatch.setattr(mechanism_windows, "_MOST", 3)
    monkeypatch.setattr(mechanism_landmark, "_ENTRIES", 400)
    monkeypatch.setattr(retrieval_blocks, "ENTRIES", 400)


def flags(form: str) -> dict:
    return {"is_causal": form == "causal", "is_cross": form == "cross"}


def problem(case, form, length=13, num_queries=None, batch=2, size=4, dtype=torch.float64):
    """Query, key and value; in the cross form there are more keys than queries."""
    num_queries = num_queries or length
    num_keys = length + 3 if form == "cross" else length
    shapes = {"query": num_queries, "key": num_keys, "value": num_keys}
    return {name: torch.randn(batch, 2, n, size, dtype=dtype) for name, n in shapes.items()}


def padding(tensors, *, holes=True):
    """keep (B, M): holes and padding at the end in the first item, padding at the start in the second."""
    batch, _, length, _ = tensors["key"].shape
    keep = torch.ones(batch, length, dtype=torch.bool)
    keep[0, -(length // 4) :] = length < 4
    if holes and length > 6:
        keep[0, 3:5] = False
    keep[1, : length // 3] = False
    return keep


def test_every_mechanism_has_a_case():
    assert {case.name for case in MECHANISM_CASES} == set(MECHANISMS)


@every_form
@pytest.mark.parametrize("length", [1, 4, 13])
def test_equals_the_naive_version(case, form, length, small_blocks):
    """Output, weights and all gradients, with padding, a scaling and (where it can be had) a position bias."""
    module, tensors = case.make(), problem(case, form, length)
    keep = padding(tensors) if length > 1 else None
    shape = (2, 2, tensors["query"].shape[2], tensors["key"].shape[2])
    extra = {"bias": torch.randn(1, *shape[1:], dtype=torch.float64)} if module.takes_bias else {}
    upstream = torch.randn(shape[:3] + (4,), dtype=torch.float64)
    results = []
    for naive in (True, False):
        leaves = {name: t.clone().requires_grad_() for name, t in {**tensors, **extra}.items()}
        call = dict(leaves, scaling=0.6, keep=keep)
        if naive:
            output, weights = naive_attention(module, form=form, **call)
        else:
            bias = call.pop("bias", None)
            output, weights = module(**call, **flags(form), position_bias=bias, return_weights=True)
        wanted = {**leaves, **dict(module.named_parameters())}
        gradients = torch.autograd.grad(output, list(wanted.values()), upstream, materialize_grads=True)
        results.append({"output": output, "weights": weights, **dict(zip(wanted, gradients))})
    expected, actual = results
    for name, tensor in expected.items():
        assert_close(actual[name], tensor, "float64", name)
    assert bool((expected["output"] != 0).any())


@every_form
def test_defaults(case, form, small_blocks):
    """No padding, no bias, and the scaling that a mechanism has by itself; values of another size than keys."""
    module, tensors = case.make(), problem(case, form)
    if case.name != "relative":
        tensors["value"] = tensors["value"][..., :3]
    output, weights = module(**tensors, **flags(form))
    assert weights is None
    assert_close(output, naive_attention(module, **tensors, form=form)[0], "float64")


@every_form
def test_rows_of_weights(case, form, small_blocks):
    """They give the output, sum to 1 and are 0 for what is hidden."""
    module, tensors = case.make(), problem(case, form)
    keep = padding(tensors)
    output, weights = module(**tensors, **flags(form), keep=keep, return_weights=True)
    if case.name != "relative":
        assert_close(weights @ tensors["value"], output, "float64")
    hidden = ~keep[:, None, None].expand_as(weights)
    if form == "causal":
        hidden = hidden | torch.ones_like(hidden).triu(1)
    assert bool((weights[hidden] == 0).all())
    if case.name != "linformer":
        # With a narrow window, padding may be all that a query sees.
        total = weights.sum(-1)
        assert_close(total, (weights > 0).any(-1).to(total), "float64")


@every_causal_case
def test_the_future_changes_nothing(case, small_blocks):
    """Bit for bit, in float32, also where later keys are so large that their exponentials would dwarf all others."""
    module, tensors = case.make().float(), problem(case, "causal", dtype=torch.float32)
    keep = padding(tensors, holes=False)
    keep[0] = True
    expected = module(**tensors, is_causal=True, keep=keep)[0]
    for cut in (1, 4, 7, 12):
        for size in (1.0, 40.0):
            later = torch.arange(13)[:, None] >= cut
            changed = {name: torch.where(later, size * torch.randn_like(t), t) for name, t in tensors.items()}
            other_keep = keep.clone()
            other_keep[:, cut:] = torch.rand(2, 13 - cut) > 0.3
            actual = module(**changed, is_causal=True, keep=other_keep)[0]
            assert_close(actual[:, :, :cut], expected[:, :, :cut], "equal", f"{cut}")
            assert not torch.equal(actual, expected)


@every_causal_case
def test_decoding_equals_the_last_rows(case, small_blocks):
    """The last N queries with all keys in a cache, N from one to all but one."""
    module, tensors = case.make(), problem(case, "causal")
    keep = padding(tensors)
    bias = torch.randn(2, 2, 13, 13, dtype=torch.float64) if module.takes_bias else None
    expected = module(**tensors, is_causal=True, keep=keep, position_bias=bias, return_weights=True)
    for count in (1, 2, 5, 12):
        last = {**tensors, "query": tensors["query"][:, :, -count:]}
        rows = None if bias is None else bias[:, :, -count:]
        actual = module(**last, is_causal=True, keep=keep, position_bias=rows, return_weights=True)
        for mine, whole in zip(actual, expected):
            assert_close(mine, whole[:, :, -count:], "float64", f"{count}")


@every_form
def test_padding_and_neighbours_change_nothing(case, form, small_blocks):
    """What stands in padding, bit for bit; the other item, bit for bit; and how much padding there is at the end."""
    module, tensors = case.make(), problem(case, form)
    keep = padding(tensors)
    expected = module(**tensors, **flags(form), keep=keep)[0]
    hidden = ~keep[:, None, :, None]
    garbage = {
        name: torch.where(hidden, 30 * torch.randn_like(tensors[name]), tensors[name]) for name in ("key", "value")
    }
    assert_close(module(tensors["query"], **garbage, **flags(form), keep=keep)[0], expected, "equal")
    for row in (0, 1):
        changed = {name: t.clone() for name, t in tensors.items()}
        for tensor in changed.values():
            tensor[1 - row] = 30 * torch.randn_like(tensor[row])
        other_keep = keep.clone()
        other_keep[1 - row] = True
        actual = module(**changed, **flags(form), keep=other_keep)[0]
        assert_close(actual[row], expected[row], "equal")
        assert not torch.equal(actual, expected)
    longer = {name: F.pad(t, (0, 0, 0, 3), value=9.0) for name, t in tensors.items()}
    actual = module(**longer, **flags(form), keep=F.pad(keep, (0, 3), value=False))[0]
    assert_close(actual[:, :, :-3], expected, "float64")


@every_form
def test_queries_that_see_nothing(case, form, small_blocks):
    """Zeros and finite gradients: an item of padding only, and, causal, padding at the start."""
    module, tensors = case.make(), problem(case, form)
    keep = padding(tensors)
    keep[0] = False
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    output = module(**leaves, **flags(form), keep=keep)[0]
    assert bool((output[0] == 0).all())
    if form == "causal":
        assert bool((output[1, :, :4] == 0).all())
    assert bool((output[1] != 0).any())
    wanted = [*leaves.values(), *module.parameters()]
    for gradient in torch.autograd.grad(output.square().sum(), wanted, materialize_grads=True):
        assert bool(gradient.isfinite().all())


@one_of_each
@DTYPES
def test_half_precision_error_is_within_twice_pytorchs(case, form, dtype):
    """Truth is the mechanism in float64 on the same rounded inputs; the yardstick is PyTorch's attention on them."""
    module = MechanismCase(case.name, case.options, max_length=64).make(head_dim=32).to(dtype)
    tensors = problem(case, form, 40, size=32, dtype=dtype)
    upstream = torch.randn(2, 2, 40, 32).to(dtype)

    def run(module, dtype):
        leaves = {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}
        output = module(**leaves, **flags(form))[0]
        assert output.dtype == dtype
        gradients = torch.autograd.grad(output, list(leaves.values()), upstream.to(dtype))
        return {"output": output.detach(), **dict(zip(leaves, gradients))}

    actual = run(module, dtype)
    ours = errors(actual, run(module.double(), torch.float64))
    theirs = pytorch_errors(tensors, {"is_causal": form == "causal"})
    for name in ours:
        assert ours[name][0] <= HALF_ERROR_RATIO * theirs[name][0], (name, ours[name], theirs[name])


@one_of_each
def test_autocast_changes_nothing_inside(case, form, small_blocks):
    module, tensors = case.make().float(), problem(case, form, dtype=torch.float32)

    def gradients(enabled):
        leaves = [t.clone().requires_grad_() for t in tensors.values()]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output = module(*leaves, **flags(form))[0]
        return output, *torch.autograd.grad(output.sum(), leaves)

    for actual, expected in zip(gradients(True), gradients(False)):
        assert_close(actual, expected, "equal")


@one_of_each
def test_dropout(case, form, small_blocks):
    """The mean over draws is the output without dropout; a batch of copies is as good as many draws."""
    draws, module = 3000, case.make()
    tensors = problem(case, form, 7, batch=1)
    expected = module(**tensors, **flags(form))[0]
    copies = {name: t.expand(draws, -1, -1, -1) for name, t in tensors.items()}
    samples = module(**copies, **flags(form), dropout_p=0.3)[0]
    deviation = samples.std(0) / math.sqrt(draws)
    assert bool((deviation > 0).all())
    assert float(((samples.mean(0) - expected[0]).abs() / deviation).detach().max()) < STANDARD_ERRORS
    before = torch.get_rng_state()
    assert torch.equal(module(**tensors, **flags(form), dropout_p=0.0)[0], expected)
    assert torch.equal(torch.get_rng_state(), before)


@one_of_each
def test_the_backward_pass_has_the_dropout_of_the_forward_pass(case, form, small_blocks):
    """The output is linear in the values: their gradient times the values is the output's gradient times it."""
    module, tensors = case.make(), problem(case, form)
    if case.name == "relative":
        torch.nn.init.zeros_(module.value_embedding)
    value = tensors["value"].requires_grad_()
    output = module(**tensors, **flags(form), dropout_p=0.5)[0]
    upstream = torch.randn_like(output)
    gradient = torch.autograd.grad(output, value, upstream)[0]
    assert_close((gradient * value).sum(), (upstream * output).sum(), "float64")


class _Largest(TorchDispatchMode):
    """Entries of the largest tensor that any operation made, and of all of them together."""

    entries = total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
                self.total += tensor.numel()
        return result


LINEAR = [(case, form) for case, form in ONE_OF_EACH if case.name != "relative"]


@pytest.mark.parametrize(("case", "form"), LINEAR, ids=[f"{c}-{f}" for c, f in LINEAR])
def test_memory_and_work_grow_with_the_length(case, form, monkeypatch):
    """Forward and backward; 4 times the length would make an (N, M) tensor 16 times as large.

    So would it make the sum of all tensors if each block had a gradient of the whole length.
    """
    # Many blocks, so that what is done once a block for the whole length would show.
    monkeypatch.setattr(mechanism_linear, "_BLOCK", 16)
    module, found = MechanismCase(case.name, case.options, max_length=2048 + 3).make().float(), []
    for length in (512, 2048):
        tensors = problem(case, form, length, batch=1, dtype=torch.float32)
        keep = torch.ones(1, tensors["key"].shape[2], dtype=torch.bool)
        leaves = {name: t.requires_grad_() for name, t in tensors.items()}
        with _Largest() as mode:
            module(**leaves, **flags(form), keep=keep)[0].sum().backward()
        found.append(mode)
        assert mode.entries < 2 * length * length
    assert found[1].entries <= 4.5 * found[0].entries
    assert found[1].total <= 4.5 * found[0].total


@one_of_each
def test_built_on_the_meta_device_and_reset(case, form):
    """As transformers builds models that it loads: what is not in the checkpoint is set by `reset_parameters`."""
    kind, options = MECHANISMS.get(case.name), {"max_length": case.max_length, **case.options}
    expected = kind(2, 4, **options)
    with torch.device("meta"):
        module = kind(2, 4, **options)
    module = module.to_empty(device="cpu")
    torch.manual_seed(5)
    expected.reset_parameters()
    torch.manual_seed(5)
    module.reset_parameters()
    assert module.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name
