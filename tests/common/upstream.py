"""transformers' common tests (`ModelTesterMixin` and others), imported from what scripts/fetch_common_tests.py fetched.

A release of transformers ships tests/test_modeling_common.py but not the three folders it imports from. What it takes
from there is put in place here before the import: our own generation tests stand in for `GenerationTesterMixin`, an
empty class for `ExportTesterMixin`, and a few settings for the configuration tests.
"""

import importlib
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from .generation import GenerationTests

FOLDER = Path(__file__).resolve().parent.parent / ".external" / f"transformers-{version('transformers')}" / "tests"
PACKAGE = "transformers_common_tests"

if not (FOLDER / "test_modeling_common.py").is_file():
    raise FileNotFoundError(
        f"transformers' common tests are not in {FOLDER}; fetch them with: python scripts/fetch_common_tests.py"
    )


class ExportTesterMixin:
    """transformers' export tests are not in its releases."""


# What the configuration tests set on every config to see it kept.
CONFIG_COMMON_ARGUMENTS = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["SomeModel"],
    "id2label": {0: "a", 1: "b", 2: "c"},
    "label2id": {"a": 0, "b": 1, "c": 2},
    "problem_type": "regression",
}


def _module(name: str, **contents) -> None:
    module = sys.modules[name] = ModuleType(name)
    vars(module).update(contents)


# The folder under a name of its own: our tests are in a folder called tests, too.
_module(PACKAGE, __path__=[str(FOLDER)])
for _package in ("exporters", "generation", "utils"):
    _module(f"{PACKAGE}.{_package}", __path__=[])
_module(f"{PACKAGE}.exporters.test_export", ExportTesterMixin=ExportTesterMixin)
_module(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=GenerationTests)
_module(f"{PACKAGE}.utils.test_configuration_utils", config_common_kwargs=CONFIG_COMMON_ARGUMENTS)

modeling = importlib.import_module(f"{PACKAGE}.test_modeling_common")
configuration = importlib.import_module(f"{PACKAGE}.test_configuration_common")
training = importlib.import_module(f"{PACKAGE}.test_training_mixin")

ModelTesterMixin = modeling.ModelTesterMixin
TrainingTesterMixin = training.TrainingTesterMixin
ConfigTester = configuration.ConfigTester
ids_tensor, floats_tensor = modeling.ids_tensor, modeling.floats_tensor
random_attention_mask = modeling.random_attention_mask
