"""The parameters a conversion adds to an attention module: λ and the per-head maps of query and key."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization

from .absolute_logits import MappedHeads
from .attention_spec import AttentionSpec, change_specs
from .backends import validate_backend
from .derived_cache import MappedKeys
from .metrics import get_metric
from .softening import check_softens

# What reports read.
_REPORTED = ("log_lambda", "log_alpha", "log_softening", "logit_shift")


def _full(tensor: Tensor) -> Tensor:
    """Return a tensor in at least float32; quicker than `to` where it is, which a decoding step notices."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


class HeadParameters(nn.Module):
    """λ, α, shift c, maps and softening ε of one group of heads, and from where absolute logits count.

    transform "none":   q, k
    transform "scalar": q / α_h, α_h·(k - c_h)
    transform "maps": q·Q_h / α_h, α_h·(k - c_h)·K_h, with Q_h, K_h (d, d)

    Shapes: log_lambda (H,), log_alpha (H,), log_softening (H,), shift (H, d), query_map and key_map (H, d, d).
    In modules with a learned sink or a cap on their logits, which compare logits with fixed numbers: origin (H, d), a
    key like the model's own, and logit_shift (H,), the logit that it has (see `absolute_shift`). Not under the lift,
    whose logits are absolute.

    Attention calls the module, `group(query, key)`, and never its methods: what loads offloaded parameters or gathers
    sharded ones does so around `forward`.
    """

    def __init__(self, spec: AttentionSpec, num_heads: int, head_dim: int | None, has_origin: bool = False):
        super().__init__()
        self.spec = spec
        metric = get_metric("lifted_sqeuclidean" if spec.lift else spec.metric)
        self.metric = metric.name
        self.p = metric.validate(spec.p)
        self.num_heads, self.head_dim = num_heads, head_dim
        self.has_origin = has_origin
        self.transform = spec.transform or "none"
        if spec.softening:
            check_softens(metric, spec.softening)
        self.fits_softening = spec.softening == "fit"
        self.constant_softening = None if self.fits_softening else spec.softening or None
        self.constant_lambda = spec.lam if (spec.lam is not None and not spec.learnable_lambda) else None
        # A model built in half precision keeps these in float32, as it does when it is loaded in half precision.
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        if self.constant_lambda is None:
            # A fixed λ is a buffer: from_pretrained makes every parameter trainable again.
            log_lambda = torch.empty(num_heads, dtype=dtype)
            if spec.learnable_lambda:
                self.log_lambda = nn.Parameter(log_lambda)
            else:
                self.register_buffer("log_lambda", log_lambda)
        self._add_parameters(dtype)
        self.reset_parameters()

    def _add_parameters(self, dtype: torch.dtype) -> None:
        num_heads, head_dim = self.num_heads, self.head_dim
        if self.fits_softening:
            self.log_softening = nn.Parameter(torch.empty(num_heads, dtype=dtype))
        if self.has_origin and not self.is_absolute:
            self.origin = nn.Parameter(torch.empty(num_heads, head_dim, dtype=dtype))
            self.logit_shift = nn.Parameter(torch.empty(num_heads, dtype=dtype))
        if self.transform != "none":
            self.log_alpha = nn.Parameter(torch.empty(num_heads, dtype=dtype))
            self.shift = nn.Parameter(torch.empty(num_heads, head_dim, dtype=dtype))
        if self.transform == "maps":
            self.query_map = nn.Parameter(torch.empty(num_heads, head_dim, head_dim, dtype=dtype))
            self.key_map = nn.Parameter(torch.empty(num_heads, head_dim, head_dim, dtype=dtype))

    def reset_parameters(self, scaling: float | None = None) -> None:
        """Set λ to the spec's or the metric's default, α = 1, c = 0, maps = identity. `scaling`: the model's own.

        The origin starts as a key of zeros, whose dot product with any query is 0 (of cosine, to which zeros are no
        direction, as (1, ..., 1)), and its logit at 0.
        """
        if self.constant_lambda is None:
            lam = self.spec.lam
            if lam is None:
                scaling = scaling or (self.head_dim or 1) ** -0.5
                lam = get_metric(self.metric).default_lambda(self.head_dim or 64, scaling, self.p)
            initialization.constant_(self.log_lambda, math.log(lam))
        if self.fits_softening:
            initialization.zeros_(self.log_softening)
        if self.has_origin and not self.is_absolute:
            (initialization.ones_ if get_metric(self.metric).scale_free else initialization.zeros_)(self.origin)
            initialization.zeros_(self.logit_shift)
        if self.transform != "none":
            initialization.zeros_(self.log_alpha)
            initialization.zeros_(self.shift)
        if self.transform == "maps":
            for weight in (self.query_map, self.key_map):
                initialization.copy_(weight, torch.eye(self.head_dim).expand(self.num_heads, -1, -1))

    def forward(self, query: Tensor, key: Tensor, what: str = "fold", **arguments) -> tuple:
        """Return the result of the method `what`: "fold", "mapped", or "features" of Nyström heads."""
        return getattr(self, what)(query, key, **arguments)

    @property
    def is_absolute(self) -> bool:
        """Whether the logits of these heads are those of a dot product: a module's own sink and cap apply to them."""
        return self.metric == "lifted_sqeuclidean"

    @property
    def maps_keys(self) -> bool:
        """Whether exact attention of these heads takes keys that are not the model's own (see `fold`)."""
        return self.transform == "maps" or (self.transform != "none" and get_metric(self.metric).degree is None)

    def fitted_tensors(self) -> dict[str, Tensor]:
        """Return all tensors that calibration sets, by name: the parameters, and λ also where it is a buffer."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def lam(self) -> float | Tensor:
        """Return λ: a constant, or (H,) in at least float32."""
        if self.constant_lambda is not None:
            return self.constant_lambda
        return _full(self.log_lambda).exp()

    def softening(self) -> float | Tensor | None:
        """Return ε: a constant, (H,) in at least float32, or None for the plain distance."""
        if not self.fits_softening:
            return self.constant_softening
        return _full(self.log_softening).exp()

    def reported_values(self) -> dict[str, list[float] | None]:
        """Return {"lam", "alpha", "softening"} of each head, for reports: six digits; None where the heads have none.
        With a sink or a cap also "logit_shift".

        Empty where the parameters are not here (on the meta device, or cut up over processes).
        """
        own = {**self._parameters, **self._buffers}
        own = [own[name] for name in _REPORTED if own.get(name) is not None]
        if any(t.is_meta or t.numel() != self.num_heads or hasattr(t, "full_tensor") for t in own):
            return {}
        lam = self.lam()
        reported = {"lam": lam.tolist() if isinstance(lam, Tensor) else [lam] * self.num_heads}
        reported |= {"alpha": None, "softening": None}
        if self.transform != "none" and not get_metric(self.metric).scale_free:
            reported["alpha"] = self.log_alpha.float().exp().tolist()
        if (epsilon := self.softening()) is not None:
            reported["softening"] = epsilon.tolist() if isinstance(epsilon, Tensor) else [epsilon] * self.num_heads
        if hasattr(self, "logit_shift"):
            reported["logit_shift"] = self.logit_shift.float().tolist()
        return {name: values and [round(value, 6) for value in values] for name, values in reported.items()}

    def map(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Map query (B, H, N, d) and key (B, H, M, d) to what the distance is taken of, in at least float32."""
        if self.transform == "none":
            return query, key
        dtype = torch.promote_types(query.dtype, torch.float32)
        return self._map_query(query.to(dtype)), self._map_key(key.to(dtype))

    def _map_query(self, query: Tensor) -> Tensor:
        if self.transform == "maps":
            query = torch.matmul(query, self.query_map.to(query.dtype))
        return query / self.log_alpha.to(query.dtype).exp()[:, None, None]

    def _map_key(self, key: Tensor) -> Tensor:
        """Return α·(k - c)·K of keys (..., H, M, d) in the dtype to compute in."""
        if self.transform == "none":
            return key
        key = key - self.shift.to(key.dtype)[:, None, :]
        if self.transform == "maps":
            key = torch.matmul(key, self.key_map.to(key.dtype))
        return key * self.log_alpha.to(key.dtype).exp()[:, None, None]

    def mapped(self, query: Tensor, key: Tensor) -> MappedHeads:
        """Return query and key of `map`, λ, ε, and from where absolute logits count."""
        return self._with_absolute(MappedHeads(*self.map(query, key), self.lam(), self.softening()), self._map_key)

    def _with_absolute(self, heads: MappedHeads, map_key: Callable[[Tensor], Tensor]) -> MappedHeads:
        """Return the same with origin and logit_shift, where something compares with fixed numbers."""
        if not self.has_origin or (self.is_absolute and self.transform == "none"):
            return heads
        dtype = torch.promote_types(heads.query.dtype, torch.float32)
        if self.is_absolute:
            return heads._replace(origin=map_key(torch.zeros_like(self.shift, dtype=dtype)[:, None, :]))
        origin = map_key(self.origin.to(dtype)[:, None, :])
        return heads._replace(origin=origin, logit_shift=self.logit_shift.to(dtype)[:, None, None])

    def fold(self, query: Tensor, key: Tensor, kept: MappedKeys | None = None) -> MappedHeads:
        """Return what gives the logits of `mapped`, with as little as possible done to keys.

        dist_ε(q·Q/α, α·(k - c)·K) = α^degree·dist_(ε/α)(q·Q/α² + c·K, k·K) for distances of differences: all but K goes
        to the query, so keys in a cache are read as they are. key_heads stay grouped where there is no K. Where keys
        are mapped all the same, `kept` has those that were mapped before.
        """
        degree = get_metric(self.metric).degree
        if self.transform == "none":
            return self.mapped(query, key)
        dtype = torch.promote_types(query.dtype, torch.float32)
        query = query.to(dtype)
        if self.maps_keys:
            map_keys = partial(self._fold_key, groups=query.shape[1] // key.shape[1], dtype=dtype)
            if kept is None or torch.is_grad_enabled():
                key = map_keys(key)
            else:
                names = ("log_alpha", "shift", "key_map") if degree is None else ("key_map",)
                key = kept.update(key, [getattr(self, name) for name in names if hasattr(self, name)], map_keys)
        if degree is None:
            heads = MappedHeads(self._map_query(query), key, self.lam(), self.softening())
            return self._with_absolute(heads, self._map_key)
        factor, shift, lam = self._folded(dtype, degree)
        key_map = self.key_map.to(dtype) if self.transform == "maps" else None
        if key_map is not None:
            query, shift = query @ self.query_map.to(dtype), shift @ key_map
        heads = MappedHeads(torch.addcmul(shift, query, factor), key, lam, self._folded_softening(dtype))
        return self._with_absolute(heads, lambda point: point if key_map is None else point @ key_map)

    def _fold_key(self, key: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
        """Return keys (B, H, M, d) as `fold` gives them, of keys (B, H / groups, M, d)."""
        key = (key.repeat_interleave(groups, dim=1) if groups > 1 else key).to(dtype)
        return self._map_key(key) if get_metric(self.metric).degree is None else key @ self.key_map.to(dtype)

    def _folded_softening(self, dtype: torch.dtype) -> Tensor | None:
        if self.fits_softening:
            return (self.log_softening.to(dtype) - self.log_alpha.to(dtype)).exp()
        return None if self.constant_softening is None else self.constant_softening * (-self.log_alpha.to(dtype)).exp()

    def _folded(self, dtype: torch.dtype, degree: int) -> tuple[Tensor, Tensor, float | Tensor]:
        """Return (1/α² as (H, 1, 1), c as (H, 1, d), λ·α^degree)."""
        # Few operations: a decoding step runs this in every layer, and each costs microseconds whatever its size.
        log_alpha = self.log_alpha.to(dtype)
        if self.constant_lambda is None:
            lam = torch.add(self.log_lambda.to(dtype), log_alpha, alpha=degree).exp()
        else:
            lam = self.constant_lambda * (degree * log_alpha).exp()
        return (-2 * log_alpha).exp()[:, None, None], self.shift.to(dtype)[:, None, :], lam

    def extra_repr(self) -> str:
        return f"metric={self.metric}, heads={self.num_heads}, transform={self.transform}"


class NystromParameters(HeadParameters):
    """The far field of a group of Nyström heads: landmarks, and weights of each key at them.

    q and k as `HeadParameters.map` gives them, w = λ·scaling:
    exp(2w·q·k) ≈ Σ_a exp(2w·q·landmarks_a + landmark_bias_a)·β_a(k)
    β(k) = softmax(k·interpolation_mapᵀ + interpolation_bias)·exp(k·key_gain) >= 0

    It is Nyström's κ(q, L)·β(k) with non-negative weights β, fitted, in place of (κ(L, L) + γI)⁻¹·κ(L, k). Shapes:
    landmarks and interpolation_map (H, m, d), landmark_bias and interpolation_bias (H, m), key_gain (H, d).
    """

    def _add_parameters(self, dtype):
        super()._add_parameters(dtype)
        # False: sinks and window alone, the control that says what the far field is worth; never saved.
        self.far_field = True
        shape = (self.num_heads, self.spec.num_landmarks)
        for name in ("landmarks", "interpolation_map"):
            setattr(self, name, nn.Parameter(torch.empty(*shape, self.head_dim, dtype=dtype)))
        for name in ("landmark_bias", "interpolation_bias"):
            setattr(self, name, nn.Parameter(torch.empty(*shape, dtype=dtype)))
        self.key_gain = nn.Parameter(torch.empty(self.num_heads, self.head_dim, dtype=dtype))

    def reset_parameters(self, scaling: float | None = None) -> None:
        """Draw landmarks from N(0, I), each key to those nearest; the rest as in `HeadParameters`."""
        super().reset_parameters(scaling)
        initialization.normal_(self.landmarks)
        initialization.copy_(self.interpolation_map, self.landmarks.detach() * (scaling or self.head_dim**-0.5))
        for bias in (self.landmark_bias, self.interpolation_bias, self.key_gain):
            initialization.zeros_(bias)

    def features(
        self, query: Tensor, key: Tensor, scaling: float, sink_logit: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (query, key, far_query, far_key) of `HybridInputs` for the model's query and key, at least float32.

        With the sink_logit of the module, broadcastable to (B, H, N, 1), queries end with it and keys with a 0.
        """
        dtype = torch.promote_types(query.dtype, torch.float32)
        query, key = self.map(query.to(dtype), key.to(dtype))
        lam = self.lam()
        weight = scaling * (lam[:, None, None] if isinstance(lam, Tensor) else lam)
        query = plain = 2 * weight * query
        far_query = query @ self.landmarks.to(dtype).mT + self.landmark_bias.to(dtype)[:, None]
        far_key = (key @ self.interpolation_map.to(dtype).mT + self.interpolation_bias.to(dtype)[:, None]).softmax(-1)
        gain = key @ self.key_gain.to(dtype)[..., None]
        if not self.spec.lift:
            # exp(-w·‖k‖²) of the Gaussian kernel: one more column in the exact logits, a factor in the far field.
            norms = weight * key.square().sum(-1, keepdim=True)
            query = torch.cat([query, torch.ones_like(query[..., :1])], dim=-1)
            key, gain = torch.cat([key, -norms], dim=-1), gain - norms
        far_key = far_key * gain.exp()
        if sink_logit is not None:
            sink = sink_logit.to(dtype).expand(*query.shape[:3], 1)
            if not self.is_absolute:
                # Absolute logits count from the origin (see `absolute_shift`), these from ‖q‖².
                origin = self._map_key(self.origin.to(dtype)[:, None])
                origin_norm = weight * origin.square().sum(-1, keepdim=True)
                sink = sink - self.logit_shift.to(dtype)[:, None, None] + plain @ origin.mT - origin_norm
            query, key = torch.cat([query, sink], dim=-1), torch.cat([key, torch.zeros_like(key[..., :1])], dim=-1)
        return query, key, far_query, far_key if self.far_field else torch.zeros_like(far_key)


def spec_of_group(specs: list[AttentionSpec], group: dict) -> AttentionSpec:
    """Return the spec of a group of heads as the config's `distattn` block describes it (see `parse_block`)."""
    spec = specs[group["spec"]]
    return spec.beyond_spec() if group.get("beyond") else spec


def parameters_for(spec: AttentionSpec, num_heads: int, entry: dict) -> HeadParameters:
    """Return the parameters that a spec's mechanism needs in a module, an entry of `find_attention_modules`."""
    kind = NystromParameters if spec.mechanism == "nystrom" else HeadParameters
    return kind(spec, num_heads, entry.get("head_dim"), bool(entry.get("sink") or entry.get("softcap")))


class DistanceAttentionState(nn.Module):
    """The submodule `distattn` of a converted attention module: one group of heads per spec that applies to it."""

    def __init__(self, specs: list[AttentionSpec], entry: dict):
        super().__init__()
        self.num_heads = entry["num_heads"]
        self.head_lists: list[list[int] | None] = [group["heads"] for group in entry["groups"]]
        self.groups = nn.ModuleList(
            parameters_for(spec_of_group(specs, group), self.num_heads if heads is None else len(heads), entry)
            for group, heads in zip(entry["groups"], self.head_lists, strict=True)
        )
        # Set while a conversion calibrates: called in place of the attention, never saved.
        self.observer = None
        # Of the cache in use, a `derived_cache.FirstQueries`: set before each call of a module with retrieval heads.
        self.first_queries = None
        self.is_cross = entry["kind"] == "cross"
        # How long the model's texts may be, where it is known.
        self.max_positions: int | None = None
        # False: nothing was converted, so exact attention is another model and not what the teacher had.
        self.has_teacher = True

    @property
    def is_nystrom(self) -> bool:
        """Whether some heads use Nyström attention."""
        return any(isinstance(group, NystromParameters) for group in self.groups)

    @property
    def is_retrieval(self) -> bool:
        """Whether some heads use retrieval attention."""
        return any(group.spec.mechanism == "retrieval" for group in self.groups)

    @property
    def derives_from_keys(self) -> bool:
        """Whether the attention of some heads is made of more than the keys, which a cache may keep beside them."""
        # Nyström heads have a cache of their own kind.
        return not self.is_nystrom and (self.is_retrieval or any(group.maps_keys for group in self.groups))

    def parts(self) -> list[tuple[list[int], HeadParameters | None]]:
        """Return (heads, their parameters); heads of no spec come last, with None: dot-product attention."""
        all_heads = range(self.num_heads)
        if self.head_lists == [None]:
            return [(list(all_heads), self.groups[0])]
        parts = [(list(all_heads if h is None else h), g) for h, g in zip(self.head_lists, self.groups, strict=True)]
        converted = {head for heads, _ in parts for head in heads}
        unclaimed_heads = [head for head in all_heads if head not in converted]
        return [*parts, (unclaimed_heads, None)] if unclaimed_heads else parts


# ------------------------------------------------------ options that no fit depends on: set on a converted model


def check_backend(spec: AttentionSpec) -> None:
    """Raise `ValueError` for a backend that does not exist or cannot run the spec's metric."""
    metric = get_metric(spec.metric)
    if validate_backend(spec.backend) == "sdpa" and not metric.has_dot_form:
        raise ValueError(f"backend 'sdpa' cannot run metric {metric.name!r}: it has no dot-product form; use 'auto'")


def with_options(specs: list[AttentionSpec], options: dict[str, Any]) -> list[AttentionSpec]:
    """Return `change_specs` of the specs; an impossible backend raises `ValueError`, too."""
    changed = change_specs(specs, options)
    for spec in changed:
        check_backend(spec)
    return changed


def set_options(config, options: dict[str, Any]) -> None:
    """Set options in the `distattn` block of a converted model's config; raises as `with_options`, before that."""
    specs = with_options(config.attention_specs, options)
    config.distattn = {**config.distattn, "specs": [spec.to_dict() for spec in specs]}
