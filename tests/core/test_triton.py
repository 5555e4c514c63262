"""The Triton backend against the float64 reference, its kernels run in Python by Triton's interpreter (or on a GPU).

The interpreter must be chosen before Triton is first imported, which PyTorch does for other tests: so on a machine
without a GPU `TestKernels` runs in a process of its own, which `test_kernels_in_the_interpreter` starts. What the
interpreter would let pass and a GPU's compiler would not, `TestCompiler` finds: it compiles without a GPU.
"""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers.dynamic_module_utils import get_imports

from distattn_hf.core import backend_triton
from distattn_hf.core.backend_triton import triton_attention, unsupported
from distattn_hf.core.inputs import AttentionInputs, split_mask
from distattn_hf.core.metrics import FunctionMetric, Manhattan, get_metric
from distattn_hf.core.reference import reference_attention
from tests.tolerances import HALF_ERROR_RATIO, LINEAR_GROWTH, assert_close

from .cases import evaluate, lambdas, make_tensors, padded, some, with_empty_rows
from .test_half_precision import errors, pytorch_errors

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu"
ROOT = Path(__file__).parents[2]
CORE = ROOT / "distattn_hf" / "core"

# (metric, p, whether l2 goes by matmul although it is float32, ε); 2.2 needs logarithms, the others do not.
KERNELS = {
    "l1": ("l1", None, False, None),
    "lp1.5": ("lp", 1.5, False, None),
    "lp2.2": ("lp", 2.2, False, None),
    "lp3": ("lp", 3.0, False, None),
    "chebyshev": ("chebyshev", None, False, None),
    "l2": ("l2", None, False, None),
    "l2 by matmul": ("l2", None, True, None),
    "soft l1": ("l1", None, False, 2.5),
    "soft lp1.5": ("lp", 1.5, False, 2.5),
    "soft lp2.2": ("lp", 2.2, False, 2.5),
    "soft lp3": ("lp", 3.0, False, 2.5),
    "soft chebyshev": ("chebyshev", None, False, 2.5),
    "soft l2": ("l2", None, False, 2.5),
}
every_kernel = pytest.mark.parametrize("kernel", KERNELS)
one_of_each_kind = pytest.mark.parametrize("kernel", ["l1", "l2 by matmul"])
every_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])

SHAPES = {
    "length 1": {"num_queries": 1, "head_dim": 16},
    "one key": {"num_queries": 17, "num_keys": 1},
    "63, head size 17": {"num_queries": 63, "head_dim": 17, "heads": 1},
    # More than one tile, and the last one partly empty, for queries and for keys.
    "tiles of queries": {"num_queries": 67, "num_keys": 35, "head_dim": 5, "value_dim": 20, "heads": 1},
    "tiles of keys": {"num_queries": 35, "num_keys": 67, "head_dim": 9, "value_dim": 3, "heads": 1},
    "head size 256": {"num_queries": 3, "num_keys": 5, "head_dim": 256, "heads": 1},
    "wide values": {"num_queries": 20, "num_keys": 18, "value_dim": 200, "heads": 1},
}

BATCH, HEADS, QUERIES, KEYS = 2, 2, 20, 36


MASKS = {
    "padding": lambda: {"mask": padded(BATCH, KEYS)},
    "per head": lambda: {"mask": some(BATCH, HEADS, QUERIES, KEYS)},
    "causal": lambda: {"is_causal": True},
    "causal + mask": lambda: {"is_causal": True, "mask": some(BATCH, 1, QUERIES, KEYS)},
    "empty rows": lambda: {"mask": with_empty_rows(BATCH, QUERIES, KEYS, 11)},
    "everything masked": lambda: {"mask": torch.zeros(1, 1, QUERIES, KEYS, dtype=torch.bool)},
}

BIASES = {
    "(1,H,N,M)": (1, HEADS, QUERIES, KEYS),
    "(B,1,1,M)": (BATCH, 1, 1, KEYS),
    "(1,H,1,1)": (1, HEADS, 1, 1),
    "(B,H,N,1)": (BATCH, HEADS, QUERIES, 1),
}


