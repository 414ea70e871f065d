"""The client library: chat with an aioserver from a program of your own.

A *client* asks *questions*, and each question has one *answer*. An answer is read as *pieces* of
its text or as *events*. It comes over a *transport* (`transport`): a WebSocket that many answers
share (`socket`), or an HTTP response for each answer (`event_source`). The *reading* of an answer
is its place on a transport: it knows the number of the last event. When the *connection* is lost,
the reading continues after that number on the next one, so that each event comes once. A refused
question is asked again (`faults`) until the *deadline* of the answer. If the server had no *room*,
it is asked again as soon as another answer has ended. *Credentials* are the key that a client
sends. A *conversation* is an id that questions have in common, whose *turns* the server keeps
(`history`). `sync` is the same for a program without an event loop.

Unlike other packages, this one exports the names that programs import: it is an interface for code
that is not ours, and its files may change.
"""

from __future__ import annotations

from aioserver.client.answer import (
    Answer,
    Complete,
    Event,
    Processing,
    Queued,
    Reasoning,
    Text,
    ToolCalls,
    Waiting,
)
from aioserver.client.client import Client, Conversation
from aioserver.client.faults import AnswerError
from aioserver.client.history import Summary, Turn

__all__ = [
    "Answer",
    "AnswerError",
    "Client",
    "Complete",
    "Conversation",
    "Event",
    "Processing",
    "Queued",
    "Reasoning",
    "Summary",
    "Text",
    "ToolCalls",
    "Turn",
    "Waiting",
]
