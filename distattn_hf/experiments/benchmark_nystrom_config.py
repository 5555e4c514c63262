"""What `distattn benchmark --mechanism nystrom` measures: its options, checked before anything runs, and its cases."""

import itertools
from dataclasses import dataclass, fields

from ..core.landmarks import STRATEGIES
from .benchmark_config import _CAUSAL, _SHORTEST, _choice, _device, _items, _number, _unique

PASSES = ("forward", "forward_backward")
PEERS = ("transformers", "nystrom-attention", "performer")


@dataclass(frozen=True)
class NystromCase:
    """One problem: query, key, value (batch, heads, length, head_size) in float32 and one pass over them."""

    causal: bool
    pass_name: str
    length: int
    batch: int
    heads: int
    head_size: int
    num_landmarks: int
    window_size: int
    num_sinks: int
    device: str
    seed: int


@dataclass(frozen=True)
class NystromConfig:
    """The options of `distattn benchmark --mechanism nystrom`; the keys of its YAML file.

    Args:
        mechanism: "nystrom".
        lengths: N = M.
        causal: False, True or "both".
        passes: "forward" (no gradient), "forward_backward".
        strategies: of landmarks; ours is measured with each.
        peers: other packages' linear attention that is measured beside, at as many landmarks or features.
        num_landmarks: m.
        window_size: keys that the causal form sees exactly. The bidirectional form has no window.
        num_sinks: first keys that the causal form sees exactly.
        heads, head_size, batch: the shape, H, d and B.
        device: "auto", "cpu" or "cuda".
        sdpa_max_length: no time of scaled_dot_product_attention above this length.
        error_max_length: no error against exact attention above this length.
        repeats, warmup, min_seconds, max_seconds: of a pair of timed calls: see `BenchmarkConfig`.
        memory: also measure peak memory (CPU).
        threads: CPU threads of PyTorch; None: its own choice.
        seed: of the inputs.
        out: the folder that gets benchmark.json and the plots.
        plot: whether to draw them.
    """

    mechanism: str = "nystrom"
    lengths: tuple[int, ...] = (1024, 4096, 16384)
    causal: bool | str = "both"
    passes: tuple[str, ...] = ("forward",)
    strategies: tuple[str, ...] = ("segment_means", "kmeans_sample", "kmeans")
    peers: tuple[str, ...] = PEERS
    num_landmarks: int = 64
    window_size: int = 64
    num_sinks: int = 4
    heads: int = 8
    head_size: int = 64
    batch: int = 1
    device: str = "auto"
    sdpa_max_length: int = 16384
    error_max_length: int = 65536
    repeats: int = 5
    warmup: int = 1
    min_seconds: float = 0.3
    max_seconds: float = 60.0
    memory: bool = True
    threads: int | None = None
    seed: int = 0
    out: str = "out/benchmark-nystrom"
    plot: bool = True

    def __post_init__(self):
        def store(name, value):
            object.__setattr__(self, name, value)

        store("mechanism", _choice(self.mechanism, "mechanism", ("nystrom",)))
        store("passes", _unique(_choice(item, "passes", PASSES) for item in _items(self.passes, "passes", str)))
        strategies = _items(self.strategies, "strategies", str)
        for name in strategies:
            STRATEGIES.get(name)
        store("strategies", _unique(strategies))
        # No peers is a choice too.
        peers = _items(self.peers, "peers", str) if self.peers else []
        store("peers", _unique(_choice(item, "peers", PEERS) for item in peers))
        lengths = [_number(item, "lengths", int, _SHORTEST) for item in _items(self.lengths, "lengths", int)]
        store("lengths", tuple(sorted(set(lengths))))
        for name, kind, least in (
            ("num_landmarks", int, 1), ("window_size", int, 0), ("num_sinks", int, 0), ("heads", int, 1),
            ("head_size", int, 1), ("batch", int, 1), ("sdpa_max_length", int, 0), ("error_max_length", int, 0),
            ("repeats", int, 1), ("warmup", int, 0), ("min_seconds", float, 0), ("max_seconds", float, 0),
            ("seed", int, 0),
        ):  # fmt: skip
            store(name, _number(getattr(self, name), name, kind, least))
        store("threads", None if self.threads is None else _number(self.threads, "threads", int, 1))
        for name in ("memory", "plot"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        store("causal", _choice(str(self.causal).lower(), "causal", tuple(_CAUSAL)))
        store("device", _device(self.device))
        if not isinstance(self.out, str) or not self.out:
            raise ValueError(f"out must be a folder, got {self.out!r}")

    def cases(self) -> list[NystromCase]:
        """Every case, the lengths of one form and pass together, ascending."""
        return [
            NystromCase(
                causal, pass_name, length, self.batch, self.heads, self.head_size, self.num_landmarks,
                self.window_size, self.num_sinks, self.device, self.seed,
            )
            for causal, pass_name, length in itertools.product(_CAUSAL[self.causal], self.passes, self.lengths)
        ]  # fmt: skip


def nystrom_config(values: dict) -> NystromConfig:
    """The options as one object; raises `ValueError` for one that there is not and for a value out of range."""
    allowed = [field.name for field in fields(NystromConfig)]
    if unknown := [str(name) for name in values if name not in allowed]:
        raise ValueError(
            f"unknown option {', '.join(unknown)} of the benchmark of mechanism nystrom; expected one of "
            f"{', '.join(allowed)}"
        )
    return NystromConfig(**values)
