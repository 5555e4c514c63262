"""`AttentionSpec`: the settings of a conversion, stored in the checkpoint's config. Needs no torch."""

import math
import re
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import transformers

from .registry import MECHANISMS, warn_unless_known, with_known_fields

# The releases of transformers that this code was tested with.
OLDEST_TESTED, NEWEST_TESTED = "5.23.0", "5.24.0"

BLOCK_VERSION = 1
TRANSFORMS = ("none", "scalar", "maps")
ATTENTION_KINDS = ("self", "cross")
BEYOND = ("retrieval", "exact")
# Fields of retrieval that a Nyström spec with beyond="retrieval" has, too.
OF_BLOCKS = {"block_size": 16, "num_blocks": 64, "min_weight": 0.003, "far_field": True, "cluster_keys": True}
# Each option that no fit depends on, and the mechanisms that have it (see `has_option`).
OPTIONS = {
    "exact_below": ("nystrom",),
    "window_size": ("nystrom", "retrieval"),
    "backend": ("distance",),
    **dict.fromkeys(("num_sinks", *OF_BLOCKS), ("retrieval",)),
}
# Values of transformers' `config.layer_types` that `AttentionSpec(layers=...)` takes.
LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
# The metric sqeuclidean and its aliases.
SQUARED_NAMES = ("sqeuclidean", "squared_l2", "l2_squared")
# The fields of each mechanism and their defaults; what stays None is for `convert` to decide.
_OWN = {
    "distance": {},
    "nystrom": {
        "num_landmarks": 64, "landmarks": "kmeans", "window_size": 64, "num_sinks": 4, "exact_below": None,
        "beyond": None,
    },
    "retrieval": {"window_size": 64, "num_sinks": 4, **OF_BLOCKS},
}  # fmt: skip
_LEAST = {
    "num_landmarks": 1, "window_size": 0, "num_sinks": 0, "exact_below": 0,
    "block_size": 1, "num_blocks": 0,
}  # fmt: skip


def version_note() -> str:
    """Say which transformers this code was tested with, and which one is here."""
    return (
        f"distattn_hf was tested with transformers {OLDEST_TESTED} to {NEWEST_TESTED}, and this is "
        f"{transformers.__version__}"
    )


def is_newer_than_tested() -> bool:
    """Return whether the installed transformers is of a later minor version than the newest tested one."""

    def minor(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in version.split(".")[:2])

    return minor(transformers.__version__) > minor(NEWEST_TESTED)


