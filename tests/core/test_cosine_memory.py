"""Cosine in parts on the CPU: the numbers do not depend on the division, and no normalised copies are kept."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from distattn_hf import distance_attention
from distattn_hf.core import backend_sdpa
from tests.tolerances import assert_close

from .cases import Case, evaluate, lambdas, make_tensors, upstream_gradient
from .oracles import loop_attention
from .test_backends import BATCH, BIASES, HEADS, KEYS, QUERIES, call_of, check_against_reference, every_row

COSINE = Case("cosine", None, "sdpa")
SHAPES = {
    "17 by 17, head size 7": {"num_queries": 17, "head_dim": 7},
    "37 by 5, 3 sequences": {"num_queries": 37, "num_keys": 5, "head_dim": 16, "batch": 3},
    "5 by 37, 5 heads": {"num_queries": 5, "num_keys": 37, "head_dim": 24, "heads": 5},
    "grouped keys": {"num_queries": 33, "num_keys": 20, "head_dim": 24, "heads": 6, "key_heads": 3},
    "one key head": {"num_queries": 19, "num_keys": 20, "head_dim": 8, "heads": 4, "key_heads": 1, "batch": 3},
}


@pytest.fixture
def parts(monkeypatch):
    """What each call of PyTorch's kernels got, in order: ("forward" or "backward", sequences, query heads)."""
    calls = []
    monkeypatch.setattr(backend_sdpa, "_LEAST_LOGITS", 0)

    def recording(name, kernel):
        def run(*tensors, **options):
            query = tensors[name == "backward"]
            calls.append((name, *query.shape[:2]))
            return kernel(*tensors, **options)

        return run

    monkeypatch.setattr(backend_sdpa, "_FLASH", recording("forward", backend_sdpa._FLASH))
    monkeypatch.setattr(backend_sdpa, "_FLASH_BACKWARD", recording("backward", backend_sdpa._FLASH_BACKWARD))
    return calls


@pytest.fixture(params=[1, 40, 80], ids="{} rows".format)
def small_parts(request, monkeypatch, parts):
    """Parts of at least so many query rows: one head each, some heads (the last part has fewer), some sequences."""
    monkeypatch.setattr(backend_sdpa, "_PART_ROWS", request.param)
    monkeypatch.setattr(backend_sdpa, "_PART_LOGITS", 1)
    yield parts
    assert {name for name, *_ in parts} >= {"forward"}, "another path ran"


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(small_parts, shape):
    tensors, is_causal = make_tensors(**SHAPES[shape]), list(SHAPES).index(shape) % 2 == 1
    tensors["lam"] = lambdas(tensors["query"].shape[1])
    check_against_reference(COSINE, tensors, is_causal=is_causal)
    assert {name for name, *_ in small_parts} == {"forward", "backward"}


@pytest.mark.parametrize("small_parts", [40], indirect=True)
@every_row
def test_every_pair_of_choices(small_parts, row):
    """A bias comes without a gradient, as the kernel has none, and values as wide as the keys."""
    tensors, options = call_of(row)
    tensors["value"] = torch.randn(*tensors["key"].shape)
    if "position_bias" in tensors:
        options["position_bias"] = tensors.pop("position_bias")
    check_against_reference(COSINE, tensors, **options)


@pytest.mark.parametrize("bias", BIASES)
def test_biases_without_a_gradient(small_parts, bias):
    tensors = make_tensors(QUERIES, KEYS, 9, batch=BATCH, heads=HEADS)
    check_against_reference(COSINE, tensors, position_bias=torch.randn(BIASES[bias]), lam=0.7)


@pytest.mark.parametrize("keys", [2, 4])
def test_against_loops(small_parts, keys):
    """The oracle in plain Python, with a λ per head and a hidden key."""
    tensors = make_tensors(9, 6, 5, heads=4, key_heads=keys, dtype=torch.float64)
    lam, keep = lambdas(4), torch.rand(2, 1, 1, 6) < 0.7
    keep[..., 0] = True
    shape = (2, 4, 9, 6)
    expected = loop_attention("cosine", None, **tensors, lam=lam.tolist(), scaling=1.3, keep=keep.expand(shape))
    assert_close(COSINE(**tensors, lam=lam.double(), scaling=1.3, mask=keep), expected, "float64")


def test_gradients_equal_finite_differences(small_parts):
    """Query, key (grouped), value and λ; test_gradcheck.py has a bias with a gradient, which goes another way."""
    sizes = ((2, 4, 5, 3), (2, 2, 4, 3), (2, 2, 4, 3))
    tensors = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    lam = torch.tensor([0.7, 1.4, 0.9, 1.1], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False, True], [True, True, True, True]])

    def attention(query, key, value, lam):
        return COSINE(query, key, value, lam=lam, mask=mask, is_causal=True)

    assert torch.autograd.gradcheck(attention, (*tensors, lam))


@pytest.mark.parametrize("size", [0.0, 1e-14, 1e-3, 1e15], ids=str)
def test_vectors_of_any_length(small_parts, size):
    """Also zero, where `normalize` divides by 1e-12; gradients are compared in units of 1 / the norm divided by."""
    tensors = make_tensors(QUERIES, KEYS, 16)
    unit = torch.nn.functional.normalize(torch.randn(16), dim=0)
    for name in ("query", "key"):
        tensors[name][:, 1, 3:5] = size * unit
    expected, actual = (evaluate(c, tensors, t) for c, t in ((COSINE.reference, torch.float64), (COSINE, None)))
    for name, value in expected.items():
        for result in (value, actual[name]):
            if name in ("query", "key"):
                result[:, 1, 3:5] *= max(size, 1e-12)
        assert_close(actual[name], value, "float32_forward" if name == "output" else "float32_gradient", name)


