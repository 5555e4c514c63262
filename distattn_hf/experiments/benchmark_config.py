"""What `distattn benchmark` measures: its options, checked before anything runs, and the list of cases they make."""

import itertools
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import yaml

from ..core.backends import validate_backend
from ..core.metrics import METRICS, get_metric

PASSES = ("forward", "forward_backward", "decode")
DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float64")}
_CAUSAL = {"false": (False,), "true": (True,), "both": (False, True)}
# Shorter sequences measure the dispatch of a call, and the check has too few rows.
_SHORTEST = 16


@dataclass(frozen=True)
class Case:
    """One problem to measure: the metric `name` of order `p` on `backend`, in one shape, dtype and pass.

    `length` is N = M, or for decode the number of keys M that one query sees. Tensors are query (batch, heads, N,
    head_size), key and value (batch, kv_heads, M, head_size).
    """

    metric: str
    p: float | None
    backend: str
    pass_name: str
    length: int
    head_size: int
    dtype: str
    causal: bool
    batch: int
    heads: int
    kv_heads: int
    device: str
    seed: int

    @property
    def label(self) -> str:
        """The metric as the options write it: "l1", "lp3"."""
        return self.metric if self.p is None else f"{self.metric}{self.p:g}"

    @property
    def queries(self) -> int:
        """N: 1 in decoding."""
        return 1 if self.pass_name == "decode" else self.length


@dataclass(frozen=True)
class BenchmarkConfig:
    """The options of `distattn benchmark`; the keys of its YAML file and, with dashes, its command-line options.

    Args:
        metrics: names or aliases; lp with its order, as in "lp3" or "lp1.5".
        backends: "auto" or names; one that cannot run a case is listed as skipped with its reason.
        passes: "forward" (no gradient), "forward_backward", "decode" (one query, no gradient).
        lengths: N = M of forward and forward_backward.
        decode_lengths: keys that the one query of decode sees.
        head_sizes: d, of query, key and value.
        heads: query heads.
        kv_heads: key heads, a divisor of `heads`; None: as many.
        batch: sequences.
        dtypes: "float32", "float16", "bfloat16", "float64".
        causal: False, True or "both".
        device: "auto" (a GPU when there is one), "cpu" or "cuda".
        repeats: pairs of (PyTorch's attention, ours) that are timed at least.
        warmup: untimed calls of each before.
        min_seconds: keep adding pairs until so many seconds are sampled.
        max_seconds: start no further pair of a case after so many seconds, even if `repeats` is not reached.
        naive: also time `torch.cdist` + softmax + matmul.
        naive_max_length: not above this length (its weights are N·M numbers several times over); decode always.
        memory: also measure peak memory.
        threads: CPU threads of PyTorch; None: its own choice.
        seed: of the random inputs and of the order within each pair.
        out: the folder that gets benchmark.json and the plots.
        plot: whether to draw them.
    """

    metrics: tuple[str, ...] = ("sqeuclidean", "cosine", "l2", "l1", "chebyshev", "lp3")
    backends: tuple[str, ...] = ("auto",)
    passes: tuple[str, ...] = PASSES
    lengths: tuple[int, ...] = (512, 1024, 2048)
    decode_lengths: tuple[int, ...] = (4096,)
    head_sizes: tuple[int, ...] = (64,)
    heads: int = 12
    kv_heads: int | None = None
    batch: int = 1
    dtypes: tuple[str, ...] = ("float32",)
    causal: bool | str = False
    device: str = "auto"
    repeats: int = 10
    warmup: int = 2
    min_seconds: float = 0.5
    max_seconds: float = 120.0
    naive: bool = True
    naive_max_length: int = 2048
    memory: bool = True
    threads: int | None = None
    seed: int = 0
    out: str = "out/benchmark"
    plot: bool = True

    def __post_init__(self):
        def store(name, value):
            object.__setattr__(self, name, value)

        parsed = [parse_metric(name) for name in _items(self.metrics, "metrics", str)]
        store("metrics", _unique(metric if p is None else f"{metric}{p:g}" for metric, p in parsed))
        store("backends", _unique(validate_backend(name) for name in _items(self.backends, "backends", str)))
        for name, allowed in (("passes", PASSES), ("dtypes", tuple(DTYPES))):
            store(name, _unique(_choice(item, name, allowed) for item in _items(getattr(self, name), name, str)))
        for name, least in (("lengths", _SHORTEST), ("decode_lengths", _SHORTEST), ("head_sizes", 1)):
            values = [_number(item, name, int, least) for item in _items(getattr(self, name), name, int)]
            store(name, _unique(values))
        for name, kind, least in (
            ("heads", int, 1), ("batch", int, 1), ("repeats", int, 1), ("warmup", int, 0), ("naive_max_length", int, 0),
            ("seed", int, 0), ("min_seconds", float, 0), ("max_seconds", float, 0),
        ):  # fmt: skip
            store(name, _number(getattr(self, name), name, kind, least))
        for name in ("kv_heads", "threads"):
            store(name, None if getattr(self, name) is None else _number(getattr(self, name), name, int, 1))
        for name in ("naive", "memory", "plot"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        store("causal", _choice(str(self.causal).lower(), "causal", tuple(_CAUSAL)))
        store("device", _device(self.device))
        if not isinstance(self.out, str) or not self.out:
            raise ValueError(f"out must be a folder, got {self.out!r}")
        if self.heads % self.key_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")

    @property
    def key_heads(self) -> int:
        """H_kv."""
        return self.kv_heads or self.heads

    def cases(self) -> list[Case]:
        """Every case, those of one shape together; one query sees all keys, so decode has no causal variant."""
        result = []
        for dtype, head_size, pass_name in itertools.product(self.dtypes, self.head_sizes, self.passes):
            decode = pass_name == "decode"
            for causal, length, metric, backend in itertools.product(
                (False,) if decode else _CAUSAL[self.causal],
                self.decode_lengths if decode else self.lengths,
                self.metrics,
                self.backends,
            ):
                name, p = parse_metric(metric)
                result.append(
                    Case(
                        name,
                        p,
                        backend,
                        pass_name,
                        length,
                        head_size,
                        dtype,
                        causal,
                        self.batch,
                        self.heads,
                        self.key_heads,
                        self.device,
                        self.seed,
                    )  # fmt: skip
                )
        return result


def read_config(path: str | Path | None) -> dict:
    """The options in a YAML file, none without a file; raises `ValueError` for one that is absent or no mapping."""
    if path is None:
        return {}
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"config {str(path)!r} does not exist")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"config {str(path)!r} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise ValueError(f"config {str(path)!r} must hold a mapping of options, got {type(values).__name__}")
    return values


