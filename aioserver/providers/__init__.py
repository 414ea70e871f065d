"""How we reach a model."""
