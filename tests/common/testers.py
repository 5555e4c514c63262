"""Tiny models for the common tests: what transformers' test mixins expect of a `model_tester`."""

import distattn_hf
from distattn_hf import AttentionSpec
from distattn_hf.core.configuration_distattn import CLASS_PREFIX

from .upstream import ids_tensor, random_attention_mask


def converted(*names: str) -> tuple[type, ...]:
    """The converted classes of transformers' classes with these names."""
    return tuple(getattr(distattn_hf, CLASS_PREFIX + name) for name in names)


class TextModelTester:
    """A converted config and random inputs (B=7, N=7) for one family.

    `spec` says which attention the family's tests run with; `settings` are the base config's own arguments.
    """

    batch_size, seq_length, vocab_size = 7, 7, 99
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    intermediate_size, num_choices, is_training = 37, 3, True
    config_class: type
    spec: AttentionSpec
    settings: dict = {}

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return self.config_class(**self.settings, distattn={"specs": [self.spec.to_dict()]})

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        inputs = {"input_ids": ids_tensor(shape, self.vocab_size), "attention_mask": random_attention_mask(shape)}
        return self.get_config(), inputs
