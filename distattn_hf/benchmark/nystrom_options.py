"""The options of `distattn benchmark --mechanism nystrom`, checked before anything runs, and its cases."""

import itertools
from dataclasses import dataclass

from ..functional.landmarks import STRATEGIES
from .fields import CAUSAL, SHORTEST_LENGTH, check_shared, choice, choices, items, number, numbers, store, unique

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
        strategies = items(self.strategies, "strategies", str)
        for name in strategies:
            STRATEGIES.get(name)
        store(
            self,
            mechanism=choice(self.mechanism, "mechanism", ("nystrom",)),
            lengths=tuple(sorted(numbers(self.lengths, "lengths", SHORTEST_LENGTH))),
            passes=choices(self.passes, "passes", PASSES),
            strategies=unique(strategies),
            # An empty list of peers is allowed.
            peers=choices(self.peers, "peers", PEERS) if self.peers else (),
        )
        for name, minimum in (
            ("num_landmarks", 1), ("window_size", 0), ("num_sinks", 0), ("head_size", 1), ("sdpa_max_length", 0),
            ("error_max_length", 0),
        ):  # fmt: skip
            store(self, **{name: number(getattr(self, name), name, int, minimum)})
        check_shared(self)

    def cases(self) -> list[NystromCase]:
        """Return every case, the lengths of one form and pass together, ascending."""
        return [
            NystromCase(
                causal, pass_name, length, self.batch, self.heads, self.head_size, self.num_landmarks,
                self.window_size, self.num_sinks, self.device, self.seed,
            )
            for causal, pass_name, length in itertools.product(CAUSAL[self.causal], self.passes, self.lengths)
        ]  # fmt: skip
