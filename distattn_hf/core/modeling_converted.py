"""Converted models: every model class of transformers with distance attention in place of dot-product attention.

`DistAttnGPT2LMHeadModel` is `GPT2LMHeadModel` plus a submodule `distattn` in each converted attention module; the
pretrained parameters keep their names. The classes are made on first use by the module's `__getattr__`, for any class
of transformers, so importing this file imports no model.
"""

import copy
import json
import math
import os
import re
from uuid import uuid4

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import cached_file

from .attention_spec import OPTIONS, AttentionSpec
from .base_weights import put_on_base, without_base
from .compatibility import check_transformers
from .configuration_distattn import (
    CLASS_PREFIX,
    MODEL_TYPE_PREFIX,
    auto_classes,
    auto_map_of,
    config_class_for,
    listed_classes,
)
from .derived_cache import use_derived_cache
from .discovery import base_prefix, find_attention_modules, locate, max_positions, select_modules
from .families import Heads, KeepsLoadedWeights, Monitored, register_models
from .interface import IMPLEMENTATIONS, resolve_implementation, say_what_sdpa_means
from .nystrom_cache import RefusesAssistance, use_nystrom_cache
from .paged_batches import PAGED_IMPLEMENTATION, BatchesContinuously
from .parameters import DistanceAttentionState, check_backend, set_options, with_options
from .relative_bias import give_relative_bias, has_relative_bias

REPORT_NAME = "distattn_report.json"


def _same(before: list[float] | None, now: list[float] | None) -> bool:
    """Return whether numbers are equal to the six digits of a report."""
    if before is None or now is None:
        return before is now
    return len(before) == len(now) and all(
        math.isclose(*pair, rel_tol=1e-5, abs_tol=1e-6) for pair in zip(before, now, strict=True)
    )


