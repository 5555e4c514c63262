"""Checkpoints, runs and results on disk: nothing half written, nothing the user had lost."""
