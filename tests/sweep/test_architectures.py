"""The exact conversion on architectures of every kind; all of them: model_cards/results."""

import json
import time
from pathlib import Path

import pytest
from transformers.models.auto import configuration_auto

from distattn_hf.core import modeling_converted
from distattn_hf.experiments import architectures
from distattn_hf.experiments.architectures import sweep_one
from distattn_hf.experiments.run_experiment import run_experiment

RESULTS = Path("model_cards") / "results" / "architectures.json"

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
    assert outcome["status"] == "exact", outcome["detail"]
    # Without this the check could pass on a model whose attention does not matter.
    assert outcome["control"] > 1e-3


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_by_name(model_type):
    outcome = sweep_one(model_type)
    assert outcome["status"] == "refused", outcome["detail"]
    assert REFUSED[model_type] in outcome["detail"]


def test_the_recorded_sweep_has_no_wrong_result_and_agrees_with_this_test():
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    recorded = {row["key"]["model_type"]: row["values"]["status"] for row in rows}
    assert "wrong" not in recorded.values()
    assert all(recorded[name] == "exact" for name in EXACT)
    assert all(recorded[name] == "refused" for name in REFUSED)


def test_every_model_type_has_a_registered_converted_config():
    for model_type in configuration_auto.CONFIG_MAPPING_NAMES:
        if model_type.startswith(modeling_converted.MODEL_TYPE_PREFIX):
            continue
        assert modeling_converted.MODEL_TYPE_PREFIX + model_type in configuration_auto.CONFIG_MAPPING


def test_the_experiment(tmp_path, monkeypatch):
    """Goes on where it stopped; one that takes too long, or is wrong, is said and stops nothing."""
    given = {"quick": True, "echo": lambda line: None}
    run_experiment("architectures", tmp_path, ["model_types=gpt2"], **given)
    monkeypatch.setattr(architectures, "convert", lambda *given, **options: time.sleep(60))
    said, before = [], time.perf_counter()
    rows = run_experiment("architectures", tmp_path, ["model_types=gpt2"], **given).rows
    with pytest.raises(ValueError, match="seconds is 1, and .* holds rows of seconds=60"):
        run_experiment("architectures", tmp_path, ["model_types=bert", "seconds=1"], **given)
    given |= {"echo": said.append}
    late = run_experiment("architectures", tmp_path / "late", ["model_types=bert", "seconds=1"], **given)
    assert [(row["model_type"], row["status"]) for row in rows] == [("gpt2", "exact")]
    assert [(row["status"], row["detail"]) for row in late.rows] == [
        ("not built", "TimeoutError: took more than 1 seconds")
    ]
    assert said[-1] == "1 not built"
    assert time.perf_counter() - before < 30
    with pytest.raises(ValueError, match="gtp2.*did you mean gpt2"):
        run_experiment("architectures", tmp_path / "unknown", ["model_types=gtp2"], **given)
