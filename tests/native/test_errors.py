"""Bad choices are refused by name when the config is made, bad input before anything runs."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from distattn_hf import (
    DistAttnConfig,
    DistAttnForCausalLM,
    DistAttnForConditionalGeneration,
    DistAttnForMaskedLM,
    DistAttnModel,
    DistAttnSeq2SeqConfig,
)
from distattn_hf.core.mechanisms import MECHANISMS
from distattn_hf.core.metrics import METRICS
from tests.tolerances import assert_close

from .choices import make_config, make_model, tokens

REFUSED = [
    (
        {"hidden_size": 30, "num_attention_heads": 4},
        "hidden_size must be a multiple of num_attention_heads, got 30 and 4",
    ),
    (
        {"num_attention_heads": 8, "num_key_value_heads": 3},
        "num_key_value_heads must divide num_attention_heads=8, got 3",
    ),
    ({"vocab_size": 0}, "vocab_size must be an integer >= 1, got 0"),
    ({"num_hidden_layers": 2.0}, "num_hidden_layers must be an integer >= 1, got 2.0"),
    ({"intermediate_size": -1}, "intermediate_size must be an integer >= 1 or None, got -1"),
    ({"hidden_size": 24, "num_attention_heads": 8, "positional_encoding": "rotary"}, "needs an even head size.*: 3"),
    (
        {"mechanism": "sotfmax"},
        "unknown mechanism 'sotfmax'; expected one of dot, distance, nystrom, retrieval, local.*sqeuclidean",
    ),
    ({"mechanism": "retreival"}, r"unknown mechanism 'retreival'; did you mean retrieval\? expected one of dot"),
    ({"mechanism": 3}, r"mechanism must be a name \(str\), got 3"),
    ({"mechanism": "distance", "metric": "l7"}, "unknown metric 'l7'; expected one of sqeuclidean"),
    ({"mechanism": "l1", "metric": "l2"}, "metric belongs to mechanism='distance' or 'retrieval', got 'l2' with 'l1'"),
    (
        {"mechanism": "dot", "metric": "l2"},
        "metric belongs to mechanism='distance' or 'retrieval', got 'l2' with 'dot'",
    ),
    ({"mechanism": "nystrom", "metric": "l2"}, "mechanism='nystrom' .*sqeuclidean"),
    ({"mechanism": "lp"}, "mechanism='distance'.*p"),
    ({"mechanism": "l2", "mechanism_options": {"p": 2.0}}, "only 'lp' takes an order p"),
    ({"mechanism": "l2", "mechanism_options": {"lam": -1}}, "lam .* must be a positive finite number, got -1"),
    ({"mechanism": "l2", "mechanism_options": {"window_size": 3}}, "window_size belongs to mechanism='nystrom'"),
    ({"mechanism": "l2", "mechanism_options": {"heads": [0]}}, "'heads' is no option of mechanism 'distance'"),
    ({"mechanism": "l2", "mechanism_options": {"lamda": 1}}, "AttentionSpec has no field 'lamda'; did you mean lam"),
    ({"mechanism_options": {"window_size": 3}}, "mechanism 'dot' has no option 'window_size'"),
    ({"mechanism_options": [1]}, r"mechanism_options must be a dict, got \[1\]"),
    ({"mechanism": "local", "mechanism_options": {"width": 3}}, "mechanism 'local' has no option 'width'"),
    (
        {"mechanism": "local", "mechanism_options": {"window_size": 0}},
        "window_size of mechanism 'local' must be an integer",
    ),
    (
        {"positional_encoding": "rotory"},
        "unknown positional encoding 'rotory'; did you mean rotary\\? expected one of none, sinusoidal",
    ),
    (
        {"positional_encoding": "alibi", "mechanism": "linear"},
        "'linear' with positional_encoding='alibi'.*no position_bias",
    ),
    (
        {"positional_encoding": "alibi", "mechanism": "nystrom"},
        "'nystrom' with positional_encoding='alibi'.*constant beyond",
    ),
    (
        {"positional_encoding": "relative", "mechanism": "nystrom", "mechanism_options": {"window_size": 64}},
        "window_size must be at least relative_attention_max_distance=128.*got 64",
    ),
    ({"mechanism": "linformer", "is_decoder": True}, "mechanism 'linformer' has no causal form; it has: bidirectional"),
    ({"positional_encoding": "relative", "relative_attention_num_buckets": 7}, "must be an even number >= 4, got 7"),
    ({"positional_encoding": "relative", "relative_attention_max_distance": 16}, "must exceed half of .*=32, got 16"),
    (
        {"rope_parameters": {"theta": 1e6}},
        "rope_parameters has no key 'theta'; expected .*rope_theta, rope_type",
    ),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters has no key 'partial_rotary_factor'"),
    ({"rope_scaling": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters has no key 'full_attention'"),
    ({"norm_position": "sandwich"}, "norm_position must be one of pre, post, got 'sandwich'"),
    ({"norm_type": "batch"}, "norm_type must be one of layer_norm, rms_norm, got 'batch'"),
    ({"hidden_dropout": 1.0}, r"hidden_dropout must be a number, in \[0, 1\); got 1.0"),
    ({"attention_dropout": "0.1"}, "attention_dropout must be a number"),
    ({"norm_eps": 0.0}, "norm_eps must be a number, positive and finite; got 0.0"),
    ({"initializer_range": float("inf")}, "initializer_range must be a number, positive and finite; got inf"),
    ({"is_decoder": 1}, "is_decoder must be True or False, got 1"),
    ({"hidden_act": "gleu"}, "unknown hidden_act 'gleu'; expected one of .*gelu"),
    ({"pad_token_id": 32000}, "pad_token_id must be None or below vocab_size=32000, got 32000"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_configs_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        DistAttnConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder_layers": 0}, "decoder_layers must be an integer >= 1 or None, got 0"),
        ({"cross_metric": "l2"}, "cross_metric belongs to cross_mechanism, which is None; got 'l2'"),
        ({"cross_options": {"p": 2}}, "cross_options belongs to cross_mechanism"),
        ({"cross_mechanism": "dot", "cross_options": 3}, "cross_options must be a dict or None, got 3"),
        ({"cross_mechanism": "foo"}, "unknown cross_mechanism 'foo'"),
        ({"mechanism": "local"}, "mechanism 'local' has no cross form.*; cross_mechanism can be another one"),
        ({"mechanism": "linformer", "cross_mechanism": "dot"}, "mechanism 'linformer' has no causal form"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_seq2seq_configs_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        DistAttnSeq2SeqConfig(**fields)


def test_the_unknown_mechanism_is_told_all_that_are_known():
    with pytest.raises(ValueError, match="unknown mechanism") as caught:
        DistAttnConfig(mechanism="foo")
    for name in ("dot", "distance", "nystrom", "retrieval", *MECHANISMS, *METRICS):
        assert name in str(caught.value)


def test_names_are_brought_into_one_form():
    config = DistAttnConfig(mechanism="Euclidean")
    assert (config.mechanism, config.metric) == ("distance", "l2")
    assert (DistAttnConfig(mechanism="distance").metric, DistAttnConfig(mechanism="nystrom").metric) == (
        "l2",
        "sqeuclidean",
    )
    assert DistAttnConfig(mechanism="distance", metric="manhattan").metric == "l1"
    config = DistAttnSeq2SeqConfig(mechanism="l1", cross_mechanism="cosine")
    assert (config.mechanism, config.metric, config.cross_mechanism, config.cross_metric) == (
        "distance", "l1", "distance", "cosine",
    )  # fmt: skip


def test_what_was_changed_in_a_config_is_checked_when_the_model_is_built():
    config = make_config("l2", "rotary", "causal")
    config.metric = "l7"
    with pytest.raises(ValueError, match="unknown metric 'l7'"):
        DistAttnModel(config)


def test_heads_say_which_direction_they_need():
    with pytest.raises(ValueError, match="DistAttnForCausalLM .* needs is_decoder=True in its config, got False"):
        DistAttnForCausalLM(make_config("dot", "rotary", "bidirectional"))
    with pytest.raises(ValueError, match="DistAttnForMaskedLM .* needs is_decoder=False in its config, got True"):
        DistAttnForMaskedLM(make_config("dot", "rotary", "causal"))


def test_input_is_checked():
    causal, encoder = (make_model("dot", "rotary", form) for form in ("causal", "bidirectional"))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        causal()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        causal(input_ids=tokens(), inputs_embeds=torch.zeros(3, 12, 16))
    with pytest.raises(ValueError, match="an encoder keeps no cache"):
        encoder.model(tokens(), past_key_values=causal(tokens(), use_cache=True).past_key_values)
    decoder = make_model("dot", "rotary", "cross").model.decoder
    with pytest.raises(ValueError, match="needs encoder_hidden_states"):
        decoder(tokens())
    for kind, more in ((causal, {}), (decoder, {"encoder_hidden_states": torch.zeros(3, 5, 16)})):
        with pytest.raises(ValueError, match="'memory' holds a cache, which DistAttn.* takes as"):
            kind(tokens(), memory=DynamicCache(), **more)
    with pytest.raises(ValueError, match="must be an EncoderDecoderCache.*; got DynamicCache"):
        make_model("dot", "rotary", "cross")(
            input_ids=tokens(), decoder_input_ids=tokens(), past_key_values=DynamicCache()
        )


@pytest.mark.parametrize("mechanism", ["dot", "l2", "nystrom", "retrieval", "linear"])
def test_padding_masks_of_the_wrong_shape_are_refused(mechanism):
    model = make_model(mechanism, "rotary", "causal")
    for shape in ((3, 11), (3, 13), (2, 12), (12,)):
        with pytest.raises(ValueError, match=rf"attention_mask must have shape \(B, M\)=\(3, 12\).*got \({shape[0]},"):
            model(tokens(), attention_mask=torch.ones(shape, dtype=torch.long))
    cache = model(tokens(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"=\(3, 14\), .*in the cache included; got \(3, 2\)"):
        model(tokens(length=2), attention_mask=torch.ones(3, 2, dtype=torch.long), past_key_values=cache)
    other = make_model(mechanism, "rotary", "cross")
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(B, M\)=\(3, 12\).*got \(3, 5\)"):
        other(input_ids=tokens(), decoder_input_ids=tokens(length=5), attention_mask=torch.ones(3, 5))
    encoded = other.model.encoder(tokens())
    with pytest.raises(ValueError, match=r"encoder_attention_mask must have shape \(B, M\)=\(3, 12\).*got \(3, 5\)"):
        other(encoder_outputs=encoded, decoder_input_ids=tokens(length=5), attention_mask=torch.ones(3, 5))


@pytest.mark.parametrize("mechanism", ["nystrom", "retrieval", "linear"])
def test_masks_of_the_wrong_shape_are_refused_by_linear_attention(mechanism):
    model = make_model(mechanism, "rotary", "causal")
    with pytest.raises(ValueError, match=r"padding mask \(B, M\), got torch.bool of shape \(3, 1, 12, 12\)"):
        model(tokens(), attention_mask=torch.ones(3, 1, 12, 12, dtype=torch.bool).tril())


def test_labels_need_the_tokens_they_are_shifted_by():
    config = make_config("dot", "rotary", "cross", decoder_start_token_id=None)
    with pytest.raises(ValueError, match="labels need decoder_start_token_id and pad_token_id, got None and 0"):
        DistAttnForConditionalGeneration(config)(input_ids=tokens(), labels=tokens())


def test_implementation_requests():
    """transformers' names choose between the fast paths and the readable reference; the rest is refused."""
    for mechanism, names in {
        "dot": ("sdpa", "eager"),
        "l2": ("distattn", "distattn_eager"),
        "nystrom": ("distattn_nystrom", "distattn_nystrom_eager"),
        "retrieval": ("distattn_nystrom", "distattn_nystrom_eager"),
        "linear": ("distattn_nystrom", "distattn_nystrom_eager"),
    }.items():
        model = make_model(mechanism, "rotary", "causal")
        assert model.config._attn_implementation == names[0]
        logits = model(tokens()).logits
        for requested, name in (("eager", names[1]), ("sdpa", names[0]), (names[1], names[1])):
            model.set_attn_implementation(requested)
            assert model.config._attn_implementation == name
            torch.testing.assert_close(model(tokens()).logits, logits, rtol=0, atol=2e-5)
        if mechanism != "dot":
            for refused in ("flash_attention_2", "flex_attention", "foo"):
                with pytest.raises(ValueError, match="attn_implementation"):
                    model.set_attn_implementation(refused)
            model.config._attn_implementation = "sdpa"
            with pytest.raises(ValueError, match="would run dot-product attention"):
                model(tokens())


