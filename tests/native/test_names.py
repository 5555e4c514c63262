"""Names that mean nothing are refused, in configs and in calls; transformers' own names of our fields are known."""

import json
from functools import partial

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from distattn_hf import DistAttnConfig, DistAttnSeq2SeqConfig
from distattn_hf.core.compatibility import CACHE_NAME, cache_of
from tests.tolerances import assert_close

from .choices import make_model, tokens


def test_other_names_of_the_fields():
    config = DistAttnConfig(num_heads=4, num_layers=3, distance_type="l1", d_model=32, n_inner=40, n_positions=9)
    assert (config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers) == (4, 4, 3)
    assert (config.mechanism, config.metric, config.hidden_size, config.head_dim) == ("distance", "l1", 32, 8)
    assert (config.intermediate_size, config.max_position_embeddings) == (40, 9)
    assert (config.num_heads, config.n_layer, config.d_model) == (4, 3, 32)
    config = DistAttnSeq2SeqConfig(encoder_layers=1, num_decoder_layers=3)
    assert (config.num_hidden_layers, config.decoder_layers) == (1, 3)


def other_value(field):
    """A value of a field that is not its default."""
    words = {"hidden_act": "silu", "metric": "cosine", "mechanism": "local", "positional_encoding": "learned"}
    return {**words, "is_decoder": True}.get(field, 0.25 if "dropout" in field else 16)


@pytest.mark.parametrize("alias", DistAttnConfig.attribute_map)
def test_every_other_name_gives_the_field(alias, tmp_path):
    field = DistAttnConfig.attribute_map[alias]
    value = other_value(field)
    config = DistAttnConfig(**{alias: value})
    assert getattr(config, field) == getattr(config, alias) == value
    assert config.to_dict() == DistAttnConfig(**{field: value}).to_dict()
    config.save_pretrained(tmp_path)
    assert alias not in json.loads((tmp_path / "config.json").read_text())
    assert getattr(AutoConfig.from_pretrained(tmp_path), field) == value


def test_two_names_of_one_field_must_agree():
    with pytest.raises(ValueError, match="num_heads is another name of num_attention_heads: got 4 and 2"):
        DistAttnConfig(num_heads=4, num_attention_heads=2)
    assert DistAttnConfig(num_heads=4, num_attention_heads=4).num_attention_heads == 4


@pytest.mark.parametrize("alias", DistAttnConfig.attribute_map)
def test_a_field_given_at_its_default_is_given(alias, tmp_path):
    field = DistAttnConfig.attribute_map[alias]
    default = getattr(DistAttnConfig, field)
    value = other_value(field)
    with pytest.raises(ValueError, match=f"{alias} is another name of {field}: got {value!r} and {default!r}"):
        DistAttnConfig(**{field: default, alias: value})
    DistAttnConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{alias} is another name of {field}"):
        DistAttnConfig.from_pretrained(tmp_path, **{field: default, alias: value})


def test_two_other_names_of_one_field_must_agree():
    with pytest.raises(ValueError, match="n_embd is another name of d_model: got 512 and 64"):
        DistAttnConfig(d_model=64, n_embd=512)
    with pytest.raises(ValueError, match="num_decoder_layers is another name of decoder_layers: got 2 and None"):
        DistAttnSeq2SeqConfig(decoder_layers=None, num_decoder_layers=2)


UNKNOWN = [
    ("mechansim", "did you mean mechanism"),
    ("hiden_size", "did you mean hidden_size"),
    ("num_head", r"did you mean num_heads \(num_attention_heads\)"),
    ("lambda", "mechanism_options={'lam': ...}"),
    ("num_landmark", "mechanism_options={'num_landmarks': ...}"),
    ("zzz", "its fields are vocab_size, hidden_size, .*, mechanism_options={'lam': ...}"),
    ("enable_performance_monitoring", r"call model.enable_performance_monitoring\(\)"),
    ("log_attention_weights", "output_attentions=True"),
    ("use_mixed_precision", "bf16=True"),
    ("return_attention_weights", "output_attentions=True"),
    ("use_padding_mask", "attention_mask"),
    ("gradient_checkpointing", "gradient_checkpointing_enable"),
    ("head_dim", "hidden_size / num_attention_heads"),
    # transformers' caches would read these from the config, and forget keys that the attention still needs.
    ("sliding_window", ""),
    ("layer_types", ""),
    # Of the generation config; every config of transformers drops them.
    ("temperature", ""),
    ("max_length", ""),
]


