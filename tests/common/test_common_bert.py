"""transformers' common tests on converted BERT with metric sqeuclidean (learnable λ, scalar transform)."""

import unittest

import torch

from distattn_hf import AttentionSpec, DistAttnBertConfig

from .cases import CommonGenerationTests
from .testers import TextModelTester, converted


class BertTester(TextModelTester):
    config_class = DistAttnBertConfig
    spec = AttentionSpec(metric="sqeuclidean", transform="scalar")
    settings = {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 37,
        "max_position_embeddings": 128,
        "type_vocab_size": 16,
        "initializer_range": 0.2,
    }


class BertCommonTest(CommonGenerationTests, unittest.TestCase):
    model_tester_class = BertTester
    all_model_classes = converted(
        "BertModel",
        "BertLMHeadModel",
        "BertForMaskedLM",
        "BertForMultipleChoice",
        "BertForNextSentencePrediction",
        "BertForPreTraining",
        "BertForQuestionAnswering",
        "BertForSequenceClassification",
        "BertForTokenClassification",
    )

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class.__name__ == "DistAttnBertForPreTraining":
            inputs["labels"] = torch.zeros_like(inputs["input_ids"])
            inputs["next_sentence_label"] = torch.zeros(len(inputs["input_ids"]), dtype=torch.long)
        return inputs
