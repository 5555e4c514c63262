"""Experiments, each one module: what it asks, what it measures, what it draws; `distattn experiment NAME`."""

# Those that `distattn experiment` runs, each a module of this folder.
EXPERIMENTS = (
    "architectures",
    "compute",
    "conversion_quality",
    "digits",
    "distances",
    "encoder_retrieval",
    "lipschitz",
    "long_context",
    "model_speed",
    "native_decoding",
    "nystrom_quality",
    "patterns",
    "quantised",
    "retrieval_speed",
    "sequence_reads",
    "sequence_speed",
    "sinks_and_caps",
    "speech",
    "training",
)  # fmt: skip
