"""Experiments, each one module: what it asks, what it measures, what it draws; `distattn experiment NAME`."""

# Those that `distattn experiment` runs, each a module of this folder.
EXPERIMENTS = (
    "compute",
    "distances",
    "lipschitz",
    "long_context",
    "native_decoding",
    "patterns",
    "training",
)  # fmt: skip
