"""Bad input: each case its own clear error, before anything is changed."""

import errno

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from distattn_hf import AttentionSpec, CalibrationOptions, convert, load_checkpoint, revert
from distattn_hf.data.batches import calibration_batch
from distattn_hf.storage.folders import save_checkpoint
from tests.conversion.models import bert, gpt2, llama, token_batch
from tests.fixtures.load import gpt2_english


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metric": ""}, "metric must be"),
        ({"metric": "lp", "p": 0.5}, "p must be a finite number >= 1, got 0.5"),
        ({"metric": "lp", "p": float("nan")}, "p must be"),
        ({"lam": 0.0}, r"lam \(λ\) must be a positive finite number, got 0.0"),
        ({"lam": -1}, r"lam \(λ\)"),
        ({"layers": []}, "layers must be"),
        ({"layers": [-1]}, "layers must be"),
        ({"layers": 1.5}, "layers must be"),
        ({"heads": "first"}, "heads must be None, a list of indices >= 0 or numbers such as '0-5', got 'first'"),
        ({"heads": "2-0"}, "heads must be numbers and ranges such as '0-2,5', got '2-0'"),
        ({"layers": "0-"}, "layers must be numbers and ranges such as '0-2,5', got '0-'"),
        ({"transform": "affine"}, "transform must be one of none, scalar, maps"),
        ({"mechanism": "magic"}, "mechanism must be one of distance"),
        ({"attention": "both"}, "attention must be"),
        ({"metric": "l2", "lift": True}, "lift=True needs metric 'sqeuclidean'"),
        ({"learnable_lambda": "yes"}, "learnable_lambda must be True or False"),
    ],
)
def test_spec(fields, message):
    with pytest.raises(ValueError, match=message):
        AttentionSpec(**fields)


def test_spec_json_round_trip_and_unknown_field():
    spec = AttentionSpec("lp", p=3, layers="0-5", heads=[2, 0], lam=1.5, transform="maps")
    assert AttentionSpec.from_dict(spec.to_dict()) == spec
    assert AttentionSpec(heads="0-2,5") == AttentionSpec(heads=[0, 1, 2, 5])
    with pytest.raises(ValueError, match=r"AttentionSpec has no field 'metrik'; did you mean metric\? its fields are"):
        AttentionSpec.from_dict({"metrik": "l2"})


@pytest.mark.parametrize(
    ("word", "own"),
    [("distance_type", "metric"), ("lambda_param", "lam"), ("windowsize", "window_size"), ("eps", "softening")],
)
def test_other_words_name_the_field(word, own):
    with pytest.raises(ValueError, match=rf"AttentionSpec has no field '{word}'; did you mean {own}\?"):
        AttentionSpec(**{word: 1})
    with pytest.raises(ValueError, match=r"has no field 'quux'; its fields are metric, mechanism, p"):
        AttentionSpec(quux=1)