class DistAttnModelMixin(KeepsLoadedWeights, RefusesAssistance, BatchesContinuously, Monitored):
    """Attaches distance attention to a model class of transformers (see `model_class_for`)."""

    _keep_in_fp32_modules_strict = {"distattn"}
    _conversion_report: dict | None = None
    _report_source: tuple[str, dict] | None = None
    # Where the teacher came from, as long as this model has not been loaded from a folder of its own.
    converted_from: str | None = None

    def __init__(self, config, *args, **kwargs):
        check_transformers()
        if getattr(config, "distattn", None) is None:
            raise ValueError(
                f"{type(self).__name__} needs config.distattn, got None; set it to "
                "{'specs': [AttentionSpec(...).to_dict()]} or use distattn_hf.convert on a pretrained model"
            )
        config._attn_implementation = self._resolve(config._attn_implementation, config)
        if "base" in config.distattn:
            # An adapter's config; the model made of it has all weights, and so has what it saves.
            config = copy.deepcopy(config)
            config.distattn = without_base(config.distattn)
        super().__init__(config, *args, **kwargs)

    def _resolve(self, requested, config) -> str:
        of_padding = any(spec.mechanism != "distance" for spec in config.attention_specs)
        return resolve_implementation(requested, self._supports_sdpa, of_padding)

    def post_init(self):
        # All modules exist now and none is initialised or placed yet: the last moment to add ours.
        attach_states(self)
        strict = type(self)._keep_in_fp32_modules_strict | set(self._keep_in_fp32_modules_strict or ())
        self._keep_in_fp32_modules_strict = strict
        super().post_init()

    @torch.no_grad()
    def initialize_weights(self):
        # The base model initialises its own submodules, marks all of them as done, and does not know ours.
        fresh = [
            (owner, group)
            for owner in self.modules()
            if isinstance(state := getattr(owner, "distattn", None), DistanceAttentionState)
            for group in state.groups
            if not getattr(group, "_is_hf_initialized", False)
        ]
        super().initialize_weights()
        for owner, group in fresh:
            group.reset_parameters(_own_scaling(owner))

    def _resolve_parallel_plans(self, distributed_config):
        if distributed_config.tp_size > 1 and distributed_config.tp_plan != {}:
            # Here, because torch's distributed tensors take their time to import.
            from .tensor_parallel import plan_by_heads

            # A plan of the caller's own is put on top of the model's.
            own = distributed_config.tp_plan if isinstance(distributed_config.tp_plan, dict) else {}
            self._tp_plan = self.tp_plan | plan_by_heads(self, self.tp_plan | own, distributed_config.tp_size)
        return super()._resolve_parallel_plans(distributed_config)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return what the base class does: for custom code transformers would leave out part of the initialisation.

        `KeepsLoadedWeights` does what custom code needs instead: its initialisation changes nothing loaded.
        """
        return cls.base_class.is_custom_code()

    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        """Set the implementation as transformers does: None, "sdpa" or "eager" (see `resolve_implementation`)."""
        implementation = self._resolve(attn_implementation, self.config)
        say_what_sdpa_means(attn_implementation, self)
        super().set_attn_implementation(implementation, *args, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        self.config.auto_map = auto_map_of(type(self).config_class, type(self).base_class.__name__)
        if (report := self.report_as_it_is()) is not None and kwargs.get("is_main_process", True):
            os.makedirs(save_directory, exist_ok=True)
            path = os.path.join(save_directory, REPORT_NAME)
            # A name of its own: of a model split by tensor parallelism all ranks save, at once.
            temporary = f"{path}.{uuid4().hex}.tmp"
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump(report, file, indent=1)
            os.replace(temporary, path)
        result = super().save_pretrained(save_directory, *args, **kwargs)
        if not self.config.name_or_path:
            # Now it has a name, which adapters made from here on refer to.
            self.name_or_path = self.config.name_or_path = str(save_directory)
        return result

    def set_attention_options(self, **options) -> None:
        """Set options that no fit depends on, in modules and config, so that `save_pretrained` keeps them.

        exact_below and window_size (no smaller than it is) of Nyström specs, the fields of retrieval, backend of the
        others (see `AttentionSpec`). Caches that were begun before cannot go on. Raises `ValueError`, before anything
        is changed, for any other name, a value that cannot be, and an option that no spec of the model has.
        """
        groups = [group for state in self.attention_states.values() for group in state.groups]
        choices = [{n: v for n, v in options.items() if group.spec.has_option(n)} for group in groups]
        changed = [with_options([group.spec], choice)[0] for group, choice in zip(groups, choices, strict=True)]
        set_options(self.config, options)
        for group, spec in zip(groups, changed, strict=True):
            group.spec = spec

    def save_adapter(self, save_directory, **arguments) -> dict:
        """Save what this model has beside its base model's weights; see `distattn_hf.storage.adapters.save_adapter`."""
        try:
            from distattn_hf.storage.adapters import save_adapter
        except ImportError as error:
            raise ImportError("save_adapter needs the package: pip install distattn_hf") from error
        return save_adapter(self, save_directory, **arguments)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, base_model=None, **kwargs):
        """Load as the base class does; options of `set_attention_options` are taken, too (`exact_below=2048`).

        A folder of `save_adapter` is put on its base, or on base_model, which must have that base's weights.
        """
        # A name that the base model's config has is its own.
        chosen = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs and not hasattr(cls.config_class, name)}
        base_name, whole = put_on_base(cls, pretrained_model_name_or_path, base_model, kwargs)
        if whole is None:
            result = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        else:
            result = super().from_pretrained(None, *args, **whole)
        model = result[0] if isinstance(result, tuple) else result
        if whole is not None:
            model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
            # What a further adapter of it is saved beside.
            model.converted_from = base_name
        if chosen:
            model.set_attention_options(**chosen)
        if pretrained_model_name_or_path is not None:
            names = ("cache_dir", "revision", "token", "subfolder", "local_files_only")
            options = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            model._report_source = (str(pretrained_model_name_or_path), options)
        return result

    @property
    def conversion_report(self):
        """The `distattn_hf.ConversionReport` of `convert`, afterwards of the checkpoint; None if absent.

        Without the package, in a checkpoint's own code, the dict that its `to_dict` gave. Each access makes it anew: to
        change it, set it; a dict will do.
        """
        if (data := self._report_data()) is None:
            return None
        try:
            from distattn_hf.conversion.report import ConversionReport
        except ImportError:
            return data
        return ConversionReport.from_dict(data, self.config.distattn)

    @conversion_report.setter
    def conversion_report(self, report):
        self._conversion_report = report if report is None or isinstance(report, dict) else report.to_dict()

    def _report_data(self) -> dict | None:
        if self._conversion_report is None and self._report_source is not None:
            source, options = self._report_source
            self._report_source = None
            try:
                path = cached_file(source, REPORT_NAME, _raise_exceptions_for_missing_entries=False, **options)
            except OSError:
                # The folder it was loaded from no longer exists, or the Hub cannot be reached.
                path = None
            if path is not None:
                with open(path, encoding="utf-8") as file:
                    self._conversion_report = json.load(file)
        return self._conversion_report

    def report_as_it_is(self) -> dict | None:
        """Return `conversion_report` as a dict, with λ, α and ε of now; "changed_since" says whether they changed."""
        if (report := copy.deepcopy(self._report_data())) is None:
            return None
        values = {
            (name, tuple(range(state.num_heads) if heads is None else heads)): group.reported_values()
            for name, state in self.attention_states.items()
            for group, heads in zip(state.groups, state.head_lists, strict=True)
        }
        changed = bool(report.get("changed_since"))
        for entry in report["groups"]:
            for name, current_values in values.get((entry["module"], tuple(entry["heads"])), {}).items():
                changed = changed or not _same(entry.get(name), current_values)
                entry[name] = current_values
        return {**report, "changed_since": changed}

    def attention_modules(self) -> dict[str, nn.Module]:
        """Return the converted attention modules by base-relative name."""
        return {name: locate(self, name) for name in self.attention_states}

    @property
    def attention_states(self) -> dict[str, DistanceAttentionState]:
        """The converted attention modules' states by base-relative name."""
        names = {module: name for name, module in self.named_modules(remove_duplicate=True)}
        prefix = base_prefix(self)
        return {
            names[module].removeprefix(prefix): module.distattn
            for module in names
            if isinstance(getattr(module, "distattn", None), DistanceAttentionState)
        }


