"""The verbs of the command line, one a file; `distattn_hf.cli` puts them together."""
