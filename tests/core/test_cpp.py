"""The compiled CPU kernels beyond the shared tests: decoding, long and odd shapes, threads, NaN, a build."""

import os
import platform
import subprocess
import sys
import textwrap

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from distattn_hf import distance_attention, explain_backend
from distattn_hf.core import kernel_cpp_hybrid, kernel_cpp_retrieval
from distattn_hf.core import kernel_cpp_library as cpp_library
from distattn_hf.core.backend_cpp import _backward, _decode, _forward
from distattn_hf.core.metrics import METRICS, _measured_temperature, get_metric
from tests.tolerances import HALF_ERROR_RATIO, assert_close

from .cases import (
    METRIC_CASES,
    Case,
    evaluate,
    every_decoding_backend,
    every_metric,
    make_tensors,
    metric_id,
    needs_compiler,
    runs,
    upstream_gradient,
)

KERNELS = [c for c in METRIC_CASES if runs(*c, "cpp", grad=True)]
every_kernel = pytest.mark.parametrize(("metric", "p"), KERNELS, ids=[metric_id(c) for c in KERNELS])
ELEMENTWISE = [c for c in METRIC_CASES if METRICS.get(c[0]).elementwise]


@pytest.fixture
def threads():
    """Set PyTorch's number of threads for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_compiler
def test_every_metric_but_the_dot_products_has_a_kernel():
    assert {metric for metric, _ in KERNELS} == {"sqeuclidean", "l2", "l1", "lp", "chebyshev"}


# ---- decoding ----

DECODE_SHAPES = {
    "one key": {"num_keys": 1, "head_dim": 16},
    "129 keys, head size 24, narrow values": {"num_keys": 129, "head_dim": 24, "value_dim": 5},
    "1000 keys, grouped": {"num_keys": 1000, "head_dim": 64, "heads": 6, "key_heads": 2},
    "300 keys, head size 256": {"num_keys": 300, "head_dim": 256, "batch": 1},
    "128 keys, head size 7, wide values": {"num_keys": 128, "head_dim": 7, "value_dim": 70},
}


@every_decoding_backend
@pytest.mark.parametrize(
    ("shape", "queries", "masked"), [(s, 1 if i % 2 else 5, i % 3 > 0) for i, s in enumerate(DECODE_SHAPES)]
)
def test_decoding(case, shape, queries, masked):
    tensors = make_tensors(queries, **DECODE_SHAPES[shape])
    (batch, heads), keys = tensors["query"].shape[:2], tensors["key"].shape[2]
    options = {"lam": torch.rand(heads) * 0.2 + 0.05}
    if masked:
        keep = torch.rand(batch, 1, 1, keys) < 0.7
        keep[0] = False  # a row with nothing to see
        options |= {"mask": keep, "position_bias": torch.randn(1, heads, 1, keys)}
    expected = case.reference(**{n: t.double() for n, t in tensors.items()}, **options)
    assert_close(case(**tensors, **options), expected, "float32_forward")


@every_decoding_backend
@pytest.mark.parametrize("num_threads", [1, 3, 7])
def test_keys_divided_among_threads(case, num_threads, threads):
    """One head and many keys: each thread takes some of the keys, and the parts are put together."""
    threads(num_threads)
    tensors = make_tensors(1, 5000, 64, batch=1, heads=1)
    tensors["key"][:, :, 3000:] *= 3  # parts of very different size
    expected = case.reference(**{n: t.double() for n, t in tensors.items()}, lam=0.3)
    assert_close(case(**tensors, lam=0.3), expected, "float32_forward")


@every_decoding_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoding_in_half_precision(case, dtype):
    """Error against float64 on the same rounded numbers: at most PyTorch's own, within the project's factor."""
    tensors = make_tensors(1, 333, 40, dtype=dtype)
    exact = {n: t.double() for n, t in tensors.items()}
    error = (case(**tensors).double() - case.reference(**exact)).abs().max()
    attention = torch.nn.functional.scaled_dot_product_attention
    own = (attention(*tensors.values()).double() - attention(*exact.values())).abs().max()
    assert error <= HALF_ERROR_RATIO * own


@every_decoding_backend
def test_a_float32_query_beside_half_precision_keys(case):
    """What a converted model in half precision asks for: the query's map is kept in float32."""
    tensors = make_tensors(3, 50, 24)
    half = {n: t if n == "query" else t.bfloat16() for n, t in tensors.items()}
    output = case(**half)
    assert output.dtype == torch.bfloat16
    expected = case.reference(**{n: t.double() for n, t in half.items()})
    # One rounding of the result to bfloat16.
    torch.testing.assert_close(output.double(), expected, rtol=2**-8, atol=2**-10)