@with_known_fields
@dataclass(frozen=True)
class AttentionSpec:
    """Settings of the attention that replaces dot-product attention, and of the layers and heads it applies to.

    Logits are -λ_h·scaling·dist(T_q q, T_k (k - c)) with `scaling` the model's own (1/√d for most, 1 for T5).

    Args:
        metric: name of a registered metric or an alias ("l2", "l1", "sqeuclidean", "lp", "cosine", "chebyshev", ...).
        mechanism: "distance" (exact), "nystrom" (constant memory, metric "sqeuclidean" only), or "retrieval" (all keys
            kept, few read): the fields from `num_landmarks` on are theirs.
        p: order of "lp", p >= 1; None for every other metric.
        lam: λ > 0 at the start, for all heads. None: the metric's default, or what calibration fits.
        learnable_lambda: λ of each head is a parameter (stored as log λ). False with a given `lam`: a plain constant.
        transform: the freedoms dot-product attention has and a distance has not, per head. "scalar": query / α and
            α·(key - c). "maps" (once "linear", which is still read): also a (d, d) map on each side. "none": neither.
            None: what the initialisation needs ("none" for exact and plain; for calibrated, "scalar" where ε is
            fitted and for sqeuclidean and l2, "maps" for every other metric).
        softening: ε of l2, l1, lp, chebyshev and cosine, below which the distance is quadratic (see softening.py).
            0: the plain distance; a number: that ε in every head; "fit": one a head, which calibration fits and
            training trains. None: what the initialisation needs ("fit" for calibrated, 0 for exact and plain).
        lift: sqeuclidean only: keys are lifted by one dimension onto a sphere, √(R² - ‖k‖²). The attention is then
            Euclidean attention in d + 1 dimensions and equals dot-product attention. None: True for "nystrom" and
            "retrieval", which then approximate the teacher's own softmax, and False for "distance".
        layers: which layers: None (all; with "retrieval" all of full_attention), a list of indices, a pattern ("0-5",
            "0,2,4-7", or a glob on module names such as "encoder.*"), or a type of the model's `config.layer_types`:
            "full_attention", "sliding_attention" or "chunked_attention".
        heads: which query heads: None (all) or a list of indices; the others keep dot-product attention.
        attention: None (all), "self" or "cross".
        backend: "auto", "cpp", "sdpa", "triton", "chunked" or "reference".
        num_landmarks: m >= 1, landmarks per head; the state of a causal head is m·(d_v + 1) numbers. Default 64.
        landmarks: the strategy that chooses them before they are fitted (see `select_landmarks`). Default "kmeans".
        window_size: keys seen exactly: the last ones, the query's own included, when causal; those at a smaller
            distance in both directions otherwise. None in cross-attention. Default 64.
        num_sinks: first tokens seen exactly by every later query; of "retrieval" the blocks that hold them. Default 4.
        exact_below: a query that may see at most so many keys (padding not counted) attends to all of them exactly; a
            cache keeps that many keys before it takes its constant size. 0: none does. None: `convert` decides, 2,048
            where the model takes longer texts (exact attention loses nothing there, for some time and memory), else 0;
            without a conversion, and in `distattn adapt`, which trains what lies beyond, it means 0.
        block_size: keys that "retrieval" finds and reads together. Default 16.
        num_blocks: blocks a query reads besides sinks and window, at most, chosen for each key head. Default 64.
        min_weight: the share of a query's weight, 0 to 1, that one key of a block must have for the block to be read,
            as far as the search says: heads that look at few keys read few. 0: num_blocks are, and so they are
            across sequences, beside a position bias and under a cap. Default 0.003.
        far_field: whether each block that a "retrieval" query does not read still counts, as one key that stands for it
            (see retrieval_far.py; not across sequences, beside a position bias or under a cap). Default True.
        cluster_keys: whether older keys stand in blocks by their likeness, found by their means (retrieval_order.py;
            causal, not beside a position bias or under a cap), or as in the text. Default True.
        beyond: what heads of "nystrom" use whose far field loses too much (see `CalibrationOptions`), by the teacher's
            own logits and with all keys of their key head in the cache. "retrieval": retrieval attention (block_size,
            num_blocks, min_weight, and window_size and num_sinks as they are) at any length, for whole key heads.
            "exact": dot-product attention, for each query head by itself. None: `convert` takes "retrieval" where there
            are any.

    Raises:
        ValueError: naming the field, its value and what is allowed. Metric names are checked by `convert`, and when a
            model is built, as one may be registered later; a name that looks misspelt is warned of.
    """

    metric: str = "sqeuclidean"
    mechanism: str = "distance"
    p: float | None = None
    lam: float | None = None
    learnable_lambda: bool = True
    transform: str | None = None
    lift: bool | None = None
    layers: tuple[int, ...] | str | None = None
    heads: tuple[int, ...] | None = None
    attention: str | None = None
    backend: str = "auto"
    num_landmarks: int | None = None
    landmarks: str | None = None
    window_size: int | None = None
    num_sinks: int | None = None
    exact_below: int | None = None
    softening: float | str | None = None
    block_size: int | None = None
    num_blocks: int | None = None
    min_weight: float | None = None
    far_field: bool | None = None
    cluster_keys: bool | None = None
    beyond: str | None = None

    def __post_init__(self):
        if not isinstance(self.metric, str) or not self.metric:
            raise ValueError(f"metric must be a metric's name (str), got {self.metric!r}")
        warn_unless_known("metric", self.metric)
        if self.mechanism not in MECHANISMS:
            raise ValueError(f"mechanism must be one of {', '.join(MECHANISMS)}, got {self.mechanism!r}")
        if self.p is not None:
            if not _is_number(self.p) or not 1 <= self.p < math.inf:
                raise ValueError(f"p must be a finite number >= 1, got {self.p!r}")
            object.__setattr__(self, "p", float(self.p))
        if self.lam is not None:
            if not _is_number(self.lam) or not 0 < self.lam < math.inf:
                raise ValueError(f"lam (λ) must be a positive finite number, got {self.lam!r}")
            object.__setattr__(self, "lam", float(self.lam))
        if self.transform == "linear":
            object.__setattr__(self, "transform", "maps")
        if self.transform is not None and self.transform not in TRANSFORMS:
            raise ValueError(f"transform must be one of {', '.join(TRANSFORMS)} or None, got {self.transform!r}")
        if self.softening is not None and self.softening != "fit":
            if not _is_number(self.softening) or not 0 <= self.softening < math.inf:
                raise ValueError(f"softening (ε) must be a finite number >= 0, 'fit' or None, got {self.softening!r}")
            object.__setattr__(self, "softening", float(self.softening))
        if self.softening and self.metric in SQUARED_NAMES:
            where = f"metric {self.metric!r}" if self.mechanism == "distance" else f"mechanism {self.mechanism!r}"
            raise ValueError(
                f"softening must be None or 0 with {where}, which is quadratic already, got {self.softening!r}"
            )
        if self.lift is None:
            # For another metric, `_check_nystrom` says what is wrong.
            object.__setattr__(self, "lift", self.mechanism != "distance" and self.metric in SQUARED_NAMES)
        for name in ("learnable_lambda", "lift"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.lift and self.metric not in SQUARED_NAMES:
            raise ValueError(f"lift=True needs metric 'sqeuclidean', got {self.metric!r}")
        if self.attention is not None and self.attention not in ATTENTION_KINDS:
            raise ValueError(f"attention must be 'self', 'cross' or None (both), got {self.attention!r}")
        if not isinstance(self.backend, str):
            raise ValueError(f"backend must be a backend's name (str), got {self.backend!r}")
        for name in ("layers", "heads"):
            object.__setattr__(self, name, _indices(name, getattr(self, name), pattern_allowed=name == "layers"))
        self._check_own()
        if self.mechanism == "nystrom":
            self._check_nystrom()
        if self.mechanism == "retrieval" and self.window_size < 1:
            raise ValueError(
                f"window_size must be an integer >= 1 with mechanism='retrieval', got {self.window_size!r}"
            )
        if self.mechanism != "distance":
            self._check_kept()

    def _check_own(self):
        """Set the defaults of the mechanism's fields and check their values."""
        defaults = {**_OWN[self.mechanism], **(OF_BLOCKS if self.beyond == "retrieval" else {})}
        for name in {name: None for own in _OWN.values() for name in own}:
            value = getattr(self, name)
            if name not in defaults:
                if value is not None:
                    owners = [f"mechanism={mechanism!r}" for mechanism in MECHANISMS if name in _OWN[mechanism]]
                    if name in OF_BLOCKS and self.mechanism == "nystrom":
                        owners.append("beyond='retrieval'")
                    where = " or ".join(owners)
                    raise ValueError(f"{name} belongs to {where}, got {name}={value!r} with {self.mechanism!r}")
                continue
            object.__setattr__(self, name, value := defaults[name] if value is None else value)
            if value is None:
                continue
            if name == "beyond":
                if value not in BEYOND:
                    raise ValueError(f"beyond must be one of {', '.join(BEYOND)} or None, got {value!r}")
            elif name == "landmarks":
                if not isinstance(value, str) or not value:
                    raise ValueError(f"landmarks must be a strategy's name (str), got {value!r}")
            elif name in ("far_field", "cluster_keys"):
                if not isinstance(value, bool):
                    raise ValueError(f"{name} must be True, False or None, got {value!r}")
            elif name == "min_weight":
                if not _is_number(value) or not 0 <= value < 1:
                    raise ValueError(f"min_weight must be a number from 0 to below 1, got {value!r}")
                object.__setattr__(self, name, float(value))
            elif isinstance(value, bool) or not isinstance(value, int) or value < _LEAST[name]:
                raise ValueError(f"{name} must be an integer >= {_LEAST[name]}, got {value!r}")

    def beyond_spec(self) -> "AttentionSpec":
        """Return the spec of those heads of a Nyström spec that use retrieval attention in its place."""
        return AttentionSpec(
            mechanism="retrieval", window_size=max(1, self.window_size), num_sinks=self.num_sinks,
            block_size=self.block_size, num_blocks=self.num_blocks, min_weight=self.min_weight,
            far_field=self.far_field, cluster_keys=self.cluster_keys,
        )  # fmt: skip

    def has_option(self, name: str) -> bool:
        """Return whether `name` is one of `OPTIONS` that this spec has."""
        return self.mechanism in OPTIONS.get(name, ()) or (name in OF_BLOCKS and self.beyond == "retrieval")

    def _check_nystrom(self):
        if self.metric not in SQUARED_NAMES:
            raise ValueError(f"mechanism='nystrom' needs metric 'sqeuclidean' (a Gaussian kernel), got {self.metric!r}")
        if self.transform == "maps":
            raise ValueError("transform must be 'none', 'scalar' or None with mechanism='nystrom', got 'maps'")

    def _check_kept(self):
        """Check what a mechanism with kernels of its own, and the lift, decide themselves."""
        if self.backend != "auto":
            raise ValueError(f"backend must be 'auto' with mechanism={self.mechanism!r}, got {self.backend!r}")
        if self.lift and (self.lam not in (None, 0.5) or self.transform not in (None, "none")):
            raise ValueError(
                f"mechanism={self.mechanism!r} with lift=True sets lam=0.5 and transform='none', got lam={self.lam!r}, "
                f"transform={self.transform!r}"
            )
        if self.lift:
            for name, value in (("lam", 0.5), ("learnable_lambda", False), ("transform", "none")):
                object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable dict that `from_dict` turns back into an equal spec."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "AttentionSpec":
        """Return the spec described by `data`; raises `ValueError` for a key that is not a field."""
        if not isinstance(data, dict):
            raise ValueError(f"an AttentionSpec in a config must be a dict like {{'metric': 'l2'}}, got {data!r}")
        return cls(**data)

    def matches_layer(self, layer: int | None, name: str, layer_type: str = "full_attention") -> bool:
        """Return whether `layers` selects the attention module `name` of number `layer` and type `layer_type`."""
        if self.layers is None:
            # A layer that sees a window alone has nothing to retrieve: it stays as it is.
            return self.mechanism != "retrieval" or layer_type == "full_attention"
        if self.layers in LAYER_TYPES:
            return layer_type == self.layers
        if isinstance(self.layers, tuple):
            return layer in self.layers
        return layer_pattern_matches(self.layers, layer, name)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _indices(field: str, value, pattern_allowed: bool):
    if isinstance(value, str) and re.fullmatch(r"[\d\s,-]+", value):
        # Digits only: raise for a mistake in the numbers, rather than match nothing as a glob.
        numbers = numeric_pattern(value)
        if not numbers:
            raise ValueError(f"{field} must be numbers and ranges such as '0-2,5', got {value!r}")
        return value if pattern_allowed else tuple(sorted(numbers))
    if value is None or (pattern_allowed and isinstance(value, str) and value):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        value = (value,)
    pattern = "a pattern such as '0-5' or 'encoder.*'" if pattern_allowed else "numbers such as '0-5'"
    kinds = f"a list of indices >= 0 or {pattern}"
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise ValueError(f"{field} must be None, {kinds}, got {value!r}")
    value = tuple(value)
    if not value or any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in value):
        raise ValueError(f"{field} must be None, {kinds} (not empty), got {list(value)!r}")
    return tuple(sorted(set(value)))


