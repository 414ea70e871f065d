"""Tests of tokens, hooks and the description of the API."""
