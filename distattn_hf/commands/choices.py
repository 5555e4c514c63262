"""Checks of options that need no torch: names of choices, and ranges of numbers."""

import math
from difflib import get_close_matches

from .flags import flag

# The registered metrics and their aliases, and other choices, without torch (tests/test_startup.py compares them).
METRICS = {
    "sqeuclidean": ("squared_l2", "l2_squared"),
    "l2": ("euclidean",),
    "l1": ("manhattan", "cityblock"),
    "lp": ("minkowski",),
    "cosine": (),
    "chebyshev": ("linf",),
    "lifted_sqeuclidean": (),
    "dot": ("standard",),
}
CHOICES = {
    "mechanism": ("distance", "nystrom", "retrieval"),
    "select": ("error", "probe"),
    "init": ("exact", "calibrated", "plain"),
    "attention": ("self", "cross"),
    "transform": ("none", "scalar", "maps"),
    "beyond": ("retrieval", "exact"),
    "task": ("passkey", "needle", "kv", "perplexity", "generation", "ruler", "classification", "speech"),
}
# Least values of the numbers; p and λ are checked separately.
LEAST = {
    "num_landmarks": 1, "window_size": 0, "num_sinks": 0, "exact_below": 0, "steps": 0,
    "block_size": 1, "num_blocks": 0,
    "max_tokens": 1, "max_length": 1, "max_texts": 1, "samples": 1, "new_tokens": 1, "tail": 1,
}  # fmt: skip


def read_softening(value: str | None) -> float | str | None:
    """Return ε as `AttentionSpec` takes it; raises `ValueError` for anything but a number >= 0 and "fit"."""
    if value is None or value == "fit":
        return value
    try:
        epsilon = float(value)
    except ValueError:
        epsilon = math.nan
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"--softening must be a finite number >= 0 or fit, got {value!r}")
    return epsilon


def read_numbers(name: str, text: str, kind: type = int) -> tuple:
    """Return the numbers of an option "a,b,c"; raises `ValueError` for anything else."""
    try:
        numbers = tuple(kind(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{flag(name)} must be {what} separated by commas, got {text!r}")
    return numbers


def check_min_weight(value: float | None) -> None:
    """Raise `ValueError` for anything but a share from 0 to below 1, or None."""
    if value is not None and not 0 <= value < 1:
        raise ValueError(f"--min-weight must be from 0 to below 1, got {value}")


def check_choices(**values) -> None:
    """Raise `ValueError`, without torch, for a name that no option takes, and for a number out of its range."""
    metric = values.pop("metric", None)
    if metric is not None and metric.lower() not in {
        *METRICS,
        *(alias for names in METRICS.values() for alias in names),
    }:
        if metric.lower() in CHOICES["mechanism"]:
            raise ValueError(f"--metric {metric!r} is a mechanism and not a metric; give --mechanism {metric.lower()}")
        usual = {name: aliases for name, aliases in METRICS.items() if name not in ("lifted_sqeuclidean", "dot")}
        known = ", ".join(f"{name} ({', '.join(aliases)})" if aliases else name for name, aliases in usual.items())
        mechanisms = [name for name in CHOICES["mechanism"] if name != "distance"]
        names = [*usual, *(alias for aliases in usual.values() for alias in aliases), *mechanisms]
        matches = get_close_matches(metric.lower(), names, cutoff=0.65)
        meant = " or ".join(f"--{'mechanism' if name in mechanisms else 'metric'} {name}" for name in matches)
        raise ValueError(
            f"unknown metric {metric!r}; {f'did you mean {meant}? ' if meant else ''}--metric is one of "
            f"{known}; --mechanism may be {' or '.join(mechanisms)}. A metric of your own must be registered, so it is "
            "converted from Python"
        )
    order = values.get("p")
    if metric is not None and order is not None and metric.lower() not in ("lp", *METRICS["lp"]):
        raise ValueError(f"--p {order:g} was given with --metric {metric}; only lp takes an order")
    if metric is not None and order is None and metric.lower() in ("lp", *METRICS["lp"]):
        raise ValueError(f"--metric {metric} needs its order: give --p, a number >= 1")
    squared = metric is None or metric.lower() in ("sqeuclidean", *METRICS["sqeuclidean"])
    for name, value in (("mechanism", "nystrom"), ("init", "exact")):
        if values.get(name) == value and not squared:
            raise ValueError(f"{flag(name)} {value} needs --metric sqeuclidean, got {metric}")
    for name, value in values.items():
        if value is None:
            continue
        if (name, value) == ("transform", "linear"):
            continue  # what "maps" was called before
        if name in CHOICES and value not in CHOICES[name]:
            matches = get_close_matches(str(value).lower(), CHOICES[name], n=1, cutoff=0.65)
            hint = f"; did you mean {flag(name)} {matches[0]}?" if matches else ""
            raise ValueError(f"{flag(name)} must be one of {', '.join(CHOICES[name])}, got {value!r}{hint}")
        if name in LEAST and value < LEAST[name]:
            raise ValueError(f"{flag(name)} must be an integer >= {LEAST[name]}, got {value}")
        if name == "seed" and not 0 <= value < 2**63:
            raise ValueError(f"--seed must be an integer >= 0 of at most 63 bits, got {value}")
        if name == "p" and not 1 <= value < float("inf"):
            raise ValueError(f"--p must be a finite number >= 1, got {value:g}")
        if name == "beyond_share" and not 0 < value <= 1:
            raise ValueError(f"--beyond-share must be a share, above 0 and at most 1, got {value:g}")
        if name in ("lam", "max_error") and not 0 < value < float("inf"):
            raise ValueError(f"{flag(name)} must be a positive finite number, got {value:g}")
