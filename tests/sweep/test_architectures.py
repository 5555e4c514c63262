"""The exact conversion on architectures of every kind; the full list is in RESULTS.txt."""

from pathlib import Path

import pytest
from transformers.models.auto import configuration_auto

from distattn_hf.core import modeling_converted
from distattn_hf.experiments.architectures import sweep_one

RESULTS = Path(__file__).parent / "RESULTS.txt"

# One or two of each kind: learned positions, RoPE, T5 bias; grouped and multi-query keys; sliding windows; learned
# sinks, capped logits, chosen keys; mixture of experts; shared layers; pictures, alone and beside text; sound; series
# of numbers; those that broke.
EXACT = [
    "gpt2", "bert", "t5", "mt5", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "phi", "gpt_neox", "opt",
    "roberta", "albert", "electra", "distilbert", "bart", "pegasus_x", "nllb-moe", "mixtral", "olmo2", "starcoder2",
    "vit", "clip_vision_model", "clip", "whisper", "patchtst", "modernbert", "gpt_oss", "gemma2",
    "inkling2_text", "hy_v4",
]  # fmt: skip
REFUSED = {"git": "picks its attention class"}


@pytest.mark.parametrize("model_type", EXACT)
def test_exact(model_type):
    outcome = sweep_one(model_type)
    assert outcome.status == "exact", outcome.detail
    # Without this the check could pass on a model whose attention does not matter.
    control = float(outcome.detail.rsplit("control ", 1)[1])
    assert control > 1e-3


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_by_name(model_type):
    outcome = sweep_one(model_type)
    assert outcome.status == "refused", outcome.detail
    assert REFUSED[model_type] in outcome.detail


def test_the_recorded_sweep_has_no_wrong_result_and_agrees_with_this_test():
    lines = [line.split(maxsplit=2) for line in RESULTS.read_text().splitlines() if line and line[0] not in "#{"]
    recorded = {line[1]: line[0] for line in lines if line[0] in ("exact", "refused", "wrong")}
    assert "wrong" not in recorded.values()
    assert all(recorded[name] == "exact" for name in EXACT)
    assert all(recorded[name] == "refused" for name in REFUSED)


def test_every_model_type_has_a_registered_converted_config():
    for model_type in configuration_auto.CONFIG_MAPPING_NAMES:
        if model_type.startswith(modeling_converted.MODEL_TYPE_PREFIX):
            continue
        assert modeling_converted.MODEL_TYPE_PREFIX + model_type in configuration_auto.CONFIG_MAPPING
