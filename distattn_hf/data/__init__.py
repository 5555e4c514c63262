"""Texts and datasets: found, read, tokenised, packed and batched; and the YAML that names them."""
