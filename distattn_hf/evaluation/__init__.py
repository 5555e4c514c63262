"""Score models on a task, and compare the scores in a table."""
