"""The border between an answer and its bookkeeping: counters, records, sums, lines of the ledger,
traces.

Bookkeeping cannot fail an answer, which was given and paid for. The methods that answers call are
marked with `bookkeeping`; a method behind one of them needs no care of its own.
"""

from __future__ import annotations

import logging
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.telemetry.bugs import Bugs

logger = logging.getLogger("aioserver.bookkeeping")


class Bookkeeper(Protocol):
    """An object with methods that are marked with `bookkeeping`."""

    @property
    def bugs(self) -> Bugs:
        """The counter of bugs in them."""


B = TypeVar("B", bound=Bookkeeper)
P = ParamSpec("P")
R = TypeVar("R")


def bookkeeping(
    otherwise: Callable[..., Any],
) -> Callable[[Callable[Concatenate[B, P], R]], Callable[Concatenate[B, P], R]]:
    """Catch every exception of the decorated method: a bug is logged, and counted.

    *otherwise* then returns the result, from its arguments.
    """

    def decorate(method: Callable[Concatenate[B, P], R]) -> Callable[Concatenate[B, P], R]:
        # Each answer comes here several times, so nothing is unpacked except for a bug.
        @wraps(method)
        def kept(*args: Any, **kwargs: Any) -> Any:
            try:
                return called(*args, **kwargs)
            except Exception as bug:
                logger.exception("bug in the bookkeeping")
                args[0].bugs.note(bug)
                return otherwise(*args[1:], **kwargs)

        called: Callable[..., R] = method
        return cast("Callable[Concatenate[B, P], R]", kept)

    return decorate


def nothing(*_args: object, **_kwargs: object) -> None:
    """Return nothing."""


def first(value: Any, *_args: object, **_kwargs: object) -> Any:
    """Return the first argument as it is."""
    return value
