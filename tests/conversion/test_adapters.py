"""Adapter checkpoints: what a conversion changed, put on its base again, equals the full checkpoint bit for bit."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPT2LMHeadModel
from typer.testing import CliRunner

from distattn_hf import AttentionSpec, CalibrationOptions, convert, load_adapter, load_checkpoint, save_adapter
from distattn_hf.cli import app
from distattn_hf.core.base_weights import ADAPTER_NAME
from distattn_hf.hub.folder import read_folder
from tests.conversion.absolute_models import gpt_oss
from tests.conversion.models import CLASSIFIER, FAMILIES, bert, gpt2, llama, token_batch

SPECS = {
    "l2": AttentionSpec("l2", transform="maps"),
    "nystrom": AttentionSpec(mechanism="nystrom", num_landmarks=4, window_size=4, num_sinks=1, exact_below=0),
    "retrieval": AttentionSpec("l2", mechanism="retrieval", window_size=4, num_sinks=1, block_size=4, num_blocks=1),
}
OPTIONS = CalibrationOptions(steps=2, sequences=1, rows=4, progress=False)


def saved_base(model, folder):
    """Return a model as it is loaded from a folder."""
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


def converted(base, spec: str):
    if spec == "nystrom":
        batch = token_batch(base, 40)
        return convert(base, SPECS[spec], calibration=[batch] * 2, options=OPTIONS)
    return convert(base, SPECS[spec], init="plain")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**token_batch(model, padded=True)).logits


@pytest.mark.parametrize(
    ("family", "spec"),
    [*((family, "l2") for family in FAMILIES), ("llama", "nystrom"), ("gpt2", "retrieval"), ("gpt_oss", "l2")],
)
def test_it_is_the_full_checkpoint(family, spec, tmp_path):
    base = saved_base({**FAMILIES, "gpt_oss": gpt_oss}[family](), tmp_path / "base")
    student = converted(base, spec)
    told = student.save_adapter(tmp_path / "adapter")
    student.save_pretrained(tmp_path / "full")
    full = type(student).from_pretrained(tmp_path / "full").eval()
    assert told["base"] == str(tmp_path / "base")
    assert told["changed"] == []
    names = load_file(tmp_path / "adapter" / ADAPTER_NAME).keys()
    assert names == {name for name in student.state_dict() if ".distattn." in name}
    by_folder, by_model = load_checkpoint(tmp_path / "adapter")[0], load_adapter(base, tmp_path / "adapter")
    for model in (by_folder, by_model):
        assert logits(model).equal(logits(full))
        assert model.config.distattn == full.config.distattn
        assert model.config.name_or_path == str(tmp_path / "adapter")
        assert json.dumps(model.report_as_it_is()) == json.dumps(full.report_as_it_is())
        assert not model.training
    if full.can_generate():
        assert by_folder.generation_config == full.generation_config
    assert not any("base" in block for block in (student.config.distattn, by_folder.config.distattn))
    # Saved whole again, it needs no base.
    by_folder.save_pretrained(tmp_path / "merged")
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == student_keys(tmp_path / "full")
    assert logits(type(student).from_pretrained(tmp_path / "merged").eval()).equal(logits(full))


def student_keys(folder):
    return load_file(folder / "model.safetensors").keys()


def test_what_training_changed_goes_along(tmp_path):
    base = saved_base(gpt2(), tmp_path / "base")
    student = converted(base, "l2")
    with torch.no_grad():
        student.transformer.h[1].mlp.c_fc.weight += 0.01
        student.transformer.wte.weight[3] += 0.01  # tied to the head
        for state in student.attention_states.values():
            state.groups[0].log_alpha -= 0.1
    told = save_adapter(student, tmp_path / "adapter")
    assert told["changed"] == ["transformer.h.1.mlp.c_fc.weight", "transformer.wte.weight"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert logits(loaded).equal(logits(student))
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_is_what_the_full_checkpoint_is(dtype, tmp_path):
    """Converted in float32 and loaded in half; and converted in half, beside a base in float32."""
    base = saved_base(llama(), tmp_path / "base")
    student = converted(base, "l2")
    student.save_adapter(tmp_path / "adapter")
    student.save_pretrained(tmp_path / "full")
    loaded, full = (
        AutoModelForCausalLM.from_pretrained(tmp_path / kind, dtype=dtype).eval() for kind in ("adapter", "full")
    )
    assert {n: t.dtype for n, t in loaded.named_parameters()} == {n: t.dtype for n, t in full.named_parameters()}
    assert logits(loaded).equal(logits(full))
    half = converted(type(base).from_pretrained(tmp_path / "base", dtype=dtype).eval(), "l2")
    assert half.save_adapter(tmp_path / "half", base=base)["changed"] == []
    assert base.dtype == torch.float32
    for asked in ({}, {"dtype": "auto"}, {"torch_dtype": "auto"}):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "half", **asked).eval()
        assert again.dtype == dtype
        assert logits(again).equal(logits(half))


def test_another_head_of_the_same_body(tmp_path):
    """The adapter of a language model serves a classifier, whose own head is the checkpoint's or new."""
    saved_base(bert(), tmp_path / "base")
    student = converted(bert().from_pretrained(tmp_path / "base"), "l2")
    student.save_adapter(tmp_path / "adapter")
    student.save_pretrained(tmp_path / "full")
    body, whole = (AutoModel.from_pretrained(tmp_path / kind, add_pooling_layer=False) for kind in ("adapter", "full"))
    batch = token_batch(student)
    assert body.eval()(**batch).last_hidden_state.equal(whole.eval()(**batch).last_hidden_state)
    classifier = type(converted(bert(CLASSIFIER), "l2")).from_pretrained(tmp_path / "adapter", num_labels=3).eval()
    hidden = classifier.bert(**batch).last_hidden_state
    assert hidden.equal(whole(**batch).last_hidden_state)
    assert classifier(**batch).logits.shape == (2, 3)


