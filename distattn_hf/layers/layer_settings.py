"""Settings of the layers for PyTorch: metric, sizes, dropout and initial weights, under our words and others'."""

import math
from dataclasses import dataclass
from enum import StrEnum
from numbers import Real

from torch import Tensor, nn

from ..core.backends import validate_backend
from ..core.configuration_native import check_integer
from ..core.metrics import get_metric
from ..core.softening import check_softening
from .names import with_aliases

INITIALIZERS = ("linear", "xavier")


class DistanceType(StrEnum):
    """The built-in distances; each is also the name that `metric` takes."""

    SQUARED_EUCLIDEAN = "sqeuclidean"
    EUCLIDEAN = "l2"
    MANHATTAN = "l1"
    MINKOWSKI = "lp"
    COSINE = "cosine"
    CHEBYSHEV = "chebyshev"
    SQEUCLIDEAN, L2, L1, LP = SQUARED_EUCLIDEAN, EUCLIDEAN, MANHATTAN, MINKOWSKI

    @classmethod
    def _missing_(cls, value):
        """Return the member of an alias of its metric, such as "manhattan" or "linf"."""
        canonical = get_metric(value).name
        return next((member for member in cls if member.value == canonical), None)


@with_aliases
@dataclass
class DistanceAttentionConfig:
    """Settings of a distance-attention layer: softmax(-λ·distance(q_i, k_j) / (√d·temperature) + bias_ij)·v.

    Args:
        hidden_size: E, a multiple of num_heads. num_heads: H; each head has d = E / H.
        metric: a `DistanceType`, a metric's name or alias, or a name from `register_metric`; "dot" is dot-product
            attention. p: order of "lp"; None: 2.
        lam: λ > 0 of every head at the start; None: the metric's default, at which logits of N(0, I) vectors have unit
            deviation. learnable_lambda: whether λ trains, one per head.
        softening: ε >= 0 of every head at the start, below which the distance is quadratic (see softening.py); 0: the
            plain distance. learnable_softening: whether ε trains, one per head; from 0 it cannot.
        temperature: > 0; larger is nearer to uniform weights.
        dropout: of the weights, in training. output_dropout: of the projected output, of feed-forward parts
            too; None: in blocks dropout, of a layer alone none.
        is_causal: whether a token sees itself and earlier ones only. bias: of the projections.
        key_value_size: size of the other sequence's vectors in cross-attention; None: hidden_size.
        value_head_dim: d_v, the size of one head's values; None: d.
        initializer: of the projections: "linear" (that of `torch.nn.Linear`) or "xavier" (uniform, biases 0).
        logit_clip: None, or the most that a logit may stay below the largest of its row, so that no weight is less than
            e^-logit_clip of another. Runs written out, quadratic in memory.
        detect_collapse: warn once for each head in which a row has an entropy below 0.1 nats or a weight above 0.95.
            Runs written out, as it looks at all weights.
        backend: as in `distance_attention`.
        use_residual, use_layer_norm, norm_first, layer_norm_eps: of blocks around attention; norm_first: before it
            rather than after the sum.
        intermediate_size: of feed-forward parts; None: 4·hidden_size. activation: its name in transformers.

    Other names of these are understood, too: distance_type, lambda_param, p_norm, use_learnable_lambda, d_model, ...
    (`names.ALIASES`).

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    hidden_size: int = 768
    num_heads: int = 12
    metric: str = "l2"
    p: float | None = None
    lam: float | None = None
    learnable_lambda: bool = False
    temperature: float = 1.0
    dropout: float = 0.0
    is_causal: bool = False
    bias: bool = True
    key_value_size: int | None = None
    logit_clip: float | None = None
    detect_collapse: bool = False
    backend: str = "auto"
    use_residual: bool = True
    use_layer_norm: bool = True
    norm_first: bool = True
    layer_norm_eps: float = 1e-5
    intermediate_size: int | None = None
    activation: str = "gelu"
    softening: float = 0.0
    learnable_softening: bool = False
    output_dropout: float | None = None
    value_head_dim: int | None = None
    initializer: str = "linear"

    def __post_init__(self):
        for name in ("hidden_size", "num_heads", "key_value_size", "intermediate_size", "value_head_dim"):
            check_integer(name, getattr(self, name), optional=name not in ("hidden_size", "num_heads"))
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}")
        metric = get_metric(self.metric)
        p = 2.0 if metric.name == "lp" and self.p is None else self.p
        self.metric, self.p = metric.name, metric.validate(p)
        if isinstance(self.softening, Tensor):
            raise ValueError(
                "softening must be a number, got a tensor; learnable_softening=True gives each head its own"
            )
        self.softening = check_softening(metric, self.softening) or 0.0
        if self.learnable_softening and not self.softening:
            raise ValueError("learnable_softening=True needs a softening > 0 to start from, got softening=0")
        self.backend = validate_backend(self.backend)
        for name in ("lam", "temperature", "logit_clip", "layer_norm_eps"):
            value = getattr(self, name)
            optional = name in ("lam", "logit_clip")
            is_valid = isinstance(value, Real) and not isinstance(value, bool) and 0 < value < math.inf
            if not is_valid and not (optional and value is None):
                raise ValueError(f"{name} must be a positive finite number{' or None' * optional}, got {value!r}")
        for name, value in (("dropout", self.dropout), ("output_dropout", self.output_dropout or 0.0)):
            if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 <= value < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {value!r}")
        if self.initializer not in INITIALIZERS:
            raise ValueError(f"initializer must be one of {', '.join(INITIALIZERS)}, got {self.initializer!r}")
        if self.logit_clip is not None and self.backend not in ("auto", "reference"):
            raise ValueError(
                f"logit_clip runs written out: backend must be 'auto' or 'reference', got {self.backend!r}"
            )

    @property
    def head_dim(self) -> int:
        """d = hidden_size / num_heads."""
        return self.hidden_size // self.num_heads


def config_of(config: DistanceAttentionConfig | None, given: dict) -> DistanceAttentionConfig:
    """Return the config of a layer that was made by one or by its fields; raises `ValueError` for both."""
    if config is None:
        return DistanceAttentionConfig(**given)
    if not isinstance(config, DistanceAttentionConfig):
        raise ValueError(f"config must be a DistanceAttentionConfig, got {config!r}; give sizes by name: hidden_size=")
    if given:
        raise ValueError(f"a config and {sorted(given)[0]}= were given; set it in the config")
    return config


def initialize(module: nn.Module, initializer: str) -> None:
    """Set the weights of a module's linear layers as `DistanceAttentionConfig.initializer` says."""
    for linear in module.modules() if initializer == "xavier" else ():
        if isinstance(linear, nn.Linear):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