def test_a_misspelt_metric_is_warned_of_at_once_and_one_to_be_registered_is_not(caplog, monkeypatch):
    from distattn_hf.core import registry

    said = []
    monkeypatch.setattr(registry.logger, "warning", said.append)
    assert AttentionSpec("euclidian").metric == "euclidian"
    assert said == ["metric 'euclidian' is not known (yet); did you mean euclidean, sqeuclidean? "]
    for name in ("L2", "manhattan", "my_own"):
        AttentionSpec(name)
    assert len(said) == 1
    with pytest.raises(ValueError, match=r"unknown metric 'euclidian'; did you mean euclidean, .*\? expected one of"):
        convert(gpt2(), "euclidian", init="plain")


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (AttentionSpec("l7"), {}, "unknown metric 'l7'; expected one of sqeuclidean"),
        (AttentionSpec("lp"), {}, "metric 'lp' needs its order"),
        (AttentionSpec("l2", p=2), {}, "p=2.0 was given with metric 'l2'"),
        (AttentionSpec("l2", backend="cuda"), {}, "unknown backend 'cuda'; expected one of"),
        (AttentionSpec("l2", layers=[7]), {}, r"there is no layer 7; this model has layers \[0, 1\]"),
        (AttentionSpec("l2"), {"layers": "0-9"}, r"there is no layer 2; this model has layers \[0, 1\]"),
        (AttentionSpec("l2", layers="h.7.*"), {}, "selects no attention module; candidates are h.0.attn .*, h.1.attn"),
        (AttentionSpec("l2", layers="decoder.*"), {}, "selects no attention module; candidates"),
        (AttentionSpec("l2", attention="cross"), {}, "selects no attention module"),
        (AttentionSpec("l2", heads=[4]), {}, "has heads 0 to 3, got 4"),
        ([AttentionSpec("l2"), AttentionSpec("l1", heads=[1])], {}, "two specs claim head 1"),
        ([], {}, "a list of these, got \\[\\]"),
        (
            3,
            {},
            r"name of a metric or mechanism \(nystrom, retrieval\), a dict of fields or a list of these, got 3",
        ),
        (["l2", 3], {}, r"spec must be an AttentionSpec, the name of .* a dict of fields or a list of these, got 3"),
        (
            "l7",
            {},
            r"unknown metric 'l7'; expected one of sqeuclidean \(squared_l2.* Or name a mechanism: nystrom,",
        ),
        (
            "retreival",
            {},
            r"unknown metric 'retreival'; .*; did you mean retrieval\? retrieval is a mechanism: convert",
        ),
        (AttentionSpec("nystorm"), {}, r"did you mean nystrom\? .* AttentionSpec\(mechanism='nystrom'\)"),
        (AttentionSpec("retrieval"), {}, r"dot \(standard\); retrieval is a mechanism: .*mechanism='retrieval'"),
        (["l2", "l1"], {}, "two specs claim head 0"),
        ("nystrom", {}, "mechanism='nystrom' needs init='calibrated'"),
        (AttentionSpec("l2"), {"init": "best"}, "init must be one of exact, calibrated, plain, got 'best'"),
        (AttentionSpec("l2"), {"init": "exact"}, "init='exact' needs metric 'sqeuclidean'"),
        (AttentionSpec("l2"), {"init": "calibrated"}, "needs calibration"),
        (AttentionSpec("l2"), {"init": "calibrated", "calibration": []}, "calibration is empty"),
        (AttentionSpec("l2"), {"init": "calibrated", "calibration": ["", "  "]}, "all 2 strings are empty"),
        (AttentionSpec("l2"), {"init": "calibrated", "calibration": ["some text"]}, "tokenizer must be given"),
        (AttentionSpec("l2"), {"init": "calibrated", "calibration": [{"ids": [1]}]}, "must hold 'input_ids'"),
    ],
)
def test_convert(spec, options, message):
    with pytest.raises(ValueError, match=message):
        convert(gpt2(), spec, **{"init": "plain", **options})


def test_model_without_the_attention_interface():
    model = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32, state_size=4))
    with pytest.raises(ValueError, match="no attention module that follows transformers' attention interface"):
        convert(model, AttentionSpec("l2"), init="plain")


def test_not_a_model_converted_twice_and_not_converted():
    with pytest.raises(ValueError, match="must be a transformers PreTrainedModel, got Linear"):
        convert(torch.nn.Linear(2, 2), AttentionSpec(), init="plain")
    with pytest.raises(ValueError, match="is converted already"):
        convert(convert(gpt2(), AttentionSpec(), init="plain"), AttentionSpec(), init="plain")
    with pytest.raises(ValueError, match="is not a converted model"):
        revert(gpt2())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value):
    model = gpt2()
    model.transformer.h[1].attn.c_attn.weight.data[0, 0] = value
    with pytest.raises(ValueError, match="'transformer.h.1.attn.c_attn.weight' of the checkpoint holds NaN"):
        convert(model, AttentionSpec(), init="exact")


def test_config_block_is_checked():
    import distattn_hf

    with pytest.raises(ValueError, match="version 99"):
        distattn_hf.DistAttnGPT2Config(distattn={"version": 99, "specs": [AttentionSpec().to_dict()]})
    with pytest.raises(ValueError, match="unknown key 'spec' in the distattn block"):
        distattn_hf.DistAttnGPT2Config(distattn={"spec": {}})
    with pytest.raises(ValueError, match="needs config.distattn"):
        distattn_hf.DistAttnGPT2LMHeadModel(distattn_hf.DistAttnGPT2Config(n_layer=1, n_embd=8, n_head=2))


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_other_attention_implementations_are_refused(implementation, tmp_path):
    student = convert(gpt2(), AttentionSpec("l2"), init="plain")
    student.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not available for distance attention"):
        type(student).from_pretrained(tmp_path, attn_implementation=implementation)
    with pytest.raises(ValueError, match="is not available for distance attention"):
        student.set_attn_implementation(implementation)


def test_number_of_layers_changed_after_the_conversion(tmp_path):
    student = convert(gpt2(), AttentionSpec("l2"), init="plain")
    student.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="names the attention module 'h.1.attn'"):
        type(student).from_pretrained(tmp_path, n_layer=1)