def test_another_base_is_refused_by_name(tmp_path):
    base = saved_base(gpt2(), tmp_path / "base")
    converted(base, "l2").save_adapter(tmp_path / "adapter")
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.transformer.h[0].ln_1.bias[0] += 1e-3
    with pytest.raises(ValueError, match="belongs to '.*base', and .* other weights"):
        load_adapter(other, tmp_path / "adapter")
    # What lies under the base's own name has changed since.
    other.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="other weights"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is converted already"):
        load_adapter(converted(base, "l2"), tmp_path / "adapter")
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", base_model=base).eval()).isfinite().all()


def test_a_base_that_is_not_there_is_named(tmp_path):
    base = saved_base(gpt2(), tmp_path / "base")
    converted(base, "l2").save_adapter(tmp_path / "adapter", base_name="nobody/knows-this")
    with pytest.raises(OSError, match="the base 'nobody/knows-this' of this adapter could not be loaded; give b"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", base_model=str(tmp_path / "base"))
    assert logits(loaded.eval()).equal(logits(converted(base, "l2")))


def test_bad_input_is_refused_and_changes_nothing(tmp_path):
    base = saved_base(gpt2(), tmp_path / "base")
    student = converted(base, "l2")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine.txt").write_text("mine")
    for attempt, message in (
        (lambda: student.save_adapter(tmp_path / "adapter"), "exists and is not empty"),
        (lambda: save_adapter(base, tmp_path / "out"), "is not a converted model"),
        (lambda: student.save_adapter(tmp_path / "out", base=llama()), "base must be a GPT2LMHeadModel, got LlamaFor"),
        (lambda: student.save_adapter(tmp_path / "out", base=gpt2()), "has no name_or_path"),
        (
            lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "base", base_model=base),
            "unexpected keyword argument|base_model",
        ),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            attempt()
    assert [file.name for file in (tmp_path / "adapter").iterdir()] == ["mine.txt"]
    assert not (tmp_path / "out").exists()
    assert "base" not in student.config.distattn


@pytest.mark.parametrize(
    ("spec", "init"), [("sqeuclidean", "exact"), (AttentionSpec(mechanism="retrieval", window_size=4), None)]
)
def test_a_conversion_that_fits_nothing_is_an_empty_adapter(spec, init, tmp_path):
    base = saved_base(llama(), tmp_path / "base")
    student = convert(base, spec, init=init) if init else convert(base, spec)
    assert student.save_adapter(tmp_path / "adapter")["tensors"] == 0
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()).equal(logits(student))


def test_training_what_was_put_on_a_model_leaves_that_model_alone(tmp_path):
    base = saved_base(gpt2(), tmp_path / "base")
    converted(base, "l2").save_adapter(tmp_path / "adapter")
    before, loaded = logits(base), load_adapter(base, tmp_path / "adapter")
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(0.1)
    assert logits(base).equal(before)


def test_an_adapter_goes_on_as_one(tmp_path):
    """Loaded, trained on and saved as an adapter of the same base; and a fresh model by its config has no base."""
    base = saved_base(gpt2(), tmp_path / "base")
    converted(base, "l2").save_adapter(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        loaded.attention_states["h.0.attn"].groups[0].log_lambda += 0.1
    told = loaded.save_adapter(tmp_path / "next")
    assert (told["base"], told["changed"]) == (str(tmp_path / "base"), [])
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path / "next").eval()).equal(logits(loaded))
    config = AutoConfig.from_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_config(config).eval()
    fresh.save_pretrained(tmp_path / "fresh")
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path / "fresh").eval()).equal(logits(fresh))
    assert "base" in config.distattn


