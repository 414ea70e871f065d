"""What the checks of a doctor know."""

from __future__ import annotations

import operator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from aioserver.tools import remote

if TYPE_CHECKING:
    import aiohttp

    from aioserver.config.settings import Settings
    from aioserver.server.app import Server


class Found:
    """What checks have found out. What is not known yet is no attribute."""

    # The settings; also as `here`, unless only one provider is looked at.
    settings: Settings
    here: Settings
    # A server with these providers in this process, of which nobody knows.
    server: Server
    # A session for requests to the URL.
    session: aiohttp.ClientSession
    # Whether an aioserver is there, whether it serves us, and whether it opens a WebSocket.
    healthy: bool
    accepted: bool
    upgraded: bool


@dataclass(kw_only=True)
class Facts(Found):
    """What was asked of the doctor, and what its checks have found out.

    The question is about the server at *url*, for a client with *key*; or about one with the
    configuration in the file *config* (None: that which `serve` would choose); or of that about
    the provider *only*. *ask*: whether a question may cost money. *idle*: seconds of silence.
    *root* has the files in which the system shows its limits. *stack* closes what checks open.
    """

    url: str = ""
    key: str | None = None
    config: Path | None = None
    only: str | None = None
    ask: bool = True
    idle: float = 0.0
    root: Path = Path("/")
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    # Whether the configuration is one that `serve` would take.
    usable: bool = True
    # The paths of the faces at the URL, a model there whose answers cost nothing, and the
    # `Content-Encoding`s of the streams that have come.
    paths: dict[str, str] = field(default_factory=remote.PATHS.copy)
    simulated: str | None = None
    encodings: set[str] = field(default_factory=set)

    @property
    def local(self) -> bool:
        """Whether the question is about a server that would start here."""
        return not self.url

    def known(self, fact: str) -> bool:
        """Return whether *fact*, a dotted name, is known, and neither empty nor false."""
        try:
            return bool(operator.attrgetter(fact)(self))
        except AttributeError:
            return False
