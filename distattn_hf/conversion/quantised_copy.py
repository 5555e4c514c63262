"""Conversion of a model whose weights transformers quantised: attention changes beside them, and none is touched."""

import copy

from torch import nn
from transformers import PreTrainedModel

from ..core.modeling_converted import attach_states


def is_quantised(model: nn.Module) -> bool:
    """Return whether transformers loaded a model with a quantization_config of a quantiser that copies and saves."""
    return getattr(model, "hf_quantizer", None) is not None


def quantised_copy(model: PreTrainedModel, student_class: type, config) -> PreTrainedModel:
    """Return a copy of a quantised model as the converted class, with `config` and the heads' start values.

    Building the class anew, as for other models, would need floating-point weights.
    """
    student = copy.deepcopy(model)
    before, implementation = student.config, config.distattn["fallback"]
    config.quantization_config = before.quantization_config
    config.name_or_path = student.name_or_path = ""
    configs = {id(before): config}
    for name in before.sub_configs:
        if (part := getattr(before, name, None)) is not None:
            configs[id(part)] = getattr(config, name)
    for module in student.modules():
        if (own := configs.get(id(getattr(module, "config", None)))) is not None:
            module.config = own
    student.__class__ = student_class
    student.set_attn_implementation("eager" if implementation == "eager" else None)
    attach_states(student)
    for state in student.attention_states.values():
        state.to(model.device)
    return student
