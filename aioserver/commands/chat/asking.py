"""Asks one question over the client library, and shows what comes."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aioserver.client import Client, Complete, Processing, Queued, Reasoning, Text, ToolCalls
from aioserver.commands.chat.display import make_display
from aioserver.commands.chat.question import BadQuestion
from aioserver.commands.chat.status import Silence, Status
from aioserver.commands.remote import printable

if TYPE_CHECKING:
    from aioserver.client import AnswerError, Event
    from aioserver.commands.chat.display import Display
    from aioserver.commands.chat.history import History


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The server that is asked, and how.

    *timeout*: seconds for a whole answer, with all waits. *endpoint*: the path of the WebSocket face.
    """

    url: str
    key: str | None
    provider: str | None
    model: str | None
    timeout: float
    endpoint: str | None = None


async def ask(settings: Settings, history: History, question: str) -> None:
    """Ask *question*, and show its answer on stdout; add both to *history*, however the answer ends.

    Cancelling this stops the answer at the server.

    Raises:
        BadQuestion: a setting can be no part of a question.
        AnswerError: there is no whole answer.
        OSError: stdout cannot be written.
    """
    display = make_display(sys.stdout)
    begun = stopped = False
    # The socket lives as long as the answer: a person who thinks or leaves holds no place at the server.
    async with (
        Status(sys.stderr) as status,
        Client(
            settings.url, key=settings.key, endpoint=settings.endpoint, deadline=settings.timeout
        ) as client,
    ):
        status.show(f"waiting for {settings.url}")
        try:
            answer = client.chat(
                history.content(question),
                conversation_id=history.conversation_id,
                provider=settings.provider,
                model=settings.model,
            )
        except ValueError as error:
            raise BadQuestion(str(error)) from None
        try:
            async with Silence(display.note) as silence, answer:
                async for event in answer.events():
                    begun = begun or isinstance(event, Text)
                    if begun:
                        silence.heard()
                    # The last line of the terminal is the answer's, once there is a text.
                    if isinstance(event, Text) or not begun:
                        show(event, status, display)
        except asyncio.CancelledError:
            stopped = True
            raise
        finally:
            status.clear()
            history.add(question, answer.received)
            display.end()
            if stopped:
                # The server is told now, which may take seconds.
                status.show("stopping")
    remark(answer.complete)


def show(event: Event, status: Status, display: Display) -> None:
    """Show *event*.

    Raises:
        OSError: stdout cannot be written.
    """
    match event:
        case Queued(position=position, eta=eta):
            status.show(
                f"position {position} in the queue, about {max(1.0, eta):.0f} s", progress=True
            )
        case Processing(provider=provider, model=model):
            name = "/".join(filter(None, (provider, model))) or "a provider"
            status.show(f"{name} has begun")
        case Reasoning(text=text):
            status.think(text)
        case Text(text=text):
            status.clear()
            display.text(text)
        case ToolCalls():
            status.show("the model calls a tool")


def remark(complete: Complete | None) -> None:
    """Say on stderr what is unusual about a whole answer."""
    reason = complete.finish_reason if complete is not None else None
    if reason == "length":
        warn("the answer was cut: it is as long as max_tokens allows")
    elif reason == "tool_calls":
        warn("the model called a tool, and chat has none")
    elif reason == "content_filter":
        warn("the provider's content filter ended the answer")


def explain(error: AnswerError, settings: Settings) -> str:
    """Return in one line what went wrong, and what to do."""
    if error.code == "invalid_api_key":
        return f"{settings.url} does not know this key: see --key and AIOSERVER_KEY"
    if error.code == "missing_api_key":
        return f"{settings.url} wants an API key: give it by --key or AIOSERVER_KEY"
    if error.code == "connect_error" and not error.text:
        return error.message
    if error.code == "protocol_error":
        return f"{settings.url} is no aioserver, or a proxy in front of it is not set up: {error.message}"
    if error.code == "cancelled":
        return "somebody else has cancelled the answer"
    start = "the answer broke off: " if error.text else ""
    return f"{start}{error.message} ({error.code})"


def warn(text: str) -> None:
    """Print *text*, which may come from a server, on one line of stderr."""
    print(f"aioserver: {printable(text)}", file=sys.stderr, flush=True)
