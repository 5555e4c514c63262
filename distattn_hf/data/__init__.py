"""Texts and datasets: find, read, tokenise, pack and batch them; and read YAML configs."""
