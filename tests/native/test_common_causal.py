"""transformers' common model and generation tests on native causal decoders."""

import unittest

from tests.common.generation import GenerationTests
from tests.common.upstream import TrainingTesterMixin

from .cases import NativeTester, NativeTests, native


class CausalTester(NativeTester):
    choices = {
        "is_decoder": True,
        "mechanism": "l2",
        "positional_encoding": "rotary",
        "num_key_value_heads": 2,
        "norm_type": "rms_norm",
        "gated_mlp": True,
        "hidden_act": "silu",
    }
    (causal_lm_class,) = native("ForCausalLM")


class DotTester(NativeTester):
    choices = {"is_decoder": True, "mechanism": "dot", "positional_encoding": "alibi"}
    (causal_lm_class,) = native("ForCausalLM")


class CausalCommonTest(TrainingTesterMixin, NativeTests, GenerationTests, unittest.TestCase):
    model_tester_class = CausalTester
    model_tester = None
    all_model_classes = native(
        "Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"
    )


class DotCommonTest(NativeTests, GenerationTests, unittest.TestCase):
    model_tester_class = DotTester
    all_model_classes = native("Model", "ForCausalLM")


class RecurrentTester(NativeTester):
    choices = {"is_decoder": True, "mechanism": "linear", "positional_encoding": "rotary"}
    (causal_lm_class,) = native("ForCausalLM")


class RingTester(NativeTester):
    choices = {
        "is_decoder": True,
        "mechanism": "local",
        "mechanism_options": {"window_size": 4},
        "positional_encoding": "alibi",
    }
    (causal_lm_class,) = native("ForCausalLM")


class RecurrentCommonTest(NativeTests, GenerationTests, unittest.TestCase):
    model_tester_class = RecurrentTester
    all_model_classes = native("Model", "ForCausalLM")


class RingCommonTest(NativeTests, GenerationTests, unittest.TestCase):
    model_tester_class = RingTester
    all_model_classes = native("Model", "ForCausalLM")
