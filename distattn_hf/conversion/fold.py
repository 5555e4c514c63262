"""Move α of converted heads into the query projection: the same attention, at α = 1.

For a metric of degree n, -λ·dist(q/α, α(k - c)) = -λαⁿ·dist(q/α², k - c): a query projection divided by α² and a λ
times αⁿ do what α did. Keys stay as they are, so that heads may share them. Where a head has maps, they take α instead.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..core.attention_spec import AttentionSpec
from ..core.discovery import find_attention_modules, locate, select_modules
from ..core.metrics import get_metric
from ..core.modeling_converted import DistAttnModelMixin
from ..core.parameters import HeadParameters, NystromParameters
from ..storage.models import check_weights
from .calibrate import fitted_defaults

_QUERY = ("q_proj", "query", "q", "q_lin", "query_proj", "to_q", "q_attn")
_NORMS = ("q_norm", "q_layernorm", "query_norm", "query_ln", "q_ln")


@torch.no_grad()
def fold_alpha(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a converted model with α = 1 in every head that has α, and the same outputs.

    What changes with it: the queries' weights are not the teacher's any more, so `revert` and attention transfer that
    takes the student's own queries for the teacher's are refused. q·k has another temperature, the distance has not.

    Raises:
        ValueError: for a model that was not converted or has no α, and naming the module where α cannot be moved:
            Nyström attention, a fixed λ, a metric that does not scale, a query projection that is not a plain linear
            layer, or is followed by a norm or clipped.
    """
    if not isinstance(model, DistAttnModelMixin):
        raise ValueError(f"{type(model).__name__} is not a converted model; fold_alpha takes what convert returned")
    check_weights(model, "folding α")
    student = copy.deepcopy(model)
    report, folded = student.report_as_it_is(), False
    for name, state in student.attention_states.items():
        for heads, group in state.parts():
            if group is None or not _has_alpha(group, name):
                continue
            if group.transform == "maps":
                group.query_map.div_(group.log_alpha.exp()[:, None, None])
                group.key_map.mul_(group.log_alpha.exp()[:, None, None])
            else:
                factors = torch.ones(state.num_heads, dtype=group.log_alpha.dtype, device=group.log_alpha.device)
                factors[heads] = (-2 * group.log_alpha).exp()
                _scale_queries(student, name, factors)
                group.log_lambda.add_(get_metric(group.metric).degree * group.log_alpha)
                if group.fits_softening:
                    group.log_softening.sub_(group.log_alpha)
                student.config.distattn["queries_scaled"] = True
            group.log_alpha.zero_()
            folded = True
    if not folded:
        raise ValueError(f"{type(model).__name__} has no head with α: cosine and transform='none' have none")
    if report is not None:
        before = report["changed_since"]
        student.conversion_report = report
        student.conversion_report = {**student.report_as_it_is(), "changed_since": before}
    return student


def check_foldable(model: PreTrainedModel, specs: Sequence[AttentionSpec]) -> None:
    """Raise the `ValueError` that `fold_alpha` would raise after a conversion of `model` by `specs`, before it."""
    candidates = find_attention_modules(model)
    for spec in specs:
        if spec.mechanism == "nystrom":
            raise ValueError("fold_alpha: mechanism='nystrom' has landmarks, which are fitted with α; leave it out")
        spec = fitted_defaults(spec)
        if get_metric(spec.metric).scale_free or spec.lift or spec.transform != "scalar":
            continue
        for name in select_modules(candidates, [spec]):
            constants = {"λ": spec.lam if spec.learnable_lambda is False else None}
            _check_scaling(name, spec.metric, constants | {"ε": None if spec.softening == "fit" else spec.softening})
            _query_layer(model, name)
    if all(get_metric(spec.metric).scale_free or spec.transform == "none" or spec.lift for spec in specs):
        raise ValueError("fold_alpha: no spec has α; cosine and transform='none' have none")


def _has_alpha(group: HeadParameters, name: str) -> bool:
    """Return whether there is an α to move; raises `ValueError` where it cannot be moved."""
    if isinstance(group, NystromParameters):
        raise ValueError(f"{name!r} has Nyström attention, whose landmarks were fitted with α: it cannot be moved")
    if group.transform == "none" or get_metric(group.metric).scale_free:
        return False
    if group.transform != "maps":
        _check_scaling(name, group.metric, {"λ": group.constant_lambda, "ε": group.constant_softening})
    return True


def _check_scaling(name: str, metric: str, constants: dict[str, float | None]) -> None:
    if get_metric(metric).degree is None:
        raise ValueError(f"{name!r} has metric {metric!r}, of which no degree is known, so α cannot be moved")
    for symbol, constant in constants.items():
        if constant is not None:
            raise ValueError(
                f"{name!r} has a fixed {symbol}={constant:g} for all heads, which cannot take each one's α"
            )


def _query_layer(model, name: str) -> tuple[nn.Module, int]:
    """Return (the layer that makes the queries of a module, how many of its outputs they are)."""
    module = locate(model, name)
    if norm := next((n for n in _NORMS if isinstance(getattr(module, n, None), nn.Module)), None):
        raise ValueError(
            f"{name!r} normalises its queries ({norm}), so α cannot be moved into their projection; "
            "maps can take it (AttentionSpec(transform='maps'))"
        )
    if getattr(model.config, "clip_qkv", None) is not None:
        raise ValueError(f"{name!r} clips its queries (clip_qkv), so α cannot be moved into their projection")
    layer = next((getattr(module, n) for n in _QUERY if isinstance(getattr(module, n, None), nn.Module)), None)
    fused = getattr(module, "c_attn", None)
    if layer is None and type(fused) is Conv1D and fused.weight.shape[1] == 3 * fused.weight.shape[0]:
        return fused, fused.weight.shape[0]
    if type(layer) not in (nn.Linear, Conv1D):
        kind = "none was found" if layer is None else f"it is {type(layer).__name__}"
        raise ValueError(f"{name!r}: α goes into a query projection that is a plain linear layer; {kind}")
    return layer, layer.weight.shape[0 if type(layer) is nn.Linear else 1]


def _scale_queries(student, name: str, factors: Tensor) -> None:
    """Multiply each head's queries by its factor (H,), in the weights of the layer that makes them."""
    layer, width = _query_layer(student, name)
    rows = factors.repeat_interleave(width // len(factors)).to(layer.weight.device)
    # Conv1D keeps its weight as (inputs, outputs); of a fused layer the queries come first.
    weight = layer.weight[:, :width].T if type(layer) is Conv1D else layer.weight
    weight.copy_(weight * rows[:, None])
    if layer.bias is not None:
        layer.bias[:width].copy_(layer.bias[:width] * rows)