@every_decoding_backend
def test_keys_are_read_where_they_lie(case):
    """A cache longer than what is filled, and heads transposed out of a projection."""
    cache = torch.randn(2, 90, 3, 24).transpose(1, 2)[:, :, 10:70]
    tensors = {"query": torch.randn(2, 3, 1, 24), "key": cache, "value": cache[..., 3:19]}
    dense = {n: t.contiguous() for n, t in tensors.items()}
    assert_close(case(**tensors), case(**dense), "float32_forward")


# ---- attention with gradients ----

SHAPES = {
    "1000, head size 64": {"num_queries": 1000, "head_dim": 64, "batch": 1, "heads": 1},
    "333 by 190, grouped": {"num_queries": 333, "num_keys": 190, "head_dim": 20, "heads": 4, "key_heads": 2},
    "65, head size 256": {"num_queries": 65, "head_dim": 256, "batch": 1},
    "65 by 257, head size 8, wide values": {"num_queries": 65, "num_keys": 257, "head_dim": 8, "value_dim": 72},
}


@every_kernel
@pytest.mark.parametrize("shape", SHAPES)
def test_many_tiles(metric, p, shape):
    """More tiles than one in every direction, and none of them full at the end; the odd shapes causal."""
    causal = list(SHAPES).index(shape) % 2 == 0
    case, tensors = Case(metric, p, "cpp"), make_tensors(**SHAPES[shape])
    expected = evaluate(case.reference, tensors, torch.float64, is_causal=causal)
    for name, actual in evaluate(case, tensors, is_causal=causal).items():
        assert_close(actual, expected[name], "float32_forward" if name == "output" else "float32_gradient", name)


BIASES = {
    "one per batch": (3, 1, 70, 90),
    "shared by the batch": (1, 2, 70, 90),
    "shared by all": (1, 1, 70, 90),
    "the same for every query": (3, 2, 1, 90),
    "the same for every key": (1, 2, 70, 1),
    "one number": (1, 1, 1, 1),
}


@every_kernel
@pytest.mark.parametrize("bias", BIASES)
def test_bias_and_lambda_gradients_with_threads(metric, p, bias, threads):
    """No two threads may add to one entry of the bias's gradient, however it is broadcast."""
    threads(5)
    tensors = make_tensors(70, 90, 48, batch=3, heads=2, key_heads=1)
    tensors |= {"position_bias": torch.randn(BIASES[bias]), "lam": torch.rand(2) * 0.3 + 0.1}
    case = Case(metric, p, "cpp")
    expected = evaluate(case.reference, tensors, torch.float64)
    for name, actual in evaluate(case, tensors).items():
        # Sums over all that share a bias or a λ grow with their number, and so does what the tolerance refers to.
        scale = expected[name].abs().max().clamp_min(1)
        assert_close(actual / scale, expected[name] / scale, "float32_gradient", name)


@every_kernel
@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("queries", [1, 40])
def test_not_a_number_stays_one(metric, p, where, queries):
    """A NaN reaches every output that sees it and no other: training must not go on as if nothing had happened."""
    tensors = make_tensors(queries, 40, 12, batch=2)
    tensors[where][1, 0, 0] = torch.nan
    output = distance_attention(**tensors, metric=metric, p=p, backend="cpp")
    assert output[1, 0, 0].isnan().all()
    assert output[1, 0].isnan().all() or where == "query"
    assert output[0].isfinite().all()
    assert output[1, 1].isfinite().all()


@every_kernel
def test_large_offsets(metric, p):
    """Differences are taken before anything is squared: a common offset of q and k costs no digits but its own."""
    tensors = make_tensors(50, 50, 16)
    # Multiples of 1/256 below 64 stay exact beside an offset of 1024.
    tensors = {n: (t * 256).round() / 256 for n, t in tensors.items()}
    moved = {n: t if n == "value" else t + 1024 for n, t in tensors.items()}
    case = Case(metric, p, "cpp")
    assert_close(case(**moved), case(**tensors), "float32_forward")


