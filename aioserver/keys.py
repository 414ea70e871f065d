"""The inventory of app state: everything that lives as long as the server, one typed key a line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web

if TYPE_CHECKING:
    from aioserver.auth import Origins
    from aioserver.faces.admission import Admission
    from aioserver.faces.websocket import Socket
    from aioserver.fastpath import Outbox
    from aioserver.gateway import Gateway
    from aioserver.router import Router
    from aioserver.settings import Settings
    from aioserver.store import Streams
    from aioserver.wheel import Wheel

SETTINGS: web.AppKey[Settings] = web.AppKey("settings")
ORIGINS: web.AppKey[Origins] = web.AppKey("origins")
ADMISSION: web.AppKey[Admission] = web.AppKey("admission")
WHEEL: web.AppKey[Wheel] = web.AppKey("wheel")
STREAMS: web.AppKey[Streams] = web.AppKey("streams")
ROUTER: web.AppKey[Router] = web.AppKey("router")
GATEWAY: web.AppKey[Gateway] = web.AppKey("gateway")
OUTBOX: web.AppKey[Outbox] = web.AppKey("outbox")
SOCKETS: web.AppKey[set[Socket]] = web.AppKey("sockets")
LIFE: web.AppKey[Life] = web.AppKey("life")


class Life:
    """Whether the server takes work: false while it starts, and from the moment it is to stop."""

    def __init__(self) -> None:
        self.ready = False
