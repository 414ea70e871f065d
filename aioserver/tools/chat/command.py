"""The command line of `chat`: a dialog where there is a terminal, else one question, which is the
words of the command line, and stdin where that is no terminal.
"""

from __future__ import annotations

import asyncio
import io
import re
import sys
from typing import TYPE_CHECKING, Any

import click

from aioserver.client.client import base_url
from aioserver.commands import options
from aioserver.tools import remote
from aioserver.tools.chat.asking import (
    BadQuestion,
    Chat,
    Interrupted,
    Interrupts,
    NoAnswer,
    end_by,
    warn,
)
from aioserver.tools.chat.dialog import Dialog

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import BinaryIO

# Bytes that are read of stdin: half of a server's default limit, since JSON may double them.
MAX_BYTES = 8 << 20
# A first word that is an address: a URL, `localhost`, or a host with a port.
_ADDRESS = re.compile(
    r"https?://\S+ | localhost(/\S*)? | (\[[\da-f:.]+\] | [a-z\d][a-z\d.-]*) : \d{1,5} (/\S*)?",
    re.IGNORECASE | re.VERBOSE,
)


@click.command("chat")
@click.argument("words", nargs=-1, metavar="[URL] [TEXT]...")
@remote.key_option
@click.option("--provider", help="Provider that alone is asked.  [default: the server's choice]")
@click.option("--model", help="Model to ask for.  [default: the server's choice]")
@click.option("--conversation", help="Id of a conversation to go on with, which the server keeps.")
@click.option(
    "--system", help="System prompt, in place of the server's; the conversation is then kept here."
)
@options.number(
    "--timeout",
    click.FloatRange(min=0, min_open=True),
    "Seconds for an answer, with its waits and reconnections.",
    600.0,
)
@options.version
def command(words: Sequence[str], *, system: str | None, **settings: Any) -> int:
    """Chat with a running server, or ask it one question.

    URL is the server's address, http://127.0.0.1:8000 unless the first word is another address.
    With a TEXT, or with a question on stdin, there is one answer; with both, stdin follows the
    TEXT. Without either there is a dialog until Ctrl-D, in which Ctrl-C stops an answer.

    Exit code 1: there is no whole answer; 2: the server wants a key, or there is no question.
    """
    if system is not None and settings["conversation"] is not None:
        raise click.UsageError(
            "either --system or --conversation: the server has a conversation's system prompt"
        )
    address, text = split(words)
    try:
        url = base_url(address or remote.DEFAULT_URL)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    chat = Chat(url=url, system=decoded(system) if system else None, **settings)
    return hold(chat, decoded(text))


def hold(chat: Chat, text: str) -> int:
    """Hold a dialog, or ask *text* with the content of stdin. Returns the exit code: see
    `command`.
    """
    if sys.stdout is None:
        warn("stdout is closed: there is no place for an answer")
        return 1
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A character that the terminal's encoding lacks is replaced, and causes no traceback.
            stream.reconfigure(errors="replace")
    person = sys.stdin is not None and sys.stdin.isatty()
    dialog = person and sys.stdout.isatty() and not text
    with asyncio.Runner() as runner:
        interrupts = Interrupts(runner)
        try:
            if not dialog:
                text = _whole_question(text, person=person)
            # Checked before the first question, which would be lost.
            interrupts.run(_look(chat))
            if dialog:
                Dialog(chat, interrupts).run()
            else:
                interrupts.run(chat.ask(text))
        except (NoAnswer, remote.Unreachable) as error:
            warn(error)
            return 2 if isinstance(error, BadQuestion | remote.KeyNeeded) else 1
        except Interrupted as interrupted:
            if not interrupted.forced:
                runner.close()
            return end_by(interrupted.number)
    return 0


def split(words: Sequence[str]) -> tuple[str | None, str]:
    """Return the first of *words*, if it is an address, and the text of the others."""
    if words and _ADDRESS.fullmatch(words[0]):
        return words[0], " ".join(words[1:])
    return None, " ".join(words)


def decoded(argument: str) -> str:
    """Return *argument* without bytes that are not UTF-8, which no server accepts."""
    return argument.encode(errors="surrogateescape").decode(errors="replace")


def _whole_question(text: str, *, person: bool) -> str:
    """Return *text* and the content of stdin. If a *person* has typed a text, stdin is not read.

    Raises:
        BadQuestion: there is no question, or it cannot be sent.
    """
    if sys.stdin is not None and not (person and text):
        if person:
            warn("type the question, and Ctrl-D at its end")
        text = "\n\n".join(filter(None, (text, read(sys.stdin.buffer))))
    if not text:
        raise BadQuestion("there is no question: give it as an argument, or on stdin")
    return text


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


async def _look(chat: Chat) -> None:
    """Ask the server for the path of its WebSocket face, and whether it knows our key.

    Raises:
        Unreachable: no aioserver is there.
        KeyNeeded: it wants another key.
    """
    async with remote.session(chat.key) as session:
        paths = await remote.paths(session, chat.url)
        if paths is None:
            raise remote.Unreachable(f"{chat.url} answers, but it is no aioserver")
        await remote.check_key(session, chat.url, chat.key)
    chat.endpoint = paths["websocket"]