def attention_by(run, kernel: str):
    """attention(query, key, value, ...) by `run`, a function of AttentionInputs, with the metric of `kernel`."""
    name, p, by_matmul, epsilon = KERNELS[kernel]

    def attend(
        query, key, value, *, lam=0.8, bias=None, mask=None, is_causal=False, softening=epsilon, sink=None, shift=None,
        softcap=None,
    ):  # fmt: skip
        keep, _ = split_mask(mask, (*query.shape[:3], key.shape[2]))
        keep = None if keep is None else keep.to(query.device)
        scaling = query.shape[-1] ** -0.5
        inputs = AttentionInputs(query, key, value, get_metric(name), lam, scaling, p, keep, bias, is_causal)
        inputs = replace(inputs, softening=softening, sink_logit=sink, shift=shift, softcap=softcap)
        if run is not reference:
            assert unsupported(inputs) is None
        with pytest.MonkeyPatch.context() as patch:
            if by_matmul:
                patch.setattr(backend_triton, "_kernel_metric", lambda inputs: ("l2", None))
            return run(inputs)

    return attend


def reference(inputs: AttentionInputs) -> torch.Tensor:
    return reference_attention(inputs.written_out())[0]


def on_device(tensors: dict) -> dict:
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


def check(kernel: str, tensors: dict, tolerance: str | None = None, **options) -> dict:
    """Output and all gradients in float32 against the reference's in float64."""
    tensors = on_device(tensors)
    expected = evaluate(attention_by(reference, kernel), tensors, torch.float64, **options)
    actual = evaluate(attention_by(triton_attention, kernel), tensors, **options)
    for name, value in expected.items():
        kind = tolerance or ("float32_forward" if name == "output" else "float32_gradient")
        assert_close(actual[name], value, kind, name)
    return actual


