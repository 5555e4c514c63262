"""What the native family's test classes are made of: tiny models, and transformers' common tests on them."""

import tempfile

import torch
from transformers import AutoConfig, AutoModel, set_seed
from transformers.models.auto import modeling_auto

import distattn_hf
from distattn_hf import DistAttnConfig
from tests.common.cases import CommonTests
from tests.common.testers import TextModelTester
from tests.common.upstream import ConfigTester, modeling


def native(*names: str) -> tuple[type, ...]:
    return tuple(getattr(distattn_hf, f"DistAttn{name}") for name in names)


class NativeTester(TextModelTester):
    """A native config and random inputs (B=7, N=7)."""

    config_class = DistAttnConfig
    choices: dict = {}

    def get_config(self):
        return self.config_class(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=128,
            initializer_range=0.2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **self.choices,
        )


class NativeTests(CommonTests):
    """transformers' common tests, and of ours those that are not about conversion."""

    test_attention_is_a_distance = None
    test_attention_implementation_requests = None
    test_a_base_checkpoint_loads_into_every_class = None

    def setUp(self):
        set_seed(0)
        modeling.global_rng.seed(0)
        self.model_tester = self.model_tester_class(self)
        self.config_tester = ConfigTester(
            self, config_class=self.model_tester.config_class, hidden_size=32, num_attention_heads=4
        )

    def test_auto_classes_find_the_class(self):
        for model, inputs in self.models():
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                assert type(AutoConfig.from_pretrained(folder)) is type(model.config)
                name = next(n for n, ref in model.config.auto_map.items() if ref.endswith(type(model).__name__))
                loaded = getattr(modeling_auto, name).from_pretrained(folder)
                assert type(loaded) is type(model)
                torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
                # Weights lie elsewhere in memory, and PyTorch sums vectors in the order of their alignment.
                self.assert_same_output(model, loaded, inputs, rtol=1e-5, atol=1e-5)
                assert type(AutoModel.from_pretrained(folder)).__name__ == type(model.base_model).__name__

    def test_auto_classes_build_from_a_config(self):
        model = AutoModel.from_config(self.model_tester.get_config(), dtype=torch.bfloat16)
        assert type(model) is self.all_model_classes[0]
        assert model.dtype == torch.bfloat16
        assert {p.dtype for name, p in model.named_parameters() if ".distattn." in name} <= {torch.float32}

    def test_transformers_lists_the_class_by_task(self):
        # Trainer asks these names whether label smoothing shifts the labels, the pipelines whether they know the model.
        lists = {key: value for key, value in vars(modeling_auto).items() if key.endswith("_MAPPING_NAMES")}
        for model_class in self.all_model_classes:
            assert any(model_class.__name__ in modeling.get_values(names) for names in lists.values())
