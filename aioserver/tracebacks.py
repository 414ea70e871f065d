"""Lets go of what the traceback of an exception holds."""

from __future__ import annotations


def forget_frames(fault: BaseException) -> None:
    """Drop the traceback of *fault*, and the exceptions that have led to it with theirs.

    A traceback holds the frames that it names, with all that a request has: its body, and what has come of its
    answer. An exception that one of these frames holds in turn would keep them until the collector of
    cycles happens to run.
    """
    exc: BaseException | None = fault
    while exc is not None:
        origin = exc.__cause__ or exc.__context__
        exc.__traceback__ = exc.__cause__ = exc.__context__ = None
        exc = origin
