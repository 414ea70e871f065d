"""The exchanges at one provider that are paused because their clients read too slowly.

A log asks for a pause where its client cannot come back (streams/stream.py). A paused exchange
keeps its place at the provider, so it is read on as soon as a request waits for one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.streams.contracts import Source


class Backpressure:
    """The paused exchanges of one provider.

    Always: none is paused once a request waits, which *waiting* counts and `end` is called for.
    """

    def __init__(self, waiting: Callable[[], int]) -> None:
        self._waiting = waiting
        self._paused: set[Source] = set()

    @property
    def paused(self) -> int:
        """The number of exchanges that are paused."""
        return len(self._paused)

    def add(self, exchange: Source) -> bool:
        """Count *exchange* as paused; return False, with nothing done, if a request waits."""
        if self._waiting():
            return False
        self._paused.add(exchange)
        return True

    def discard(self, exchange: Source) -> None:
        """Count *exchange* as paused no more."""
        self._paused.discard(exchange)

    def end(self) -> None:
        """Let all exchanges read on: a request is about to wait."""
        for exchange in tuple(self._paused):
            exchange.resume()
