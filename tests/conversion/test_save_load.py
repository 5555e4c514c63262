"""A saved conversion loads bit-equal, with its config, report and heads; tests/test_fresh_process.py: elsewhere."""

import ast
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import distattn_hf
from distattn_hf import AttentionSpec, CalibrationOptions, convert
from distattn_hf.conversion.convert import current_report
from distattn_hf.core.metrics import METRICS
from distattn_hf.hub.card import build_card
from tests.conversion.models import CLASSIFIER, FAMILIES, bert, gpt2, t5, token_batch

AUTO = {
    "gpt2": AutoModelForCausalLM,
    "llama": AutoModelForCausalLM,
    "bert": AutoModelForMaskedLM,
    "t5": AutoModelForSeq2SeqLM,
}


def saved(folder: Path, family: str, spec: AttentionSpec):
    teacher = FAMILIES[family]()
    student = convert(teacher, spec, calibration=[token_batch(teacher, seed=s) for s in range(3)])
    batch = token_batch(teacher, padded=True, seed=9)
    student.save_pretrained(folder)
    with torch.no_grad():
        torch.save((batch, student(**batch).logits), folder / "expected.pt")
    return student, batch


@pytest.mark.parametrize("metric", [m for m in METRICS if METRICS.get(m).is_distance and not m.startswith("lifted")])
def test_every_metric_reloads_bit_equal(tmp_path, metric):
    student, batch = saved(tmp_path, "gpt2", AttentionSpec(metric, p=3 if metric == "lp" else None))
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**batch).logits, student(**batch).logits)


def test_other_heads_of_the_family_load_from_the_same_folder(tmp_path):
    student, batch = saved(tmp_path, "bert", AttentionSpec("l2"))
    base = AutoModel.from_pretrained(tmp_path).eval()
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3).eval()
    assert type(base).__name__ == "DistAttnBertModel"
    assert type(classifier).__name__ == "DistAttnBertForSequenceClassification"
    expected = student.bert(**batch).last_hidden_state
    assert torch.equal(base(**batch).last_hidden_state, expected)
    assert torch.equal(classifier.bert(**batch).last_hidden_state, expected)


def test_encoder_of_a_converted_t5_loads_alone(tmp_path):
    student, batch = saved(tmp_path, "t5", AttentionSpec("l2"))
    encoder = distattn_hf.DistAttnT5EncoderModel.from_pretrained(tmp_path).eval()
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    assert torch.equal(encoder(**inputs).last_hidden_state, student.encoder(**inputs).last_hidden_state)


def test_config_and_report_travel(tmp_path):
    student, _ = saved(tmp_path, "gpt2", AttentionSpec("l2", layers=[1]))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config).__name__ == "DistAttnGPT2Config"
    assert config.model_type == "distattn_gpt2"
    assert config.attention_specs == student.config.attention_specs
    assert config.hidden_size == 32
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "again")
    stored = json.loads((tmp_path / "again" / "distattn_report.json").read_text())
    assert stored == student.conversion_report.to_dict()


def test_two_processes_may_save_to_one_folder(tmp_path, monkeypatch):
    """As all ranks of tensor parallelism do: here the second saves while the first writes its report."""
    student = convert(gpt2(), AttentionSpec("l2"), init="plain")
    write = json.dump

    def second_comes_first(*args, **kwargs):
        monkeypatch.undo()
        student.save_pretrained(tmp_path)
        write(*args, **kwargs)

    monkeypatch.setattr(json, "dump", second_comes_first)
    student.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "distattn_report.json").read_text())["groups"]
    assert not list(tmp_path.glob("*.tmp"))


def test_the_report_says_when_its_parameters_have_changed_since(tmp_path):
    """Training by any trainer: the saved report has the λ and α of its checkpoint, and owns up to old divergences."""
    specs = [AttentionSpec("cosine", layers=[0]), AttentionSpec("l2", layers=[1])]
    student = convert(gpt2(), specs, calibration=[token_batch(gpt2())], options=CalibrationOptions(steps=3))
    fitted = current_report(student)
    assert (fitted.changed_since, "at the conversion" in fitted.summary()) == (False, False)
    assert fitted.groups[0].alpha is None
    assert fitted.mean_alpha == pytest.approx(fmean(fitted.groups[1].alpha))
    student.save_pretrained(tmp_path / "fitted")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "fitted", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    assert not AutoModelForCausalLM.from_pretrained(tmp_path / "half").conversion_report["changed_since"]
    # A few hundred steps at 2e-5 move log λ by no more than this.
    half.attention_states["h.0.attn"].groups[0].log_lambda.data += 1e-3
    assert current_report(half).changed_since
    group = student.attention_states["h.1.attn"].groups[0]
    torch.nn.init.zeros_(group.log_alpha)
    assert "(λ, α or ε have changed since)" in current_report(student).summary()
    student.save_pretrained(tmp_path / "trained")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    stored = again.conversion_report
    assert stored["changed_since"]
    assert stored["groups"][1]["alpha"] == [1.0] * 4
    assert stored["groups"][1]["divergence_after"] == fitted.groups[1].divergence_after
    text = build_card(tmp_path / "trained", "user/x", license="mit").text
    assert "λ, α or ε have changed since" in text
    assert "what was done to the model after the conversion is not recorded here" in text
    again.save_pretrained(tmp_path / "again")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").conversion_report["changed_since"]


