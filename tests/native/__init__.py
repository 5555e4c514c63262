"""The native family: models, encodings, and transformers' common tests on them."""
