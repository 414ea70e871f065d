"""The part of a conversation that is sent with a question."""

from __future__ import annotations

import uuid
from typing import Any

# Characters of earlier turns that are sent. A server takes 16 MiB, and models take less than this.
MAX_CHARACTERS = 1_000_000


class History:
    """Either the server keeps the conversation, and gets its id; or it is kept here, behind a system prompt.

    Always: what is kept here is whole turns, the newest, and at most MAX_CHARACTERS.
    """

    def __init__(self, *, conversation_id: str | None = None, system: str | None = None) -> None:
        """*conversation_id*: that of a conversation to go on with. With a *system* prompt there is none at the server."""
        self._system = system
        self._turns: list[tuple[str, str]] = []
        self._id = conversation_id or uuid.uuid4().hex

    @property
    def conversation_id(self) -> str | None:
        """The id by which the server knows the conversation; None if it is kept here."""
        return self._id if self._system is None else None

    def content(self, question: str) -> str | list[dict[str, Any]]:
        """Return what to send for *question*: a text, or the messages up to it."""
        if self._system is None:
            return question
        messages = [{"role": "system", "content": self._system}]
        for asked, answered in self._turns:
            messages += (
                {"role": "user", "content": asked},
                {"role": "assistant", "content": answered},
            )
        return [*messages, {"role": "user", "content": question}]

    def add(self, question: str, answer: str) -> None:
        """Keep a turn, which may have been stopped; one without an answer is as if it had not been."""
        if self._system is None or not answer:
            return
        self._turns.append((question, answer))
        size = sum(len(asked) + len(answered) for asked, answered in self._turns)
        while size > MAX_CHARACTERS:
            asked, answered = self._turns.pop(0)
            size -= len(asked) + len(answered)

    def begin_anew(self) -> None:
        """Begin another conversation, with the same system prompt."""
        self._turns.clear()
        self._id = uuid.uuid4().hex