def numeric_pattern(pattern: str) -> set[int] | None:
    """Return the numbers of a pattern, {0, 1, 2, 5} for "0-2,5"; None when it is not made of numbers and ranges."""
    if not re.fullmatch(r"\s*\d+(\s*-\s*\d+)?(\s*,\s*\d+(\s*-\s*\d+)?)*\s*", pattern):
        return None
    chosen: set[int] = set()
    for part in pattern.split(","):
        first, _, last = part.partition("-")
        chosen.update(range(int(first), int(last or first) + 1))
    return chosen


def layer_pattern_matches(pattern: str, layer: int | None, name: str) -> bool:
    """Return whether a number pattern ("0-5") holds `layer`, or a glob ("encoder.*") matches the name."""
    numbers = numeric_pattern(pattern)
    return layer in numbers if numbers is not None else fnmatchcase(name, pattern)


def _saved_spec(data: dict[str, Any]) -> AttentionSpec:
    """Return the spec in a config; what was saved before a field of retrieval was there is read as it was meant."""
    if isinstance(data, dict) and data.get("num_blocks") is not None:
        data = {"min_weight": 0.0, "cluster_keys": False, **data}
    return AttentionSpec.from_dict(data)


def parse_block(block: dict[str, Any] | None) -> dict[str, Any] | None:
    """Check the `distattn` block of a config and return it in canonical form; raises `ValueError` naming the key.

    Keys: version; specs (list of `AttentionSpec` dicts); modules (None: chosen when the model is built; otherwise
    {attention module's name relative to the base model: {"num_heads", "head_dim", "kind", "layer",
    "groups": [{"spec": index, "heads": None or list}]}}, with "beyond": True for heads that retrieve by the spec's
    `beyond`); fallback (attention implementation of what is not converted); init; queries_scaled (True where
    `fold_alpha` has changed query projections, else absent); base (of adapter checkpoints: see base_weights.py).
    """
    if block is None:
        return None
    if not isinstance(block, dict):
        raise ValueError(f"distattn must be a dict, got {type(block).__name__}")
    allowed = {"version", "specs", "modules", "fallback", "init", "queries_scaled", "base"}
    if unknown := sorted(set(block) - allowed):
        raise ValueError(f"unknown key {unknown[0]!r} in the distattn block; expected {', '.join(sorted(allowed))}")
    version = block.get("version", BLOCK_VERSION)
    if version != BLOCK_VERSION:
        raise ValueError(
            f"this checkpoint's distattn block has version {version!r}, this distattn_hf reads {BLOCK_VERSION}; "
            "install a matching release of distattn_hf"
        )
    specs = [s if isinstance(s, AttentionSpec) else _saved_spec(s) for s in block.get("specs") or []]
    if not specs:
        raise ValueError("the distattn block holds no specs; give at least one AttentionSpec")
    return {
        "version": BLOCK_VERSION,
        "specs": [spec.to_dict() for spec in specs],
        "modules": block.get("modules"),
        "fallback": block.get("fallback") or "sdpa",
        "init": block.get("init") or "plain",
        **({"queries_scaled": True} if block.get("queries_scaled") else {}),
        **({"base": _checked_base(block["base"])} if block.get("base") else {}),
    }


