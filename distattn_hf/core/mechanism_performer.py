"""Performer: softmax attention estimated by random positive features (FAVOR+), in linear time and memory.

Written here and not taken from a library, because a checkpoint must load with torch and transformers alone.
"""

import math

import torch
from torch import Tensor
from transformers import initialization

from .mechanism_base import Option, register_mechanism
from .mechanism_linear import FeatureAttention


@register_mechanism("performer", aliases=("favor+",))
class PerformerAttention(FeatureAttention):
    """φ(x)_a = exp(ω_a·x - ‖x‖²/2) of x = q·√scaling or k·√scaling: its products have the mean exp(scaling·q·k).

    num_features: m; None: d·ln d. The ω_a are orthogonal in groups of d, with the lengths of N(0, I) vectors, and the
    same for all heads; they are a buffer that is saved with a checkpoint. redraw_interval: so many forward calls in
    training share one draw; 0: the first is kept. seed: of the draws, which are the same on every device and process.
    With gradient checkpointing a redraw must not fall between a forward call and its backward pass; two forward calls
    before one backward pass want redraw_interval=0 and a call of `redraw` now and then.

    A text that goes on through a cache keeps its features: a redraw waits for the next text, and `redraw` is for
    between texts. A row whose features all underflow gives zeros. Causal: no exponent depends on a later key.
    Source: Choromanski et al., Rethinking Attention with Performers (2021).
    """

    options = {
        "num_features": Option(None, optional=True),
        "redraw_interval": Option(1000, minimum=0),
        "seed": Option(0, minimum=0),
    }

    def _build(self):
        if self.num_features is None:
            self.num_features = max(1, int(self.head_dim * math.log(self.head_dim)))
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.register_buffer("projection", torch.empty(self.num_features, self.head_dim, dtype=dtype))
        self.register_buffer("draws", torch.empty((), dtype=torch.long))
        self.register_buffer("calls", torch.empty((), dtype=torch.long))
        # `calls` as a Python number: reading the buffer would make the host wait for a GPU in every forward call.
        self._known_calls: int | None = None

    def reset_parameters(self):
        """Make the first draw of features."""
        self._known_calls = None
        initialization.zeros_(self.draws)
        initialization.zeros_(self.calls)
        initialization.copy_(self.projection, orthogonal_features(self.num_features, self.head_dim, self.seed))

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self._known_calls = None

    def redraw(self) -> None:
        """Take the next draw of features."""
        self.draws += 1
        features = orthogonal_features(self.num_features, self.head_dim, self.seed + 7919 * int(self.draws))
        # Not in place: a graph that is still to be differentiated holds the old ones.
        self.projection = features.to(self.projection)

    def forward(self, query, *args, memory=None, **kwargs):
        goes_on = self.holds_still or memory is not None and memory.length > query.shape[2]
        # Gradient checkpointing calls again from within the backward pass and must meet the same features.
        if self.training and self.redraw_interval and not goes_on and torch._C._current_graph_task_id() == -1:
            if self._known_calls is None:
                self._known_calls = int(self.calls)
            if self._known_calls and self._known_calls % self.redraw_interval == 0:
                self.redraw()
            self._known_calls += 1
            self.calls += 1
        return super().forward(query, *args, memory=memory, **kwargs)

    def _features(self, call):
        factor = (call.query.shape[-1] ** -0.5 if call.scaling is None else call.scaling) ** 0.5
        query, key = call.query * factor, call.key * factor
        projection = self.projection.to(query.dtype)
        # ‖q‖²/2 is one number for a row, which its normaliser cancels.
        query = query @ projection.mT
        query = (query - query.detach().amax(-1, keepdim=True)).exp()
        key = key @ projection.mT - key.square().sum(-1, keepdim=True) / 2
        scale = key.detach().amax(-1)
        return query, (key - scale[..., None]).exp(), scale


def orthogonal_features(num_features: int, size: int, seed: int) -> Tensor:
    """Return (m, d): rows of random orthogonal matrices, with the lengths of N(0, I) vectors."""
    generator = torch.Generator().manual_seed(seed)
    count = -(-num_features // size)
    gaussian = torch.randn(count, size, size, generator=generator, dtype=torch.float64, device="cpu")
    lengths = torch.randn(num_features, size, generator=generator, dtype=torch.float64, device="cpu").norm(dim=-1)
    triangle_signs = torch.linalg.qr(gaussian)
    # QR alone prefers one sign of each direction; the triangle's signs make the rotation uniform.
    rotation = triangle_signs.Q * triangle_signs.R.diagonal(dim1=-2, dim2=-1).sign()[:, None]
    return (rotation.mT.flatten(0, 1)[:num_features] * lengths[:, None]).float()
