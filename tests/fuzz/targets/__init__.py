"""The targets, by name. Each is the function `run` of the module of that name."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

# Bytes that mean something to most parsers.
WORDS = (
    *(b"\n", b"\r", b"\r\n", b"\n\n", b"\0", b":", b",", b'"', b"\\", b"{", b"}", b"[", b"]"),
    b"  ",
    *(b"data: ", b"[DONE]", b'"error"', b"\xff", b"\xef\xbb\xbf", "é😀".encode(), rb"\ud83d"),
    *(b"0\r\n\r\n", b"-1", b"1e999", b"null", b"true", b"\x80"),
)

TARGETS = (
    "event_stream",
    "fast_path",
    "provider_answer",
    "responses",
    "bridge",
    "messages",
    "message_bridge",
    "client_frames",
    "server_frames",
    "chat_bodies",
    "whole_answers",
    "configuration",
)


def load(name: str) -> Callable[[bytes], None]:
    """Return the target *name*, and import with it the code that it is for."""
    run: Callable[[bytes], None] = _module(name).run
    return run


def words(name: str) -> tuple[bytes, ...]:
    """Return the words that mean something to what the target *name* is for."""
    own: tuple[bytes, ...] = getattr(_module(name), "WORDS", ())
    return (*WORDS, *own)


def _module(name: str) -> Any:
    return import_module(f"{__name__}.{name}")
