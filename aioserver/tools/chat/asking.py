"""Asks one question over the client library, and shows its answer, until its end or a signal.

The question is the words of a command line, and stdin where that is no terminal; a part of the
conversation is sent with it.

Signals end an answer, or the program: SIGINT (Ctrl-C), SIGTERM, and SIGHUP of a terminal that was
closed. While an answer comes, the first signal cancels its task, so that the answer ends at the
server too. A second one, and any signal at another time, is an exception.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar

from aioserver.client import (
    Client,
    Complete,
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
    from collections.abc import Coroutine, Sequence
    from types import FrameType
    from typing import BinaryIO, NoReturn

    from aioserver.client import AnswerError, Event

# What is said of a whole answer with this finish reason.
REMARKS = {
    "length": "the answer was cut: it is as long as max_tokens allows",
    "tool_calls": "the model called a tool, and chat has none",
    "content_filter": "the provider's content filter ended the answer",
}
# Characters that are shown of a model's reasoning.
MAX_THOUGHT = 60


class History:
    """The conversation, which is either kept by the server under an id, or kept here as a whole
    with a system prompt in front.
    """

    def __init__(self, *, conversation_id: str | None = None, system: str | None = None) -> None:
        """*conversation_id* is that of a conversation to continue. With a *system* prompt the
        conversation is not kept by the server.
        """
        self._system = system
        self._id = conversation_id or uuid.uuid4().hex
        self._turns: list[dict[str, str]] = []

    @property
    def conversation_id(self) -> str | None:
        """The id by which the server knows the conversation; None if it is kept here."""
        return self._id if self._system is None else None

    def content(self, question: str) -> str | list[dict[str, str]]:
        """Return the content to send for *question*: a text, or the messages up to it."""
        if self._system is None:
            return question
        system, asked = _message("system", self._system), _message("user", question)
        return [system, *self._turns, asked]

    def add(self, question: str, answer: str) -> None:
        """Keep a turn, which may have been stopped; one without an answer is left out."""
        if self._system is not None and answer:
            self._turns += _message("user", question), _message("assistant", answer)

    def begin_anew(self) -> None:
        """Begin another conversation, with the same system prompt."""
        self._turns.clear()
        self._id = uuid.uuid4().hex


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


# Bytes that are read of stdin: half of a server's default limit, since JSON may double them.
MAX_BYTES = 8 << 20
# A first word that is an address: a URL, `localhost`, or a host with a port.
_ADDRESS = re.compile(
    r"https?://\S+ | localhost(/\S*)? | (\[[\da-f:.]+\] | [a-z\d][a-z\d.-]*) : \d{1,5} (/\S*)?",
    re.IGNORECASE | re.VERBOSE,
)


class BadQuestion(Exception):
    """There is no question that can be sent; the message is one line for people."""


def split(words: Sequence[str]) -> tuple[str | None, str]:
    """Return the first of *words*, if it is an address, and the text of the others."""
    if words and _ADDRESS.fullmatch(words[0]):
        return words[0], " ".join(words[1:])
    return None, " ".join(words)


def decoded(argument: str) -> str:
    """Return *argument* without bytes that are not UTF-8, which no server accepts."""
    return argument.encode(errors="surrogateescape").decode(errors="replace")


def read(stdin: BinaryIO) -> str:
    """Read all of *stdin*, without the white space at its end.

    Raises:
        BadQuestion: it is larger than MAX_BYTES, or not UTF-8.
    """
    data = stdin.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise BadQuestion(f"stdin has more than {MAX_BYTES} bytes: send less")
    try:
        return data.decode().removeprefix("\ufeff").rstrip()
    except UnicodeDecodeError as error:
        raise BadQuestion(f"stdin is not UTF-8 text: byte {error.start} is not") from None


T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal came. *number* is that of the signal. *forced*: it is the second one, and work may
    still be under way.

    A KeyboardInterrupt, since asyncio lets no other exception of a signal handler out of its loop.
    """

    def __init__(self, number: int, *, forced: bool = False) -> None:
        super().__init__(number)
        self.number = number
        self.forced = forced


