"""The command line of `top`: the screen until `q` or Ctrl-C, or one snapshot."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import termios
import tty
from typing import TYPE_CHECKING, Any, Self

import click

from aioserver.commands import options
from aioserver.tools import remote
from aioserver.tools.top.feed import Feed, LostError, State

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from aioserver.tools.top.screen import Screen

# Seconds. Each event draws the screen, too; but a lost server sends none, and the displayed time
# must go on.
DRAW_INTERVAL = 1.0
# The key that ends the program, and the most bytes of keys that are read at once.
QUIT, MAX_KEYS = b"q", 64


@click.command("top")
@remote.url_argument
@options.number("--interval", click.FloatRange(1, 60), "Seconds between two snapshots.", 1.0)
@click.option(
    "--once",
    is_flag=True,
    help="Print one snapshot and exit, as when stdout is not a terminal.",
)
@remote.key_option
@options.version
def command(url: str, *, interval: float, once: bool, key: str | None) -> int:
    """Show the live state of a running server.

    URL is the server's address, http://127.0.0.1:8000 unless you name another. The screen shows
    connections, queues, providers, latencies and incidents, until `q` or Ctrl-C. A server that
    wants keys wants an admin key for this. Exit code 1: the server refused the key, or --once did
    not reach it.
    """
    return top(url, interval=interval, once=once, key=key)


def top(url: str, *, interval: float, once: bool, key: str | None) -> int:
    """Show the state of the server at *url*, each *interval* seconds, until `q`, SIGINT or SIGTERM.

    One snapshot is printed instead with *once*, and if stdout is not a terminal. Returns the exit
    code: 0, 1 if the server refuses us (or, for one snapshot, is not there), 2 without rich.
    """
    try:
        from aioserver.tools.top import screen  # noqa: PLC0415 - optional
    except ModuleNotFoundError:
        print(remote.RICH_MISSING, file=sys.stderr)
        return 2
    once = once or not screen.terminal()
    state = State(url)
    try:
        asyncio.run(_once(state, key) if once else _live(state, interval, key, screen))
    except (remote.Unreachable, LostError) as error:
        print(f"{url}: {error}", file=sys.stderr)
        return 1
    if once:
        screen.show(state)
    return 0


async def _once(state: State, key: str | None) -> None:
    async with remote.session(key) as session:
        await Feed(session, state, 1.0, lambda: None).first()


async def _live(state: State, interval: float, key: str | None, screen: ModuleType) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    with Keys(stop.set), screen.Screen(state) as live_screen:
        async with remote.session(key) as session:
            tasks = (
                asyncio.create_task(Feed(session, state, interval, live_screen.draw).follow()),
                asyncio.create_task(_tick(live_screen)),
                asyncio.create_task(stop.wait()),
            )
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
            for task in tasks:
                if not task.cancelled():
                    task.result()


class Keys:
    """The pressed keys, inside a `with`: `q` calls *on_quit*.

    Always: the terminal is as it was before when the block has ended.
    """

    def __init__(self, on_quit: Callable[[], None]) -> None:
        self._on_quit = on_quit
        self._before: list[Any] | None = None

    def __enter__(self) -> Self:
        if sys.stdin is not None and sys.stdin.isatty():
            self._before = termios.tcgetattr(sys.stdin)
            # One key at a time and without echo; Ctrl-C is still a signal.
            tty.setcbreak(sys.stdin, termios.TCSANOW)
            asyncio.get_running_loop().add_reader(sys.stdin, self._pressed)
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._before is not None:
            asyncio.get_running_loop().remove_reader(sys.stdin)
            termios.tcsetattr(sys.stdin, termios.TCSANOW, self._before)

    def _pressed(self) -> None:
        try:
            keys = os.read(sys.stdin.fileno(), MAX_KEYS)
        except OSError:
            keys = b""
        if not keys:
            # The terminal is gone.
            asyncio.get_running_loop().remove_reader(sys.stdin)
        elif QUIT in keys.lower():
            self._on_quit()


async def _tick(live_screen: Screen) -> None:
    while True:
        await asyncio.sleep(DRAW_INTERVAL)
        live_screen.draw()
