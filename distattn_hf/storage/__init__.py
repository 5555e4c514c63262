"""Checkpoints, runs and results on disk, written so that none is incomplete and no earlier one is lost."""
