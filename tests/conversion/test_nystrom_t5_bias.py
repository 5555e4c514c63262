"""T5's relative bias in linear attention: exact, and never written out as (N, M)."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import UMT5Config, UMT5ForConditionalGeneration

from distattn_hf import AttentionSpec, CalibrationOptions, convert
from distattn_hf.core.relative_bias import RelativeBias

from .models import t5, token_batch

QUICK = CalibrationOptions(steps=1, progress=False)


def student_of(teacher, **fields):
    spec = {"num_landmarks": 6, "window_size": 128, "num_sinks": 2, **fields}
    batches = [token_batch(teacher, 40, seed=seed) for seed in range(2)]
    return convert(teacher, AttentionSpec(mechanism="nystrom", **spec), calibration=batches, options=QUICK)


class LargestTensor(TorchDispatchMode):
    """Entries of the largest tensor that any operation makes."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                # Not what a broadcast pretends to be.
                self.entries = max(self.entries, tensor.untyped_storage().nbytes() // max(1, tensor.element_size()))
        return result


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
def test_nothing_quadratic_is_made(grad):
    length = 1500
    teacher = t5()
    batch = token_batch(teacher, length)
    batch["decoder_input_ids"] = batch["input_ids"]
    for model, quadratic in ((student_of(teacher), False), (teacher, True)):
        with LargestTensor() as largest, torch.set_grad_enabled(grad):
            loss = model(**batch).logits.square().mean()
            if grad:
                loss.backward()
        assert (largest.entries >= length * length) == quadratic


@pytest.mark.parametrize("decoder", [False, True], ids=["encoder", "decoder"])
def test_the_table_is_the_bias_that_t5_writes_out(decoder):
    model = t5()
    module = (model.decoder if decoder else model.encoder).block[0].layer[0].SelfAttention
    num_queries, num_keys, window = 5, 400, 128
    past = num_keys - num_queries
    expected = module.compute_bias(num_queries, num_keys, past_seen_tokens=past)
    bias = RelativeBias.from_module(module, past, torch.device("cpu"))
    assert torch.equal(bias.written_out(num_queries, num_keys), expected)
    heads = torch.tensor([3, 1])
    assert torch.equal(bias.of(heads).written_out(num_queries, num_keys), expected[:, heads])
    table = bias.window(window, num_keys, is_causal=decoder)
    relative = torch.arange(num_keys) - torch.arange(num_queries)[:, None] - past
    assert torch.equal(table.at(relative)[None], expected)


@pytest.mark.parametrize("layers", [None, "0", "1"], ids=["all", "first", "second"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_with_a_window_over_the_whole_text_the_model_is_the_teacher(layers, implementation):
    """Every bias is looked up in the table, or, in layers that are not converted, written out from the placeholder."""
    teacher = t5()
    student = student_of(teacher, layers=layers, attention="self")
    student.set_attn_implementation(implementation)
    batch = token_batch(teacher, 100, padded=True, seed=4)
    with torch.no_grad():
        torch.testing.assert_close(student(**batch).logits, teacher(**batch).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_bias_gets_the_teachers_gradient(checkpointing):
    teacher = t5().double()
    student = student_of(teacher, attention="self").double().train()
    if checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    batch = token_batch(teacher, 100)
    for model in (student, teacher):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        model(**batch, labels=batch["decoder_input_ids"]).loss.backward()
    for stack in ("encoder", "decoder"):
        ours, theirs = (
            getattr(m, stack).block[0].layer[0].SelfAttention.relative_attention_bias.weight.grad
            for m in (student, teacher)
        )
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_steps_see_the_same_bias_as_the_whole():
    student = student_of(t5(), window_size=130)
    length = 300
    batch = token_batch(student, 2 * length, seed=2)
    decoder_ids = batch["decoder_input_ids"]
    with torch.no_grad():
        encoded = student.encoder(input_ids=batch["input_ids"])
        whole = student(encoder_outputs=encoded, decoder_input_ids=decoder_ids).logits
        cache, pieces, start = None, [], 0
        for size in (140, 1, 1, 100, 58):
            found = student(encoder_outputs=encoded, decoder_input_ids=decoder_ids[:, start : start + size],
                            past_key_values=cache, use_cache=True)  # fmt: skip
            cache, start = found.past_key_values, start + size
            pieces.append(found.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-3, atol=1e-3)


def test_a_window_shorter_than_the_bias_is_refused():
    with pytest.raises(ValueError, match="window_size=20 is too small"):
        student_of(t5(), window_size=20)
    # Texts that end within the window say nothing against it; a longer one is refused when it comes.
    student = student_of(t5(), window_size=45)
    with pytest.raises(ValueError, match="window_size=45 is too small"), torch.no_grad():
        student(**token_batch(student, 100))


def test_a_placeholder_that_lost_its_bias_is_noticed():
    """Reentrant checkpointing hands detached copies from layer to layer."""
    student = student_of(t5()).train()
    student.gradient_checkpointing_enable({"use_reentrant": True})
    batch = token_batch(student, 40)
    loss = student(**batch, labels=batch["decoder_input_ids"]).loss
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        loss.backward()


def test_a_model_that_makes_its_bias_in_every_layer():
    """UMT5 takes no bias from outside: its own, written out, is used."""
    torch.manual_seed(0)
    config = UMT5Config(
        num_layers=2, num_decoder_layers=2, num_heads=4, d_model=32, d_kv=8, d_ff=64, vocab_size=64,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=2, relative_attention_max_distance=20,
        relative_attention_num_buckets=8,
    )  # fmt: skip
    teacher = UMT5ForConditionalGeneration(config).eval()
    student = student_of(teacher, window_size=100, attention="self")
    batch = token_batch(teacher, 60, seed=4)
    with torch.no_grad():
        torch.testing.assert_close(student(**batch).logits, teacher(**batch).logits, rtol=1e-3, atol=1e-3)
    student = student_of(teacher, window_size=20)
    assert student.generate(input_ids=batch["input_ids"], max_new_tokens=5).shape[1] <= 6
