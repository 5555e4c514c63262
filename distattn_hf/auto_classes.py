"""Let transformers' Auto classes know our model types without importing a model: what is asked for is imported then."""

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, AutoConfig
from transformers.utils import logging

from .core.attention_spec import is_newer_than_tested, version_note
from .core.configuration_distattn import (
    CLASS_PREFIX,
    MODEL_TYPE_PREFIX,
    auto_classes,
    listed_classes,
    new_config_class_hooks,
)
from .core.configuration_native import DistAttnConfig, DistAttnSeq2SeqConfig, config_checks

logger = logging.get_logger(__name__)


def register_all() -> None:
    """Register "distattn_<model type>" for every model type of transformers, and the native family; again: nothing."""
    if _register_family_of in new_config_class_hooks:
        return
    if is_newer_than_tested():
        logger.warning(f"{version_note()}: what it changed may not be known here")
    for model_type in CONFIG_MAPPING_NAMES:
        pending = type("_Pending", (_PendingFamily,), {"base_model_type": model_type, "__module__": __name__})
        AutoConfig.register(MODEL_TYPE_PREFIX + model_type, pending, exist_ok=True)
    _list_class_names()
    new_config_class_hooks.append(_register_family_of)
    for config_class in (DistAttnConfig, DistAttnSeq2SeqConfig):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    # First: it brings checks that are appended behind it, which the config being made goes through as well.
    config_checks.insert(0, _register_native)


class _PendingFamily:
    """Stands for a family's config class in AutoConfig until it is asked for; then the real classes are registered."""

    base_model_type = ""

    def __new__(cls, *args, **kwargs):
        return _register_family(cls.base_model_type)(*args, **kwargs)

    @classmethod
    def from_dict(cls, *args, **kwargs):
        return _register_family(cls.base_model_type).from_dict(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return _register_family(cls.base_model_type).from_pretrained(*args, **kwargs)


def _register_family(base_model_type: str) -> type:
    from .core.modeling_converted import register_family

    return register_family(base_model_type)


def _register_family_of(config_class: type[PreTrainedConfig]) -> None:
    """Register the family of a config class made outside AutoConfig, so that `AutoModel.from_config` finds it."""
    base = config_class.base_config_class
    if CONFIG_MAPPING_NAMES.get(base.model_type) == base.__name__:
        _register_family(base.model_type)


def _list_class_names() -> None:
    """Name our classes where transformers lists its own by task.

    Trainer (label smoothing), the pipelines and others ask those lists by class name what a model is.
    """
    for auto_class in auto_classes().values():
        names = auto_class._model_mapping._model_mapping
        for model_type in [name for name in names if not name.startswith(MODEL_TYPE_PREFIX)]:
            ours = tuple(CLASS_PREFIX + name for name in listed_classes(auto_class, model_type))
            names[MODEL_TYPE_PREFIX + model_type] = ours[0] if len(ours) == 1 else ours


def _register_native(config: DistAttnConfig) -> None:
    """Import the native family's models with its first config: Auto classes and the checks of a config need them."""
    from .core import modeling_distattn, modeling_distattn_seq2seq  # noqa: F401 (they register)
