"""The monitor of attention modules: what it counts, and that nothing of it is left when it is off."""

import copy
import json
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from distattn_hf import (
    AttentionSpec,
    DistanceAttentionConfig,
    DistanceBasedAttention,
    DistanceEncoder,
    DistAttnConfig,
    DistAttnForCausalLM,
    DistAttnForConditionalGeneration,
    DistAttnSeq2SeqConfig,
    convert,
)
from distattn_hf.analysis.monitor import PerformanceMonitor, _layer_of


class Sleepy(nn.Module):
    """Attention whose weights are known, and which takes 20 ms and 8 MB."""

    def __init__(self, weights=None):
        super().__init__()
        self.weights, self.asked = weights, []

    def forward(self, x, output_attentions=False):
        self.asked.append(output_attentions)
        time.sleep(0.02)
        torch.ones(2_000_000).sum()
        return x, self.weights if output_attentions else None


@pytest.mark.parametrize("raises", [False, True])
def test_one_call_in_so_many(raises):
    """The others are neither timed nor asked for weights, also where one of them fails."""
    module = Sleepy(torch.full((1, 1, 2, 2), 0.5))
    monitor = PerformanceMonitor({"a": module}, statistics=True, every=3)
    for number in range(7):
        if raises and number == 4:
            with pytest.raises(TypeError):
                module()
        else:
            module(torch.ones(1, 2, 3))
    assert monitor.stats()["a"]["calls"] == 3
    assert monitor.stats()["a"]["tokens"] == 6
    assert module.asked == [n in (0, 3, 6) for n in range(7) if not (raises and n == 4)]
    monitor.reset()
    module(torch.ones(1, 2, 3))
    assert json.loads(json.dumps(monitor.stats()))["a"]["calls"] == 1
    with pytest.raises(ValueError, match="every must be an integer >= 1, got 0"):
        PerformanceMonitor({"a": module}, every=0)
    model = DistanceEncoder(DistanceAttentionConfig(16, 2), 2)
    model.enable_performance_monitoring(every=2)
    for _ in range(3):
        model(torch.randn(1, 4, 16))
    assert [stats["calls"] for stats in model.get_performance_stats(by="layer").values()] == [2, 2]


def test_calls_time_and_memory():
    module = Sleepy()
    monitor = PerformanceMonitor({"a": module})
    for _ in range(3):
        module(torch.ones(1))
    stats = monitor.stats()["a"]
    assert stats["calls"] == 3
    assert stats["seconds"] >= 0.06
    assert stats["seconds_per_call"] == stats["seconds"] / 3
    # Linux says how much memory rose; allocators take up to a few MB more or have some left from before.
    assert stats["peak_bytes"] is None or 0 <= stats["peak_bytes"] < 100_000_000
    assert set(stats) == {"calls", "seconds", "seconds_per_call", "peak_bytes", "tokens", "tokens_per_second", "flops"}
    assert (stats["tokens"], stats["tokens_per_second"]) == (0, None)
    assert module.asked == [False] * 3
    monitor.reset()
    assert monitor.stats()["a"]["calls"] == 0
    monitor.stop()
    module(torch.ones(1))
    assert monitor.stats()["a"]["calls"] == 0
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


