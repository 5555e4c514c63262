"""Distance attention as PyTorch layers."""