class Interrupts:
    """Takes the signals over inside a `with`, and runs the coroutines that they may end."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self._runner = runner
        self._task: asyncio.Task[Any] | None = None
        self._number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            # `nohup` makes its program ignore SIGHUP, and a shell makes background programs ignore
            # SIGINT.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_exc: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run *work* to its end.

        Raises:
            Interrupted: a signal came, and *work* has ended, unless a second one came.
        """
        self._number, loop = 0, self._runner.get_loop()
        self._task = task = loop.create_task(work)
        try:
            result = loop.run_until_complete(task)
        except asyncio.CancelledError:
            if not self._number:
                raise
            raise Interrupted(self._number) from None
        finally:
            self._task = None
        if self._number:
            # The signal came too late to cancel anything.
            raise Interrupted(self._number)
        return result

    def _take(self, number: int, _frame: FrameType | None) -> None:
        if self._task is None or self._number:
            raise Interrupted(number, forced=self._task is not None)
        self._number = number
        # Thread-safe, since that also wakes the loop, which waits for its sockets.
        self._task.get_loop().call_soon_threadsafe(self._task.cancel)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The server that is asked, and how.

    *timeout*: seconds for a whole answer, with all waits. *endpoint*: the path of the WebSocket
    face.
    """

    url: str
    key: str | None
    provider: str | None
    model: str | None
    timeout: float
    endpoint: str | None = None


async def ask(settings: Settings, history: History, question: str) -> None:
    """Ask *question*, and show its answer on stdout; add both to *history*, however the answer
    ends.

    Cancelling this stops the answer at the server.

    Raises:
        BadQuestion: a setting can be no part of a question.
        AnswerError: there is no whole answer.
        OSError: stdout cannot be written.
    """
    begun, thought = False, ""
    # The socket lives only as long as the answer: a person who thinks or leaves holds no place at
    # the server.
    async with (
        make_display() as display,
        Client(
            settings.url, key=settings.key, endpoint=settings.endpoint, deadline=settings.timeout
        ) as client,
    ):
        display.note(f"waiting for {settings.url}")
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
        finally:
            history.add(question, answer.received)
    remark(answer.complete)


def make_display() -> Display:
    """Return a display for stdout, which draws if rich is installed and stdout is a terminal that
    supports it.
    """
    out, terminal = sys.stdout, sys.stdout.isatty()
    screen = out if terminal else sys.stderr
    # A terminal of these names cannot move its cursor.
    dumb = os.environ.get("TERM", "") in {"", "dumb"}
    if screen is not None and screen.isatty() and not dumb:
        try:
            from aioserver.tools.chat.markdown import DrawnDisplay  # noqa: PLC0415 - optional

            return DrawnDisplay(out, screen)
        except ModuleNotFoundError:
            pass
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


def remark(complete: Complete | None) -> None:
    """Report on stderr anything unusual about a whole answer."""
    if complete is not None and complete.finish_reason in REMARKS:
        warn(REMARKS[complete.finish_reason])


def explain(error: AnswerError, settings: Settings) -> str:
    """Return in one line the fault and its remedy."""
    if error.code in KEY_FAULTS:
        return f"{settings.url} {KEY_FAULTS[error.code]}"
    if error.code == "connect_error" and not error.text:
        return error.message
    if error.code == "protocol_error":
        return (
            f"{settings.url} is no aioserver, "
            f"or a proxy in front of it is not set up: {error.message}"
        )
    if error.code == "cancelled":
        return "somebody else has cancelled the answer"
    start = "the answer broke off: " if error.text else ""
    return f"{start}{error.message} ({error.code})"


def warn(text: str) -> None:
    """Print *text*, which may come from a server, on one line of stderr."""
    print(f"aioserver: {printable(text)}", file=sys.stderr, flush=True)