def test_statistics_of_known_weights():
    """One head uniform over 4 keys, one that sees a single key of 4, and a row that sees nothing."""
    uniform, single = torch.full((4, 4), 0.25), torch.eye(4)[[0, 0, 0, 0]]
    weights = torch.stack([uniform, single * 0.97 + 0.01])[None].clone()
    weights[0, :, 3] = 0.0
    module = Sleepy(weights)
    monitor = PerformanceMonitor({"a": module}, statistics=True)
    module(torch.ones(1))
    module(x=torch.ones(1))
    stats = monitor.stats()["a"]
    assert module.asked == [True, True]
    # Three rows of each head count; 0.97 + 0.01 is beyond 0.95.
    narrow = -(0.98 * torch.tensor(0.98).log() + 3 * 0.01 * torch.tensor(0.01).log())
    assert stats["entropy"] == pytest.approx((1.3862944 + float(narrow)) / 2, abs=1e-6)
    assert stats["maximum"] == pytest.approx((0.25 + 0.98) / 2, abs=1e-6)
    assert stats["collapsed"] == pytest.approx(0.5)
    # Distances of rows 0, 1, 2 to keys 0 to 3: uniform (6, 4, 4) / 4.
    near = [0.01 * 6, 0.98 + 0.01 * 3, 0.98 * 2 + 0.01 * 2]
    assert stats["distance"] == pytest.approx((14 / 4 + sum(near)) / 6, abs=1e-6)


def test_a_converted_model_is_monitored_and_gives_the_same():
    torch.manual_seed(0)
    teacher = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=16)).eval()
    student = convert(teacher, AttentionSpec(metric="l2", layers="0"), init="plain").eval()
    ids = torch.arange(8)[None]
    expected = student(ids).logits
    with pytest.raises(RuntimeError, match="performance monitoring is off"):
        student.get_performance_stats()
    student.enable_performance_monitoring(statistics=True)
    assert torch.equal(student(ids).logits, expected) or torch.allclose(student(ids).logits, expected, atol=1e-6)
    stats = student.get_performance_stats()
    weights = student(ids, output_attentions=True).attentions[0].detach().double()
    assert list(stats) == ["h.0.attn"]
    entropy = -(weights * weights.clamp_min(1e-300).log()).sum(-1)[:, :, 1:].mean()
    assert stats["h.0.attn"]["entropy"] == pytest.approx(float(entropy), abs=1e-5)
    attention = student.attention_modules()["h.0.attn"]
    handle = attention.c_attn.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("monitor")))
    with pytest.raises(RuntimeError, match="monitor"):
        student(ids)
    handle.remove()
    assert student(ids).attentions is None, "what the monitor asked for goes no further, also after an error"
    student.enable_performance_monitoring()
    student(ids)
    assert student.get_performance_stats()["h.0.attn"]["calls"] == 1, "counting starts anew"
    assert "entropy" not in student.get_performance_stats()["h.0.attn"]
    student.disable_performance_monitoring()
    assert torch.equal(student(ids).logits, expected)
    attention = student.attention_modules()["h.0.attn"]
    hooks = [*attention._forward_hooks.values(), *attention._forward_pre_hooks.values()]
    assert not [hook for hook in hooks if "PerformanceMonitor" in repr(hook)]


@pytest.mark.parametrize("mechanism", ["dot", "l1", "local", "linear", "nystrom"])
def test_a_native_model_is_monitored(mechanism):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 30}
    model = DistAttnForCausalLM(DistAttnConfig(mechanism=mechanism, is_decoder=True, **sizes)).eval()
    ids = torch.arange(12)[None] % 30
    weights = model(ids, output_attentions=True).attentions
    model.enable_performance_monitoring(statistics=True)
    model(ids)
    stats = model.get_performance_stats()
    assert list(stats) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    for found, layer in zip(stats.values(), weights, strict=True):
        layer = layer.detach().double()[:, :, 1:]
        entropy = -(layer * layer.clamp_min(1e-300).log()).sum(-1).mean()
        assert found["entropy"] == pytest.approx(float(entropy), abs=1e-5)
        assert found["calls"] == 1


