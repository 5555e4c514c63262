"""transformers' own common model tests, run against the converted model classes."""
