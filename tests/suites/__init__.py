"""Suites of others, from the package registries, run by hand: `pytest -m suites`."""
