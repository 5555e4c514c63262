"""The config classes of converted models: a transformers config with a `distattn` block that says what was converted.

A config class `DistAttn<Base>Config` exists for every base config of transformers. They are made on first use by the
module's `__getattr__`, so importing this file imports no model.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import fields
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from .attention_spec import OPTIONS, AttentionSpec, change_specs, parse_block

logger = logging.get_logger(__name__)

MODEL_TYPE_PREFIX = "distattn_"
# The files that hold models, and a class in each.
_MODEL_FILES = {
    "modeling_converted": "DistAttnModelMixin",
    "modeling_distattn": "DistAttnModel",
    "modeling_distattn_seq2seq": "DistAttnSeq2SeqModel",
}
_HERE = os.path.dirname(__file__)
CLASS_PREFIX = "DistAttn"

# Called with every config class that is made. The package adds its registration with the Auto classes.
new_config_class_hooks: list[Callable[[type[PreTrainedConfig]], None]] = []


class NamesWhatIsUnused:
    """Mixin before `PreTrainedConfig` that reports arguments of `from_pretrained` that nothing would use.

    The class itself raises `ValueError`; where an Auto class loads the config there is a warning, as the arguments may
    be a tokenizer's.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load as transformers does; raises `ValueError` for an argument that is no field."""
        if kwargs.get("return_unused_kwargs") or kwargs.get("_from_auto"):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        kwargs["return_unused_kwargs"] = True
        config, unused = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if names := _unused_names(unused):
            raise ValueError(cls.describe_unknown(names[0]))
        return config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Return the config in a dict, with the fields in `kwargs` set."""
        return_unused = kwargs.pop("return_unused_kwargs", False)
        config, unused = super().from_dict(config_dict, return_unused_kwargs=True, **kwargs)
        if return_unused:
            return config, unused
        for name in _unused_names(unused):
            logger.warning(f"{name}={unused[name]!r} is not used: {cls.describe_unknown(name)}")
        return config

    @classmethod
    def describe_unknown(cls, name: str) -> str:
        """Return an error message for an unknown field: the fields with the nearest names."""
        known = {*(f.name for f in fields(cls)), *cls.attribute_map, *cls.settable()}
        nearest = get_close_matches(name, sorted(known), n=3)
        return f"{cls.__name__} has no field {name!r}" + (f"; did you mean {', '.join(nearest)}?" if nearest else "")

    @classmethod
    def settable(cls) -> tuple[str, ...]:
        """Return names that `from_pretrained` takes and that are no fields."""
        return ()


def _unused_names(unused: dict[str, Any]) -> list[str]:
    # transformers' server gives a config all that it gives the model.
    return sorted(name for name in unused if not name.startswith("_") and name not in ("device_map", "tqdm_class"))


class OwnAttentionMixin(NamesWhatIsUnused):
    """What the configs of both families share. `peft_type`: the model type whose PEFT target modules apply."""

    # Attention returns true weights whatever the implementation: `output_attentions` asks for no other one.
    @property
    def output_attentions(self):
        return self._output_attentions

    @output_attentions.setter
    def output_attentions(self, value):
        self._output_attentions = value

    def validate(self):
        """Run transformers' checks but the one that refuses weights to all but the eager implementation."""
        for validator in self.__class_validators__:
            if validator.__name__ != "validate_output_attentions":
                validator(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the config as a dict; PEFT, if imported, learns of our model types here, as it reads them from it."""
        constants = sys.modules.get("peft.utils.constants")
        for name, table in list(vars(constants).items()) if constants is not None else ():
            if name.endswith("_TARGET_MODULES_MAPPING") and isinstance(table, dict) and self.peft_type in table:
                table.setdefault(self.model_type, table[self.peft_type])
        return super().to_dict()

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save as transformers does; the code of models that is in the folder becomes of this version, too.

        transformers copies that of the config alone, beside which older code of the models would not run.
        """
        super().save_pretrained(save_directory, *args, **kwargs)
        for name, kind in _MODEL_FILES.items():
            if all(os.path.isfile(os.path.join(folder, f"{name}.py")) for folder in (save_directory, _HERE)):
                custom_object_save(getattr(import_module(f"{__package__}.{name}"), kind), save_directory)


class DistAttnConfigMixin(OwnAttentionMixin):
    """Adds the `distattn` block to a config of transformers; everything else is the base config's own.

    An option that needs no fit (`OPTIONS`) is taken by `from_pretrained`, as that of the models takes it.
    """

    @classmethod
    def settable(cls) -> tuple[str, ...]:
        """Return the options of the attention, but for names that the base model's config has as its own."""
        return tuple(name for name in OPTIONS if not hasattr(cls, name))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Return the config in a dict, with the fields and attention options in `kwargs` set."""
        options = {name: kwargs.pop(name) for name in cls.settable() if name in kwargs}
        result = super().from_dict(config_dict, **kwargs)
        if options:
            # A backend's name is checked where backends are known: when a model is built.
            config = result[0] if isinstance(result, tuple) else result
            specs = change_specs(config.attention_specs, options)
            config.distattn = {**(config.distattn or {}), "specs": [spec.to_dict() for spec in specs]}
        return result

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save as transformers does, and name our class in the config.

        Also where a head class's base model, of transformers' own class, was saved alone: that class would read the
        checkpoint as dot-product attention.
        """
        names = list(self.architectures or ())
        plain = [name for name in names if isinstance(getattr(transformers, name, None), type)]
        if plain:
            self.architectures = [CLASS_PREFIX + name if name in plain else name for name in names]
            self.auto_map = auto_map_of(type(self), plain[0])
        super().save_pretrained(save_directory, *args, **kwargs)
        modeling = sys.modules.get(f"{__package__}.modeling_converted")
        if plain and modeling is not None:
            custom_object_save(modeling.DistAttnModelMixin, save_directory)

    def __post_init__(self, **kwargs):
        block = parse_block(self.distattn)
        super().__post_init__(**kwargs)
        self.distattn = block

    @property
    def attention_specs(self) -> list[AttentionSpec]:
        """The specs of the `distattn` block, as objects."""
        return [AttentionSpec.from_dict(s) for s in (self.distattn or {}).get("specs", [])]


def config_class_for(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """Return the config class with a `distattn` block that extends `base`, made once."""
    name = CLASS_PREFIX + base.__name__
    if name not in globals():
        namespace = {
            "__module__": __name__,
            "__qualname__": name,
            "__doc__": f"{base.__name__} with a `distattn` block (see `AttentionSpec`).",
            "__annotations__": {"distattn": dict | None},
            "distattn": None,
            "model_type": MODEL_TYPE_PREFIX + base.model_type,
            "base_config_class": base,
            "peft_type": base.model_type,
            "_auto_class": "AutoConfig",
        }
        globals()[name] = type(name, (DistAttnConfigMixin, base), namespace)
        for hook in new_config_class_hooks:
            hook(globals()[name])
    return globals()[name]


def auto_classes() -> dict[str, type]:
    """Return the Auto classes of models by name."""
    from transformers.models.auto import modeling_auto

    return {
        name: value
        for name, value in vars(modeling_auto).items()
        if name.startswith("AutoModel")
        and isinstance(value, type)
        and getattr(value, "_model_mapping", None) is not None
    }


def listed_classes(auto_class: type, model_type: str) -> tuple[str, ...]:
    """Return names of the model classes an Auto class lists for a model type of transformers."""
    names = auto_class._model_mapping._model_mapping.get(model_type, ())
    return (names,) if isinstance(names, str) else tuple(names or ())


def auto_map_of(config_class: type[PreTrainedConfig], base_name: str) -> dict[str, str]:
    """Return config.auto_map: where trust_remote_code finds the config and every head class of the family.

    base_name: the class of transformers that the saved model extends; what its Auto classes name is that one.
    """
    entries = {"AutoConfig": f"{__name__.rpartition('.')[2]}.{config_class.__name__}"}
    for auto_name, auto_class in auto_classes().items():
        if names := listed_classes(auto_class, config_class.base_config_class.model_type):
            chosen = base_name if base_name in names else names[0]
            entries[auto_name] = f"modeling_converted.{CLASS_PREFIX}{chosen}"
    return entries


def __getattr__(name: str):
    if name.startswith(CLASS_PREFIX) and name.endswith("Config"):
        base = getattr(transformers, name.removeprefix(CLASS_PREFIX), None)
        if isinstance(base, type) and issubclass(base, PreTrainedConfig):
            return config_class_for(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
