"""Fine-tuning works with what a transformers user has: Trainer, PEFT, checkpointing, bf16, device_map, compile."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

from distattn_hf import AttentionSpec, convert
from tests.conversion.models import CLASSIFIER, FAMILIES, bert, gpt2, llama, t5, token_batch


def arguments(folder, **kwargs):
    return TrainingArguments(
        str(folder), report_to=[], use_cpu=True, disable_tqdm=True, seed=0, per_device_train_batch_size=4,
        learning_rate=5e-3, save_strategy="no", **kwargs,
    )  # fmt: skip


def sequences(count=32):
    """Rows that repeat their first half, which attention can learn and position alone cannot."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randint(3, 20, (count, 8), generator=generator)
    rows = torch.cat([half, half], dim=1)
    return [{"input_ids": row, "labels": row} for row in rows]


@pytest.mark.parametrize("metric", ["l2", "l1", "sqeuclidean"])
def test_trainer_learns_and_the_result_reloads(tmp_path, metric):
    student = convert(gpt2(), AttentionSpec(metric, transform="scalar"), init="plain")
    before = copy.deepcopy(student.state_dict())
    trainer = Trainer(student, arguments(tmp_path, max_steps=30), train_dataset=sequences())
    first = trainer.evaluate(sequences())["eval_loss"]
    trainer.train()
    last = trainer.evaluate(sequences())["eval_loss"]
    assert last < 0.8 * first
    after = student.state_dict()
    name = "transformer.h.0.attn.distattn.groups.0."
    for parameter in ("log_lambda", "log_alpha", "shift"):
        assert not torch.equal(after[name + parameter], before[name + parameter]), parameter
    trainer.save_model(tmp_path / "final")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    batch = token_batch(student)
    assert torch.equal(again(**batch).logits, student.eval()(**batch).logits)


def test_fixed_lambda_does_not_train(tmp_path):
    student = convert(gpt2(), AttentionSpec("l2", learnable_lambda=False), init="plain")
    before = student.attention_states["h.0.attn"].groups[0].lam().clone()
    Trainer(student, arguments(tmp_path, max_steps=3), train_dataset=sequences()).train()
    assert torch.equal(student.attention_states["h.0.attn"].groups[0].lam(), before)


def test_trainer_on_a_classifier(tmp_path):
    student = convert(bert(CLASSIFIER, num_labels=2), AttentionSpec("cosine"), init="plain")
    rows = [{**row, "labels": int(row["input_ids"][0] > 10)} for row in sequences()]
    trainer = Trainer(student, arguments(tmp_path, max_steps=60), train_dataset=rows)
    trainer.train()
    assert trainer.evaluate(rows)["eval_loss"] < 0.6
    trainer.save_model(tmp_path / "final")
    assert type(AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")) is type(student)


@pytest.mark.parametrize(
    ("family", "target"), [("gpt2", "c_attn"), ("bert", "query"), ("t5", "q"), ("llama", "q_proj")]
)
def test_lora_finds_its_targets_by_itself(tmp_path, family, target):
    from peft import LoraConfig, PeftModel, get_peft_model

    student = convert(FAMILIES[family](), AttentionSpec("l2"), init="plain")
    student.save_pretrained(tmp_path / "base")
    batch = token_batch(student)
    expected = student(**batch).logits
    adapted = get_peft_model(student, LoraConfig(r=2, init_lora_weights=False))
    adapted.eval()
    assert any(f".{target}.lora_A" in name for name, _ in adapted.named_parameters())
    changed = adapted(**batch).logits
    assert not torch.allclose(changed, expected)
    adapted.save_pretrained(tmp_path / "adapter")
    # Not the teacher, on which the adapter would do something else without a word.
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "base")
    fresh = type(student).from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    torch.testing.assert_close(again(**batch).logits, changed)


@pytest.mark.parametrize("metric", ["l2", "l1", "sqeuclidean"])
@pytest.mark.parametrize("family", ["gpt2", "t5", "llama", "bert"])
def test_gradient_checkpointing_gives_the_same_gradients(family, metric):
    student = convert(FAMILIES[family](), AttentionSpec(metric, transform="scalar"), init="plain")
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for config in {id(m.config): m.config for m in student.modules() if hasattr(m, "config")}.values():
        config.attention_dropout = 0.0
    batch = token_batch(student, padded=True)
    gradients = []
    for checkpointing in (False, True):
        student.train()
        student.zero_grad()
        if checkpointing:
            student.gradient_checkpointing_enable()
        for module in student.modules():
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
        student(**batch).logits.square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any(".distattn." in name for name in gradients[0])
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_model_runs_forward_and_backward(family):
    student = convert(FAMILIES[family](), AttentionSpec("l2", transform="scalar"), init="plain")
    batch = token_batch(student, padded=True)
    expected = student(**batch).logits
    half = student.to(torch.bfloat16)
    logits = half(**batch).logits
    logits.float().square().mean().backward()
    assert logits.dtype == torch.bfloat16
    assert all(torch.isfinite(p.grad).all() for p in half.parameters() if p.grad is not None)
    real = slice(None) if student.config.is_encoder_decoder else batch["attention_mask"].bool()
    assert torch.nn.functional.cosine_similarity(logits.float()[real], expected[real], dim=-1).min() > 0.98


def test_autocast_is_close_to_float32():
    student = convert(llama(), AttentionSpec("l2"), init="plain")
    batch = token_batch(student)
    with torch.no_grad():
        expected = student(**batch, labels=batch["input_ids"]).loss
        with torch.autocast("cpu", torch.bfloat16):
            got = student(**batch, labels=batch["input_ids"]).loss
    assert torch.isfinite(got)
    assert abs(float(got - expected)) < 0.02 * float(expected)


def test_device_map(tmp_path):
    student = convert(gpt2(), AttentionSpec("l2"), init="plain")
    student.save_pretrained(tmp_path)
    batch = token_batch(student)
    for device_map in ("auto", {"": "cpu"}):
        again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map).eval()
        assert torch.equal(again(**batch).logits, student(**batch).logits)


def test_a_t5_trains_with_seq2seq_labels(tmp_path):
    student = convert(t5(), AttentionSpec("l2"), init="plain")
    trainer = Trainer(student, arguments(tmp_path, max_steps=20), train_dataset=sequences())
    first = trainer.evaluate(sequences())["eval_loss"]
    trainer.train()
    assert trainer.evaluate(sequences())["eval_loss"] < 0.8 * first
