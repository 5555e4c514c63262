"""Fewer bits: a converted checkpoint quantised as it loads is off by what the untouched model is, and a teacher that
transformers quantised is converted as it stands.
"""

import pytest
import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from distattn_hf import AttentionSpec, CalibrationOptions, convert, fold_alpha, revert
from tests.conversion.models import SPECIAL, VOCAB, token_batch

KINDS = {
    "torchao int8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "bitsandbytes int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}
SPECS = {
    "exact": (AttentionSpec(), {"init": "exact"}),
    "l2": (AttentionSpec("l2", transform="maps"), {"calibration": 2}),
    "nystrom": (
        AttentionSpec(mechanism="nystrom", num_landmarks=8, window_size=6, num_sinks=2, exact_below=0),
        {"calibration": 2},
    ),
    # All blocks: which ones are best differs with the weights.
    "retrieval": (AttentionSpec(mechanism="retrieval", block_size=2, window_size=4, num_blocks=64, min_weight=0), {}),
}
OPTIONS = CalibrationOptions(steps=20, progress=False)
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
EVERY_SPEC = pytest.mark.parametrize("spec", SPECS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    torch.manual_seed(0)
    # bitsandbytes' 4 bits need multiples of 64.
    config = LlamaConfig(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=64, intermediate_size=128,
        vocab_size=VOCAB, max_position_embeddings=256, initializer_range=0.2, **SPECIAL,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "teacher")
    return folder / "teacher"


def quantised(folder, kind: str):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=KINDS[kind]()).eval()


def converted(teacher, name: str):
    spec, arguments = SPECS[name]
    if count := arguments.get("calibration"):
        arguments = {"calibration": [token_batch(teacher, 40, seed=seed) for seed in range(count)]}
    return convert(teacher, spec, options=OPTIONS, **arguments)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**token_batch(model, 40, padded=True, seed=9)).logits.float()


def kinds_of(model) -> dict[str, type]:
    return {name: type(parameter.data) for name, parameter in model.named_parameters() if ".distattn." in name}


def off(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@EVERY_KIND
@EVERY_SPEC
def test_a_checkpoint_quantised_as_it_loads_is_off_by_what_the_untouched_model_is(folder, tmp_path, kind, spec):
    teacher = AutoModelForCausalLM.from_pretrained(folder).eval()
    student = converted(teacher, spec)
    student.save_pretrained(tmp_path)
    again = quantised(tmp_path, kind)
    assert {type(p.data) for n, p in again.named_parameters() if ".distattn." in n} <= {torch.Tensor}
    assert all(p.dtype == torch.float32 for n, p in again.named_parameters() if ".distattn." in n)
    untouched = off(logits(quantised(folder, kind)), logits(teacher))
    assert untouched > 1e-3
    assert off(logits(again), logits(student)) <= 2 * untouched
    assert again.generate(**token_batch(again), max_new_tokens=3).shape[1] == 23


@EVERY_KIND
@EVERY_SPEC
def test_a_quantised_teacher_is_converted_as_it_stands(folder, tmp_path, kind, spec):
    teacher = quantised(folder, kind)
    before = logits(teacher)
    student = converted(teacher, spec)
    assert logits(teacher).equal(before)
    assert type(teacher).__name__ == "LlamaForCausalLM"
    assert type(student.model.layers[0].mlp.up_proj) is type(teacher.model.layers[0].mlp.up_proj)
    after = logits(student)
    if spec in ("exact", "retrieval"):
        # bitsandbytes rounds what goes into a layer, to half precision or to 8 bits.
        assert off(after, before) < (1e-4 if "torchao" in kind else 1e-2)
    else:
        assert 0 < off(after, before) < 0.9
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert logits(again).equal(logits(student))
    # On a CPU bitsandbytes itself changes a model of 4 bits that has run when it is saved, an untouched one, too.
    assert "nf4" in kind or logits(again).equal(after)
    assert kinds_of(again) == kinds_of(student)
    assert str(again.conversion_report) == str(student.conversion_report)
    for call in (revert, fold_alpha):
        with pytest.raises(ValueError, match="is quantised"):
            call(student)


def test_a_fit_of_a_quantised_teacher_helps(folder):
    """λ, shift and maps are fitted to what the quantised model computes."""
    teacher = quantised(folder, "torchao int8")
    plain = convert(teacher, AttentionSpec("l2", transform="maps"), init="plain")
    assert off(logits(converted(teacher, "l2")), logits(teacher)) < 0.5 * off(logits(plain), logits(teacher))