def test_pretrained_parameters_keep_their_names_and_values():
    for family, build in FAMILIES.items():
        teacher = build()
        state = convert(teacher, AttentionSpec("l2", transform="maps"), init="plain").state_dict()
        for name, tensor in teacher.state_dict().items():
            assert torch.equal(state[name], tensor), (family, name)
        assert all(".distattn." in name for name in state.keys() - teacher.state_dict().keys())


def test_tied_weights_stay_tied_and_generation_config_and_modes_are_kept(tmp_path):
    teacher = gpt2()
    teacher.generation_config.max_new_tokens = 7
    teacher.transformer.wte.weight.requires_grad_(False)
    teacher.train()
    student = convert(teacher, AttentionSpec("l2"), init="plain")
    assert student.lm_head.weight is student.transformer.wte.weight
    assert student.generation_config.max_new_tokens == 7
    assert student.training
    assert not student.transformer.wte.weight.requires_grad
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.transformer.wte.weight
    assert again.generation_config.max_new_tokens == 7


def test_classifier_heads_and_labels_survive(tmp_path):
    teacher = bert(CLASSIFIER, num_labels=3, id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2})
    student = convert(teacher, AttentionSpec("cosine"), init="plain")
    student.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(again) is type(student)
    assert again.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_tokenizer_is_found_by_auto_tokenizer(tmp_path):
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "distance", "attention"]
    tokenizer = BertTokenizerFast(vocab={w: i for i, w in enumerate(words)})
    convert(bert(), AttentionSpec("l2"), init="plain").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("distance attention")["input_ids"] == [2, 5, 6, 3]


def test_head_parameters_stay_float32_when_the_model_is_loaded_in_half(tmp_path):
    student, batch = saved(tmp_path, "gpt2", AttentionSpec("l2"))
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    kinds = {p.dtype for n, p in half.named_parameters() if ".distattn." in n}
    assert kinds == {torch.float32}
    assert half.transformer.wte.weight.dtype == torch.bfloat16
    logits = half(**batch).logits
    assert logits.dtype == torch.bfloat16
    expected = student(**batch).logits
    assert torch.nn.functional.cosine_similarity(logits.float(), expected, dim=-1).min() > 0.99


def test_every_head_class_of_the_named_families_exists():
    import transformers

    for family in ("GPT2", "Bert", "T5"):
        module = getattr(transformers.models, family.lower())
        for name in dir(module):
            base = getattr(module, name, None)
            if isinstance(base, type) and issubclass(base, transformers.PreTrainedModel) and "PreTrained" not in name:
                assert issubclass(getattr(distattn_hf, f"DistAttn{name}"), base)


def test_importing_the_package_imports_no_model_file():
    code = (
        "import sys, distattn_hf; "
        "print([m for m in sys.modules if m.startswith('transformers.models.') and '.modeling_' in m "
        "and '.auto.' not in m])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ast.literal_eval(run.stdout) == []


def test_converted_encoder_decoder_keeps_its_config(tmp_path):
    student = convert(t5(), AttentionSpec("l2"), init="plain")
    student.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.is_encoder_decoder
    assert config.tie_word_embeddings is True


def test_weights_asked_for_in_the_config_do_not_forbid_saving(tmp_path):
    teacher = gpt2(attn_implementation="eager", output_attentions=True)
    student = convert(teacher, AttentionSpec("l2"), init="plain")
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, output_attentions=True)
    assert len(again(**token_batch(again)).attentions) == 2


def test_a_fresh_model_from_a_converted_config_has_no_report(tmp_path):
    student, _ = saved(tmp_path, "gpt2", AttentionSpec("l2"))
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert fresh.conversion_report is None
    assert student.conversion_report is not None


def test_a_model_made_from_a_config_can_be_inspected():
    from distattn_hf.conversion.convert import current_report

    block = {"specs": [AttentionSpec("l2").to_dict()]}
    config = distattn_hf.DistAttnGPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, distattn=block)
    report = current_report(distattn_hf.DistAttnGPT2LMHeadModel(config))
    assert [group.module for group in report.groups] == ["h.0.attn", "h.1.attn"]
    assert report.unconverted == []


def test_a_family_used_for_the_first_time_has_one_class():
    """The class that convert makes is the one that the Auto classes load (no other test uses this family)."""
    config = transformers.OlmoConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    student = convert(transformers.OlmoForCausalLM(config), AttentionSpec("sqeuclidean"), init="plain")
    assert type(student) is distattn_hf.DistAttnOlmoForCausalLM
    assert type(transformers.AutoModelForCausalLM.from_config(student.config)) is type(student)


@pytest.mark.parametrize(
    ("name", "known"), [("me/model", "me/model"), ("gpt2", "gpt2"), ("", None), ("/a/b", None), ("tests/core", None)]
)
def test_the_report_names_the_teacher_unless_it_was_a_folder(name, known, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    teacher = gpt2()
    teacher.config.name_or_path = name
    student = convert(teacher, AttentionSpec("l2"), init="plain")
    assert student.conversion_report.base_model == known
    assert current_report(student).base_model == known