@pytest.mark.parametrize(("name", "hint"), UNKNOWN)
@pytest.mark.parametrize("kind", [DistAttnConfig, DistAttnSeq2SeqConfig])
def test_unknown_fields_are_refused_with_the_nearest_known_ones(kind, name, hint):
    for make in (kind, partial(AutoConfig.for_model, kind.model_type)):
        with pytest.raises(ValueError, match=rf"{kind.__name__} has no field '{name}'.*{hint}"):
            make(**{name: 1})


def test_what_every_config_of_transformers_takes():
    common = {
        "return_dict": False, "output_hidden_states": True, "output_attentions": True, "torch_dtype": "float16",
        "architectures": ["A"], "num_labels": 3, "problem_type": "regression", "name_or_path": "here",
        "attn_implementation": "eager", "rope_theta": 1e6, "transformers_version": "5.0.0", "sep_token_id": 3,
        "auto_map": {"AutoConfig": "a.B"}, "_commit_hash": "abc", "chunk_size_feed_forward": 2,
    }  # fmt: skip
    config = DistAttnConfig(**common)
    assert (config.dtype, config.num_labels, config.name_or_path) == (torch.float16, 3, "here")
    assert (config.rope_parameters["rope_theta"], config.sep_token_id) == (1e6, 3)
    assert DistAttnConfig(id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2}).num_labels == 3


@pytest.mark.parametrize("kind", [DistAttnConfig, DistAttnSeq2SeqConfig])
def test_a_file_of_a_newer_version_loads_with_a_warning(kind, tmp_path):
    kind(vocab_size=40, num_hidden_layers=1).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    # The caches of transformers would read the second.
    newer = {**json.loads(file.read_text()), "new_choice": 3, "sliding_window": 4}
    file.write_text(json.dumps(newer))
    for load in (
        lambda: AutoConfig.from_pretrained(tmp_path),
        lambda: kind.from_pretrained(tmp_path),
        lambda: kind.from_dict(dict(newer)),
        lambda: kind.from_json_file(file),
    ):
        with CaptureLogger(logging.get_logger("distattn_hf.core.configuration_native")) as log:
            config = load()
        assert f"'new_choice', 'sliding_window' of this {kind.__name__} mean nothing" in log.out
        assert (config.vocab_size, config.num_hidden_layers) == (40, 1)
        assert not hasattr(config, "new_choice")
        assert not hasattr(config, "sliding_window")
    file.write_text(json.dumps({k: v for k, v in newer.items() if k not in ("new_choice", "sliding_window")}))
    with CaptureLogger(logging.get_logger("distattn_hf.core.configuration_native")) as log:
        assert kind.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert not log.out


CALLS = [
    ({"attention_masks": torch.ones(3, 12)}, "takes no argument 'attention_masks'; did you mean 'attention_mask'"),
    ({"label": tokens()}, "takes no argument 'label'; did you mean 'labels'"),
    ({"head_mask": torch.ones(2)}, "takes no argument 'head_mask'"),
    ({"zzz": 1}, "takes no argument 'zzz', which would do nothing"),
    ({"token_type_ids": torch.ones(3, 12, dtype=torch.long)}, "token_type_ids mark a second segment"),
]


def test_generation_may_have_a_tokenizer():
    """transformers' `generate` gives it on to every call of the model; stop strings need it."""
    model, tokenizer = make_model("l2", "rotary", "causal").eval(), object()
    expected = model.generate(tokens(), max_new_tokens=4, do_sample=False)
    assert model.generate(tokens(), max_new_tokens=4, do_sample=False, tokenizer=tokenizer).equal(expected)


@pytest.mark.parametrize("mechanism", ["dot", "l2", "nystrom", "retrieval", "local"])
@pytest.mark.parametrize("form", ["causal", "bidirectional"])
def test_arguments_that_would_do_nothing_are_refused(mechanism, form):
    model = make_model(mechanism, "rotary", form)
    for arguments, message in CALLS:
        with pytest.raises(ValueError, match=message):
            model(tokens(), **arguments)
    if form == "bidirectional" or mechanism in ("nystrom", "retrieval", "local"):
        with pytest.raises(ValueError, match="is_causal=.* cannot be honoured here, with is_decoder="):
            model(tokens(), is_causal=form == "bidirectional")
    nothing = {"token_type_ids": torch.zeros(3, 12, dtype=torch.long), "head_mask": None, "is_causal": form == "causal"}
    assert_close(model(tokens(), **nothing).logits, model(tokens()).logits, "equal")


