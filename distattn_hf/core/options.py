"""Options of an attention that no fit depends on: set on a converted model, when it is loaded or afterwards."""

from dataclasses import replace
from typing import Any

from .backends import validate_backend
from .configuration_distattn import AttentionSpec
from .metrics import get_metric

# Each option, and the mechanism that has it.
OPTIONS = {"exact_below": "nystrom", "window_size": "nystrom", "backend": "distance"}


def check_backend(spec: AttentionSpec) -> None:
    """Raise `ValueError` for a backend that does not exist or cannot run the spec's metric."""
    metric = get_metric(spec.metric)
    if validate_backend(spec.backend) == "sdpa" and not metric.has_dot_form:
        raise ValueError(f"backend 'sdpa' cannot run metric {metric.name!r}: it has no dot-product form; use 'auto'")


def with_options(specs: list[AttentionSpec], options: dict[str, Any]) -> list[AttentionSpec]:
    """Return the specs with the options that their mechanism has.

    Raises `ValueError` for an option that a fit depends on, that none of the specs has, or whose value cannot be; and
    for a window_size below what the far field was fitted beside.
    """
    for name, value in options.items():
        if name not in OPTIONS:
            raise ValueError(f"{name} cannot be set on a converted model; expected one of {', '.join(OPTIONS)}")
        having = [spec for spec in specs if spec.mechanism == OPTIONS[name]]
        if not having:
            raise ValueError(f"{name}={value!r} belongs to mechanism={OPTIONS[name]!r}, which this model does not have")
        if value is None:
            raise ValueError(f"{name} must have a value, got None")
        if name == "window_size" and isinstance(value, int) and value < (least := max(s.window_size for s in having)):
            raise ValueError(
                f"window_size must be an integer >= {least}, which the far field was fitted beside, got {value!r}; "
                "`distattn adapt` trains a model to a smaller one"
            )
    changed = []
    for spec in specs:
        spec = replace(spec, **{name: v for name, v in options.items() if OPTIONS[name] == spec.mechanism})
        check_backend(spec)
        changed.append(spec)
    return changed


def set_options(config, options: dict[str, Any]) -> None:
    """Set options in the `distattn` block of a converted model's config; raises as `with_options`, before that."""
    specs = with_options(config.attention_specs, options)
    config.distattn = {**config.distattn, "specs": [spec.to_dict() for spec in specs]}
