"""A saved native model loads bit-equal; tests/test_fresh_process.py loads some in a process of its own."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from distattn_hf.core.families import auto_map_for
from distattn_hf.core.native_layers import NATIVE_HEADS
from tests.tolerances import assert_close
from tests.without_package import HIDE_PACKAGE

from .choices import FORMS, HAS, make_model, tokens

AUTO = {"causal": AutoModelForCausalLM, "bidirectional": AutoModelForMaskedLM, "cross": AutoModelForSeq2SeqLM}


def trained(mechanism, encoding, form):
    """A model after a step, so that no parameter or buffer is what a fresh model has; and a batch with padding."""
    model = make_model(mechanism, encoding, form).train()
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if form == "cross":
        batch["decoder_input_ids"] = tokens(length=5, seed=1)
    return model.eval(), batch


@pytest.mark.parametrize("mechanism", HAS)
@pytest.mark.parametrize("form", FORMS)
def test_auto_classes_load_it_bit_equal(tmp_path, mechanism, form):
    if form not in HAS[mechanism][0]:
        pytest.skip("refused: see test_trains_or_is_refused_by_name")
    model, batch = trained(mechanism, "learned", form)
    model.save_pretrained(tmp_path)
    loaded = AUTO[form].from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.config.to_dict()
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    with torch.no_grad():
        assert_close(loaded(**batch).logits, model(**batch).logits, "equal")


GENERIC_HEAD = (
    HIDE_PACKAGE
    + """
import sys, torch
from transformers import AutoModelForSequenceClassification
hide_package()
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], num_labels=3, trust_remote_code=True)
assert model(torch.ones(2, 4, dtype=torch.long)).logits.shape == (2, 3)
print("RESULT", type(model).__name__)
"""
)


def test_a_head_that_transformers_makes_loads_without_the_package(tmp_path, monkeypatch):
    """It asks the Auto classes for the base model, which must know the family from its file alone."""
    model, _ = trained("l1", "alibi", "causal")
    model.save_pretrained(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    command = [sys.executable, "-c", GENERIC_HEAD, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.stdout.splitlines()[-1:] == ["RESULT DistAttnForSequenceClassification"], run.stderr[-2000:]


@pytest.mark.parametrize("mechanism", ["dot", "l2", "nystrom", "retrieval"])
def test_a_config_that_asks_for_weights_is_saved_and_loaded(tmp_path, mechanism):
    """transformers refuses to save such a config unless the implementation is "eager"."""
    model = make_model(mechanism, "rotary", "causal")
    model.config.output_attentions = True
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(loaded(tokens()).attentions) == model.config.num_hidden_layers


def test_every_class_is_in_the_auto_map(tmp_path):
    for form in FORMS:
        model, _ = trained("dot", "none", form)
        model.save_pretrained(tmp_path / form)
        auto_map = json.loads((tmp_path / form / "config.json").read_text())["auto_map"]
        assert auto_map == auto_map_for(model, NATIVE_HEADS[model.config.model_type])
        for reference in auto_map.values():
            module, _, name = reference.partition(".")
            assert f"class {name}(" in (tmp_path / form / f"{module}.py").read_text()