def _own_scaling(module: nn.Module) -> float | None:
    for name in ("scaling", "scale"):
        value = getattr(module, name, None)
        if isinstance(value, float) and value > 0:
            return value
    return None


def _check_implementation(module: nn.Module, arguments) -> None:
    """Refuse another implementation, which would run dot product (forward pre-hook of converted modules)."""
    implementation = module.config._attn_implementation
    if implementation not in (*IMPLEMENTATIONS, PAGED_IMPLEMENTATION):
        raise ValueError(
            f"config._attn_implementation was set to {implementation!r}, which would run dot-product attention in a "
            "converted model; call set_attn_implementation('sdpa' or 'eager') on the whole converted model instead"
        )


def attach_states(model: PreTrainedModel) -> None:
    """Give each attention module named in config.distattn its submodule; choose the modules first where none is named.

    Raises `ValueError` when a named module is missing from a part of the model that this head class has, and for a
    backend that does not exist or cannot run its metric.
    """
    block = model.config.distattn
    specs = [AttentionSpec.from_dict(spec) for spec in block["specs"]]
    modules = block["modules"]
    for spec in specs:
        check_backend(spec)
    if modules is None:
        # Chosen anew each time, so that the same config with another number of layers converts all of them.
        modules = select_modules(find_attention_modules(model), specs)
    else:
        _refuse_new_layers(model, specs, modules)
    for name, entry in modules.items():
        module = locate(model, name)
        if module is None:
            # A head class may lack a whole part of the base model (T5EncoderModel has no decoder), not a layer of it.
            if locate(model, name.split(".")[0]) is None:
                continue
            raise ValueError(
                f"config.distattn names the attention module {name!r}, which {type(model).__name__} does not have; "
                "was the number of layers changed after the conversion?"
            )
        if not isinstance(getattr(module, "distattn", None), DistanceAttentionState):
            module.distattn = DistanceAttentionState(specs, entry)
            module.distattn.max_positions = max_positions(getattr(module, "config", None) or model.config)
            module.register_forward_pre_hook(_check_implementation)
            causal = entry["kind"] == "self" and getattr(module, "is_causal", False)
            if module.distattn.is_nystrom and causal:
                module.register_forward_pre_hook(use_nystrom_cache, with_kwargs=True)
                # Its cache cannot be cropped, which transformers checks before assisted generation.
                model._is_stateful = True
            # A conversion may make all heads of a Nyström module retrieve.
            if (module.distattn.derives_from_keys or module.distattn.is_nystrom) and causal:
                module.register_forward_pre_hook(use_derived_cache, with_kwargs=True)
            for group in module.distattn.groups:
                group.reset_parameters(_own_scaling(module))
    if others := sorted({spec.mechanism for spec in specs} - {"distance"}):
        for name in find_attention_modules(model):
            module = locate(model, name)
            if not model._supports_sdpa and not isinstance(getattr(module, "is_causal", None), bool):
                raise ValueError(
                    f"mechanism={others[0]!r} needs to know which modules are causal, and {name!r} "
                    f"({type(module).__name__}) has no is_causal: it belongs to a model without support for SDPA"
                )
            if has_relative_bias(module):
                module.register_forward_pre_hook(give_relative_bias, with_kwargs=True)


