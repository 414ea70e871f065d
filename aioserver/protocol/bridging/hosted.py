"""The hosted tools of a request: only a provider could run them, and chat completions do not have
them.

A hosted tool is left out if another tool remains and the client has not chosen a hosted one: the
model does not know of it. Otherwise the request is refused, and the error names the tool: without a
search, for instance, a model would invent its results.
"""

from __future__ import annotations

from aioserver.errors import InvalidRequest

# The most characters of a name that are shown, and the most names.
MAX_SHOWN, MAX_NAMES = 64, 16


class Hosted:
    """The hosted tools of one request, and the traces of such tools in its history.

    `left_out` are the names of all tools that the provider does not get, once each, in order.
    """

    def __init__(self) -> None:
        # The place of the first tool of each name.
        self.names: dict[str, str] = {}
        self.left_out: dict[str, None] = {}

    def add(self, name: str, param: str) -> None:
        """Add a tool; *param* is its place."""
        self.names.setdefault(name, param)

    def leave_out(self, *, others: bool) -> None:
        """Leave out the tools that were added; *others*: other tools remain.

        Raises:
            InvalidRequest: no other tool remains.
        """
        if self.names and not others:
            name, param = next(iter(self.names.items()))
            raise self.refused(name, param)
        for name in self.names:
            self.note(name)

    def note(self, name: str) -> None:
        """Note that something of the tool *name* is left out."""
        if name.isascii() and name.isprintable() and len(self.left_out) < MAX_NAMES:
            self.left_out[name[:MAX_SHOWN]] = None

    def refused(self, name: str, param: str) -> InvalidRequest:
        """Return the error of a request that needs the tool *name*, at *param*."""
        message = (
            f"the tool {name[:MAX_SHOWN]!r} is not available: the provider has chat completions "
            "only, whose tools are functions that the client runs"
        )
        return InvalidRequest(message, param=param)