def test_layers_are_monitored_and_give_what_their_caller_asked_for():
    torch.manual_seed(0)
    config = DistanceAttentionConfig(hidden_size=16, num_heads=2)
    x = torch.randn(2, 6, 16)
    stack = DistanceEncoder(config, num_layers=2).eval()
    expected, weights = stack(x, output_attentions=True)
    stack.enable_performance_monitoring(statistics=True)
    torch.testing.assert_close(stack(x), expected)
    assert len(stack(x, output_attentions=True)[1]) == 2
    stats = stack.get_performance_stats()
    assert len(stats) == 2
    for found, layer in zip(stats.values(), weights, strict=True):
        entropy = -(layer.detach().double() * layer.detach().double().log()).sum(-1).mean()
        assert found["entropy"] == pytest.approx(float(entropy), abs=1e-5)
        assert found["calls"] == 2
    layer = DistanceBasedAttention(config).eval()
    expected = layer(x)
    layer.enable_performance_monitoring(statistics=True)
    torch.testing.assert_close(layer(x), expected)
    assert list(layer.get_performance_stats()) == ["DistanceBasedAttention"]


def test_a_copy_counts_for_itself_and_threads_do_not_meet():
    torch.manual_seed(0)
    config = DistanceAttentionConfig(hidden_size=16, num_heads=2)
    model, x = DistanceEncoder(config, num_layers=2).eval(), torch.randn(1, 6, 16)
    model.enable_performance_monitoring()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(x)
        assert {stats["calls"] for stats in other.get_performance_stats().values()} == {1}
        assert {stats["calls"] for stats in model.get_performance_stats().values()} == {0}
        other.disable_performance_monitoring()
        assert not any(module._forward_hooks for module in other.modules())
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: model(x), range(20)))
    assert {stats["calls"] for stats in model.get_performance_stats().values()} == {20}


def test_by_layer():
    """The names and numbers of both families, and of an encoder-decoder, whose decoder layers have two modules."""
    stack = DistanceEncoder(DistanceAttentionConfig(16, 2), num_layers=2)
    teacher = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=30))
    converted = convert(teacher, AttentionSpec("l2", transform="scalar"), init="plain")
    ids = torch.ones(3, 5, dtype=torch.long)
    for model, call in ((stack, torch.randn(3, 5, 16)), (converted, ids)):
        model.enable_performance_monitoring()
        for _ in range(2):
            model(call)
        stats = model.get_performance_stats(by="layer")
        assert list(stats) == ["layer_0", "layer_1"]
        first, module = stats["layer_0"], next(iter(model.get_performance_stats().values()))
        assert (first["calls"], first["tokens"]) == (2, 30)
        assert first["seconds"] == module["seconds"] > 0
        assert first["avg_forward_time"] == module["seconds_per_call"] == first["seconds"] / 2
        assert first["tokens_per_second"] == 30 / first["seconds"]
    with pytest.raises(ValueError, match="by must be 'module' or 'layer', got 'head'"):
        stack.get_performance_stats(by="head")


def test_layers_of_an_encoder_decoder():
    config = DistAttnSeq2SeqConfig(
        vocab_size=30, hidden_size=16, num_attention_heads=2, num_hidden_layers=1, decoder_layers=2, mechanism="l1"
    )
    model = DistAttnForConditionalGeneration(config)
    model.enable_performance_monitoring()
    model(input_ids=torch.ones(2, 7, dtype=torch.long), decoder_input_ids=torch.ones(2, 4, dtype=torch.long))
    stats, modules = model.get_performance_stats(by="layer"), model.get_performance_stats()
    assert list(stats) == ["encoder_layer_0", "decoder_layer_0", "decoder_layer_1"]
    assert [layer["tokens"] for layer in stats.values()] == [14, 8, 8]
    both = [modules[f"model.decoder.layers.0.{part}"]["seconds"] for part in ("self_attn", "cross_attn")]
    assert stats["decoder_layer_0"]["seconds"] == sum(both)


def test_two_towers_are_not_one():
    """CLIP's are both called encoder."""
    names = [f"{tower}_model.encoder.layers.0.self_attn" for tower in ("text", "vision")]
    assert [_layer_of(name, names) for name in names] == [
        "text_model.encoder.layers_layer_0", "vision_model.encoder.layers_layer_0"
    ]  # fmt: skip