class TestKernels:
    __test__ = INTERPRETING or DEVICE == "cuda"

    @pytest.mark.parametrize(
        ("kernel", "shape"),
        # Of the largest heads, which take seconds each, one kernel of each kind: more of the same coordinates.
        [(k, s) for k in KERNELS for s in SHAPES if s != "head size 256" or k in ("l1", "chebyshev", "l2 by matmul")],
    )
    def test_shapes_with_lambda_per_head(self, kernel, shape):
        tensors = make_tensors(**{"batch": 1, **SHAPES[shape]})
        heads = tensors["query"].shape[1]
        check(kernel, {**tensors, "lam": lambdas(heads)}, is_causal=shape.startswith("tiles of"))

    @one_of_each_kind
    @pytest.mark.parametrize("mask", MASKS)
    def test_masks_with_a_bias(self, kernel, mask):
        tensors = make_tensors(QUERIES, KEYS, 5, 6, batch=BATCH, heads=HEADS)
        check(kernel, {**tensors, "bias": torch.randn(1, HEADS, QUERIES, KEYS)}, **MASKS[mask]())

    @one_of_each_kind
    @pytest.mark.parametrize("mask", ["causal", "empty rows"])
    def test_sinks(self, kernel, mask):
        """A key without a value, whose logit may be one of each query, and its gradient."""
        tensors = make_tensors(QUERIES, KEYS, 5, 6, batch=BATCH, heads=HEADS)
        for shape in ((1, HEADS, 1, 1), (BATCH, HEADS, QUERIES, 1)):
            check(kernel, {**tensors, "sink": 2 * torch.randn(shape) - 1}, **MASKS[mask]())

    @pytest.mark.parametrize("kernel", ["l1", "l2 by matmul", "chebyshev", "soft lp3"])
    @pytest.mark.parametrize("mask", ["causal", "empty rows"])
    def test_caps(self, kernel, mask):
        """Of logits from far below the cap to beyond it: the shift is inside it, a bias and a sink are not."""
        tensors = make_tensors(QUERIES, KEYS, 5, 6, batch=BATCH, heads=2 * HEADS, key_heads=HEADS)
        tensors["lam"] = torch.tensor([0.05, 0.8, 3.0, 8.0])
        check(kernel, tensors, softcap=0.7, **MASKS[mask]())
        tensors["bias"] = torch.randn(1, 1, QUERIES, KEYS)
        tensors["shift"] = 3 * torch.randn(BATCH, 2 * HEADS, QUERIES, 1)
        tensors["sink"] = torch.randn(1, 2 * HEADS, 1, 1)
        check(kernel, tensors, softcap=1.3, is_causal=mask == "causal")

    @pytest.mark.parametrize("cap", [0.3, 20.0, 1e5])
    def test_the_tanh_keeps_its_digits(self, cap):
        """Logits from 0 to 12 caps, densely: weights of a value of ones each; of a large cap, tanh(x) is x."""
        points = torch.linspace(0, min(12 * cap, 30.0), 300)
        shift = torch.tensor([[[[0.0], [min(3 * cap, 9.0)]]]])
        key, value = points[None, None, :, None], torch.eye(300)[None, None]
        inputs = AttentionInputs(torch.zeros(1, 1, 2, 1), key, value, get_metric("l1"), 1.0, 1.0)
        inputs = replace(inputs, **on_device({"query": inputs.query, "key": key, "value": value, "shift": shift}))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend_triton, "_LARGEST_DIM", 512)
            weights = triton_attention(replace(inputs, softcap=cap))[0, 0].cpu()
        exact = cap * torch.tanh((shift[0, 0].double() - points.double()) / cap)
        exact = exact.softmax(-1)
        # Half of cap times the last bit of tanh, and what exp makes of it.
        error = ((weights - exact) / exact).abs().max()
        assert float(error) < 2e-7 * max(1.0, min(cap, 30.0)) + 4e-6

    @pytest.mark.parametrize("bias", BIASES)
    def test_biases(self, bias):
        """Broadcast axes have stride 0, and their gradient is the sum over them."""
        tensors = make_tensors(QUERIES, KEYS, 3, batch=BATCH, heads=HEADS)
        check("l1", {**tensors, "bias": torch.randn(BIASES[bias])}, is_causal=bias == "(B,1,1,M)")

    @pytest.mark.parametrize("kernel", [name for name in KERNELS if name.startswith("soft")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_every_epsilon_of_each_head(self, kernel, dtype):
        """Near and far vectors with heads that share their keys; an ε of 0 and large powers must not overflow."""
        tensors = make_tensors(20, 17, 6, batch=1, heads=6, key_heads=2, dtype=dtype)
        epsilon = torch.tensor([0.0, 1e-3, 0.3, 2.0, 30.0, 1e3])
        # Softened by a large ε, distances are squares over it.
        lam = torch.tensor([1.0, 1.0, 1.0, 1.0, 20.0, 1e3])
        leaves = on_device({**tensors, "lam": lam, "softening": epsilon})
        expected = evaluate(attention_by(reference, kernel), leaves, torch.float64)
        actual = evaluate(attention_by(triton_attention, kernel), leaves)
        for name in ("query", "key", "value", "lam", "output"):
            kind = "float32_forward" if name == "output" else "float32_gradient"
            assert_close(
                actual[name], expected[name].to(actual[name].dtype), kind if dtype == torch.float32 else "autocast"
            )

    def test_float64_bias(self):
        tensors = make_tensors(5, head_dim=3, batch=1)
        bias = torch.randn(1, 2, 5, 5, dtype=torch.float64, device=DEVICE)
        check("l1", tensors, bias=bias)

    @one_of_each_kind
    def test_empty_rows_give_zero(self, kernel):
        result = check(
            kernel,
            make_tensors(QUERIES, KEYS, 5, batch=BATCH, heads=HEADS),
            mask=with_empty_rows(BATCH, QUERIES, KEYS, 11),
        )
        for rows in (result["output"], result["query"]):
            assert bool((rows[0, :, 3] == 0).all())
            assert bool((rows[1, :, 11:] == 0).all())
            assert bool((rows[0, :, 4] != 0).any())

    @pytest.mark.parametrize("kernel", ["l1", "chebyshev", "l2 by matmul"])
    @pytest.mark.parametrize("heads", [(6, 1), (6, 2)], ids=str)
    def test_grouped_keys(self, kernel, heads):
        """Both per-head λ and the mask go with the query head, keys and values with its group."""
        heads, key_heads = heads
        tensors = make_tensors(20, 11, 4, batch=BATCH, heads=heads, key_heads=key_heads)
        check(kernel, {**tensors, "lam": lambdas(heads)}, mask=some(BATCH, heads, 20, 11))

    @one_of_each_kind
    def test_non_contiguous_inputs(self, kernel):
        """As models hand them over, an expanded key, and a gradient of a sum (an expanded number)."""
        tensors = {
            "query": torch.randn(2, 20, 3, 12).transpose(1, 2),
            "key": torch.randn(1, 1, 13, 12).expand(2, 3, 13, 12),
            "value": torch.randn(2, 3, 13, 10)[..., ::2],
            "lam": torch.tensor([0.7]).expand(3),
        }
        mask = (torch.rand(20, 2, 13) > 0.3).transpose(0, 1)
        tensors = on_device(tensors)
        assert not any(tensor.is_contiguous() for tensor in tensors.values())
        results = []
        for make in (lambda t: t.clone(memory_format=torch.preserve_format), lambda t: t.contiguous()):
            leaves = {name: make(tensor).requires_grad_() for name, tensor in tensors.items()}
            output = attention_by(triton_attention, kernel)(**leaves, mask=mask)
            results.append((output, *torch.autograd.grad(output.sum(), list(leaves.values()))))
        strided = attention_by(triton_attention, kernel)(**tensors, mask=mask)
        assert_close(strided, results[1][0], "equal")
        for actual, expected in zip(*results):
            assert_close(actual, expected, "equal")

    @every_kernel
    def test_some_keys_equal_the_query(self, kernel):
        """Zero distances, where a root has no slope: the gradient there is the subgradient 0, as in the reference."""
        tensors = make_tensors(20, 20, 8, batch=1)
        tensors["key"][:, :, 5:9] = tensors["query"][:, :, 5:9]
        check(kernel, tensors, "float32_l2_coinciding" if kernel == "l2 by matmul" else None)

    @every_kernel
    @pytest.mark.parametrize("point", ["random", "zero"])
    def test_all_keys_and_queries_equal(self, kernel, point):
        tensors = make_tensors(18, 6, 8, batch=1)
        same = torch.randn(8) if point == "random" else torch.zeros(8)
        tensors["query"], tensors["key"] = same.expand(1, 2, 18, 8), same.expand(1, 2, 6, 8)
        result = evaluate(attention_by(triton_attention, kernel), on_device(tensors))
        mean = tensors["value"].mean(-2, keepdim=True).expand(-1, -1, 18, -1)
        assert_close(result["output"].cpu(), mean, "float32_forward")
        assert all(bool(tensor.isfinite().all()) for tensor in result.values())

    @pytest.mark.parametrize("kernel", ["l1", "chebyshev"])
    def test_ties(self, kernel):
        """Whole numbers: equal coordinates have slope 0, and those that reach the maximum share its gradient."""
        tensors = make_tensors(12, 9, 7, batch=1)
        for name in ("query", "key"):
            tensors[name] = tensors[name].round()
        check(kernel, tensors)

    @one_of_each_kind
    def test_tile_sizes_do_not_matter(self, kernel, monkeypatch):
        """Square tiles of 16, of which this needs 3 by 3, some of them above the diagonal and left out."""
        tensors = make_tensors(37, 41, 4, batch=1, heads=2, key_heads=1)
        tile = {"BLOCK_N": 16, "BLOCK_M": 16, "num_warps": 4}
        monkeypatch.setattr(backend_triton, "_tile", lambda *arguments, **options: tile)
        check(kernel, {**tensors, "bias": torch.randn(1, 1, 37, 41)}, is_causal=True)

    @pytest.mark.parametrize("lengths", [(0, 3), (3, 0)], ids=str)
    def test_no_queries_or_no_keys(self, lengths):
        tensors = {
            "query": torch.randn(2, 2, lengths[0], 8),
            "key": torch.randn(2, 2, lengths[1], 8),
            "value": torch.randn(2, 2, lengths[1], 5),
        }
        result = evaluate(attention_by(triton_attention, "l1"), on_device(tensors))
        assert result["output"].shape == (2, 2, lengths[0], 5)
        assert all(bool((tensor == 0).all()) for tensor in result.values())

    @pytest.mark.parametrize("only", ["query", "key", "value", "lam", "bias", "shift"])
    def test_gradient_of_one_input_alone(self, only):
        tensors = {**make_tensors(9, 5, 3, batch=1), "lam": lambdas(2), "bias": torch.randn(1, 2, 1, 5)}
        tensors = on_device({**tensors, "shift": torch.randn(1, 2, 9, 1)})
        attend = partial(attention_by(triton_attention, "l1"), softcap=2.0)
        expected = evaluate(attend, tensors)[only]
        others = {name: tensor for name, tensor in tensors.items() if name != only}
        actual = evaluate(lambda **leaf: attend(**leaf, **others), {only: tensors[only]})[only]
        assert_close(actual, expected, "equal")

    @pytest.mark.parametrize("kernel", ["l1", "lp3", "chebyshev", "l2"])
    @every_half
    def test_half_precision_error_is_within_twice_pytorchs(self, kernel, dtype):
        options = {"mask": torch.ones(1, 1, 40, 40, dtype=torch.bool, device=DEVICE).triu(-20)}
        tensors = on_device(make_tensors(40, head_dim=32, batch=1, dtype=dtype))
        expected = evaluate(attention_by(reference, kernel), tensors, torch.float64, **options)
        actual = evaluate(attention_by(triton_attention, kernel), tensors, **options)
        assert all(tensor.dtype == dtype for tensor in actual.values())
        ours, theirs = errors(actual, expected), pytorch_errors(tensors, options)
        for name in expected:
            for kind, mine, budget in zip(("root mean square", "largest"), ours[name], theirs[name]):
                assert mine <= HALF_ERROR_RATIO * budget, f"{name}: {kind} error {mine:.2e}, PyTorch's {budget:.2e}"

    @pytest.mark.parametrize("kernel", ["l1", "l2"])
    @every_half
    def test_lambda_bias_and_query_stay_in_float32(self, kernel, dtype):
        """They may come in float32 beside half precision, and then keep its digits."""
        tensors = make_tensors(20, head_dim=16, batch=1, dtype=dtype)
        extra = {"lam": torch.tensor([0.7013, 1.3027]), "bias": torch.randn(1, 2, 20, 20)}
        for query in (tensors["query"], torch.randn(1, 2, 20, 16)):
            leaves = on_device({**tensors, **extra, "query": query})
            expected = evaluate(attention_by(reference, kernel), leaves, torch.float64)
            actual = evaluate(attention_by(triton_attention, kernel), leaves)
            for name in ("lam", "bias", *(["query"] if query.dtype == torch.float32 else [])):
                assert actual[name].dtype == torch.float32
                assert_close(actual[name], expected[name], "float32_gradient", name)

    @pytest.mark.parametrize("kernel", ["l1", "lp3", "chebyshev", "l2"])
    @pytest.mark.parametrize("scale", [30.0, 200.0])
    def test_large_activations_stay_finite(self, kernel, scale):
        """‖q‖² of these overflows float16 (65,504)."""
        tensors = make_tensors(10, head_dim=16, batch=1, dtype=torch.float16)
        tensors = {**tensors, "query": tensors["query"] * scale, "key": tensors["key"] * scale}
        result = evaluate(attention_by(triton_attention, kernel), on_device(tensors), lam=0.01)
        assert all(bool(tensor.isfinite().all()) for tensor in result.values())
        assert bool((result["output"] != 0).any())

    def test_memory_kept_for_backward_grows_linearly(self):
        sizes = []
        for length in (32, 64):
            tensors = on_device(make_tensors(length, head_dim=2, batch=1))
            kept = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t
            ):
                attention_by(triton_attention, "l1")(**{n: t.requires_grad_() for n, t in tensors.items()})
            sizes.append(sum(kept))
        assert 0 < sizes[1] <= LINEAR_GROWTH * sizes[0]

    def test_second_derivative_is_refused(self):
        tensors = {n: t.requires_grad_() for n, t in on_device(make_tensors(4, head_dim=3, batch=1)).items()}
        output = attention_by(triton_attention, "l1")(**tensors)
        (gradient,) = torch.autograd.grad(output.square().sum(), tensors["query"], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


@pytest.mark.skipif(INTERPRETING or DEVICE == "cuda", reason="TestKernels runs in this process")
def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"{__file__}::TestKernels"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    # None was left out.
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


class TestCompiler:
    __test__ = not INTERPRETING

    @pytest.mark.parametrize(
        ("capability", "metric", "p", "dtype"),
        [
            (80, "l1", None, "fp32"),
            (80, "lp", 2.2, "bf16"),
            (80, "chebyshev", None, "fp16"),
            (80, "l2", None, "bf16"),
            (90, "l1", None, "bf16"),
            (80, "soft_l1", None, "fp32"),
            (90, "soft_lp", 2.2, "fp32"),
            (80, "soft_lp", 2.0, "fp32"),
            (80, "soft_chebyshev", None, "fp32"),
        ],
    )
    def test_kernels_compile_without_a_gpu(self, capability, metric, p, dtype, tmp_path, monkeypatch):
        """To machine code by Triton's own compiler, and with shared memory that even a small GPU has."""
        triton = pytest.importorskip("triton")
        from triton.backends.compiler import GPUTarget

        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        for name, kernel, owner in _kernels():
            source = _source(triton, kernel, owner, metric, p, dtype)
            try:
                compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
            except (FileNotFoundError, OSError) as error:
                pytest.skip(f"this installation of Triton cannot compile for NVIDIA: {error}")
            assert compiled.asm["cubin"], name
            assert compiled.metadata.shared <= 99 * 1024, name

    @pytest.mark.parametrize(
        ("capability", "metric", "dtype", "size", "queries"),
        [
            (90, "l2", torch.bfloat16, 256, 48),
            (80, "l1", torch.float32, 256, 48),
            # One query: its number becomes a constant, and strides of 1 too.
            (90, "chebyshev", torch.float16, 64, 1),
            (90, "soft chebyshev", torch.bfloat16, 64, 48),
        ],
    )
    def test_what_is_launched_compiles(self, capability, metric, dtype, size, queries, tmp_path, monkeypatch):
        """As a GPU would get it: with the tile, warps, alignment and constants of this call, which set the memory."""
        pytest.importorskip("triton")
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction

        compiled, run = {}, JITFunction.run

        def only_compile(kernel, *arguments, grid, warmup, **options):
            compiled[kernel.fn.__name__] = run(kernel, *arguments, grid=grid, warmup=True, **options)

        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(JITFunction, "run", only_compile)
        monkeypatch.setattr(backend_triton, "_readable", lambda tensor: tensor)
        driver.set_active(_NoGPU(capability))
        tensors = make_tensors(queries, 48, size, batch=1, dtype=dtype)
        try:
            attention = attention_by(triton_attention, metric)
            with mock.patch(f"{__name__}.unsupported", return_value=None):
                evaluate(attention, {**tensors, "lam": lambdas(2)}, is_causal=queries > 1)
        except (FileNotFoundError, OSError) as error:
            pytest.skip(f"this installation of Triton cannot compile for NVIDIA: {error}")
        finally:
            # `reset_active` would look for a GPU.
            driver.set_active(None)
        assert set(compiled) == {"forward_kernel", "query_kernel", "key_kernel"}
        for name, kernel in compiled.items():
            assert kernel.metadata.shared <= SHARED_MEMORY[capability], name


# Bytes that one program may take.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}


class _NoGPU:
    """What Triton asks a driver before it compiles."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


def _kernels():
    from distattn_hf.core.kernel_triton_backward import key_kernel, query_kernel
    from distattn_hf.core.kernel_triton_forward import forward_kernel

    return [("forward", forward_kernel, "queries"), ("query", query_kernel, "queries"), ("key", key_kernel, "keys")]


def _source(triton, kernel, owner: str, metric: str, p: float | None, dtype: str):
    """The kernel as `_arguments` would call it for head size 64, with mask, bias, cap and everything differentiated."""
    tile = {n: size for n, size in backend_triton._tile(metric, 64, 64, owner=owner).items() if n != "num_warps"}
    flags = dict.fromkeys(("IS_CAUSAL", "HAS_KEEP", "HAS_BIAS", "HAS_CAP", "NEEDS_BIAS"), True)
    sizes = dict.fromkeys(("HEAD_DIM", "VALUE_DIM", "BLOCK_D", "BLOCK_V"), 64)
    constants = {
        "METRIC": metric,
        "SOFT": metric.startswith("soft"),
        "P": p,
        "PRECISION": "tf32x3",
        **flags,
        **sizes,
        **tile,
    }
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name == "keep_ptr":
            signature[name] = "*u8"
        elif name.endswith("_ptr"):
            signature[name] = "*" + (dtype if name in ("q_ptr", "k_ptr", "v_ptr", "grad_out_ptr") else "fp32")
        else:
            signature[name] = "fp32" if name == "cap" else "i32"
    return triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)


def problem(**changes) -> AttentionInputs:
    one = torch.ones(1, 1, 2, 4)
    return replace(AttentionInputs(one, one, one, get_metric("l1"), 1.0, 1.0), **changes)


class _OwnManhattan(Manhattan):
    pass


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"metric": get_metric("cosine")}, "metric 'cosine' has no Triton kernel"),
        ({"metric": _OwnManhattan()}, "metric 'l1' has no Triton kernel"),
        ({"metric": FunctionMetric("l1", torch.cdist)}, "metric 'l1' has no Triton kernel"),
        ({"dropout_p": 0.1}, "no dropout"),
        ({"query": torch.ones(1, 1, 2, 4, dtype=torch.float64)}, "got query in torch.float64"),
        ({"value": torch.ones(1, 1, 2, 257)}, "head sizes up to 256, got 257 of value"),
        ({"query": torch.ones(1, 1, 2, 4, device="meta")}, "got tensors on 'meta'"),
    ],
    ids=["metric", "subclass", "override", "dropout", "float64", "head size", "device"],
)
def test_unsupported_says_why(changes, reason, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backend_triton, "_INSTALLED", True)
    assert unsupported(problem()) is None
    assert reason in unsupported(problem(**changes))


def test_unsupported_without_a_gpu_or_without_triton(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backend_triton, "_INSTALLED", True)
    assert "needs a GPU" in unsupported(problem())
    monkeypatch.setattr(backend_triton, "_INSTALLED", False)
    assert "not installed" in unsupported(problem())


@pytest.mark.parametrize("path", sorted(CORE.glob("*triton*.py")), ids=lambda path: path.name)
def test_a_checkpoint_with_this_file_loads_without_triton(path):
    """transformers demands every import that this function finds, and the files are copied with each checkpoint."""
    assert "triton" not in get_imports(path)
