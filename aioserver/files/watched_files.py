"""Watched files beside the configuration, which are read again when they have changed:
certificates, keys.

Each LOOK seconds, and at SIGHUP, the files are checked with stat(2), which follows links. A file
may be written in place, be replaced by another one of its name, or be behind a link that changes,
as in a volume of Kubernetes. A change is read in a thread, since a file system may hang, and put
into effect in one step of the event loop.

A writer may not be done yet, and two files that belong together are never replaced at once. So a
change that cannot be used has no effect: the former content stays in use, and each check tries
again. Only after PATIENCE seconds is there one warning, and one incident.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable
    from typing import NoReturn

logger = logging.getLogger("aioserver.files")

# Seconds between two checks.
LOOK = 2.0
# Seconds for which a change may be unusable before it is reported.
PATIENCE = 10.0


class _Watch:
    """Files that are read together; see `WatchedFiles.add`."""

    def __init__(
        self,
        kind: str,
        paths: Callable[[], Iterable[str]],
        prepare: Callable[[], Callable[[], Awaitable[None] | None] | None],
    ) -> None:
        self.kind, self.paths, self.prepare = kind, paths, prepare
        # The state of the files when the content in use was read; None: it is not known.
        self.seen: object = None
        # The first time at which they could not be used, in the loop's time, and whether that was
        # reported.
        self.failing_since: float | None = None
        self.reported = False


class WatchedFiles:
    """Reads files again when they have changed.

    Always: one check runs at a time, and its results are in effect before the next one begins. A
    file that changes while it is read is read once more.

    *report* is called with the kind and the text of an incident. Checks start only with `begin`;
    call `close` at the end.
    """

    def __init__(self, report: Callable[[str, str], None]) -> None:
        self._report = report
        self._watches: list[_Watch] = []
        self._looking = asyncio.Lock()
        self._task: asyncio.Task[NoReturn] | None = None
        self._begun = False

    def add(
        self,
        kind: str,
        paths: Callable[[], Iterable[str]],
        prepare: Callable[[], Callable[[], Awaitable[None] | None] | None],
    ) -> None:
        """Watch the files that *paths* returns; after a reload it may return others.

        *kind* is that of the incident. *prepare* is called in a thread: it reads the files, and
        returns a function that puts their content into effect, or None if there is nothing to do.
        The event loop calls this function, which may be a coroutine function. Both raise OSError
        or ValueError, with a text that holds no secret, if the content cannot be used. The first
        check reads the files, as they may have changed since the start.
        """
        self._watches.append(_Watch(kind, paths, prepare))
        if self._begun:
            self.begin()

    def begin(self) -> None:
        """Check from time to time, as soon as there is anything to watch."""
        self._begun = True
        if self._watches and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def look(self, *, again: bool = False) -> None:
        """Read the files that have changed, or all of them *again*, and put them into effect.

        Cancelling this may leave a change to the next check.
        """
        async with self._looking:
            for watch in self._watches:
                if again:
                    watch.seen = None
                await self._look_at(watch)

    async def close(self) -> None:
        """Stop watching."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def _run(self) -> NoReturn:
        while True:
            await asyncio.sleep(LOOK)
            await self.look()

    async def _look_at(self, watch: _Watch) -> None:
        # In this order: a change after the stamps is seen at the next check.
        paths = tuple(watch.paths())
        stamps = await asyncio.to_thread(_stamps, paths) if paths else []
        if stamps == watch.seen:
            watch.failing_since, watch.reported = None, False
            return
        try:
            put_in_effect = await asyncio.to_thread(watch.prepare)
            if put_in_effect is not None:
                waiting = put_in_effect()
                if inspect.isawaitable(waiting):
                    await waiting
        except (OSError, ValueError) as exc:
            self._fail(watch, exc)
            return
        except Exception as bug:
            logger.exception("bug in rereading a file")
            self._fail(watch, bug)
            return
        watch.seen, watch.failing_since, watch.reported = stamps, None, False

    def _fail(self, watch: _Watch, fault: Exception) -> None:
        now = asyncio.get_running_loop().time()
        if watch.failing_since is None:
            watch.failing_since = now
        if now - watch.failing_since >= PATIENCE and not watch.reported:
            watch.reported = True
            text = f"the former content stays in use: {fault}"
            logger.warning("%s: %s", watch.kind, text)
            self._report(watch.kind, text)


def _stamps(paths: Iterable[str]) -> object:
    """Return a value that differs once one of the files of *paths* was replaced or written."""
    return [(path, _stamp(path)) for path in paths]


def _stamp(path: str) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)  # noqa: PTH116 - a Path for each look is not needed
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