@every_kernel
def test_no_second_derivative(metric, p):
    tensors = make_tensors(20)
    query = tensors["query"].requires_grad_()
    output = distance_attention(**tensors, metric=metric, p=p, backend="cpp")
    (gradient,) = torch.autograd.grad(output.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


@pytest.mark.parametrize(("metric", "p"), ELEMENTWISE, ids=[metric_id(c) for c in ELEMENTWISE])
@pytest.mark.parametrize("shape", [((2, 3, 130, 17), (2, 3, 77, 17)), ((5, 9), (4, 9)), ((3, 1, 9, 64), (2, 200, 64))])
def test_distances_alone(metric, p, shape):
    """`fast_distance` in float32, which calibration differentiates, against the definition in float64."""
    entry, tensors = get_metric(metric), [torch.randn(s) for s in shape]
    for dtype, function in ((torch.float64, entry.distance), (torch.float32, entry.fast_distance)):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        output = function(*leaves, p)
        result = [output.detach(), *torch.autograd.grad(output, leaves, upstream_gradient(output))]
        if dtype == torch.float64:
            expected = result
    for actual, value in zip(result, expected, strict=True):
        scale = value.abs().max()
        assert_close(actual / scale, value / scale, "float32_gradient")


# ---- torch.compile ----


@pytest.mark.parametrize("cap", [0.0, 0.7])
@every_kernel
def test_operators_keep_their_promises(metric, p, cap):
    """Schema, shapes of the fake versions, autograd registration."""
    tensors = [t.requires_grad_() for t in make_tensors(20, 33, 12, heads=4, key_heads=2, value_dim=6).values()]
    kind, coef = cpp_library.kind_of(metric, p), torch.full((4,), 0.1, requires_grad=True)
    keep, bias = torch.rand(2, 1, 20, 33) < 0.8, torch.randn(1, 4, 20, 33, requires_grad=True)
    sink = torch.randn(2, 4, 20, 1, requires_grad=True)
    shift = torch.randn(2, 4, 20, 1, requires_grad=True) if cap else None
    arguments = (*tensors, coef, None, keep, bias, sink, shift, kind, p or 0.0, cap, True)
    torch.library.opcheck(_forward, arguments)
    plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    output, lse = _forward(*plain)
    gradient = (torch.ones_like(output), *plain[:7], plain[8], output, lse, *plain[9:], True)
    torch.library.opcheck(_backward, gradient)
    torch.library.opcheck(_decode, tuple(plain))


@every_metric
@pytest.mark.parametrize("queries", [1, 30])
def test_one_graph(metric, p, queries):
    """torch.compile(fullgraph=True) of every metric gives what eager gives, gradients included."""
    tensors = make_tensors(queries, 30, 12) | {"lam": torch.rand(2) + 0.1}

    def function(query, key, value, lam):
        return distance_attention(query, key, value, lam=lam, metric=metric, p=p)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close(compiled(**tensors), function(**tensors), "float32_forward")
    expected = evaluate(function, tensors)
    for name, actual in evaluate(compiled, tensors).items():
        assert_close(actual, expected[name], "float32_gradient", name)


# ---- building ----

PROBE = """
import sys, warnings, torch
import distattn_hf
q = torch.randn(1, 2, 20, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    output = distattn_hf.distance_attention(q, q, q, metric="l1")
expected = distattn_hf.distance_attention(q, q, q, metric="l1", backend="reference")
assert torch.allclose(output, expected, atol=1e-5)
choice = distattn_hf.explain_backend(metric="l1", num_queries=20)
told = [str(w.message) for w in caught if "CPU kernels" in str(w.message)]
print(choice.backend, "|", choice.reasons.get("cpp"), "|", told)
"""


def _start(**environment):
    variables = {**os.environ, "CXX": "", **{name: str(value) for name, value in environment.items()}}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROBE)],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(process) -> str:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output


@pytest.fixture
def quick_compiler(tmp_path):
    """A compiler that notes each call and hands out this process's library, which takes half a minute to build."""
    library, script, calls = cpp_library._build(cpp_library.EXACT), tmp_path / "c++", tmp_path / "calls"
    calls.touch()
    script.write_text(
        "#!/bin/sh\n"
        '[ "$1" = --version ] && echo quick && exit 0\n'
        f"cat > /dev/null; echo called >> {calls}; sleep 1\n"
        f'for output; do :; done; cp {library} "$output"\n'
    )
    script.chmod(0o755)
    return script, lambda: len(calls.read_text().splitlines())


