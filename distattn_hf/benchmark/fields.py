"""Checks of the options of `distattn benchmark`, and of the options that all mechanisms share."""

import math

import torch

CAUSAL = {"false": (False,), "true": (True,), "both": (False, True)}
# Shorter sequences measure the dispatch of a call, and the check has too few rows.
SHORTEST_LENGTH = 16


def store(config, **values) -> None:
    """Set fields of a frozen dataclass, in its `__post_init__`."""
    for name, value in values.items():
        object.__setattr__(config, name, value)


def check_shared(config) -> None:
    """Check and normalise the options that all mechanisms share, except `lengths` and `passes`."""
    for name, kind, minimum in (
        ("heads", int, 1), ("batch", int, 1), ("repeats", int, 1), ("warmup", int, 0), ("seed", int, 0),
        ("min_seconds", float, 0), ("max_seconds", float, 0),
    ):  # fmt: skip
        store(config, **{name: number(getattr(config, name), name, kind, minimum)})
    store(
        config,
        threads=None if config.threads is None else number(config.threads, "threads", int, 1),
        memory=flag(config.memory, "memory"),
        plot=flag(config.plot, "plot"),
        causal=choice(str(config.causal).lower(), "causal", tuple(CAUSAL)),
        device=device(config.device),
    )
    if not isinstance(config.out, str) or not config.out:
        raise ValueError(f"out must be a folder, got {config.out!r}")


def items(value, name: str, kind: type) -> list:
    """Return a list from a list, one value, or "a,b,c"; raises `ValueError` if it is empty."""
    if isinstance(value, str):
        value = [item.strip() for item in value.split(",") if item.strip()]
    entries = list(value) if isinstance(value, list | tuple) else [value]
    if not entries:
        raise ValueError(f"{name} must name at least one")
    if kind is str and not all(isinstance(item, str) for item in entries):
        raise ValueError(f"{name} must be names, got {value!r}")
    return entries


def unique(values) -> tuple:
    """Return each value once, at its first position."""
    return tuple(dict.fromkeys(values))


def choice(value, name: str, allowed: tuple[str, ...]) -> str:
    """Return `value` if it is allowed; otherwise raises `ValueError` with the allowed values."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def choices(value, name: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """Return one or more allowed values, each once."""
    return unique(choice(item, name, allowed) for item in items(value, name, str))


def number(value, name: str, kind: type, least: float):
    """Return `value` (a number or its text) as int or float, at least `least`."""
    try:
        if isinstance(value, bool) or (kind is int and isinstance(value, float) and value != int(value)):
            raise ValueError
        converted = kind(value)
    except (TypeError, ValueError, OverflowError):
        converted = math.nan
    if not least <= converted < math.inf:
        expected = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} must be {expected} >= {least}, got {value!r}")
    return converted


def numbers(value, name: str, least: int) -> tuple[int, ...]:
    """Return one or more whole numbers, each once."""
    return unique(number(item, name, int, least) for item in items(value, name, int))


def flag(value, name: str) -> bool:
    """Return `value` if it is True or False; raises `ValueError` otherwise."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


def device(name) -> str:
    """Return "cpu" or "cuda"; raises `ValueError` if there is no GPU to run on."""
    choice(name, "device", ("auto", "cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but PyTorch sees no GPU; use device cpu or auto")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
