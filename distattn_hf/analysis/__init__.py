"""What a model does: evaluation of a conversion."""
