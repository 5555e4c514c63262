"""Layers and heads that are gone: smaller, equal to leaving them out, saved, loaded, reverted."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, ViTConfig, ViTForImageClassification

from distattn_hf import AttentionSpec, convert, load_checkpoint, revert
from distattn_hf.analysis.intervention import replaced_heads
from distattn_hf.analysis.pruning import prune_layers, remove_heads
from tests.conversion.models import bert, gpt2, llama, t5, token_batch

# Whole float32 models: other sums round otherwise, as tests.analysis.test_importance.FLOAT32.
FLOAT32 = {"rtol": 0, "atol": 5e-5}
VOCAB = 64


def qwen3(layers: int = 3, sliding: bool = False):
    torch.manual_seed(0)
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"][:layers]
    config = Qwen3Config(
        num_hidden_layers=layers, num_attention_heads=6, num_key_value_heads=3, head_dim=8, hidden_size=24,
        intermediate_size=32, vocab_size=VOCAB, max_position_embeddings=64, initializer_range=0.2, eos_token_id=2,
        bos_token_id=1, pad_token_id=0,
        **({"use_sliding_window": True, "sliding_window": 4, "layer_types": kinds} if sliding else {}),
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def vit():
    torch.manual_seed(0)
    config = ViTConfig(
        num_hidden_layers=3, num_attention_heads=2, hidden_size=16, intermediate_size=16, image_size=8, patch_size=2,
        num_channels=1, num_labels=3, initializer_range=0.2,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def deep(family):
    """A model of four layers."""
    torch.manual_seed(0)
    model = {"gpt2": gpt2, "bert": bert, "llama": llama}[family]()
    config = model.config
    config.num_hidden_layers = 4
    return type(model)(config).eval()


def parameters(model) -> int:
    return sum(p.numel() for p in model.parameters())


def without_layers(model, layers, batch):
    """The untouched model with the layers' outputs replaced by their inputs, by a patch of their methods."""
    stack = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    originals = {layer: stack[layer].forward for layer in layers}

    def skip(hidden_states, *args, **kwargs):
        return hidden_states

    for layer in layers:
        stack[layer].forward = skip
    try:
        with torch.no_grad():
            return model(**batch, **({} if "pixel_values" in batch else {"use_cache": False})).logits
    finally:
        for layer, original in originals.items():
            stack[layer].forward = original


@pytest.mark.parametrize("attention", ["untouched", "l2", "retrieval", "two specs"])
@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_pruned_layers_are_gone_and_the_rest_is_as_it_was(family, attention, tmp_path):
    model = deep(family)
    if attention == "two specs":
        model = convert(model, [AttentionSpec("l2", layers="0-1"), AttentionSpec("l1", layers=(3,))], init="plain")
    elif attention != "untouched":
        model = convert(model, attention, init="plain") if attention == "l2" else convert(model, attention)
    batch = token_batch(model, length=12)
    expected = without_layers(model, [0, 2], batch)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = prune_layers(model, [2, 0])
    assert pruned.config.num_hidden_layers == 2
    assert parameters(pruned) < parameters(model)
    with torch.no_grad():
        torch.testing.assert_close(pruned(**batch).logits, expected, **FLOAT32)
        assert not torch.allclose(pruned(**batch).logits, model(**batch).logits, atol=1e-3)
    assert model.config.num_hidden_layers == 4
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    pruned.save_pretrained(tmp_path / "pruned")
    loaded = load_checkpoint(tmp_path / "pruned")[0]
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, pruned(**batch).logits)
    if attention != "untouched":
        teacher = revert(loaded)
        assert type(teacher) is type(deep(family))
        assert teacher.config.num_hidden_layers == 2
    if attention == "two specs":
        assert [spec.metric for spec in loaded.config.attention_specs] == ["l2", "l1"]
        assert [spec.layers for spec in loaded.config.attention_specs] == [(0,), (1,)]
    if family != "bert":
        tokens = loaded.generate(batch["input_ids"], max_new_tokens=4, min_new_tokens=4, do_sample=False)
        again = loaded.generate(
            batch["input_ids"], max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False
        )
        assert torch.equal(tokens, again), "each layer writes into its own place of the cache"


