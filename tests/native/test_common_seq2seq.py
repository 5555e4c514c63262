"""transformers' common model and generation tests on the native encoder-decoder."""

import unittest

from distattn_hf import DistAttnSeq2SeqConfig
from tests.common.generation import GenerationTests
from tests.common.upstream import ids_tensor, random_attention_mask

from .cases import NativeTester, NativeTests, native


class Seq2SeqTester(NativeTester):
    config_class = DistAttnSeq2SeqConfig
    encoder_seq_length = decoder_seq_length = seq_length = 7
    choices = {"mechanism": "sqeuclidean", "positional_encoding": "relative", "decoder_start_token_id": 3}

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        inputs = {
            "input_ids": ids_tensor(shape, self.vocab_size),
            "attention_mask": random_attention_mask(shape),
            "decoder_input_ids": ids_tensor(shape, self.vocab_size),
            "decoder_attention_mask": random_attention_mask(shape),
        }
        return self.get_config(), inputs


class Seq2SeqCommonTest(NativeTests, GenerationTests, unittest.TestCase):
    model_tester_class = Seq2SeqTester
    is_encoder_decoder = True
    all_model_classes = native("Seq2SeqModel", "ForConditionalGeneration")