def change_specs(specs: list[AttentionSpec], options: dict[str, Any]) -> list[AttentionSpec]:
    """Return the specs with the options that their mechanism has.

    Raises `ValueError` for an option that a fit depends on, that none of the specs has, or whose value cannot be; and
    for a window_size below what the far field was fitted beside.
    """
    for name, value in options.items():
        if name not in OPTIONS:
            raise ValueError(f"{name} cannot be set on a converted model; expected one of {', '.join(OPTIONS)}")
        owners = [spec for spec in specs if spec.has_option(name)]
        if not owners:
            named = " or ".join(map(repr, OPTIONS[name]))
            raise ValueError(f"{name}={value!r} belongs to mechanism={named}, which this model does not have")
        if value is None:
            raise ValueError(f"{name} must have a value, got None")
        least = max((s.window_size for s in owners if s.mechanism == "nystrom"), default=0)
        if name == "window_size" and isinstance(value, int) and value < least:
            raise ValueError(
                f"window_size must be an integer >= {least}, which the far field was fitted beside, got {value!r}; "
                "`distattn adapt` trains a model to a smaller one"
            )
    return [replace(spec, **{n: v for n, v in options.items() if spec.has_option(n)}) for spec in specs]


def _checked_base(entry: Any) -> dict[str, Any]:
    needed = ("name", "class", "dtype", "sha256")
    if not isinstance(entry, dict) or any(not isinstance(entry.get(key), str) for key in needed):
        raise ValueError(f"distattn.base must hold texts for {', '.join(needed)}, got {entry!r}")
    return dict(entry)
