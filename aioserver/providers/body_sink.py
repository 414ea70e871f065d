"""The sink of a body that is not streamed: it collects the body, up to a bound."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.provider_errors import ProviderBadResponse

if TYPE_CHECKING:
    from aioserver.streams.store import HeldBytes


# Parts below this size are put together as they come: each by itself would cost more than its bytes.
SMALL_PART_BYTES = 1024


class BodySink:
    """Collects a body.

    Always: it holds at most *max_bytes*, which *held* counts; they cost little more in memory, in
    however many parts they come.
    """

    def __init__(self, max_bytes: int, held: HeldBytes | None = None) -> None:
        if held is not None and held.size:
            held.reset()
        self._held = held
        self._parts: list[bytes | bytearray] = []
        self._size = 0
        self._max_bytes = max_bytes

    @property
    def progress(self) -> int:
        """The bytes that have come so far."""
        return self._size

    @property
    def body(self) -> bytes:
        """The bytes that have come so far."""
        return b"".join(self._parts)

    def feed(self, data: bytes) -> bool:
        """Keep a part of the body.

        Raises:
            ProviderBadResponse: the body has more than *max_bytes*.
            ServerAtCapacity: all that is kept would be more than `max_kept_bytes`.
        """
        if self._held is not None:
            self._held.grow(len(data))
        self._size += len(data)
        if self._size > self._max_bytes:
            raise ProviderBadResponse(f"an answer of more than {self._max_bytes} bytes")
        parts = self._parts
        if parts and len(data) < SMALL_PART_BYTES:
            last = parts[-1]
            if isinstance(last, bytearray):
                last += data
            else:
                parts.append(bytearray(data))
        else:
            # As a rule a body comes in one part, which is never copied.
            parts.append(data)
        return True

    def end(self) -> None:
        """Do nothing: the body is complete."""

    def fast(self) -> None:
        """Return None: every part is collected."""
