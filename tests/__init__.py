"""The tests. Before anything takes the clock by name, it is one that can jump."""

from tests.support import jumping_loop

jumping_loop.install()