@needs_compiler
def test_two_processes_build_at_the_same_time(quick_compiler, tmp_path):
    compiler, calls = quick_compiler
    environment = {"CXX": compiler, "XDG_CACHE_HOME": tmp_path}
    for process in [_start(**environment) for _ in range(2)]:
        assert _finish(process).startswith("cpp | None | []")
    assert 1 <= calls() <= 2
    files = list((tmp_path / "distattn_hf").iterdir())
    assert len(files) == 1
    assert files[0].suffix == ".so"


@needs_compiler
def test_a_build_is_used_again_and_a_damaged_one_is_not(quick_compiler, monkeypatch, tmp_path):
    compiler, calls = quick_compiler
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = cpp_library._build(cpp_library.EXACT)
    assert cpp_library._build(cpp_library.EXACT) == file
    assert calls() == 1
    file.write_bytes(b"")
    assert cpp_library._load.__wrapped__(cpp_library.EXACT)[0].attention_forward
    assert calls() == 2
    assert file.stat().st_size > 0


def test_without_a_compiler(tmp_path):
    output = _finish(_start(XDG_CACHE_HOME=tmp_path, PATH=tmp_path))
    assert output.startswith("chunked | no C++ compiler found ($CXX, g++, c++, clang++) | []")


def test_with_a_compiler_that_fails(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'unknown option -march' >&2; exit 1\n")
    compiler.chmod(0o755)
    output = _finish(_start(XDG_CACHE_HOME=tmp_path, CXX=compiler))
    assert output.startswith(
        f"chunked | the C++ compiler {compiler} failed: unknown option -march | ['distattn_hf runs"
    )
    assert not list((tmp_path / "distattn_hf").iterdir())


def _no_home():
    raise RuntimeError("Could not determine home directory.")


@needs_compiler
@pytest.mark.parametrize("cache", [None, "/dev/null"], ids=["no home", "a folder that cannot be written"])
def test_without_a_cache_the_library_is_for_one_process(cache, quick_compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(quick_compiler[0]))
    monkeypatch.setenv("XDG_CACHE_HOME", cache or "")
    monkeypatch.setattr(cpp_library.Path, "home", _no_home)
    monkeypatch.setattr(cpp_library.tempfile, "tempdir", str(tmp_path))
    assert cpp_library._build(cpp_library.EXACT).parent.parent == tmp_path
    assert cpp_library._load.__wrapped__(cpp_library.EXACT)[0].attention_forward


@pytest.mark.parametrize("variable", ["c++ -O2", "no-such-compiler", ""])
def test_compiler_from_the_environment(variable, monkeypatch, tmp_path):
    (tmp_path / "c++").write_text("#!/bin/sh\n")
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", variable)
    assert cpp_library.compiler() == [str(tmp_path / "c++"), *variable.split()[1:] * variable.startswith("c++")]


# ---- what the kernels must not be given ----


@pytest.mark.parametrize("strided", ["key", "value", "both"])
@pytest.mark.parametrize("metric", ["l1", "l2", "sqeuclidean", "cosine", "chebyshev"])
def test_bfloat16_decoding_reads_strided_caches(metric, strided):
    """One of key and value with rows that are not contiguous: the kernel is told one dtype for both."""
    tensors = make_tensors(1, 50, dtype=torch.bfloat16)
    expected = distance_attention(**tensors, metric=metric)
    for name in ("key", "value"):
        if strided in (name, "both"):
            tensors[name] = tensors[name].mT.contiguous().mT
    assert torch.equal(distance_attention(**tensors, metric=metric), expected)


@pytest.mark.parametrize("length", [1, 40])
@every_kernel
def test_forward_derivatives_are_never_dropped(metric, p, length):
    query = torch.randn(1, 2, length, 8)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(query, torch.ones_like(query))
        try:
            output = distance_attention(dual, query, query, metric=metric, p=p)
        except (NotImplementedError, RuntimeError):
            # PyTorch's own operators say that they have none.
            return
        assert torch.autograd.forward_ad.unpack_dual(output).tangent is not None


@pytest.mark.parametrize("metric", ["l1", "l2", "sqeuclidean", "cosine"])
@pytest.mark.parametrize("length", [1, 40])
def test_vmap_takes_another_backend(metric, length):
    batches = torch.randn(3, 1, 2, length, 8)
    other = torch.randn(1, 2, 40, 8)
    mapped = torch.func.vmap(lambda query: distance_attention(query, other, other, metric=metric))(batches)
    single = torch.stack([distance_attention(query, other, other, metric=metric) for query in batches])
    # l2 of equal points takes the root of rounding noise.
    torch.testing.assert_close(mapped, single, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@every_metric
def test_fake_tensors_have_a_shape_and_no_memory(metric, p, dropout_p):
    """Also where a metric's default λ has not been measured yet."""
    _measured_temperature.cache_clear()
    with FakeTensorMode():
        query = torch.randn(1, 2, 20, 8)
        output = distance_attention(query, query, query, metric=metric, p=p, dropout_p=dropout_p)
    assert output.shape == (1, 2, 20, 8)


@every_metric
def test_meta_tensors_have_a_shape(metric, p):
    query = torch.randn(1, 2, 20, 8, device="meta")
    assert distance_attention(query, query, query, metric=metric, p=p).shape == query.shape


@pytest.mark.parametrize("sizes", [(0, 4, 4), (1, 0, 4), (1, 4, 0)], ids=str)
@every_metric
def test_empty_problems_have_gradients(metric, p, sizes):
    batch, num_queries, num_keys = sizes
    query, key = torch.randn(batch, 2, num_queries, 8), torch.randn(batch, 2, num_keys, 8)
    lam = torch.ones(2, requires_grad=True)
    distance_attention(query, key, key, metric=metric, p=p, lam=lam).sum().backward()
    assert torch.equal(lam.grad, torch.zeros(2))


# ---- explain_backend ----


def test_explanation_names_every_backend():
    choice = explain_backend(metric="l1", num_queries=2048, requires_grad=True, dropout_p=0.1)
    assert choice.backend == "chunked"
    assert choice.reasons["cpp"] == "no dropout in the kernels"
    assert choice.reasons["sdpa"] == "metric 'l1' has no dot-product form"
    assert all(name in str(choice) for name in (choice.backend, *choice.reasons))


@needs_compiler
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"metric": "sqeuclidean", "num_queries": 512, "device": "cuda", "requires_grad": True}, "sdpa"),
        ({"metric": "cosine", "num_queries": 1, "num_keys": 900, "kv_heads": 3}, "cpp"),
        ({"metric": "sqeuclidean", "num_queries": 512, "mask_shape": (1, 1, 1, 512)}, "sdpa"),
        ({"metric": "sqeuclidean", "num_queries": 512, "bias_shape": (1, 12, 512, 512)}, "cpp"),
        ({"metric": "lp", "p": 3, "num_queries": 512, "dtype": torch.float64}, "chunked"),
        ({"metric": "l1", "num_queries": 512, "backend": "reference"}, "reference"),
    ],
    ids=str,
)
def test_explanation(options, expected):
    assert explain_backend(**options).backend == expected


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"metric": "l7"}, "unknown metric 'l7'"),
        ({"backend": "flash"}, "unknown backend 'flash'"),
        ({"backend": "sdpa"}, "backend 'sdpa' cannot run this: metric 'l1' has no dot-product form"),
        ({"backend": "cpp", "device": "cuda"}, "backend 'cpp' cannot run this: runs on the CPU only"),
        ({"num_keys": 0}, "num_keys must be a whole number of at least 1, got 0"),
        ({"kv_heads": -1}, "kv_heads must be a whole number of at least 1, got -1"),
        ({"num_queries": 0}, "num_queries must be a whole number of at least 1, got 0"),
        ({"kv_heads": 5}, r"heads \(12\) must be a multiple of kv_heads \(5\)"),
        ({"mask_shape": (1, 1, 7, 7)}, "mask_shape must broadcast"),
    ],
    ids=str,
)
def test_explanation_of_what_cannot_be(options, match):
    with pytest.raises(ValueError, match=match):
        explain_backend(**{"metric": "l1", "num_queries": 64, **options})


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="flags of x86 processors")
@pytest.mark.parametrize(
    "without", [["avx512vnni"], ["avx512f"], ["avx2", "avx512f"], ["avx", "avx2", "avx512f"]], ids="-".join
)
@pytest.mark.parametrize(
    "source",
    [cpp_library.EXACT, kernel_cpp_hybrid.SOURCE, kernel_cpp_retrieval.SOURCE],
    ids=["exact", "hybrid", "retrieval"],
)
def test_kernels_compile_for_lesser_processors(source, without):
    """What takes the place of their instructions is not compiled here otherwise, but it is on ARM."""
    command = [
        *cpp_library.compiler(),
        *(f"-mno-{name}" for name in without),
        *cpp_library._FLAGS,
        "-fsyntax-only",
        "-",
    ]
    run = subprocess.run(command, input=source, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[:2000]
