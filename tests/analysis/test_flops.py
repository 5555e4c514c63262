"""FLOPs by layer: of PyTorch's operators as PyTorch counts them, of the package's kernels by what they read."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distattn_hf import AttentionSpec, CalibrationOptions, DistAttnConfig, convert, distance_attention
from distattn_hf.analysis.flops import FlopCounter
from distattn_hf.analysis.monitor import PerformanceMonitor
from distattn_hf.core.discovery import find_attention_modules, locate
from distattn_hf.core.modeling_distattn import DistAttnForCausalLM
from distattn_hf.functional.retrieval_attention import retrieval_attention
from tests.conversion.models import gpt2, llama, token_batch

LENGTH = 24
# Llama of tests.conversion.models: q and o 32 x 32, k and v 32 x 16; two rows.
PROJECTIONS = 2 * 2 * LENGTH * 32 * (32 + 32 + 16 + 16)
PAIRS = LENGTH * (LENGTH + 1) // 2


def stats(model, batch) -> dict:
    model.enable_performance_monitoring(flops=True)
    with torch.no_grad():
        model(**batch, use_cache=False)
    try:
        return model.get_performance_stats(by="layer")
    finally:
        model.disable_performance_monitoring()


@pytest.mark.parametrize(("metric", "of_a_pair"), [("l1", 3 * 8), ("chebyshev", 3 * 8)])
def test_a_kernel_is_counted_by_its_shapes(metric, of_a_pair):
    model = convert(llama(), metric, init="plain")
    batch = token_batch(model, length=LENGTH)
    for layer in stats(model, batch).values():
        assert layer["flops"] == PROJECTIONS + 2 * 4 * PAIRS * (of_a_pair + 2 * 8)
        assert layer["avg_forward_time"] > 0


def test_operators_are_counted_as_pytorch_does():
    """Dot product through PyTorch's attention, also of a model that is no model of the package."""
    model = gpt2()
    batch = token_batch(model, length=LENGTH)
    modules = {name: locate(model, name) for name in find_attention_modules(model)}
    monitor = PerformanceMonitor(modules, flops=True)
    with torch.no_grad():
        model(**batch, use_cache=False)
    monitor.stop()
    counted = FlopCounterMode(display=False)
    with torch.no_grad(), counted:
        model(**batch, use_cache=False)
    shares = counted.get_flop_counts()
    expected = sum(sum(ops.values()) for name, ops in shares.items() if name.endswith(".attn"))
    assert sum(layer["flops"] for layer in monitor.layers().values()) == expected > 0


def test_no_count_without_asking_and_none_of_other_threads():
    model = convert(llama(), "l1", init="plain")
    model.enable_performance_monitoring()
    with torch.no_grad():
        model(**token_batch(model, length=8))
    assert {layer["flops"] for layer in model.get_performance_stats(by="layer").values()} == {None}
    assert {module["flops"] for module in model.get_performance_stats().values()} == {None}
    from concurrent.futures import ThreadPoolExecutor

    x = torch.randn(1, 2, 8, 4)
    with FlopCounter() as counter, ThreadPoolExecutor(1) as pool:
        pool.submit(distance_attention, x, x, x, metric="l1").result()
        assert counter.of_kernels == 0
        distance_attention(x, x, x, metric="l1")
        assert counter.of_kernels == 2 * 8 * 8 * (3 * 4 + 2 * 4)


@pytest.mark.parametrize("min_weight", [0.0, 0.05])
def test_retrieval_is_counted_by_what_it_reads(min_weight):
    torch.manual_seed(0)
    query, key = 3 * torch.randn(1, 4, 200, 16), torch.randn(1, 2, 200, 16)
    options = {"window_size": 16, "num_sinks": 1, "block_size": 16, "num_blocks": 2, "min_weight": min_weight}
    with FlopCounter() as counter:
        retrieval_attention(query, key, key, is_causal=True, far_field=False, cluster_keys=False, **options)
    dense = 4 * 200 * 200 * 4 * 16
    assert 0 < counter.of_kernels < dense
    # Every query's own block and the one before, the first block, and at most the chosen ones.
    own = [16 * len({0, max(0, i // 16 - 1), i // 16}) for i in range(200)]
    least = 4 * sum(own) * 4 * 16
    most = 4 * sum(size + 16 * (2 if min_weight == 0 else 64) for size in own) * 4 * 16
    assert least <= counter.of_kernels <= most
    if min_weight == 0:
        others = [min(2, max(0, i // 16 - 2)) for i in range(200)]
        assert counter.of_kernels == 4 * sum(size + 16 * more for size, more in zip(own, others)) * 4 * 16


def test_nystrom_grows_with_the_length_and_not_its_square():
    spec = AttentionSpec("sqeuclidean", mechanism="nystrom", num_landmarks=4, window_size=8, num_sinks=1)
    teacher = llama()
    options = CalibrationOptions(steps=1, progress=False)
    model = convert(teacher, spec, calibration=[token_batch(teacher)], options=options)
    counts = [sum(x["flops"] for x in stats(model, token_batch(model, length=n)).values()) for n in (48, 96, 192)]
    assert counts[2] - counts[1] == pytest.approx(2 * (counts[1] - counts[0]), rel=0.02)


def test_native_mechanisms_are_counted():
    config = DistAttnConfig(
        mechanism="linear", is_decoder=True, num_hidden_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=64,
        intermediate_size=16,
    )  # fmt: skip
    model = DistAttnForCausalLM(config).eval()
    (layer,) = stats(model, token_batch(model, length=LENGTH)).values()
    assert layer["flops"] > 4 * 2 * 2 * LENGTH * 16 * 16