def test_output_folder(tmp_path):
    student = convert(gpt2(), AttentionSpec("l2"), init="plain")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty; pass --overwrite"):
        save_checkpoint(student, None, tmp_path / "out")
    with pytest.raises(ValueError, match="is not replaced: it has no config.json"):
        save_checkpoint(student, None, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        save_checkpoint(student, None, tmp_path / "file")


@pytest.mark.parametrize("existing", [False, True])
def test_a_disk_that_fills_midway_leaves_nothing_half_written(tmp_path, monkeypatch, existing):
    """The write of the weights fails as a full disk makes it fail; what was there stays, nothing else does."""
    student = convert(gpt2(), AttentionSpec("l2"), init="plain")
    if existing:
        save_checkpoint(student, None, tmp_path / "out")
    before = sorted(p.name for p in tmp_path.rglob("*"))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(student, None, tmp_path / "out", overwrite=True)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_quantised_and_meta_weights():
    model = bert()
    with torch.device("meta"):
        empty = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=8, bos_token_id=1, eos_token_id=2))
    with pytest.raises(ValueError, match="is on the meta device"):
        convert(empty, AttentionSpec(), init="exact")
    model.bert.embeddings.word_embeddings.weight = torch.nn.Parameter(
        torch.zeros(64, 32, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(ValueError, match="is quantised .*TorchAoConfig"):
        convert(model, AttentionSpec(), init="exact")


def test_rotary_positions_warn_for_metrics_that_rotation_changes():

    reports = {
        metric: convert(llama(), AttentionSpec(metric), init="plain").conversion_report for metric in ("l1", "l2")
    }
    assert "not invariant under rotation" in reports["l1"].warnings[0]
    assert reports["l2"].warnings == []


def test_wrong_number_of_heads_at_run_time():
    student = convert(gpt2(), AttentionSpec("l2"), init="plain")
    student.attention_states["h.0.attn"].num_heads = 8
    with pytest.raises(ValueError, match="was converted with 8 heads but calls attention with 4"):
        student(**token_batch(student))


@pytest.mark.parametrize("where", ["config", "submodel"])
def test_dot_product_attention_does_not_come_back_silently(where):
    student = convert(gpt2(), AttentionSpec("l2"), init="plain")
    if where == "config":
        student.config._attn_implementation = "sdpa"
    else:
        student.transformer.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="would run dot-product attention in a converted model"):
        student(**token_batch(student))
    student.set_attn_implementation("sdpa")
    assert torch.isfinite(student(**token_batch(student)).logits).all()


def test_model_with_adapters():
    from peft import LoraConfig, inject_adapter_in_model

    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["c_attn"]), gpt2())
    with pytest.raises(ValueError, match="merge them first"):
        convert(model, AttentionSpec("l2"), init="plain")


def test_backend_that_cannot_run_the_metric():
    with pytest.raises(ValueError, match="backend 'sdpa' cannot run metric 'l2'"):
        convert(gpt2(), AttentionSpec("l2", backend="sdpa"), init="plain")


def test_a_config_reused_with_more_layers(tmp_path):
    import distattn_hf

    block = {"specs": [AttentionSpec("l2").to_dict()]}
    config = distattn_hf.DistAttnGPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, distattn=block)
    assert len(distattn_hf.DistAttnGPT2Model(config).attention_states) == 2
    config.n_layer = 4
    assert len(distattn_hf.DistAttnGPT2Model(config).attention_states) == 4
    student = convert(gpt2(), AttentionSpec("l2"), init="plain")
    student.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not name the attention module 'h.2.attn'"):
        type(student).from_pretrained(tmp_path, n_layer=3)


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./out/minilm", "out/a/b"])
def test_a_folder_that_does_not_exist_is_not_looked_for_on_the_hub(source):
    with pytest.raises(ValueError, match=f"folder '{source}' does not exist; expected a folder, a Hub name"):
        load_checkpoint(source)


def test_neither_a_folder_nor_a_name_on_the_hub():
    with pytest.raises(OSError, match="there is no folder 'out/typo' here, and as a Hub name it could not be loaded"):
        load_checkpoint("out/typo")


def test_little_calibration_text_is_said(caplog):
    teacher = gpt2()
    batches = [token_batch(teacher, 40, seed=seed) for seed in range(2)]
    many = [token_batch(teacher, 128, seed=seed) for seed in range(4)]
    options = CalibrationOptions(steps=1, progress=False)
    for text, said in ((batches, True), (many, False)):
        caplog.clear()
        student = convert(teacher, AttentionSpec("l2"), calibration=text, options=options)
        for place in (caplog.text, str(student.conversion_report["warnings"])):
            assert ("tokens are little to fit on" in place) == said


@pytest.mark.parametrize("init", ["exact", "plain"])
def test_calibration_that_init_does_not_use_is_said(init, caplog):
    student = convert(gpt2(), "sqeuclidean", init=init, calibration=[token_batch(gpt2())])
    for place in (caplog.text, str(student.conversion_report["warnings"])):
        assert f"init={init!r} fits nothing: calibration is not used" in place.replace("\\", "")


def test_calibration_text_longer_than_a_file_name_is_text():
    """Between the longest name of a file and the longest path the system refuses to look."""
    model, tokenizer, _ = gpt2_english()
    batch = calibration_batch(model, "hello there " * 100, tokenizer)
    assert batch["input_ids"].numel() > 1
