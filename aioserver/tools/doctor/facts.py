"""The facts: the arguments of `doctor`, and the values that its checks have found."""

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
    """The values that checks have found. A value that is not known yet is not an attribute."""

    # The settings; also as `here`, unless only one provider is checked.
    settings: Settings
    here: Settings
    # A server in this process with these providers, which has no clients.
    server: Server
    # A session for requests to the URL.
    session: aiohttp.ClientSession
    # Whether an aioserver answers, whether it accepts our key, and whether it opens a WebSocket.
    healthy: bool
    accepted: bool
    upgraded: bool


@dataclass(kw_only=True)
class Facts(Found):
    """The arguments of the command, and the values that its checks have found.

    With *url*, the checks concern the server there, for a client with *key*. Otherwise they concern
    a server with the configuration in the file *config* (None: the file that `serve` would choose),
    or only its provider *only*. *ask* allows questions that cost money. *idle* are the seconds of
    silence. *root* has the files in which the system shows its limits. *stack* closes the objects
    that checks open.
    """

    url: str = ""
    key: str | None = None
    config: Path | None = None
    only: str | None = None
    ask: bool = True
    idle: float = 0.0
    root: Path = Path("/")
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    # Whether `serve` would accept the configuration.
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