def load_config(path: str | Path | None, overrides: dict | None = None) -> BenchmarkConfig:
    """The options of a YAML file (None: the defaults), with those of `overrides` that are not None in their place.

    Raises `ValueError` for a file that is absent or no mapping, for an unknown key and for a value out of range.
    """
    values = {**read_config(path), **{name: value for name, value in (overrides or {}).items() if value is not None}}
    if values.pop("mechanism", "distance") != "distance":
        raise ValueError("these are options of another mechanism than distance")
    allowed = [field.name for field in fields(BenchmarkConfig)]
    if unknown := [str(name) for name in values if name not in allowed]:
        raise ValueError(f"unknown benchmark option {', '.join(unknown)}; expected one of {', '.join(allowed)}")
    return BenchmarkConfig(**values)


def parse_metric(text: str) -> tuple[str, float | None]:
    """(canonical name, p) of "l1", "euclidean", "lp3", "lp1.5", "minkowski2"; raises `ValueError` naming the fault."""
    name, p = text, None
    if text not in METRICS and (found := re.fullmatch(r"([a-z_]+?)(\d+(?:\.\d+)?)", text.lower())):
        name, p = found[1], float(found[2])
        if name not in METRICS or get_metric(name).name != "lp":
            name, p = text, None
    metric = get_metric(name)
    if metric.name == "lp" and p is None:
        raise ValueError(f"metric {text!r} needs its order: write lp3 or lp1.5")
    return metric.name, metric.validate(p)


def _items(value, name: str, kind: type) -> list:
    """A list from a list, one value, or "a,b,c"; raises `ValueError` when it is empty."""
    if isinstance(value, str):
        value = [item.strip() for item in value.split(",") if item.strip()]
    items = list(value) if isinstance(value, list | tuple) else [value]
    if not items:
        raise ValueError(f"{name} must name at least one")
    if kind is str and not all(isinstance(item, str) for item in items):
        raise ValueError(f"{name} must be names, got {value!r}")
    return items


def _unique(values) -> tuple:
    return tuple(dict.fromkeys(values))


def _choice(value, name: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def _number(value, name: str, kind: type, least: float):
    """`value` (a number or its text) as int or float, at least `least`."""
    try:
        if isinstance(value, bool) or (kind is int and isinstance(value, float) and value != int(value)):
            raise ValueError
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not least <= number < math.inf:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} must be {what} >= {least}, got {value!r}")
    return number


def _device(name) -> str:
    """ "cpu" or "cuda"; raises `ValueError` when there is no GPU to run on."""
    _choice(name, "device", ("auto", "cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but PyTorch sees no GPU; use device cpu or auto")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
