"""Wings: features that the core does not need, each with everything of it.

The *core* is what stands left of `wings` in the line of packages (docs/architecture.md): it
carries an answer from a provider to its client. A *wing* is one feature: its wire format, its
face, its store, its part at a provider, its part in Redis. It stands on the core, and knows no
other wing.

The first sentence of each wing's own `__init__` says what would be gone without it.
"""
