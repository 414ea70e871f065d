"""The data of the checks: the facts that they find, and the results that they yield."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from aioserver.tools import remote

if TYPE_CHECKING:
    import aiohttp

    from aioserver.config.settings import Settings
    from aioserver.server.app import Server

LEVELS = ("ok", "warn", "fail", "skip")


@dataclass(slots=True)
class Result:
    """A result of a check. *hint* says what to do. *seconds* is the time that a step took; None if
    it is of no interest. An empty *subject* stands for that of the check.

    The level `warn` means that some clients fail or are slow, `fail` that answers fail, and `skip`
    that nothing was checked.
    """

    level: str
    text: str
    hint: str = ""
    seconds: float | None = None
    subject: str = ""

    def __post_init__(self) -> None:
        # A server may have written the text.
        self.text, self.hint = remote.printable(self.text), remote.printable(self.hint)

    def __str__(self) -> str:
        took = "" if self.seconds is None else f" ({1000 * self.seconds:.0f} ms)"
        hint = f"\n        {self.hint}" if self.hint else ""
        return f"{self.level:<6}{self.subject}: {self.text}{took}{hint}"


ok, warn, fail, skip = (partial(Result, level) for level in LEVELS)


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
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    # The settings, unless a single provider is checked.
    here: Settings = field(init=False)
    # A server in this process with these providers, which has no clients.
    server: Server = field(init=False)
    # A session for requests to the URL; whether an aioserver answers there, and accepts our key.
    session: aiohttp.ClientSession = field(init=False)
    healthy: bool = False
    accepted: bool = False
    # The paths of the faces at the URL, and a model there whose answers cost nothing.
    paths: dict[str, str] = field(default_factory=remote.PATHS.copy)
    simulated: str | None = None

    async def get(self, path: str, **headers: str) -> remote.Answered:
        """GET *path* at the URL."""
        return await remote.get(self.session, self.url + path, headers=headers)
