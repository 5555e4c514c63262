"""transformers' common model tests on a native encoder."""

import unittest

from .cases import NativeTester, NativeTests, native


class EncoderTester(NativeTester):
    choices = {"mechanism": "dot", "positional_encoding": "learned", "norm_position": "post"}


class EncoderCommonTest(NativeTests, unittest.TestCase):
    model_tester_class = EncoderTester
    all_model_classes = native(
        "Model",
        "ForMaskedLM",
        "ForSequenceClassification",
        "ForTokenClassification",
        "ForQuestionAnswering",
        "ForMultipleChoice",
    )
