"""Move α of converted heads into the query projection: the same attention, and then the plain distance, α = 1.

For a metric of degree n, -λ·dist(q/α, α(k - c)) = -λαⁿ·dist(q/α², k - c): a query projection divided by α² and a λ
times αⁿ do what α did. Keys stay as they are, so that heads may share them. Where a head has maps, they take α instead.
"""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..core.discovery import locate
from ..core.metrics import get_metric
from ..core.modeling_converted import DistAttnModelMixin
from ..core.parameters import HeadParameters, NystromParameters

_QUERY = ("q_proj", "query", "q", "q_lin", "query_proj", "to_q", "q_attn")
_NORMS = ("q_norm", "q_layernorm", "query_norm", "query_ln", "q_ln")


@torch.no_grad()
def fold_alpha(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a converted model with α = 1 in every head that has α, and the same outputs.

    What changes with it: the queries' weights are not the teacher's any more, so `revert` and attention transfer that
    takes the student's own queries for the teacher's are refused. q·k has another temperature, the distance has not.

    Raises:
        ValueError: for a model that was not converted or has no α, and naming the module where α cannot be moved:
            Nyström attention, a fixed λ, a metric that does not scale, a query projection that is not a plain linear
            layer or is followed by a norm.
    """
    if not isinstance(model, DistAttnModelMixin):
        raise ValueError(f"{type(model).__name__} is not a converted model; fold_alpha takes what convert returned")
    student = copy.deepcopy(model)
    report, folded = student.report_as_it_is(), False
    for name, state in student.attention_states.items():
        for heads, group in state.parts():
            if group is None or not _has_alpha(group, name):
                continue
            if group.transform == "linear":
                group.query_map.div_(group.log_alpha.exp()[:, None, None])
                group.key_map.mul_(group.log_alpha.exp()[:, None, None])
            else:
                factors = torch.ones(state.num_heads, dtype=torch.float64, device=group.log_alpha.device)
                factors[heads] = (-2 * group.log_alpha.double()).exp()
                _scale_queries(student, name, factors)
                group.log_lambda.add_(get_metric(group.metric).degree * group.log_alpha)
                student.config.distattn["queries_scaled"] = True
            group.log_alpha.zero_()
            folded = True
    if not folded:
        raise ValueError(f"{type(model).__name__} has no head with α: cosine and transform='none' have none")
    if report is not None:
        before = report["trained_since"]
        student.conversion_report = report
        student.conversion_report = {**student.report_as_it_is(), "trained_since": before}
    return student


def _has_alpha(group: HeadParameters, name: str) -> bool:
    """Whether there is an α to move; raises `ValueError` where it cannot be moved."""
    if isinstance(group, NystromParameters):
        raise ValueError(
            f"{name!r} has Nyström attention, whose landmarks were fitted with α; fold_alpha leaves it out"
        )
    metric = get_metric(group.metric)
    if group.transform == "none" or metric.scale_free:
        return False
    if group.transform == "linear":
        return True
    if metric.degree is None:
        raise ValueError(f"{name!r} has metric {group.metric!r}, of which no degree is known, so α cannot be moved")
    if group.constant_lambda is not None:
        raise ValueError(
            f"{name!r} has a fixed λ={group.constant_lambda:g} for all heads, which cannot take α from each"
        )
    return True


def _scale_queries(student, name: str, factors: torch.Tensor) -> None:
    """Multiply each head's queries by its factor (H,), in the weights of the layer that makes them."""
    module = locate(student, name)
    if norm := next((n for n in _NORMS if isinstance(getattr(module, n, None), nn.Module)), None):
        raise ValueError(f"{name!r} normalises its queries ({norm}), so α cannot be moved into their projection")
    layer = next((getattr(module, n) for n in _QUERY if isinstance(getattr(module, n, None), nn.Module)), None)
    fused = getattr(module, "c_attn", None)
    if layer is None and type(fused) is Conv1D and fused.weight.shape[1] == 3 * fused.weight.shape[0]:
        layer = fused
    if type(layer) not in (nn.Linear, Conv1D):
        kind = "none was found" if layer is None else f"it is {type(layer).__name__}"
        raise ValueError(f"{name!r}: α goes into a query projection that is a plain linear layer; {kind}")
    width = layer.weight.shape[0] if layer is fused else layer.weight.shape[0 if type(layer) is nn.Linear else 1]
    rows = factors.repeat_interleave(width // len(factors)).to(layer.weight.device)
    # Conv1D keeps its weight as (inputs, outputs); of a fused layer the queries come first.
    weight = layer.weight[:, :width].T if type(layer) is Conv1D else layer.weight
    weight.copy_(weight.double() * rows[:, None])
    if layer.bias is not None:
        layer.bias[:width].copy_(layer.bias[:width].double() * rows)