@pytest.mark.parametrize("mechanism", ["dot", "l2"])
@pytest.mark.parametrize("padding", [0, 3])
def test_a_decoder_that_is_told_to_look_both_ways(mechanism, padding):
    """transformers' own flag, which embedding models made of decoders use."""
    causal, both = (make_model(mechanism, "rotary", form) for form in ("causal", "bidirectional"))
    both.load_state_dict(causal.state_dict())
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, :padding] = 0
    with torch.no_grad():
        expected = both(tokens(), attention_mask=mask).logits
        actual = causal(tokens(), attention_mask=mask, is_causal=False).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)


def test_arguments_of_an_encoder_decoder():
    model = make_model("l2", "rotary", "cross")
    for arguments, message in CALLS:
        with pytest.raises(ValueError, match=message):
            model(input_ids=tokens(), decoder_input_ids=tokens(), **arguments)
    encoded = model.model.encoder(tokens())
    with pytest.raises(ValueError, match="is_causal=True cannot be honoured here"):
        model(encoder_outputs=encoded, decoder_input_ids=tokens(), is_causal=True)


def test_an_attention_function_of_the_users_own_takes_its_arguments():
    seen = []

    def attend(*args, zzz=None, **kwargs):
        seen.append(zzz)
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("with_arguments_for_test", attend)
    AttentionMaskInterface.register("with_arguments_for_test", sdpa_mask)
    model = make_model("dot", "rotary", "causal")
    model.set_attn_implementation("with_arguments_for_test")
    model(tokens(), zzz=3)
    assert set(seen) == {3}


ROW = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])


def packed(mechanism):
    """(model, two documents in one row, the second one's logits alone)"""
    model = make_model(mechanism, "rotary", "causal")
    ids = tokens()[:1, :8]
    with torch.no_grad():
        return model, ids, model(ids[:, 4:], use_cache=False).logits[0]


@pytest.mark.parametrize("mechanism", ["dot", "l2", "l1"])
def test_packed_documents_are_kept_apart(mechanism):
    model, ids, alone = packed(mechanism)
    with torch.no_grad():
        together = model(ids, position_ids=ROW, use_cache=False).logits[0, 4:]
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)


@pytest.mark.parametrize("mechanism", ["dot", "l2", "nystrom", "retrieval", "local"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("is_new", [True, False], ids=["new cache", "filled cache"])
def test_packed_documents_beside_a_cache_are_refused(mechanism, masked, is_new):
    model, ids, _ = packed(mechanism)
    more = {} if is_new else {CACHE_NAME: cache_of(model(ids, use_cache=True))}
    if masked:
        more["attention_mask"] = torch.ones(1, 8 if is_new else 16, dtype=torch.long)
    remedy = "pass" if is_new else "leave out past_key_values and pass"
    with pytest.raises(ValueError, match=f"position_ids start anew .* only without cache.*: {remedy} use_cache=False"):
        model(ids, position_ids=ROW, use_cache=True, **more)
    if not is_new:
        assert more[CACHE_NAME].get_seq_length() == 8


def test_positions_of_padded_batches_are_no_documents():
    model, ids, _ = packed("l2")
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1, 1, 0]])
    ids = ids.expand(2, -1)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        counted = mask.cumsum(-1) - 1
        for positions in (counted.clamp(min=0), counted.masked_fill(mask == 0, 1)):
            actual = model(ids, attention_mask=mask, position_ids=positions).logits
            torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=0, atol=2e-6)


def test_loaded_models_know_the_names(tmp_path):
    model = make_model("l1", "rotary", "causal")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.num_heads == model.config.num_attention_heads
    assert_close(loaded(tokens()).logits, model(tokens()).logits, "equal")
    with pytest.raises(TypeError, match="mechansim"):
        AutoModel.from_pretrained(tmp_path, mechansim="l2")


def test_a_field_in_a_file_counts_more_than_its_other_name(tmp_path):
    """Older versions kept other names without a meaning beside the fields by which they built the model."""
    model = make_model("dot", "rotary", "causal")
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    old = {**json.loads(file.read_text()), "num_layers": 1, "hidden_dropout_prob": 0.5, "num_heads": 4}
    file.write_text(json.dumps(old))
    with CaptureLogger(logging.get_logger("distattn_hf.core.configuration_native")) as said:
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (again.config.num_hidden_layers, again.config.num_attention_heads, again.config.hidden_dropout) == (2, 2, 0)
    torch.testing.assert_close(again(tokens()).logits, model(tokens()).logits, rtol=1e-5, atol=1e-5)
    assert "'hidden_dropout_prob', 'num_heads', 'num_layers'" in said.out
