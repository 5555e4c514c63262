"""The part that is copied beside a checkpoint: metrics, backends, attention interface, config and model classes."""