def _refuse_new_layers(model, specs, modules) -> None:
    """Raise `ValueError` for a layer like the converted ones that the specs select and config.distattn omits."""
    templates = {re.sub(r"\d+", "#", name) for name in modules}
    for name, entry in find_attention_modules(model).items():
        selected = any(
            s.matches_layer(entry["layer"], name, entry["type"]) and s.attention in (None, entry["kind"]) for s in specs
        )
        if selected and name not in modules and re.sub(r"\d+", "#", name) in templates:
            raise ValueError(
                f"config.distattn does not name the attention module {name!r}, which its specs select; was the number "
                "of layers changed after the conversion? Set config.distattn['modules'] = None to choose anew"
            )


def model_class_for(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the converted class that extends `base`, made once, with its config class."""
    name = CLASS_PREFIX + base.__name__
    # Making a config class registers its family, this class included: first that, then look.
    config_class = config_class_for(base.config_class)
    if name not in globals():
        strict = set(base._keep_in_fp32_modules_strict or ()) | DistAttnModelMixin._keep_in_fp32_modules_strict
        namespace = {
            "__module__": __name__,
            "__qualname__": name,
            "__doc__": f"{base.__name__} with distance attention as its config's `distattn` block says.",
            "config_class": config_class,
            "base_class": base,
            "_keep_in_fp32_modules_strict": strict,
            "_auto_class": next(iter(auto_class_names(base)), "AutoModel"),
            # transformers reads the module's source to decide this; the base class follows the interface.
            "_can_set_attn_implementation_cached_value": True,
        }
        globals()[name] = type(name, (DistAttnModelMixin, base), namespace)
    return globals()[name]


def auto_class_names(base: type[PreTrainedModel]) -> list[str]:
    """Return names of the Auto classes that list `base` for its config."""
    names = []
    for auto_name, auto_class in auto_classes().items():
        if base.__name__ in listed_classes(auto_class, base.config_class.model_type):
            names.append(auto_name)
    return names


def heads_of(base_config: type[PreTrainedConfig]) -> Heads:
    """Return the converted classes of all that the Auto classes list for a config class of transformers."""
    heads = {}
    for auto_name, auto_class in auto_classes().items():
        listed = listed_classes(auto_class, base_config.model_type)
        if names := [name for name in listed if hasattr(transformers, name)]:
            heads[auto_name] = tuple(model_class_for(getattr(transformers, name)) for name in names)
    return heads


def register_family(base_model_type: str) -> type[PreTrainedConfig]:
    """Register one family's config and head classes with the Auto classes; returns the config class."""
    base_config = CONFIG_MAPPING[base_model_type]
    config_class = config_class_for(base_config)
    AutoConfig.register(MODEL_TYPE_PREFIX + base_model_type, config_class, exist_ok=True)
    heads = {}
    for auto_name, classes in heads_of(base_config).items():
        # Some types list classes of another config, such as that of their text part.
        if own_classes := tuple(kind for kind in classes if kind.config_class is config_class):
            heads[auto_name] = own_classes
    register_models(config_class, heads)
    return config_class


def __getattr__(name: str):
    if name.startswith(CLASS_PREFIX):
        base = getattr(transformers, name.removeprefix(CLASS_PREFIX), None)
        if isinstance(base, type) and issubclass(base, PreTrainedModel):
            return model_class_for(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
