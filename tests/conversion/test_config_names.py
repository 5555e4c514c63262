"""What is given to a config beside its file: options of the attention are set, what nothing uses is not left unsaid."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GPT2Model
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from distattn_hf import AttentionSpec, DistAttnConfig, convert, load_checkpoint
from distattn_hf.hub.folder import read_folder
from tests.analysis.models import letter_tokenizer
from tests.conversion.models import FAMILIES, bert, gpt2, llama, token_batch
from tests.conversion.nystrom_cases import converted, nystrom

LOGGER = "distattn_hf.core.configuration_distattn"


def save_nystrom(folder):
    converted(llama(), nystrom(4, exact_below=3)).save_pretrained(folder)


@pytest.fixture
def folder(tmp_path):
    save_nystrom(tmp_path)
    return tmp_path


def test_options_of_the_attention_are_set_in_the_config(folder):
    kind = type(AutoConfig.from_pretrained(folder))
    for load in (AutoConfig.from_pretrained, kind.from_pretrained):
        config = load(folder, exact_below=9, window_size=8)
        assert [(s.exact_below, s.window_size) for s in config.attention_specs] == [(9, 8)]
        config, unused = load(folder, exact_below=9, other=1, return_unused_kwargs=True)
        assert (config.attention_specs[0].exact_below, unused) == (9, {"other": 1})
    by_config = AutoModelForCausalLM.from_pretrained(folder, config=AutoConfig.from_pretrained(folder, exact_below=0))
    by_model = AutoModelForCausalLM.from_pretrained(folder, exact_below=0)
    default = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(40)[None] % 60
    with torch.no_grad():
        logits = [model.eval()(ids).logits for model in (by_config, by_model, default)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exact_below": -1}, "exact_below must be an integer >= 0, got -1"),
        ({"window_size": 2}, "window_size must be an integer >= 4"),
        ({"backend": "cpp"}, "backend='cpp' belongs to mechanism='distance', which this model does not have"),
    ],
)
def test_options_that_cannot_be_are_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(folder, **options)


def test_a_backend_is_checked_when_the_model_is_built(tmp_path):
    convert(gpt2(), AttentionSpec("l1"), init="plain").save_pretrained(tmp_path)
    for backend in ("sdpa", "fastest"):
        config = AutoConfig.from_pretrained(tmp_path, backend=backend)
        with pytest.raises(ValueError, match=backend):
            AutoModelForCausalLM.from_pretrained(tmp_path, config=config)


def configs(tmp_path):
    """(folder, name that is nearly one of its config's, what is meant) of a converted and a native model."""
    save_nystrom(tmp_path / "converted")
    DistAttnConfig(num_hidden_layers=1).save_pretrained(tmp_path / "native")
    return [(tmp_path / "converted", "exact_bellow", "exact_below"), (tmp_path / "native", "mechansim", "mechanism")]


def test_a_name_that_nothing_uses_is_refused_or_said(tmp_path):
    for folder, name, meant in configs(tmp_path):
        kind = type(AutoConfig.from_pretrained(folder))
        with pytest.raises(ValueError, match=f"{kind.__name__} has no field '{name}'; did you mean {meant}"):
            kind.from_pretrained(folder, **{name: 1})
        # What an Auto class is given may be meant for something else, such as a tokenizer.
        with CaptureLogger(logging.get_logger(LOGGER)) as log:
            AutoConfig.from_pretrained(folder, **{name: 1})
        assert f"{name}=1 is not used: {kind.__name__} has no field '{name}'; did you mean {meant}" in log.out
        for load in (kind.from_pretrained, AutoConfig.from_pretrained):
            with CaptureLogger(logging.get_logger(LOGGER)) as log:
                assert load(folder, return_unused_kwargs=True, **{name: 1})[1] == {name: 1}
                load(folder, revision="main", local_files_only=True, output_attentions=True)
            assert not log.out


def test_a_tokenizer_loads_with_its_own_arguments(tmp_path):
    for folder, *_ in configs(tmp_path):
        letter_tokenizer().save_pretrained(folder)
        file = folder / "tokenizer_config.json"
        kept = {k: v for k, v in json.loads(file.read_text()).items() if k != "tokenizer_class"}
        file.write_text(json.dumps(kept))
        assert AutoTokenizer.from_pretrained(folder, padding_side="left").padding_side == "left"


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_the_base_model_of_a_head_class_saves_as_a_converted_one(family, tmp_path):
    student = convert(FAMILIES[family](), AttentionSpec("l2"), init="plain")
    batch = {"input_ids": token_batch(student)["input_ids"]}
    base = student.base_model
    base.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = base(**batch).last_hidden_state
        for loaded in (AutoModel.from_pretrained(tmp_path), load_checkpoint(tmp_path)[0]):
            assert type(loaded).__name__ == f"DistAttn{type(base).__name__}"
            assert torch.equal(loaded.eval()(**batch).last_hidden_state, expected)
    found = read_folder(tmp_path)
    assert (found.architecture, found.auto_class) == (f"DistAttn{type(base).__name__}", "AutoModel")
    assert {"modeling_converted.py", "configuration_distattn.py", "attention_spec.py"} <= set(found.files)
    # Saving the whole afterwards says what the whole is.
    student.save_pretrained(tmp_path / "whole")
    assert type(load_checkpoint(tmp_path / "whole")[0]) is type(student)


def test_a_base_model_saved_by_an_older_version_loads_as_converted(tmp_path):
    convert(bert(), AttentionSpec("l2"), init="plain").base_model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": ["BertModel"]}))
    assert type(load_checkpoint(tmp_path)[0]).__name__ == "DistAttnBertModel"
    # A plain model is what it was.
    gpt2(GPT2Model).save_pretrained(tmp_path / "plain")
    assert type(load_checkpoint(tmp_path / "plain")[0]) is GPT2Model
