"""A quantised, sharded, wrapped or adapted teacher is refused with what to do instead, before anything is built."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Wav2Vec2Config, Wav2Vec2Model

from distattn_hf import AttentionSpec, convert, fold_alpha, revert
from tests.conversion.models import FAMILIES, gpt2, llama, token_batch

WAY = "is quantised .*load the model in floating point before converting it.*convert, save_pretrained, .*TorchAoConfig"
SPEC = AttentionSpec("l2", transform="scalar")


def dynamically_quantised():
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantize_dynamic(llama(), {nn.Linear}, dtype=torch.qint8)


def with_weights(kind: torch.dtype):
    """Weights as bitsandbytes (int8, uint8) and fine-grained FP8 checkpoints keep them."""
    model = llama()
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(kind), requires_grad=False)
    return model


def packed():
    """A layer as GPTQ and AWQ make it: integers of another name, and no weight."""
    model = gpt2()
    layer = model.transformer.h[0].attn.c_proj
    del layer.weight
    layer.register_buffer("qweight", torch.zeros(4, 32, dtype=torch.int32))
    return model


@pytest.mark.parametrize(
    "teacher",
    [dynamically_quantised, packed, *(lambda kind=kind: with_weights(kind) for kind in (
        torch.int8, torch.uint8, torch.float8_e4m3fn))],
    ids=["dynamic", "packed", "int8", "uint8", "float8"],
)  # fmt: skip
def test_quantised_teachers(teacher):
    with pytest.raises(ValueError, match=WAY):
        convert(teacher(), SPEC, init="plain")


def test_a_parametrised_weight_is_not_quantised():
    """wav2vec 2.0's convolution has weight norm."""
    model = Wav2Vec2Model(
        Wav2Vec2Config(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, conv_dim=(16, 16),
            conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        )
    ).eval()  # fmt: skip
    sound, student = torch.randn(1, 800), convert(model, AttentionSpec(), init="exact")
    assert torch.allclose(student(sound).last_hidden_state, model(sound).last_hidden_state, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("spec", [AttentionSpec("l2", transform="maps"), AttentionSpec(
    mechanism="nystrom", num_landmarks=4, window_size=8)], ids=["maps", "nystrom"])  # fmt: skip
def test_the_way_that_works(tmp_path, family, spec):
    from torchao import quantization
    from transformers import TorchAoConfig

    teacher = FAMILIES[family]()
    batch = token_batch(teacher)
    student = convert(teacher, spec, calibration=[batch])
    student.save_pretrained(tmp_path)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    again = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config).eval()
    kinds = {name: type(parameter.data) for name, parameter in again.named_parameters()}
    assert {kind for name, kind in kinds.items() if ".distattn." in name} == {torch.Tensor}
    assert family == "gpt2" or len(set(kinds.values())) > 1
    expected, got = student(**batch).logits, again(**batch).logits
    assert torch.nn.functional.cosine_similarity(got, expected, dim=-1).min() > 0.99
    assert again.generate(**batch, max_new_tokens=3).shape[1] == batch["input_ids"].shape[1] + 3
    if family == "llama":
        for call in (revert, fold_alpha):
            with pytest.raises(ValueError, match="is quantised"):
                call(again)


@pytest.mark.parametrize(
    ("wrap", "way"),
    [
        (torch.compile, "got OptimizedModule; convert model._orig_mod"),
        (nn.DataParallel, "got DataParallel; convert model.module"),
        (lambda model: get_peft_model(model, LoraConfig(target_modules=["q_proj"])), "convert model.merge_and_unload"),
        (
            lambda model: get_peft_model(model, LoraConfig(target_modules=["q_proj"])).base_model.model,
            "merge them first",
        ),
        (nn.Sequential, "got Sequential, which holds one: convert that alone, model.0. = convert"),
    ],
    ids=["compile", "DataParallel", "PEFT", "inside PEFT", "Sequential"],
)
def test_wrapped_teachers(wrap, way):
    with pytest.raises(ValueError, match=way):
        convert(wrap(llama()), SPEC, init="plain")


def test_sharded_teachers():
    import torch.distributed
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        teacher, student = llama(), convert(llama(), SPEC, init="plain")
        for model in (teacher, student):
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        for call in (
            lambda: convert(teacher, SPEC, init="plain"),
            lambda: revert(student),
            lambda: fold_alpha(student),
        ):
            with pytest.raises(ValueError, match="is cut up over processes .*shard the model after"):
                call()
    finally:
        torch.distributed.destroy_process_group()
