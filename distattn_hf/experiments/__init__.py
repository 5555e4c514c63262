"""Experiments: each module makes one table or figure of the README."""
