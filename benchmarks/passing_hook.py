"""A hook in Python that lets everything pass, for `features.py`."""

from aioserver.hook import Call


class Passing:
    """Shown all, it refuses and changes nothing."""

    async def request(self, call: Call) -> None:
        """Let a request pass."""

    def event(self, call: Call, data: bytes) -> None:
        """Let an event pass."""
