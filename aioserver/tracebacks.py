"""The traceback of an exception: its last line, and the release of the objects that it holds."""

from __future__ import annotations


def last_line(fault: BaseException) -> str:
    """Return the class of *fault*, and the place where it was raised: "AttributeError at
    faces/socket.py:128 in close".

    Everybody may read it. The message is left out, of whatever class: that of a KeyError is the
    key, and an attribute may have been looked up by what a client sent. Types, files and functions
    are names in the code.
    """
    while isinstance(fault, BaseExceptionGroup):
        fault = fault.exceptions[0]
    name, traceback = type(fault).__name__, fault.__traceback__
    if traceback is None:
        return name
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    code = traceback.tb_frame.f_code
    # Without the folder of the installation.
    file = "/".join(code.co_filename.rsplit("/", 2)[-2:])
    return f"{name} at {file}:{traceback.tb_lineno} in {code.co_name}"


def forget_frames(fault: BaseException) -> None:
    """Drop the traceback of *fault*, and the exceptions that have led to it with theirs.

    A traceback holds the frames that it names, with everything of a request: its body, and the
    answer so far. An exception that one of these frames holds in turn would keep them until the
    collector of cycles happens to run.
    """
    exc: BaseException | None = fault
    while exc is not None:
        origin = exc.__cause__ or exc.__context__
        exc.__traceback__ = exc.__cause__ = exc.__context__ = None
        exc = origin
