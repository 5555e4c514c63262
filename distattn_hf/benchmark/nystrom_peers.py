"""Other packages' linear attention, each by its own module, on the same tensors as ours.

A competitor is (prepare, attention): `prepare(query, key, value)` returns the leaves in the module's own layout, not
timed; `attention(*leaves)` returns (B, H, N, d).
"""

import contextlib
import importlib
import io
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .nystrom_options import NystromCase
from .run import Unavailable

Competitor = tuple[Callable, Callable]


def _module(name: str, packages: str):
    try:
        # Old packages print and warn on import.
        with contextlib.redirect_stdout(io.StringIO()):
            return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"not installed (pip install --no-deps {packages}): {error}") from None
    except Exception as error:  # An old package may not work with the installed torch.
        raise Unavailable(f"cannot be imported: {type(error).__name__}: {error}") from None


def _merged(tensor: Tensor) -> Tensor:
    """Reshape (B, H, N, d) to (B, N, H·d)."""
    return tensor.transpose(1, 2).flatten(2).contiguous()


class _Given(nn.Module):
    """A module that replaces a projection and returns a given tensor."""

    def forward(self, hidden):
        return self.tensor


def transformers_peer(case: NystromCase) -> Competitor:
    """Return transformers' NystromformerSelfAttention: projections replaced, no convolution."""
    if case.causal:
        raise Unavailable("no causal form")
    if case.length % case.num_landmarks:
        raise Unavailable("N is no multiple of m")
    module = _module("transformers.models.nystromformer.modeling_nystromformer", "transformers")
    configuration = _module("transformers.models.nystromformer.configuration_nystromformer", "transformers")
    config = configuration.NystromformerConfig(
        hidden_size=case.heads * case.head_size, num_attention_heads=case.heads, num_landmarks=case.num_landmarks,
        segment_means_seq_len=case.length, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    layer = module.NystromformerSelfAttention(config).to(case.device).eval()
    layer.conv_kernel_size = None
    layer.query, layer.key, layer.value = projections = [_Given() for _ in range(3)]

    def attention(*leaves):
        for projection, leaf in zip(projections, leaves):
            projection.tensor = leaf
        return layer(leaves[0])[0].unflatten(-1, (case.heads, case.head_size)).transpose(1, 2)

    return lambda *tensors: tuple(map(_merged, tensors)), attention


def nystrom_attention_peer(case: NystromCase) -> Competitor:
    """Return nystrom_attention.NystromAttention: projections replaced, no convolution."""
    if case.causal:
        raise Unavailable("no causal form")
    package = _module("nystrom_attention.nystrom_attention", "nystrom-attention einops")
    width = case.heads * case.head_size
    layer = package.NystromAttention(
        dim=width, dim_head=case.head_size, heads=case.heads, num_landmarks=case.num_landmarks, residual=False
    )
    layer.to_qkv, layer.to_out = nn.Identity(), nn.Identity()
    layer = layer.to(case.device).eval()

    def attention(merged):
        return layer(merged).unflatten(-1, (case.heads, case.head_size)).transpose(1, 2)

    return lambda *tensors: (torch.cat([_merged(t) for t in tensors], dim=-1),), attention


def performer_peer(case: NystromCase) -> Competitor:
    """Return performer_pytorch.FastAttention; causal: without the CUDA extension if that is not installed."""
    packages = "performer-pytorch einops local-attention axial-positional-embedding"
    package = _module("performer_pytorch.performer_pytorch", packages)
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
        torch.manual_seed(case.seed)
        layer = package.FastAttention(case.head_size, nb_features=case.num_landmarks, causal=case.causal)
    return lambda *tensors: tensors, layer.to(case.device).eval()


COMPETITORS = {
    "transformers": transformers_peer,
    "nystrom-attention": nystrom_attention_peer,
    "performer": performer_peer,
}