def test_inputs_as_models_hand_them_over(small_parts):
    """Heads transposed out of a projection, an expanded key, an upstream gradient without storage of its own."""
    tensors = {
        "query": torch.randn(2, 20, 3, 12).transpose(1, 2),
        "key": torch.randn(1, 1, 13, 12).expand(2, 3, 13, 12),
        "value": torch.randn(2, 13, 3, 12).transpose(1, 2),
    }
    results = []
    for case, dtype in ((COSINE.reference, torch.float64), (COSINE, torch.float32)):
        leaves = {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}
        assert not any(t.is_contiguous() for t in tensors.values())
        output = case(**leaves)
        results.append([output.detach(), *torch.autograd.grad(output.sum(), list(leaves.values()))])
    for expected, actual in zip(*results):
        assert_close(actual, expected, "float32_gradient")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_rounded_once(small_parts, dtype):
    tensors = make_tensors(20, 13, 16, dtype=dtype)
    expected = COSINE(**{name: t.float() for name, t in tensors.items()}).to(dtype)
    assert_close(COSINE(**tensors), expected, "equal")


def test_parts_follow_the_rows(parts):
    """At 2,048 rows one head alone keeps a thread busy; the backward kernel wants a head for each thread."""
    tensors = make_tensors(2048, 300, 8, batch=1, heads=3)
    evaluate(COSINE, tensors)
    assert parts == [("forward", 1, 1)] * 3 + [("backward", 1, 1)] * 3
    parts.clear()
    COSINE(**make_tensors(60, 8, 8, batch=4, heads=3))
    assert parts == [("forward", 4, 3)]


def test_grouped_heads_stay_together(parts, monkeypatch):
    monkeypatch.setattr(backend_sdpa, "_PART_ROWS", 1)
    monkeypatch.setattr(backend_sdpa, "_PART_LOGITS", 1)
    COSINE(**make_tensors(10, 8, 8, batch=2, heads=6, key_heads=2))
    assert parts == [("forward", 1, 3)] * 4


def test_a_backward_part_has_a_head_for_each_thread(parts, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(backend_sdpa, "_PART_ROWS", 1)
    monkeypatch.setattr(backend_sdpa, "_PART_LOGITS", 1)
    evaluate(COSINE, make_tensors(10, 8, 8, batch=2, heads=6))
    assert parts == [("forward", 1, 1)] * 12 + [("backward", 1, 3)] * 4


def test_few_logits_take_the_other_path(parts, monkeypatch):
    monkeypatch.setattr(backend_sdpa, "_LEAST_LOGITS", 2 * 2 * 20 * 20)
    COSINE(**make_tensors(20))
    assert len(parts) == 1
    COSINE(**make_tensors(20, 19))
    assert len(parts) == 1


def test_the_backward_pass_keeps_no_normalised_copies(parts):
    """Beyond the inputs: the output, one number for each row and λ, which is what plain attention keeps."""
    tensors = {name: t.requires_grad_() for name, t in make_tensors(64, 64, 16).items()}
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = COSINE(**tensors)
    for tensor in tensors.values():
        kept.pop(tensor.data_ptr())
    assert sorted(kept.values()) == sorted([output.numel(), output[..., 0].numel(), 2])


OTHERWISE = {
    "dropout": {"dropout_p": 0.1},
    "a bias with a gradient": {"position_bias": torch.zeros(1, 2, 20, 20, requires_grad=True)},
}


@pytest.mark.parametrize("options", OTHERWISE)
def test_what_the_kernel_does_not_take(parts, options):
    COSINE(**make_tensors(20), **OTHERWISE[options])
    COSINE(**make_tensors(20, value_dim=5))
    assert parts == []


def test_a_second_derivative_by_the_kernel_that_has_one(parts):
    """As of plain attention: under PyTorch's choice of the composed kernel."""
    query, key, value = make_tensors(5, 4, 3, dtype=torch.float64).values()
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(lambda q: COSINE(q, key, value), query.requires_grad_())
    assert parts == []


def test_torch_func(parts):
    """Gradients and batching of torch.func, which must not meet a function that it cannot look into."""
    tensors = make_tensors(20, 20, 8)
    expected = evaluate(COSINE, tensors)["query"]
    parts.clear()
    actual = torch.func.grad(lambda q: (COSINE(q, tensors["key"], tensors["value"]) * upstream_gradient(q)).sum())
    assert_close(actual(tensors["query"]), expected, "float32_gradient")
    assert parts == []


def test_one_graph(parts):
    """torch.compile gets operators that it knows, and the numbers of the parts."""
    tensors = make_tensors(30, 20, 8) | {"lam": lambdas(2)}
    expected = evaluate(COSINE, tensors)
    assert parts
    parts.clear()
    torch.compiler.reset()
    compiled = torch.compile(
        lambda **t: distance_attention(**t, metric="cosine", backend="sdpa"), fullgraph=True, backend="aot_eager"
    )
    for name, actual in evaluate(compiled, tensors).items():
        assert_close(actual, expected[name], "float32_gradient", name)
    assert parts == []


def test_only_the_metric_itself(parts, monkeypatch):
    """A metric that someone registers under this name runs by its own definition."""
    other = type(backend_sdpa.BUILT_IN["cosine"])()
    monkeypatch.setattr("distattn_hf.core.attention.get_metric", lambda name: other)
    COSINE(**make_tensors(20))
    assert parts == []
