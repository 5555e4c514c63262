"""What one more token costs after a long text, in time and in cache, by mechanism of the native family.

A model with random weights reads a text of each length in chunks. Then single tokens are read after all of them in
turns, a round of one token after each text and after the same texts in a model of dot-product attention, so that other
work on the machine meets all alike. Times are medians over rounds and ratios are within rounds.
"""

import time
from dataclasses import dataclass
from functools import lru_cache
from statistics import median

import torch

from ..conversion.cache_bytes import held_bytes
from ..core.compatibility import CACHE_NAME, cache_of
from ..core.configuration_native import DistAttnConfig
from ..core.modeling_distattn import DistAttnForCausalLM

CHUNK = 1024
AXES = ("mechanisms",)


@dataclass(frozen=True)
class Options:
    """mechanisms: of native causal models with default options. lengths: tokens read before, ascending; times are
    given beside the first one's.

    hidden_size, layers, heads: of the models. rounds: single tokens timed after each length. seed: of weights and text.
    """

    mechanisms: tuple[str, ...] = ("linear", "performer", "local", "strided", "nystrom", "dot")
    lengths: tuple[int, ...] = (1024, 4096, 16384)
    hidden_size: int = 512
    layers: int = 4
    heads: int = 8
    rounds: int = 60
    seed: int = 0

    def __post_init__(self):
        if list(self.lengths) != sorted(set(self.lengths)) or not self.lengths or self.lengths[0] < 1:
            raise ValueError(f"lengths must be positive and ascending, got {self.lengths!r}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be >= 1, got {self.rounds!r}")
        for mechanism in self.mechanisms:
            _config(self, mechanism)


QUICK = {"lengths": (64, 192), "hidden_size": 32, "layers": 1, "heads": 2, "rounds": 4}


def run(options: Options, results) -> None:
    """Measure a row for each mechanism and length."""
    for mechanism in options.mechanisms:
        for number, length in enumerate(options.lengths):
            results.row(
                {"mechanism": mechanism, "length": length}, lambda m=mechanism, n=number: _measure(options, m)[n]
            )


def _config(options: Options, mechanism: str) -> DistAttnConfig:
    return DistAttnConfig(
        vocab_size=1024, hidden_size=options.hidden_size, num_hidden_layers=options.layers,
        num_attention_heads=options.heads, is_decoder=True, mechanism=mechanism,
        max_position_embeddings=options.lengths[-1] + options.rounds,
    )  # fmt: skip


@lru_cache(maxsize=1)
@torch.no_grad()
def _measure(options: Options, mechanism: str) -> list[dict]:
    """Return for each length the bytes of the cache, the time of a token, and its ratios."""
    texts = {name: [_Text(options, name, n) for n in options.lengths] for name in dict.fromkeys((mechanism, "dot"))}
    seconds = {name: [[] for _ in options.lengths] for name in texts}
    # The first round, in which caches change their shape, is not counted.
    for round_number in range(options.rounds + 1):
        for number in range(len(options.lengths)):
            for name, each in texts.items():
                taken = each[number].step()
                if round_number:
                    seconds[name][number].append(taken)
    own, dot = seconds[mechanism], seconds["dot"]
    return [
        {
            "cache_bytes": held_bytes(text.cache),
            "milliseconds": 1e3 * median(times),
            "times_first": median(now / first for now, first in zip(times, own[0], strict=True)),
            "times_dot": median(now / beside for now, beside in zip(times, dot[number], strict=True)),
        }
        for number, (text, times) in enumerate(zip(texts[mechanism], own, strict=True))
    ]


class _Text:
    """A model that has read a text."""

    def __init__(self, options: Options, mechanism: str, length: int):
        torch.manual_seed(options.seed)
        self.model = DistAttnForCausalLM(_config(options, mechanism)).eval()
        ids, self.cache = torch.randint(3, 1024, (1, length + 1)), None
        for chunk in ids[:, :-1].split(CHUNK, dim=1):
            self._read(chunk)
        self.token, self.mask = ids[:, -1:], torch.ones_like(ids)

    def _read(self, ids, **arguments) -> None:
        output = self.model(ids, use_cache=True, logits_to_keep=1, **{CACHE_NAME: self.cache}, **arguments)
        self.cache = cache_of(output)

    def step(self) -> float:
        """Return the seconds of one more token, called as `generate` does: with a mask of all tokens."""
        started = time.perf_counter()
        self._read(self.token, attention_mask=self.mask)
        taken = time.perf_counter() - started
        self.mask = torch.cat([self.mask, self.mask[:, :1]], dim=1)
        return taken
