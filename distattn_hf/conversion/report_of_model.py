"""The report of a converted model, from the model as it is and what its conversion measured."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..core.discovery import find_attention_modules, select_modules
from ..core.modeling_converted import DistAttnModelMixin
from ..core.parameters import HeadParameters
from .cache_bytes import cache_bytes
from .report import MEASURED, ConversionReport, GroupReport, settings_of


def report_of(base_class, student, modules, divergences, init, warnings) -> ConversionReport:
    """Return the report of a converted model: what its heads have now, and what was measured of them."""
    report = ConversionReport(base_class.__name__, init, warnings=warnings)
    report.unconverted = [name for name in find_attention_modules(student) if name not in modules]
    for name, state in student.attention_states.items():
        if exact := [head for heads, group in state.parts() if group is None for head in heads]:
            report.exact_heads[name] = exact
        for number, (group, heads) in enumerate(zip(state.groups, state.head_lists, strict=True)):
            measured = divergences.get(name, [{}] * len(state.groups))[number]
            if not (values := group.reported_values()):
                raise ValueError(
                    f"{name!r}: its λ and α are offloaded or cut up over processes; load the model fully, or see "
                    "model.conversion_report"
                )
            report.groups.append(
                GroupReport(
                    module=name,
                    layer=modules[name]["layer"],
                    kind=modules[name]["kind"],
                    metric=group.metric,
                    heads=list(range(state.num_heads)) if heads is None else heads,
                    mechanism=group.spec.mechanism,
                    **values,
                    divergence_before=_numbers(measured.get("before")),
                    divergence_after=_numbers(measured.get("after")),
                    divergence_plain=_numbers(measured.get("plain")),
                    **{name: _numbers(measured.get(name)) for name in MEASURED},
                    measured_with=measured.get("measured_with", settings_of(group.spec)) if measured else None,
                    exact=measured["exact"] if "exact" in measured else _is_exact(group),
                )
            )
    report.cache_bytes = cache_bytes(student)
    return report


def _is_exact(group: HeadParameters) -> bool:
    """Return whether heads, as they were just converted, are the teacher's: the lift, or q·k at its own scale."""
    if group.spec.mechanism != "distance" or group.transform != "none":
        return False
    own = torch.as_tensor(group.lam())
    return group.is_absolute or (group.metric == "dot" and bool((own == 1).all()))


def _numbers(values: Tensor | list[float] | None) -> list[float] | None:
    if isinstance(values, Tensor):
        values = values.detach().float().tolist()
    return None if values is None else [round(v, 6) for v in values]


def current_report(model: PreTrainedModel) -> ConversionReport:
    """Return a converted model's report with current λ and α; divergences are those of the conversion.

    Raises `ValueError` for a model that was not converted.
    """
    if not isinstance(model, DistAttnModelMixin):
        raise ValueError(f"{type(model).__name__} is not a converted model")
    block = model.config.distattn
    saved = model.conversion_report
    divergences: dict[str, list[dict]] = {}
    for group in saved.groups if saved else ():
        measured = {"before": group.divergence_before, "after": group.divergence_after}
        measured |= {"plain": group.divergence_plain, "measured_with": group.measured_with, "exact": group.exact}
        measured |= {name: getattr(group, name) for name in MEASURED}
        divergences.setdefault(group.module, []).append(measured)
    # A model made from a config names no modules: its specs choose them.
    modules = block["modules"] or select_modules(find_attention_modules(model), model.config.attention_specs)
    report = report_of(model.base_class, model, modules, divergences, block["init"], saved.warnings if saved else [])
    if saved:
        for name in ("calibration_tokens", "seconds", "base_model", "source"):
            setattr(report, name, getattr(saved, name))
        report.changed_since = model.report_as_it_is()["changed_since"]
    return ConversionReport.from_dict(report, block)
