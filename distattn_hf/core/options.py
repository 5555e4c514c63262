"""Options of an attention that no fit depends on: set on a converted model, when it is loaded or afterwards."""

from typing import Any

from .backends import validate_backend
from .configuration_distattn import AttentionSpec, change_specs
from .metrics import get_metric


def check_backend(spec: AttentionSpec) -> None:
    """Raise `ValueError` for a backend that does not exist or cannot run the spec's metric."""
    metric = get_metric(spec.metric)
    if validate_backend(spec.backend) == "sdpa" and not metric.has_dot_form:
        raise ValueError(f"backend 'sdpa' cannot run metric {metric.name!r}: it has no dot-product form; use 'auto'")


def with_options(specs: list[AttentionSpec], options: dict[str, Any]) -> list[AttentionSpec]:
    """`change_specs`, after which a backend that cannot be raises `ValueError`, too."""
    changed = change_specs(specs, options)
    for spec in changed:
        check_backend(spec)
    return changed


def set_options(config, options: dict[str, Any]) -> None:
    """Set options in the `distattn` block of a converted model's config; raises as `with_options`, before that."""
    specs = with_options(config.attention_specs, options)
    config.distattn = {**config.distattn, "specs": [spec.to_dict() for spec in specs]}
