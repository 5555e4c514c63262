"""What travels with a checkpoint: metrics, backends, the attention interface, config and model classes."""