def test_a_base_of_a_class_of_ones_own_is_given(tmp_path):
    class Mine(GPT2LMHeadModel):
        pass

    base = saved_base(gpt2(Mine), tmp_path / "base")
    student = converted(base, "l2")
    student.save_adapter(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is a Mine, which transformers does not have; give base_model="):
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert logits(load_adapter(base, tmp_path / "adapter")).equal(logits(student))


def test_an_embedded_checkpoint_is_the_base_by_its_name(tmp_path, monkeypatch):
    """The model of that name on the Hub may have other weights: SmolLM2's are read from GGUF."""
    made = gpt2()
    made.config.name_or_path = "somebody/on-the-hub"
    monkeypatch.setattr("distattn_hf.storage.models._load_embedded", lambda checkpoint: (copy.deepcopy(made), None))
    monkeypatch.setattr("distattn_hf.storage.embedded.EmbeddedCheckpoint.folder", lambda checkpoint: tmp_path)
    run = CliRunner().invoke(
        app, ["convert", "iglm", str(tmp_path / "out"), "--init=plain", "--metric=l2", "--adapter"]
    )
    assert run.exit_code == 0, run.output
    student = convert(made, "l2", init="plain")
    assert logits(load_checkpoint(tmp_path / "out")[0]).equal(logits(student))
    assert student.save_adapter(tmp_path / "again", base="iglm")["base"] == "iglm"
    with pytest.raises(ValueError, match="is an adapter of 'iglm', which only machines with the PyPI package 'iglm'"):
        read_folder(tmp_path / "out")


def test_the_base_is_not_replaced_and_must_be_here_and_the_whole_may_be_offloaded(tmp_path):
    base = saved_base(gpt2(), tmp_path / "base")
    student = converted(base, "l2")
    with pytest.raises(ValueError, match="is the base's own folder"):
        student.save_adapter(tmp_path / "base", overwrite=True)
    place = str(tmp_path / "base")
    run = CliRunner().invoke(app, ["convert", place, place, "--init=plain", "--metric=l2", "--adapter", "--overwrite"])
    assert "is or holds the model that is read, which it would replace" in str(run.exception)
    student.save_adapter(tmp_path / "adapter")
    with torch.device("meta"):
        nowhere = type(base)(base.config)
    with pytest.raises(ValueError, match="on the meta device .* before putting an adapter on it"):
        load_adapter(nowhere, tmp_path / "adapter")
    places = dict.fromkeys(("transformer.wte", "transformer.wpe", "transformer.h.0", "transformer.ln_f"), "cpu")
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "adapter", device_map={**places, "transformer.h.1": "disk", "lm_head": "cpu"},
        offload_folder=tmp_path / "offloaded",
    )  # fmt: skip
    assert logits(offloaded).equal(logits(student))


def test_a_full_checkpoint_is_no_base(tmp_path):
    base = saved_base(gpt2(), tmp_path / "base")
    converted(base, "l2").save_pretrained(tmp_path / "full")
    loaded = load_checkpoint(tmp_path / "full")[0]
    with pytest.raises(ValueError, match="does not know what it was converted from; give base="):
        loaded.save_adapter(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"base must be the teacher, got '.*full', which is a converted checkpoint"):
        loaded.save_adapter(tmp_path / "adapter", base=str(tmp_path / "full"))
    loaded.save_adapter(tmp_path / "adapter", base=base)
    assert logits(load_checkpoint(tmp_path / "adapter")[0]).equal(logits(loaded))


def test_a_full_checkpoint_takes_no_base(tmp_path):
    base = saved_base(gpt2(), tmp_path / "base")
    converted(base, "l2").save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match="base_model is for adapter checkpoints, which '.*full' is not"):
        load_adapter(base, tmp_path / "full")


def test_the_command_line(tmp_path):
    base = saved_base(gpt2(), tmp_path / "base")
    run = CliRunner().invoke(
        app, ["convert", str(tmp_path / "base"), str(tmp_path / "out"), "--init=plain", "--metric=l2", "--adapter"]
    )
    assert run.exit_code == 0, run.output
    assert (tmp_path / "out" / ADAPTER_NAME).stat().st_size < 10_000
    assert not list(tmp_path.glob("out/*model.safetensors"))
    assert logits(load_checkpoint(tmp_path / "out")[0]).equal(logits(convert(base, "l2", init="plain")))
    assert AutoConfig.from_pretrained(tmp_path / "out").distattn["base"]["name"] == str(tmp_path / "base")
    assert CliRunner().invoke(app, ["inspect", str(tmp_path / "out")]).exit_code == 0
    with pytest.raises(ValueError, match=r"is an adapter of '.*base', a folder of this machine; save it with"):
        read_folder(tmp_path / "out")
