"""Conversations as a wing: their history in memory, in Redis, or in an SQLite file."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from aioserver.faces.wing import Routes, Wing
from aioserver.wings.conversations import face
from aioserver.wings.conversations.history import History, Trouble
from aioserver.wings.conversations.memory import Conversations
from aioserver.wings.conversations.section import HistorySection

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AsyncExitStack

    from aioserver.config.settings import Repository, Settings
    from aioserver.faces.context import Context
    from aioserver.faces.wing import Core
    from aioserver.wings.conversations.history import Storage

logger = logging.getLogger("aioserver.history")

MISSING = Trouble(
    "missing",
    "conversations are not kept in a file: this Python has no sqlite3",
    "Run the server with a Python that was built with SQLite.",
)


class ConversationsWing(Wing):
    """The turns in front of a question, and the face that shows and deletes them."""

    name: ClassVar = "conversations"
    endpoints: ClassVar = {"conversations": "/conversations"}
    _history: History

    @staticmethod
    def before_workers(settings: Settings) -> None:
        """Make the file of conversations, if one is wanted. It blocks."""
        prepare_file(settings.chat.service.repository)

    async def open(self, core: Core, stack: AsyncExitStack) -> None:
        """Open the storage that the settings name, and the storage that all instances share."""
        service = core.settings.chat.service
        persistence = service.repository.persistence
        if core.scope is None and persistence.clear_on_startup:
            await asyncio.to_thread(prepare_file, service.repository)
        conversations = Conversations(service.context, persistence)
        shared = None
        if core.commands is not None:
            # A single instance needs none of it.
            from aioserver.wings.conversations.redis import RedisHistories  # noqa: PLC0415

            shared = RedisHistories(core.commands, conversations)
            stack.push_async_callback(shared.close)
        storage: Storage | None = shared
        missing = None
        if service.repository.in_file:
            # It replaces the shared storage: all processes of a machine have the same file, and
            # turns that are written to it late are noted in the shared storage.
            try:
                # Python's own sqlite3, which some builds lack.
                from aioserver.wings.conversations.sqlite import SqliteStorage  # noqa: PLC0415
            except ModuleNotFoundError:
                missing = MISSING
            else:
                storage = file = SqliteStorage(
                    service.repository.path,
                    persistence,
                    conversations.clock,
                    core.metrics.history_turns,
                    shared=core.scope is not None,
                    late=shared,
                )
                stack.push_async_callback(file.close)
                await file.open()
        self.histories = self._history = History(conversations, storage, missing)

    def sections(self) -> Sequence[HistorySection]:
        """Return the state of the storage."""
        return (HistorySection(self._history),)

    async def serve(self, context: Context) -> Routes:  # noqa: ARG002 - it needs none of it
        """Return the routes of `/conversations`."""
        return Routes(key=face.routes(self._history))

    def prepare(self, settings: Settings) -> Callable[[], None]:
        """Return the function that uses new bounds."""
        service = settings.chat.service
        return partial(self._history.apply, service.context, service.repository.persistence)


def prepare_file(repository: Repository) -> None:
    """Make the file of conversations, or clear it, as the settings demand.

    It blocks. A fault is logged here, and occurs again when the file is opened.
    """
    if not repository.in_file:
        return
    try:
        from aioserver.wings.conversations.sqlite_file import (  # noqa: PLC0415 - see `open`
            Broken,
            prepare,
        )
    except ModuleNotFoundError:
        return
    clear = repository.persistence.clear_on_startup
    try:
        prepare(repository.path, clear=clear)
    except Broken as fault:
        logger.warning("%s. %s", fault.trouble.text, fault.trouble.advice)
    else:
        if clear:
            logger.info("conversations deleted at the start: all in %s", repository.path)
