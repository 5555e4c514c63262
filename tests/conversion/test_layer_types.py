"""Models that mix full and sliding layers: each layer gets the mask of its own type, whatever the others are."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from distattn_hf import AttentionSpec, convert
from distattn_hf.core.nystrom_cache import NystromLayer
from tests.tolerances import CACHED_LOGITS

from .models import SPECIAL, VOCAB, token_batch
from .nystrom_cases import GENERATION, converted, in_chunks, nystrom, padded

SIZES = {
    "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "head_dim": 8, "intermediate_size": 64,
    "vocab_size": VOCAB, "initializer_range": 0.2, "sliding_window": 5, **SPECIAL,
}  # fmt: skip
TYPES = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
MIXED = {"num_hidden_layers": 4, "layer_types": TYPES}
FULL, SLIDING = [1, 3], [0, 2]

DECODERS = {
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **MIXED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, **MIXED, use_sliding_window=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, **MIXED, use_sliding_window=True)),
}
EVERY = pytest.mark.parametrize("name", DECODERS)


def build(make):
    torch.manual_seed(0)
    return make().eval()


def test_a_full_layer_is_converted_beside_a_sliding_one_and_nothing_is_built_for_a_sliding_one():
    for name, make in DECODERS.items():
        teacher = build(make)
        with pytest.raises(
            ValueError, match=r"layers.0.self_attn' has sliding_attention.*layers='full_attention' or layers=\[1, 3\]"
        ):
            converted(teacher, nystrom())
        by_type = converted(teacher, nystrom(layers="full_attention"))
        assert by_type.config.distattn["modules"].keys() == {f"layers.{i}.self_attn" for i in FULL}, name
        by_number = converted(teacher, nystrom(layers=FULL))
        batch = padded(40)
        with torch.no_grad():
            assert torch.equal(by_type(**batch).logits, by_number(**batch).logits), name


@EVERY
@torch.no_grad()
def test_without_far_keys_it_is_the_teacher(name):
    """A window that holds the whole text leaves the far field nothing: what differs is a mask that went wrong."""
    teacher = build(DECODERS[name])
    student = converted(teacher, nystrom(window_size=64, layers="full_attention"))
    batch = padded(40)
    real = batch["attention_mask"].bool()
    for implementation in ("sdpa", "eager"):
        student.set_attn_implementation(implementation)
        off = (student(**batch).logits - teacher(**batch).logits)[real].abs().max()
        assert off <= CACHED_LOGITS, implementation


@EVERY
@pytest.mark.parametrize("sizes", [[31, 1, 1, 7, 1, 19], [1] * 9 + [51]], ids=str)
@torch.no_grad()
def test_chunks_are_one_forward_and_generation_is_the_same_without_a_cache(name, sizes):
    specs = [nystrom(layers="full_attention"), AttentionSpec("l2", layers="sliding_attention")]
    model, batch = converted(build(DECODERS[name]), specs), padded(60)
    real = batch["attention_mask"].bool()
    logits, past = in_chunks(model, batch, sizes)
    assert (logits - model(**batch, use_cache=False).logits)[real].abs().max() <= CACHED_LOGITS
    assert [type(layer) is NystromLayer for layer in past.layers] == [kind == "full_attention" for kind in TYPES]
    prompt = token_batch(model, length=30, padded=True)
    assert torch.equal(*(model.generate(**prompt, **GENERATION, use_cache=use) for use in (True, False)))


@EVERY
@pytest.mark.parametrize("layers", ["sliding_attention", "full_attention", None])
@torch.no_grad()
def test_exact_metrics_on_any_type(name, layers):
    """`init="exact"` is the teacher; the other metrics are their own reference in float64."""
    teacher = build(DECODERS[name])
    batch = padded(40)
    real = batch["attention_mask"].bool()
    exact = convert(teacher, AttentionSpec(layers=layers), init="exact")
    kinds = {None: [0, 1, 2, 3], "full_attention": FULL, "sliding_attention": SLIDING}
    assert [m["layer"] for m in exact.config.distattn["modules"].values()] == kinds[layers]
    assert (exact(**batch).logits - teacher(**batch).logits)[real].abs().max() <= CACHED_LOGITS
    for metric in ("l1", "l2", "cosine"):
        student = convert(teacher, AttentionSpec(metric, layers=layers), init="plain")
        fast = student(**batch).logits
        student.set_attn_implementation("eager")
        assert (fast - student.double()(**batch).logits)[real].abs().max() <= CACHED_LOGITS, metric
    logits, _ = in_chunks(exact, batch, [23, 1, 1, 15])
    assert (logits - exact(**batch).logits)[real].abs().max() <= CACHED_LOGITS


@torch.no_grad()
def test_a_model_whose_layers_all_slide():
    sizes = {k: v for k, v in SIZES.items() if k != "sliding_window"}
    make = lambda window: build(lambda: MistralForCausalLM(MistralConfig(**sizes, sliding_window=window)))  # noqa: E731
    with pytest.raises(ValueError, match="no layer of full_attention.*config.sliding_window = None"):
        converted(make(5), nystrom())
    with pytest.raises(
        ValueError, match=r"layers='full_attention'.*selects no attention module.*\(sliding_attention\)"
    ):
        converted(make(5), nystrom(layers="full_attention"))
    teacher, batch = make(5), padded(40)
    exact = convert(teacher, AttentionSpec(layers="sliding_attention"), init="exact")
    assert (exact(**batch).logits - teacher(**batch).logits)[batch["attention_mask"].bool()].abs().max() < CACHED_LOGITS
    assert bool(converted(make(None), nystrom(layers="full_attention"))(**batch).logits.isfinite().all())


@torch.no_grad()
def test_an_encoder_of_both_types(tmp_path):
    config = ModernBertConfig(
        num_hidden_layers=4, num_attention_heads=4, hidden_size=32, intermediate_size=64, vocab_size=VOCAB,
        global_attn_every_n_layers=2, local_attention=8, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    teacher = build(lambda: ModernBertForMaskedLM(config))
    student = converted(teacher, nystrom(window_size=64, layers="full_attention"))
    assert [m["layer"] for m in student.config.distattn["modules"].values()] == [0, 2]
    batch = {k: v for k, v in padded(40).items() if k != "position_ids"}
    real = batch["attention_mask"].bool()
    assert (student(**batch).logits - teacher(**batch).logits)[real].abs().max() <= CACHED_LOGITS
    with pytest.raises(ValueError, match=r"layers.1.attn' has sliding_attention"):
        converted(teacher, nystrom())


def test_a_reloaded_model_and_one_made_from_a_config(tmp_path):
    student = converted(build(DECODERS["qwen3"]), nystrom(layers="full_attention"))
    batch = padded(40)
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, student(**batch).logits)
    config = type(student.config)(**SIZES, **MIXED, use_sliding_window=True, distattn={"specs": [nystrom().to_dict()]})
    with pytest.raises(ValueError, match="layers.0.self_attn' has sliding_attention"):
        AutoModelForCausalLM.from_config(config)


def test_a_pattern_that_no_config_tells_is_refused_by_the_heads_that_get_it():
    student = converted(build(DECODERS["qwen3"]), nystrom(layers="full_attention"))
    ids = torch.randint(3, VOCAB, (1, 20))
    packed = torch.cat([torch.arange(8), torch.arange(12)])[None]
    with pytest.raises(ValueError, match="need a padding mask.*packed sequences"):
        student(ids, position_ids=packed, use_cache=False)
