"""transformers' common tests on converted GPT-2 with metric l2 (learnable λ, scalar transform)."""

import unittest

import torch

from distattn_hf import AttentionSpec, DistAttnGPT2Config

from .cases import CommonGenerationTests
from .testers import TextModelTester, converted
from .upstream import TrainingTesterMixin


class GPT2Tester(TextModelTester):
    config_class = DistAttnGPT2Config
    spec = AttentionSpec(metric="l2", transform="scalar")
    settings = {
        "vocab_size": 99,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 37,
        "n_positions": 128,
        "initializer_range": 0.2,
        "bos_token_id": 98,
        "eos_token_id": 98,
        "pad_token_id": 97,
    }
    (causal_lm_class,) = converted("GPT2LMHeadModel")


class GPT2CommonTest(TrainingTesterMixin, CommonGenerationTests, unittest.TestCase):
    model_tester_class = GPT2Tester
    model_tester = None
    all_model_classes = converted(
        "GPT2Model",
        "GPT2LMHeadModel",
        "GPT2DoubleHeadsModel",
        "GPT2ForSequenceClassification",
        "GPT2ForTokenClassification",
        "GPT2ForQuestionAnswering",
    )

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class.__name__ == "DistAttnGPT2DoubleHeadsModel":
            batch, choices = self.model_tester.batch_size, self.model_tester.num_choices
            ids = inputs["input_ids"][:, None].repeat(1, choices, 1)
            inputs = {
                "input_ids": ids,
                "labels": ids,
                "mc_token_ids": torch.zeros(batch, choices, dtype=torch.long),
                "mc_labels": torch.zeros(batch, dtype=torch.long),
            }
        return inputs

    def check_training_gradient_checkpointing(self, gradient_checkpointing_kwargs=None):
        # Its two heads have two losses, so `loss` alone gives one of them no gradient.
        self.leave_out("GPT2DoubleHeadsModel")
        super().check_training_gradient_checkpointing(gradient_checkpointing_kwargs)