def test_layers_of_other_models_and_options_by_layer():
    model = vit()
    batch = {"pixel_values": torch.randn(2, 1, 8, 8)}
    pruned = prune_layers(model, [1])
    with torch.no_grad():
        torch.testing.assert_close(pruned(**batch).logits, without_layers(model, [1], batch), **FLOAT32)
    model = qwen3(4, sliding=True)
    batch = token_batch(model, length=20)
    pruned = prune_layers(model, [0], batch)
    assert pruned.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    with torch.no_grad():
        torch.testing.assert_close(pruned(**batch).logits, without_layers(model, [0], batch), **FLOAT32)


def test_native_options_by_layer_go_with_their_layer(tmp_path):
    from distattn_hf.core.configuration_native import DistAttnConfig
    from distattn_hf.core.modeling_distattn import DistAttnForCausalLM

    torch.manual_seed(0)
    config = DistAttnConfig(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=3, vocab_size=64, intermediate_size=16,
        max_position_embeddings=32, is_decoder=True, pad_token_id=0, initializer_range=0.5, mechanism="local",
        mechanism_options={"window_size": [2, 3, 5]},
    )  # fmt: skip
    model = DistAttnForCausalLM(config).eval()
    batch = token_batch(model, length=12)
    pruned = prune_layers(model, [1], batch)
    assert pruned.config.mechanism_options == {"window_size": [2, 5]}
    assert model.config.mechanism_options == {"window_size": [2, 3, 5]}
    with torch.no_grad():
        torch.testing.assert_close(pruned(**batch).logits, without_layers(model, [1], batch), **FLOAT32)
    pruned.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load_checkpoint(tmp_path)[0](**batch).logits, pruned(**batch).logits)


def test_layers_that_cannot_go_are_refused():
    model = gpt2()
    for layers in ([], [0, 1], [2], [-1], [True]):
        with pytest.raises(ValueError, match="layers must be numbers 0 to 1, at least one and not all"):
            prune_layers(model, layers)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has no single stack of layers"):
        prune_layers(t5(), [0])
    with pytest.raises(ValueError, match="all converted layers would go"):
        prune_layers(convert(model, AttentionSpec("l2", layers=(1,)), init="plain"), [1])


def test_removed_heads_are_gone(tmp_path):
    model = qwen3()
    batch = token_batch(model, length=12)
    chosen = {0: [0, 1], 1: [2, 3], 2: [4, 5]}
    with torch.no_grad(), replaced_heads(model, chosen):
        expected = model(**batch).logits
    smaller = remove_heads(model, chosen)
    assert (smaller.config.num_attention_heads, smaller.config.num_key_value_heads) == (4, 2)
    # q 2·8·24, k and v 8·24 each, o 24·2·8, in three layers.
    assert parameters(model) - parameters(smaller) == 3 * (2 * 8 * 24 + 2 * 8 * 24 + 24 * 2 * 8)
    with torch.no_grad():
        torch.testing.assert_close(smaller(**batch).logits, expected, **FLOAT32)
        assert not torch.allclose(expected, model(**batch).logits, atol=1e-3)
    smaller.save_pretrained(tmp_path)
    loaded = load_checkpoint(tmp_path)[0]
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, smaller(**batch).logits)
    student = convert(loaded, AttentionSpec("sqeuclidean"), init="exact")
    with torch.no_grad():
        torch.testing.assert_close(student(**batch).logits, expected, **FLOAT32)


def test_heads_that_no_config_could_name_are_refused():
    model = qwen3()
    with pytest.raises(ValueError, match="as many must go of each"):
        remove_heads(model, {0: [0, 1]})
    with pytest.raises(ValueError, match="of each key head all 2 query heads must go"):
        remove_heads(model, {0: [0, 2], 1: [0, 1], 2: [0, 1]})
    with pytest.raises(ValueError, match="takes its head size from hidden_size / heads"):
        remove_heads(gpt2(), {0: [0], 1: [0]})
    with pytest.raises(ValueError, match="prune the teacher, then convert"):
        remove_heads(convert(model, "l2", init="plain"), {0: [0, 1], 1: [0, 1], 2: [0, 1]})
