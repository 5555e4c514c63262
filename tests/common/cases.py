"""What every family's test class is made of: transformers' common tests, and ours for what those leave open."""

import copy
import io
import pickle
import tempfile

import pytest
import torch
from transformers import AutoConfig, AutoModel, set_seed
from transformers.models.auto import modeling_auto

from distattn_hf.core.configuration_distattn import CLASS_PREFIX
from distattn_hf.core.discovery import base_prefix, find_attention_modules

from .generation import GenerationTests
from .upstream import ConfigTester, ModelTesterMixin, modeling


class CommonTests(ModelTesterMixin):
    """The tests for the classes in `all_model_classes`, with configs and inputs from `model_tester_class`."""

    model_tester_class: type
    # Upstream skips this one for classes older than 2023 unless asked.
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        set_seed(0)
        modeling.global_rng.seed(0)
        self.model_tester = self.model_tester_class(self)
        config = self.model_tester.get_config()
        self.config_tester = ConfigTester(
            self, config_class=type(config), **self.model_tester.settings, distattn=config.distattn
        )

    def leave_out(self, name: str) -> None:
        """Run the rest of this test without the converted class of transformers' class `name`."""
        self.all_model_classes = tuple(c for c in self.all_model_classes if c.__name__ != CLASS_PREFIX + name)

    def models(self):
        """(model in eval mode, its inputs) for each class."""
        for model_class in self.all_model_classes:
            set_seed(0)
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            yield model_class(config).eval(), self._prepare_for_class(inputs, model_class)

    def assert_same_output(self, left, right, inputs, **tolerances):
        with torch.no_grad():
            torch.testing.assert_close(left(**inputs)[0], right(**inputs)[0], **tolerances)

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_attention_is_a_distance(self):
        for model, inputs in self.models():
            assert model.attention_states.keys() == find_attention_modules(model).keys()
            metrics = {group.metric for state in model.attention_states.values() for group in state.groups}
            assert metrics == {self.model_tester.spec.metric}
            with torch.no_grad():
                before = model(**inputs)[0]
                for state in model.attention_states.values():
                    state.groups[0].log_lambda.add_(3.0)
                assert not torch.allclose(before, model(**inputs)[0], rtol=1e-4, atol=0)

    def test_attention_implementation_requests(self):
        names = {None: "distattn", "sdpa": "distattn", "eager": "distattn_eager"}
        for model, inputs in self.models():
            for requested, name in names.items():
                config = self.model_tester.get_config()
                config._attn_implementation = requested
                assert type(model)(config).config._attn_implementation == name
                if requested is not None:
                    model.set_attn_implementation(requested)
                    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {name}
            eager = copy.deepcopy(model)
            model.set_attn_implementation("sdpa")
            self.assert_same_output(model, eager, inputs, rtol=1e-4, atol=1e-5)
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                loaded = type(model).from_pretrained(folder, attn_implementation="eager")
                assert loaded.config._attn_implementation == "distattn_eager"
                for refused in ("flash_attention_2", "flex_attention", "foo"):
                    with pytest.raises(ValueError, match="attn_implementation"):
                        type(model).from_pretrained(folder, attn_implementation=refused)
                    with pytest.raises(ValueError, match="attn_implementation"):
                        model.set_attn_implementation(refused)
            assert model.config._attn_implementation == "distattn"

    def test_copies(self):
        for model, inputs in self.models():
            stored = io.BytesIO()
            torch.save(model, stored)
            stored.seek(0)
            for other in (
                copy.deepcopy(model),
                pickle.loads(pickle.dumps(model)),
                torch.load(stored, weights_only=False),
            ):
                assert type(other) is type(model)
                self.assert_same_output(model, other, inputs, rtol=0, atol=0)

    def test_auto_classes_find_the_class(self):
        for model, _ in self.models():
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                config = AutoConfig.from_pretrained(folder)
                assert type(config) is type(model.config)
                assert config.distattn == model.config.distattn
                base = AutoModel.from_pretrained(folder)
                assert type(base).__name__ == CLASS_PREFIX + type(base).base_class.__name__
                # A class may be a part of its base (T5's encoder) or hold it (a head): what both have is the same.
                shared = base.attention_states.keys() & model.attention_states.keys()
                assert shared in (base.attention_states.keys(), model.attention_states.keys())
                for name in shared:
                    ours = base.attention_states[name].state_dict()
                    torch.testing.assert_close(ours, model.attention_states[name].state_dict())

    def test_auto_classes_build_from_a_config(self):
        model = AutoModel.from_config(self.model_tester.get_config(), dtype=torch.bfloat16)
        assert type(model).__name__ == CLASS_PREFIX + type(model).base_class.__name__
        assert model.dtype == torch.bfloat16
        assert {p.dtype for state in model.attention_states.values() for p in state.parameters()} == {torch.float32}

    def test_transformers_lists_the_class_by_task(self):
        # Trainer asks these names whether label smoothing shifts the labels, the pipelines whether they know the model.
        lists = {key: value for key, value in vars(modeling_auto).items() if key.endswith("_MAPPING_NAMES")}
        for model_class in self.all_model_classes:
            for key, names in lists.items():
                listed = modeling.get_values(names)
                assert (model_class.base_class.__name__ in listed) == (model_class.__name__ in listed), key

    def test_a_base_checkpoint_loads_into_every_class(self):
        base = next(iter(self.models()))[0]
        with tempfile.TemporaryDirectory() as folder:
            base.save_pretrained(folder)
            for model_class in self.all_model_classes[1:]:
                model = model_class.from_pretrained(folder)
                prefix, weights = base_prefix(model), model.state_dict()
                shared = {name: value for name, value in base.state_dict().items() if prefix + name in weights}
                ours = {name.removeprefix(prefix) for name in weights if ".distattn." in name}
                assert ours
                assert ours <= shared.keys()
                for name, value in shared.items():
                    torch.testing.assert_close(weights[prefix + name], value, rtol=0, atol=0)

    def test_initialising_again_keeps_what_was_trained(self):
        for model, _ in self.models():
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.5)
            before = copy.deepcopy(model.state_dict())
            model.init_weights()
            torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)

    def test_compile(self):
        # One class: the heads differ in what follows the attention.
        model, inputs = next(self.models())
        compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
        outputs = [each(**inputs)[0] for each in (model, compiled)]
        for output in outputs:
            output.square().mean().backward()
        torch.compiler.reset()
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
        for expected, parameter in zip(model.parameters(), compiled.parameters(), strict=True):
            if expected.grad is not None:
                torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-5)

    def test_export(self):
        model, inputs = next(self.models())
        inputs["use_cache"] = False
        exported = torch.export.export(model, args=(), kwargs=inputs, strict=False).module()
        self.assert_same_output(model, exported, inputs, rtol=1e-4, atol=1e-5)


class CommonGenerationTests(CommonTests, GenerationTests):
    """The same for a family with classes that generate."""
