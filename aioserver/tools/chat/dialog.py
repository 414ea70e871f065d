"""The dialog: a person asks, reads, and asks again."""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import sys
import termios
from typing import TYPE_CHECKING

from aioserver import __version__
from aioserver.tools.chat.asking import Interrupted, NoAnswer, warn
from aioserver.tools.remote import RICH_MISSING, printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aioserver.tools.chat.asking import Chat, Interrupts

# The index of the local modes among the attributes of a terminal (termios).
LOCAL_MODES = 3
PROMPT, MORE = "> ", ". "
QUOTES = '"""'
HELP = '''\
/new           begin another conversation
/model NAME    ask this model from now on; without NAME: the server's choice
/help          show this
/quit          leave; so do Ctrl-D, and Ctrl-C while you write

Ctrl-C stops an answer. A question of several lines begins and ends with """,
or has a \\ at the end of each line but the last.
'''


class Dialog:
    """Reads questions from the terminal, and shows the answers, until the person leaves."""

    def __init__(self, chat: Chat, interrupts: Interrupts) -> None:
        self._chat = chat
        self._interrupts = interrupts

    def run(self) -> None:
        """Hold the dialog.

        Raises:
            Interrupted: by another signal than SIGINT.
            OSError: the terminal is gone.
        """
        # Line editing and a history of the questions in memory, where Python has them.
        with contextlib.suppress(ModuleNotFoundError):
            import readline  # noqa: F401, PLC0415 - optional
        print(f"aioserver {__version__}, {self._chat.url}. /help explains, Ctrl-D leaves.")
        if importlib.util.find_spec("rich") is None:
            print(f"{RICH_MISSING}; without it, answers are plain text, and waits are not shown.")
        print()
        while True:
            try:
                question = self._read()
            except EOFError:
                print()
                return
            except Interrupted as interrupted:
                print()
                if interrupted.number == signal.SIGINT:
                    return
                raise
            if question.startswith("/") and "\n" not in question:
                if not self._obey(question):
                    return
            elif question:
                self._ask(question)

    def _read(self) -> str:
        """Read a question of one or more lines.

        Raises:
            EOFError: stdin has ended.
            Interrupted: a signal came.
        """
        line = input(PROMPT)
        if line.lstrip().startswith(QUOTES):
            text = line.lstrip().removeprefix(QUOTES)
            while not text.rstrip().endswith(QUOTES):
                text += "\n" + input(MORE)
            return text.rstrip().removesuffix(QUOTES).strip()
        while line.endswith("\\"):
            line = line[:-1] + "\n" + input(MORE)
        return line.strip()

    def _obey(self, command: str) -> bool:
        """Carry out a command; return whether the dialog continues."""
        name, _, argument = command.partition(" ")
        match name:
            case "/quit" | "/exit":
                return False
            case "/new":
                self._chat.begin_anew()
                print("This is another conversation.\n")
            case "/model":
                self._chat.model = argument.strip() or None
                print(f"{self._chat.model or 'The model of the server'} is asked from now on.\n")
            case "/help":
                print(HELP)
            case _:
                print(f"There is no command {printable(name)}; /help lists them.\n")
        return True

    def _ask(self, question: str) -> None:
        try:
            with _no_echo():
                self._interrupts.run(self._chat.ask(question))
        except NoAnswer as error:
            warn(error)
        except Interrupted as interrupted:
            if interrupted.forced or interrupted.number != signal.SIGINT:
                raise
            print("(stopped)", file=sys.stderr)
        print()


@contextlib.contextmanager
def _no_echo() -> Iterator[None]:
    """Switch echo off: keys that are pressed during an answer would move the cursor."""
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    quiet = [*before]
    quiet[LOCAL_MODES] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        # It fails if the terminal is gone.
        with contextlib.suppress(termios.error):
            termios.tcsetattr(terminal, termios.TCSADRAIN, before)
