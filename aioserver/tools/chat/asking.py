"""Asks the questions of one conversation over the client library, and shows each answer until its
end, or until a signal.

Signals end an answer, or the program: SIGINT (Ctrl-C), SIGTERM, and SIGHUP of a terminal that was
closed. While an answer comes, the first signal cancels its task, so that the answer ends at the
server too. A second one, and any signal at another time, is an exception.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from aioserver.client import (
    AnswerError,
    Client,
    Processing,
    Queued,
    Reasoning,
    Text,
    ToolCalls,
    Waiting,
)
from aioserver.tools.chat.display import Display
from aioserver.tools.remote import KEY_FAULTS, printable

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from types import FrameType
    from typing import NoReturn

    from aioserver.client import Event

# The remark under a whole answer, by its finish reason.
REMARKS = {
    "length": "the answer was cut: it is as long as max_tokens allows",
    "tool_calls": "the model called a tool, and chat has none",
    "content_filter": "the provider's content filter ended the answer",
}
# Characters that are shown of a model's reasoning.
MAX_THOUGHT = 60
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

T = TypeVar("T")


class NoAnswer(Exception):
    """There is no whole answer, or no question; the message is one line for people."""


class BadQuestion(NoAnswer):
    """There is no question that can be sent."""


@dataclass(kw_only=True)
class Chat:
    """A conversation with the server at *url*, which keeps it under the id *conversation*. With a
    *system* prompt the conversation is kept here, in *turns*, and sent as a whole.

    *timeout*: seconds for a whole answer, with all waits. *endpoint*: the path of the WebSocket
    face.
    """

    url: str
    key: str | None = None
    provider: str | None = None
    model: str | None = None
    conversation: str | None = None
    system: str | None = None
    timeout: float
    endpoint: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.conversation = self.conversation or uuid.uuid4().hex

    def begin_anew(self) -> None:
        """Begin another conversation, with the same system prompt."""
        self.turns.clear()
        self.conversation = uuid.uuid4().hex

    def content(self, question: str) -> str | list[dict[str, str]]:
        """Return the content to send for *question*: a text, or the messages up to it."""
        if self.system is None:
            return question
        return [_message("system", self.system), *self.turns, _message("user", question)]

    async def ask(self, question: str) -> None:
        """Ask *question*, and show its answer on stdout. Both belong to the conversation then,
        however the answer ends.

        Cancelling this stops the answer at the server.

        Raises:
            BadQuestion: a setting can be no part of a question.
            NoAnswer: there is no whole answer.
            OSError: stdout cannot be written.
        """
        begun, thought = False, ""
        # The socket lives only as long as the answer: a person who thinks or leaves holds no place
        # at the server.
        async with (
            make_display() as display,
            Client(
                self.url, key=self.key, endpoint=self.endpoint, deadline=self.timeout
            ) as client,
        ):
            display.note(f"waiting for {self.url}")
            try:
                answer = client.chat(
                    self.content(question),
                    conversation_id=self.conversation if self.system is None else None,
                    provider=self.provider,
                    model=self.model,
                )
            except ValueError as error:
                raise BadQuestion(str(error)) from None
            try:
                async with answer:
                    async for event in answer.events():
                        if isinstance(event, Text):
                            begun = True
                            display.text(event.text)
                        elif not begun:
                            # Once there is text, only more text is of interest.
                            if isinstance(event, Reasoning):
                                thought = (thought + event.text)[-MAX_THOUGHT:]
                            show(event, thought, display)
            except asyncio.CancelledError:
                # Now the server is asked to cancel the answer, which may take seconds.
                display.note("stopping")
                raise
            except AnswerError as error:
                raise NoAnswer(explain(error, self.url)) from None
            finally:
                if self.system is not None and answer.received:
                    self.turns += (
                        _message("user", question),
                        _message("assistant", answer.received),
                    )
        if answer.complete is not None and answer.complete.finish_reason in REMARKS:
            warn(REMARKS[answer.complete.finish_reason])


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def make_display() -> Display:
    """Return a display for stdout, which draws if rich is installed and stdout is a terminal that
    supports it.
    """
    out, terminal = sys.stdout, sys.stdout.isatty()
    screen = out if terminal else sys.stderr
    # A terminal of these names cannot move its cursor.
    dumb = os.environ.get("TERM", "") in {"", "dumb"}
    if screen is not None and screen.isatty() and not dumb:
        with contextlib.suppress(ModuleNotFoundError):
            from aioserver.tools.chat.markdown import DrawnDisplay  # noqa: PLC0415 - optional

            return DrawnDisplay(out, screen)
    return Display(out, terminal=terminal)


def show(event: Event, thought: str, display: Display) -> None:
    """Show the current wait, from an *event* before the text; *thought* is the end of the model's
    reasoning.
    """
    match event:
        case Queued(position=position, eta=eta):
            display.note(
                f"position {position} in the queue, about {max(1.0, eta):.0f} s", progress=True
            )
        case Waiting(message=message, seconds=seconds):
            display.note(f"{message}: again in {max(1.0, seconds):.0f} s", progress=True)
        case Processing(provider=provider, model=model):
            name = "/".join(filter(None, (provider, model))) or "a provider"
            display.note(f"{name} has begun")
        case Reasoning():
            display.note(f"thinking: {thought.lstrip()}", progress=True)
        case ToolCalls():
            display.note("the model calls a tool")


def explain(error: AnswerError, url: str) -> str:
    """Return in one line the fault and its remedy."""
    if error.code in KEY_FAULTS:
        return f"{url} {KEY_FAULTS[error.code]}"
    if error.code == "protocol_error":
        return f"{url} is no aioserver, or a proxy in front of it is not set up: {error.message}"
    if error.code == "connect_error" and not error.text:
        return error.message
    if error.code == "cancelled":
        return "somebody else has cancelled the answer"
    return f"{'the answer broke off: ' if error.text else ''}{error}"


def warn(text: object) -> None:
    """Print *text*, which may come from a server, on one line of stderr."""
    print(f"aioserver: {printable(text)}", file=sys.stderr, flush=True)


class Interrupted(KeyboardInterrupt):
    """The signal *number* came. *forced*: it is the second one, and work may still be under way.

    A KeyboardInterrupt, since asyncio lets no other exception of a signal handler out of its loop.
    """

    def __init__(self, number: int, *, forced: bool = False) -> None:
        super().__init__(number)
        self.number = number
        self.forced = forced


class Interrupts:
    """Takes the signals over, and runs the coroutines that they may end."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self._loop = runner.get_loop()
        self._task: asyncio.Task[Any] | None = None
        self._number = 0
        for number in SIGNALS:
            # `nohup` makes its program ignore SIGHUP, and a shell makes background programs ignore
            # SIGINT.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._take)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run *work* to its end.

        Raises:
            Interrupted: a signal came, and *work* has ended, unless a second one came.
        """
        self._number, self._task = 0, (task := self._loop.create_task(work))
        try:
            with contextlib.suppress(asyncio.CancelledError):
                self._loop.run_until_complete(task)
        finally:
            self._task = None
        # It may have come too late to cancel anything.
        if self._number:
            raise Interrupted(self._number)
        return task.result()

    def _take(self, number: int, _frame: FrameType | None) -> None:
        if self._task is None or self._number:
            raise Interrupted(number, forced=self._task is not None)
        self._number = number
        # Thread-safe, since that also wakes the loop, which waits for its sockets.
        self._loop.call_soon_threadsafe(self._task.cancel)


def end_by(number: int) -> NoReturn:
    """End this process by the signal *number*, as if it had no handler: a shell then ends its
    loop, too.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    raise SystemExit(128 + number)
