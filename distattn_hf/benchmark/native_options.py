"""The options of `distattn benchmark --mechanism native`, checked before anything runs, and its cases."""

import itertools
from dataclasses import dataclass

from ..core.mechanisms import MECHANISMS
from .fields import CAUSAL, SHORTEST_LENGTH, check_shared, choices, number, numbers, store

# Mechanisms that are functions and have all forms.
_FUNCTIONS = ("nystrom", "retrieval")


@dataclass(frozen=True)
class NativeCase:
    """One problem: query, key, value (batch, heads, length, head_size) in float32, one mechanism, one pass."""

    mechanism: str
    causal: bool
    pass_name: str
    length: int
    batch: int
    heads: int
    head_size: int
    device: str
    seed: int


@dataclass(frozen=True)
class NativeConfig:
    """The options of `distattn benchmark --mechanism native`; the keys of its YAML file.

    Args:
        mechanism: "native".
        mechanisms: names registered in `MECHANISMS`, "nystrom" and "retrieval"; each with its default options. A form
            that a mechanism does not have is left out.
        lengths, causal, passes, heads, head_size, batch, device, repeats, warmup, min_seconds, max_seconds, memory,
        threads, seed, out, plot: as in `NystromConfig`.
        sdpa_max_length: beyond this length scaled_dot_product_attention is not run beside.
    """

    mechanism: str = "native"
    mechanisms: tuple[str, ...] = ("local", "strided", "landmark", "linear", "performer", "nystrom")
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    causal: bool | str = "both"
    passes: tuple[str, ...] = ("forward",)
    heads: int = 4
    head_size: int = 64
    batch: int = 1
    device: str = "auto"
    sdpa_max_length: int = 16384
    repeats: int = 3
    warmup: int = 1
    min_seconds: float = 0.3
    max_seconds: float = 60.0
    memory: bool = True
    threads: int | None = None
    seed: int = 0
    out: str = "out/benchmark-native"
    plot: bool = True

    def __post_init__(self):
        mechanisms = (*MECHANISMS, *_FUNCTIONS)
        store(
            self,
            mechanisms=choices(self.mechanisms, "mechanisms", mechanisms),
            lengths=tuple(sorted(numbers(self.lengths, "lengths", SHORTEST_LENGTH))),
            passes=choices(self.passes, "passes", ("forward", "forward_backward")),
        )
        for name, minimum in (("head_size", 1), ("sdpa_max_length", 0)):
            store(self, **{name: number(getattr(self, name), name, int, minimum)})
        check_shared(self)

    def cases(self) -> list[NativeCase]:
        """Return every case that exists, the lengths of one mechanism, form and pass together, ascending."""
        combinations = itertools.product(self.mechanisms, CAUSAL[self.causal], self.passes, self.lengths)
        return [
            NativeCase(name, causal, pass_name, length, self.batch, self.heads, self.head_size, self.device, self.seed)
            for name, causal, pass_name, length in combinations
            if name in _FUNCTIONS or (MECHANISMS.get(name).causal if causal else MECHANISMS.get(name).bidirectional)
        ]
