"""The facts: the arguments of `doctor`, and the values that its checks have found."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from aioserver.tools import remote

if TYPE_CHECKING:
    import aiohttp

    from aioserver.config.settings import Settings
    from aioserver.server.app import Server


@dataclass(kw_only=True)
class Facts:
    """The arguments of the command, and the values that its checks have found. A value that is not
    known yet, and has no default, is not an attribute.

    With *url*, the checks concern the server there, for a client with *key*. Otherwise they concern
    a server with the configuration in the file *config* (None: the file that `serve` would choose),
    or only its provider *only*. *ask* allows questions that cost money. *idle* are the seconds of
    silence. *root* has the files in which the system shows its limits.
    """

    url: str = ""
    key: str | None = None
    config: Path | None = None
    only: str | None = None
    ask: bool = True
    idle: float = 0.0
    root: Path = Path("/")
    # Closes the objects that checks open.
    stack: AsyncExitStack = field(default_factory=AsyncExitStack, init=False)
    # Whether `serve` would accept the configuration.
    usable: bool = field(default=True, init=False)
    # The settings; also as `here`, unless only one provider is checked.
    settings: Settings = field(init=False)
    here: Settings = field(init=False)
    # A server in this process with these providers, which has no clients.
    server: Server = field(init=False)
    # A session for requests to the URL.
    session: aiohttp.ClientSession = field(init=False)
    # Whether an aioserver answers, whether it accepts our key, and whether it opens a WebSocket.
    healthy: bool = field(default=False, init=False)
    accepted: bool = field(default=False, init=False)
    upgraded: bool = field(default=False, init=False)
    # The paths of the faces at the URL, and a model there whose answers cost nothing.
    paths: dict[str, str] = field(default_factory=remote.PATHS.copy, init=False)
    simulated: str | None = field(default=None, init=False)
