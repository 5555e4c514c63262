"""Scores of a model on a task, and the table that sets them side by side."""
