"""Small models with learned sinks or capped logits, whose sinks and caps matter."""

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM

from distattn_hf.experiments.architectures import build
from tests.conversion.models import _SPREAD, SPECIAL, VOCAB

_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 128, **SPECIAL, **_SPREAD,
}  # fmt: skip


def gpt_oss(layers=2, **kwargs):
    """Layers of a sliding window and full ones in turn; a sink in each head that takes a third of the weight."""
    torch.manual_seed(0)
    options = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8, **kwargs}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    model = GptOssForCausalLM(GptOssConfig(**_SIZES, num_hidden_layers=layers, rope_parameters=rope, **options))
    return with_sinks(model).eval()


def gemma2(layers=2, softcap=0.7, **kwargs):
    torch.manual_seed(0)
    options = {"attn_logit_softcapping": softcap, "sliding_window": 8, "query_pre_attn_scalar": 8, **kwargs}
    return Gemma2ForCausalLM(Gemma2Config(**_SIZES, num_hidden_layers=layers, **options)).eval()


def with_sinks(model):
    """Give each head another sink: as they are drawn they are all near 0."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith(".sinks"):
            parameter.data = (2 * torch.randn(parameter.shape, generator=generator) + 1).to(parameter)
    return model


def with_cap(model, softcap=0.1):
    """Cap the logits where it matters: the usual caps are far above those of a tiny model."""
    for module in model.modules():
        if getattr(module, "attn_logit_softcapping", None) is not None:
            module.attn_logit_softcapping = softcap
            module.config.attn_logit_softcapping = softcap
    return model


# Every other text model with a sink or a cap that the sweep can build.
OTHERS = (
    "deepseek_v4", "flint", "granite_swa", "granitemoe_swa", "hy_v4", "inkling2_text",
    "openai_privacy_filter", "t5gemma", "vaultgemma",
)  # fmt: skip


def other(model_type):
    return with_cap(with_sinks(build(model_type)))


def in_float64(model):
    """Return the model in float64, with the one implementation of experts that takes it."""
    if hasattr(model.config, "num_local_experts"):
        model.set_experts_implementation("eager")
    return model.double()


FAMILIES = {"gpt_oss": gpt_oss, "gemma2": gemma2}
