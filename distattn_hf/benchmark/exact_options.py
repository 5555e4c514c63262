"""The options of `distattn benchmark`, checked before anything runs, and the cases that they define."""

import itertools
import re
from dataclasses import dataclass

import torch

from ..core.backends import validate_backend
from ..core.metrics import METRICS, get_metric
from ..core.softening import check_softening
from .fields import CAUSAL, SHORTEST_LENGTH, check_shared, choices, flag, items, number, numbers, store, unique

PASSES = ("forward", "forward_backward", "decode")
DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float64")}


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
    softening: float = 0.0
    softcap: float = 0.0

    @property
    def label(self) -> str:
        """The metric as the options write it, "l1", "lp3", and what is done to it: "l1 ε 5", "l1 cap 30"."""
        name = self.metric if self.p is None else f"{self.metric}{self.p:g}"
        changes = (("ε", self.softening), ("cap", self.softcap))
        return " ".join([name, *(f"{what} {value:g}" for what, value in changes if value)])

    @property
    def problem(self) -> dict:
        """What `distance_attention` computes: its arguments beside tensors, causality and backend."""
        cap = self.softcap or None
        return {"metric": self.metric, "p": self.p, "softening": self.softening, "softcap": cap}

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
        softening: ε of all metrics, which must take one; 0: the plain distances. softcap: the cap on logits; 0: none.
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
    softening: float = 0.0
    softcap: float = 0.0
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
        metrics = [parse_metric(name) for name in items(self.metrics, "metrics", str)]
        store(
            self,
            metrics=unique(metric if p is None else f"{metric}{p:g}" for metric, p in metrics),
            backends=unique(validate_backend(name) for name in items(self.backends, "backends", str)),
            passes=choices(self.passes, "passes", PASSES),
            lengths=numbers(self.lengths, "lengths", SHORTEST_LENGTH),
            decode_lengths=numbers(self.decode_lengths, "decode_lengths", SHORTEST_LENGTH),
            head_sizes=numbers(self.head_sizes, "head_sizes", 1),
            kv_heads=None if self.kv_heads is None else number(self.kv_heads, "kv_heads", int, 1),
            dtypes=choices(self.dtypes, "dtypes", tuple(DTYPES)),
            softening=number(self.softening, "softening", float, 0),
            softcap=number(self.softcap, "softcap", float, 0),
            naive=flag(self.naive, "naive"),
            naive_max_length=number(self.naive_max_length, "naive_max_length", int, 0),
        )
        check_shared(self)
        for name in self.metrics:
            check_softening(get_metric(parse_metric(name)[0]), self.softening)
        if self.heads % self.key_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")

    @property
    def key_heads(self) -> int:
        """H_kv."""
        return self.kv_heads or self.heads

    def cases(self) -> list[Case]:
        """Return every case, grouped by shape; one query sees all keys, so decode has no causal variant."""
        result = []
        for dtype, head_size, pass_name in itertools.product(self.dtypes, self.head_sizes, self.passes):
            forms, lengths = CAUSAL[self.causal], self.lengths
            if pass_name == "decode":
                forms, lengths = (False,), self.decode_lengths
            for causal, length, metric, backend in itertools.product(forms, lengths, self.metrics, self.backends):
                problem = (*parse_metric(metric), backend, pass_name, length, head_size, dtype, causal)
                sizes = (self.batch, self.heads, self.key_heads, self.device, self.seed)
                result.append(Case(*problem, *sizes, self.softening, self.softcap))
        return result


def parse_metric(text: str) -> tuple[str, float | None]:
    """Parse "l1", "euclidean", "lp3", "lp1.5", "minkowski2" to (canonical name, p); raises `ValueError` otherwise."""
    name, p = text, None
    if text not in METRICS and (match := re.fullmatch(r"([a-z_]+?)(\d+(?:\.\d+)?)", text.lower())):
        name, p = match[1], float(match[2])
        if name not in METRICS or get_metric(name).name != "lp":
            name, p = text, None
    metric = get_metric(name)
    if metric.name == "lp" and p is None:
        raise ValueError(f"metric {text!r} needs its order: write lp3 or lp1.5")
    return metric.name, metric.validate(p)
