"""Base class of the native family's attention mechanisms: options, checks, the call and true weights."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicLayer

from .attention import without_autocast
from .constant_cache import RecurrentLayer
from .inputs import causal_keep, masked_softmax, say_backend
from .registry import Registry

MECHANISMS = Registry("mechanism")


def register_mechanism(name: str, aliases: tuple[str, ...] = ()):
    """Register a `Mechanism` class under `name` (decorator); raises `ValueError` for a name that is taken."""

    def register(kind: type["Mechanism"]) -> type["Mechanism"]:
        if not isinstance(kind, type) or not issubclass(kind, Mechanism):
            raise ValueError(f"mechanism {name!r} must be a subclass of Mechanism, got {kind!r}")
        MECHANISMS.register(name, kind, aliases=tuple(aliases))
        kind.name = name
        return kind

    return register


@dataclass(frozen=True)
class Option:
    """An integer option of a mechanism: its default and the smallest value allowed; None only where it is optional."""

    default: int | None
    minimum: int = 1
    optional: bool = False

    def check(self, mechanism: str, name: str, value) -> None:
        """Raise `ValueError` for a value that is not allowed."""
        if value is None and self.optional:
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < self.minimum:
            allowed = f"an integer >= {self.minimum}" + (" or None" if self.optional else "")
            raise ValueError(f"{name} of mechanism {mechanism!r} must be {allowed}, got {value!r}")


@dataclass(frozen=True)
class Beyond:
    """Global tokens that stand before a call's keys, where a cache has let go of those between.

    key (B, H, G, d), value (B, H, G, d_v), seen (B, G): which of them there are, padding aside; bias (B, H, N, G) or
    None.
    """

    key: Tensor
    value: Tensor
    seen: Tensor
    bias: Tensor | None

    def to(self, dtype: torch.dtype) -> "Beyond":
        """Return these in a floating-point type."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return Beyond(self.key.to(dtype), self.value.to(dtype), self.seen, bias)


@dataclass(frozen=True)
class Call:
    """Checked inputs of one call in at least float32: query (B, H, N, d), key (B, H, M, d), value (B, H, M, d_v).

    keep (B, M) bool, True for a real key, or None for all; bias (B or 1, H, N, M) or None. Causal: the last N of the M
    keys are the queries' own. scaling: what the caller gave, None where it gave nothing. memory: what is kept of a text
    whose earlier keys are not among these (see `Mechanism.cache_layer`). is_global (B, M) bool: tokens that see and are
    seen wherever they stand, or None; beyond: those before the first key, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    keep: Tensor | None
    is_causal: bool
    is_cross: bool
    scaling: float | None
    dropout_p: float
    bias: Tensor | None
    memory: RecurrentLayer | None = None
    is_global: Tensor | None = None
    beyond: Beyond | None = None

    @property
    def pattern_keep(self) -> Tensor | None:
        """Which keys a pattern may look at: `keep` without global tokens, which come besides."""
        if self.is_global is None:
            return self.keep
        return ~self.is_global if self.keep is None else self.keep & ~self.is_global

    @property
    def before(self) -> int:
        """How many keys stand before the first query's own."""
        return self.key.shape[2] - self.query.shape[2] if self.is_causal else 0

    @property
    def global_queries(self) -> Tensor:
        """Which queries are global tokens, (B, N) bool."""
        return self.is_global[:, self.before :]

    @property
    def scaled_query(self) -> Tensor:
        """The query with `scaling` in it, 1/√d where the caller gave none."""
        return self.query * (self.query.shape[-1] ** -0.5 if self.scaling is None else self.scaling)

    def seen(self) -> Tensor:
        """Return which keys causality and padding leave, (B or 1, 1, N, M) bool."""
        shape = (self.query.shape[2], self.key.shape[2])
        device = self.query.device
        seen = torch.ones(shape, dtype=torch.bool, device=device)
        if self.is_causal:
            seen = causal_keep(*shape, device, offset=self.before)
        return seen[None, None] if self.keep is None else seen & self.keep[:, None, None]

    def drop(self, weights: Tensor) -> Tensor:
        """Apply dropout to weights (or to what stands for them), where it is asked for."""
        return F.dropout(weights, self.dropout_p) if self.dropout_p > 0 else weights


