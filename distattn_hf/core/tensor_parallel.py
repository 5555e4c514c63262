"""transformers' tensor parallelism of converted modules: λ, α, maps and landmarks are split by heads, as q, k, v are.

A rank has consecutive heads, as many as any other, and of each parameter (H, ...) their rows; a checkpoint has all.
"""

import re
from contextlib import contextmanager

from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES, _use_local_dtensor_params
from transformers.distributed.tensor_parallel import TensorParallelLayer

from .interface import _own
from .parameters import DistanceAttentionState

_SPLIT = {"colwise", "rowwise"}
# Of norms of queries and keys, which every rank has whole.
_WHOLE = "replicated_with_grad_allreduce"


class _ByHeads(TensorParallelLayer):
    """Style of a `DistanceAttentionState`, whose heads become those of the rank, and of its groups' parameters."""

    def shard_param(self, module, param, mesh):
        whole = module._parameters[param]
        module._parameters[param] = nn.Parameter(
            distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None), requires_grad=whole.requires_grad
        )

    def install_forward(self, module, mesh):
        if isinstance(module, DistanceAttentionState):
            module.num_heads //= mesh.size()
            return module
        return super().install_forward(module, mesh)

    @contextmanager
    def context_around_forward(self, module, mesh):
        # A fixed λ is a buffer, which every rank has whole.
        buffers = dict(module._buffers)
        module._buffers.update({name: t.chunk(mesh.size())[mesh.get_local_rank()] for name, t in buffers.items()})
        try:
            with _use_local_dtensor_params(module):
                yield
        finally:
            module._buffers.update(buffers)


STYLE = _own("distattn_by_heads")
ALL_PARALLEL_STYLES.register(STYLE, _ByHeads())


def plan_by_heads(model: nn.Module, plan: dict[str, str], size: int) -> dict[str, str]:
    """Return what a plan of tensor parallelism over `size` ranks needs beside for the converted modules it splits.

    Raises `ValueError`, naming the module, for one that cannot be split by heads.
    """
    found = {}
    for name, module in model.named_modules():
        state = getattr(module, "distattn", None)
        if not isinstance(state, DistanceAttentionState):
            continue
        styles = {child: plan.get(_generic(f"{name}.{child}")) for child, _ in module.named_children()}
        styles = {child: style for child, style in styles.items() if style is not None}
        if not styles:
            continue
        key_heads = getattr(model.config.get_text_config(), "num_key_value_heads", None) or state.num_heads
        # A norm over the entries of a head is the same for any heads.
        styles = {
            child: style
            for child, style in styles.items()
            if style != _WHOLE
            or any(
                parameter.numel() != getattr(module, "head_dim", None)
                for parameter in module.get_submodule(child).parameters()
            )
        }
        if reason := _reason_against(state, styles, size, key_heads):
            raise ValueError(f"tensor parallelism cannot split the converted attention module {name!r}: {reason}")
        found[_generic(f"{name}.distattn")] = STYLE
        for number, group in enumerate(state.groups):
            own = _generic(f"{name}.distattn.groups.{number}")
            found |= {own: STYLE} | {f"{own}.{parameter}": STYLE for parameter, _ in group.named_parameters()}
    return found


def _generic(name: str) -> str:
    """Return a name as plans have it, with a star for the number of a layer."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _reason_against(state: DistanceAttentionState, styles: dict[str, str], size: int, key_heads: int) -> str | None:
    # Others hand over all heads, or heads in another order, or none.
    if others := {child: style for child, style in styles.items() if style not in _SPLIT}:
        return f"the plan has {others}, and its heads are split only where projections are colwise and rowwise"
    if state.num_heads % size:
        return f"{state.num_heads} heads are no multiple of {size} ranks"
    if key_heads % size:
        return f"{key_heads} key heads are no multiple of {size} ranks"
    if any(heads is not None for heads in state.head_lists):
        return (
            "some of its heads are converted in another way than the rest, and ranks would have other groups of heads"
        )
    return None
