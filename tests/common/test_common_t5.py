"""transformers' common tests on converted T5 (self and cross attention): metric l1, learnable λ, scalar transform."""

import unittest

from distattn_hf import AttentionSpec, DistAttnT5Config

from .cases import CommonGenerationTests, CommonTests
from .testers import TextModelTester, converted
from .upstream import ids_tensor, random_attention_mask


class T5Tester(TextModelTester):
    config_class = DistAttnT5Config
    spec = AttentionSpec(metric="l1", transform="scalar")
    encoder_seq_length, decoder_seq_length = 7, 7
    seq_length = decoder_seq_length
    settings = {
        "vocab_size": 99,
        "d_model": 32,
        "d_ff": 37,
        "d_kv": 8,
        "num_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "initializer_factor": 0.1,
        "bos_token_id": 0,
        "decoder_start_token_id": 0,
    }

    def prepare_config_and_inputs_for_common(self):
        encoder, decoder = [self.batch_size, self.encoder_seq_length], [self.batch_size, self.decoder_seq_length]
        inputs = {
            # No end-of-sequence token (1): T5ForSequenceClassification wants the same number of them in every row.
            "input_ids": ids_tensor(encoder, self.vocab_size - 2) + 2,
            "attention_mask": random_attention_mask(encoder),
            "decoder_input_ids": ids_tensor(decoder, self.vocab_size),
            "decoder_attention_mask": random_attention_mask(decoder),
        }
        return self.get_config(), inputs


class T5EncoderTester(TextModelTester):
    config_class = DistAttnT5Config
    spec = T5Tester.spec
    settings = {**T5Tester.settings, "is_encoder_decoder": False}


class T5CommonTest(CommonGenerationTests, unittest.TestCase):
    model_tester_class = T5Tester
    is_encoder_decoder = True
    all_model_classes = converted(
        "T5Model",
        "T5ForConditionalGeneration",
        "T5ForSequenceClassification",
        "T5ForQuestionAnswering",
    )

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if model_class.__name__ == "DistAttnT5ForSequenceClassification":
            # It reads the state of the last end-of-sequence token.
            inputs["input_ids"][:, -1] = 1
        return inputs

    def test_inputs_embeds(self):
        # It refuses embeddings: it looks for end-of-sequence tokens in the ids.
        self.leave_out("T5ForSequenceClassification")
        super().test_inputs_embeds()


class T5EncoderCommonTest(CommonTests, unittest.TestCase):
    model_tester_class = T5EncoderTester
    all_model_classes = converted("T5EncoderModel", "T5ForTokenClassification")

    def test_training(self):
        # It has no loss.
        self.leave_out("T5EncoderModel")
        super().test_training()

    def check_training_gradient_checkpointing(self, gradient_checkpointing_kwargs=None):
        self.leave_out("T5EncoderModel")
        super().check_training_gradient_checkpointing(gradient_checkpointing_kwargs)
