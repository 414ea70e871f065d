"""The command line of `chat`: a dialog where there is a terminal, else one question."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import sys
from typing import TYPE_CHECKING

import click

from aioserver.client import AnswerError
from aioserver.client.client import base_url
from aioserver.commands import options
from aioserver.tools import remote
from aioserver.tools.chat import asking
from aioserver.tools.chat.asking import History, Interrupted, Interrupts, Settings, end_by
from aioserver.tools.chat.dialog import Dialog

if TYPE_CHECKING:
    from collections.abc import Sequence


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
def command(
    words: Sequence[str],
    *,
    key: str | None,
    provider: str | None,
    model: str | None,
    conversation: str | None,
    system: str | None,
    timeout: float,
) -> int:
    """Chat with a running server, or ask it one question.

    URL is the server's address, http://127.0.0.1:8000 unless the first word is another address.
    With a TEXT, or with a question on stdin, there is one answer; with both, stdin follows the
    TEXT. Without either there is a dialog until Ctrl-D, in which Ctrl-C stops an answer.

    Exit code 1: there is no whole answer; 2: the server wants a key, or there is no question.
    """
    if system is not None and conversation is not None:
        raise click.UsageError(
            "either --system or --conversation: the server has a conversation's system prompt"
        )
    address, text = asking.split(words)
    try:
        url = base_url(address or remote.DEFAULT_URL)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    settings = Settings(url=url, key=key, provider=provider, model=model, timeout=timeout)
    history = History(
        conversation_id=conversation, system=asking.decoded(system) if system else None
    )
    return chat(settings, history, asking.decoded(text))


def chat(settings: Settings, history: History, text: str) -> int:
    """Hold a dialog, or ask *text* with the content of stdin. Returns the exit code: see
    `command`.
    """
    if sys.stdout is None:
        asking.warn("stdout is closed: there is no place for an answer")
        return 1
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A character that the terminal's encoding lacks is replaced, and causes no traceback.
            stream.reconfigure(errors="replace")
    person = sys.stdin is not None and sys.stdin.isatty()
    dialog = person and sys.stdout.isatty() and not text
    with asyncio.Runner() as runner, Interrupts(runner) as interrupts:
        try:
            if not dialog:
                text = _whole_question(text, person=person)
            # Checked before the first question, which would be lost.
            settings = interrupts.run(_look(settings))
            if dialog:
                Dialog(settings, history, interrupts).run()
            else:
                interrupts.run(asking.ask(settings, history, text))
        except (asking.BadQuestion, remote.KeyNeeded) as error:
            asking.warn(str(error))
            return 2
        except remote.Unreachable as error:
            asking.warn(str(error))
            return 1
        except AnswerError as error:
            asking.warn(asking.explain(error, settings))
            return 1
        except Interrupted as interrupted:
            if not interrupted.forced:
                runner.close()
            return end_by(interrupted.number)
    return 0


def _whole_question(text: str, *, person: bool) -> str:
    """Return *text* and the content of stdin. If a *person* has typed a text, stdin is not read.

    Raises:
        BadQuestion: there is no question, or it cannot be sent.
    """
    if sys.stdin is not None and not (person and text):
        if person:
            asking.warn("type the question, and Ctrl-D at its end")
        text = "\n\n".join(filter(None, (text, asking.read(sys.stdin.buffer))))
    if not text:
        raise asking.BadQuestion("there is no question: give it as an argument, or on stdin")
    return text


async def _look(settings: Settings) -> Settings:
    """Ask the server for the path of its WebSocket face, and whether it knows our key.

    Raises:
        Unreachable: no aioserver is there.
        KeyNeeded: it wants another key.
    """
    async with remote.session(settings.key) as session:
        paths = await remote.paths(session, settings.url)
        if paths is None:
            raise remote.Unreachable(f"{settings.url} answers, but it is no aioserver")
        await remote.check_key(session, settings.url, settings.key)
    return dataclasses.replace(settings, endpoint=paths["websocket"])