class Mechanism(nn.Module):
    """Attention (query, key, value) -> (output, weights), in forms that the class attributes name.

    causal, bidirectional, cross: which forms exist (cross: queries and keys of different sequences).
    takes_bias: whether an additive position bias can be honoured. takes_global: whether single tokens can be global.
    needs_max_length: whether the longest sequence must
    be known when the module is made. complexity, memory: of one call, N queries, M keys, head size d, in words.
    options: the keyword arguments beyond `num_heads`, `head_dim` and `max_length`, with what they may be.

    Computation is in at least float32, also under autocast; the output has value's dtype.
    """

    name: str
    causal: bool = True
    bidirectional: bool = True
    cross: bool = False
    takes_bias: bool = False
    takes_global: bool = False
    needs_max_length: bool = False
    complexity: str
    memory: str
    options: dict[str, Option] = {}
    # Whether this call goes on with a call before, so that what changes between calls (draws of features) must not.
    holds_still: bool = False

    def __init__(self, num_heads: int, head_dim: int, *, max_length: int | None = None, **options):
        super().__init__()
        for name, size in (("num_heads", num_heads), ("head_dim", head_dim)):
            Option(None).check(self.name, name, size)
        self.check_options(max_length=max_length, **options)
        self.num_heads, self.head_dim, self.max_length = num_heads, head_dim, max_length
        for name, option in self.options.items():
            setattr(self, name, options.get(name, option.default))
        self._build()
        self.reset_parameters()

    @classmethod
    def check_options(cls, *, max_length: int | None = None, **options) -> None:
        """Raise `ValueError` for options this mechanism does not have, or values it cannot take."""
        unknown = sorted(set(options) - set(cls.options))
        if unknown:
            has = ", ".join(cls.options) or "none"
            raise ValueError(f"mechanism {cls.name!r} has no option {unknown[0]!r}; its options are: {has}")
        for name, value in options.items():
            cls.options[name].check(cls.name, name, value)
        Option(None, optional=not cls.needs_max_length).check(cls.name, "max_length", max_length)

    @classmethod
    def check(cls, *, is_causal: bool = False, is_cross: bool = False, has_bias: bool = False) -> None:
        """Raise `ValueError` for a form that this mechanism does not have."""
        if is_causal and is_cross:
            raise ValueError("is_causal and is_cross exclude each other: another sequence has no future")
        form = "cross" if is_cross else "causal" if is_causal else "bidirectional"
        if not getattr(cls, form):
            forms = [name for name in ("causal", "bidirectional", "cross") if getattr(cls, name)]
            raise ValueError(f"mechanism {cls.name!r} has no {form} form; it has: {', '.join(forms)}")
        if has_bias and not cls.takes_bias:
            raise ValueError(
                f"mechanism {cls.name!r} takes no position_bias, as its weights never exist one by one; choose a "
                "positional encoding that is not a bias"
            )

    def cache_layer(self, layer: DynamicLayer) -> DynamicLayer | RecurrentLayer:
        """Return what a causal text's cache has in the place of `layer`, with its keys: less than all, where less does.

        A `RecurrentLayer` comes back as `memory` of the calls; a `RingLayer` gives keys up to those that are reached.
        """
        return layer

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        keep: Tensor | None = None,
        is_causal: bool = False,
        is_cross: bool = False,
        scaling: float | None = None,
        dropout_p: float = 0.0,
        position_bias: Tensor | None = None,
        return_weights: bool = False,
        memory: RecurrentLayer | None = None,
        is_global: Tensor | None = None,
        beyond: Beyond | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return (output (B, H, N, d_v) in value's dtype, weights (B, H, N, M) before dropout, or None).

        Args:
            query: (B, H, N, d). key: (B, H, M, d). value: (B, H, M, d_v). Grouped key heads are repeated by the caller.
            keep: (B, M) bool, True for a real key; None: all are.
            is_causal: query i sees the keys up to its own; the last N of the M keys are the queries' own.
            is_cross: the keys are another sequence's. Neither: the queries' own sequence, N = M, all of it.
            scaling: factor of the logits; None: 1/√d (mechanisms without logits say what it is for them).
            dropout_p: dropout on the weights, applied whenever it is > 0.
            position_bias: (B or 1, H, N, M), finite, added to the logits.
            return_weights: also return the true weights, quadratic in time and memory here and only here.
            memory: the cache layer that these keys came from and that has summed up those before, where the mechanism
                made it; it is brought up to date.
            is_global: (B, M) bool, tokens that see and are seen wherever they stand.
            beyond: those that stand before the first key; then no query is one.

        A query that sees nothing gets zeros.

        Raises:
            ValueError: for a form or argument that this mechanism does not have, and for shapes that do not fit.
        """
        self.check(is_causal=is_causal, is_cross=is_cross, has_bias=position_bias is not None)
        self._check_call(query, key, value, keep, is_causal, is_cross, scaling, dropout_p, position_bias)
        self._check_global(is_global, key)
        say_backend(self.name, "operators", query, key)
        with without_autocast(query.device.type):
            dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), torch.float32)
            bias = None if position_bias is None else position_bias.to(dtype)
            tensors = (tensor.to(dtype) for tensor in (query, key, value))
            call = Call(*tensors, keep, is_causal, is_cross, scaling, dropout_p, bias, memory, is_global)
            if beyond is not None:
                call = replace(call, beyond=beyond.to(dtype))
            if return_weights and memory is not None and memory.state is not None:
                raise ValueError(
                    f"output_attentions is not available once keys are in the cache of mechanism {self.name!r}: they "
                    "are sums by now. Pass use_cache=False"
                )
            if return_weights and beyond is not None:
                raise ValueError(
                    "output_attentions is not available once global tokens stand before the keys that the cache of "
                    f"mechanism {self.name!r} has kept. Pass use_cache=False"
                )
            weights = self._weights(call).to(value.dtype) if return_weights else None
            output = self._attend(call).to(value.dtype)
        shapes = {"_attend": (output, (*query.shape[:3], value.shape[-1]))}
        if weights is not None:
            shapes["_weights"] = weights, (*query.shape[:3], key.shape[2])
        for method, (tensor, expected) in shapes.items():
            # A reshape into (B, N, H·d) would hide it.
            if tensor.shape != expected:
                raise ValueError(
                    f"{type(self).__name__}.{method} must return shape {expected}, got {tuple(tensor.shape)}"
                )
        return output, weights

    def reset_parameters(self) -> None:
        """Set parameters and buffers to their initial values; does nothing for mechanisms without any."""

    def _build(self) -> None:
        """Check options against each other, and make parameters and buffers."""

    def _attend(self, call: Call) -> Tensor:
        """Return the output (B, H, N, d_v)."""
        raise NotImplementedError

    def _weights(self, call: Call) -> Tensor:
        """Return the weights (B, H, N, M) that `_attend` applies, written out: softmax over what a query sees."""
        logits = call.scaled_query @ call.key.mT
        if call.bias is not None:
            logits = logits + call.bias
        visible = self._visible(call)
        if call.is_global is not None:
            visible = visible | call.is_global[:, None, None] | call.global_queries[:, None, :, None]
        seen = call.seen() & visible
        return masked_softmax(logits, seen.expand_as(logits))

    def _visible(self, call: Call) -> Tensor:
        """Return which keys each query looks at, causality and padding aside, broadcastable to (B, H, N, M) bool."""
        raise NotImplementedError

    def _check_call(self, query, key, value, keep, is_causal, is_cross, scaling, dropout_p, bias) -> None:
        """Raise `ValueError` naming the argument that does not fit."""
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if tensor.dim() != 4 or tensor.shape[1] != self.num_heads or not tensor.is_floating_point():
                raise ValueError(
                    f"{name} must be a floating-point tensor (B, {self.num_heads} heads, length, size), got "
                    f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                )
        batch, heads, num_queries, size = query.shape
        num_keys = key.shape[2]
        if size != self.head_dim or key.shape != (batch, heads, num_keys, size):
            raise ValueError(
                f"query {tuple(query.shape)} and key {tuple(key.shape)} must agree in batch, and have head_dim "
                f"{self.head_dim}"
            )
        if value.shape[:3] != key.shape[:3]:
            raise ValueError(
                f"key {tuple(key.shape)} and value {tuple(value.shape)} must agree in batch, heads and length"
            )
        if not is_cross and (num_queries > num_keys if is_causal else num_queries != num_keys):
            expected_keys = "no fewer keys than queries" if is_causal else "as many keys as queries, or is_cross=True"
            raise ValueError(f"self-attention needs {expected_keys}, got {num_queries} queries and {num_keys} keys")
        if keep is not None and (keep.dtype != torch.bool or keep.shape != (batch, num_keys)):
            raise ValueError(
                f"keep must be bool of shape (B, M)={(batch, num_keys)}, got {keep.dtype} of shape {tuple(keep.shape)}"
            )
        if scaling is not None and not 0 < scaling < math.inf:
            raise ValueError(f"scaling must be a positive finite number, got {scaling!r}")
        if not 0.0 <= dropout_p < 1.0:
            raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p!r}")
        if bias is not None:
            shape = (batch, heads, num_queries, num_keys)
            if bias.dim() != 4 or bias.shape[0] not in (1, batch) or bias.shape[1:] != shape[1:]:
                raise ValueError(f"position_bias must have shape (B or 1, H, N, M)={shape}, got {tuple(bias.shape)}")

    def _check_global(self, is_global: Tensor | None, key: Tensor) -> None:
        """Raise `ValueError` for global tokens that this mechanism or call cannot have."""
        if is_global is None:
            return
        if not self.takes_global:
            raise ValueError(f"mechanism {self.name!r} takes no global tokens")
        shape = (len(key), key.shape[2])
        if is_global.dtype != torch.bool or is_global.shape != shape:
            raise ValueError(
                f"is_global must be bool of shape (B, M)={shape}, got {is_global.dtype} of shape "
                f"{tuple(is_global.shape)}"
            )

    def extra_repr(self) -> str:
        values = {name: getattr(self, name) for name in self.options}
        return ", ".join(f"{name}={value}" for name, value in {"heads": self.num_heads, **values}.items())