def test_flash_attention_would_lose_a_bias():
    with pytest.raises(ValueError, match="'flash_attention_2' takes no position bias, which .*'alibi' is"):
        make_model("dot", "alibi", "causal").set_attn_implementation("flash_attention_2")


def test_each_part_of_an_encoder_decoder_gets_its_own_implementation():
    model = make_model("l2", "rotary", "cross")
    assert model.model.encoder.config._attn_implementation == "sdpa"
    assert model.model.decoder.config._attn_implementation == "distattn"
    model.set_attn_implementation("eager")
    assert model.model.encoder.config._attn_implementation == "eager"
    assert model.model.decoder.config._attn_implementation == "distattn_eager"


def test_weights_are_refused_where_there_are_none():
    """As with flash attention: any attention function of transformers runs with "dot", and not all know weights."""
    AttentionInterface.register("without_weights_for_test", sdpa_attention_forward)
    AttentionMaskInterface.register("without_weights_for_test", sdpa_mask)
    model = make_model("dot", "rotary", "causal")
    logits = model(tokens()).logits
    model.set_attn_implementation("without_weights_for_test")
    assert_close(model(tokens()).logits, logits, "equal")
    with pytest.raises(
        ValueError, match="output_attentions: attn_implementation='without_weights_for_test' returns no"
    ):
        model(tokens(), output_attentions=True)
