"""The road to a running server: what a proxy in front lets pass, and what it keeps to itself."""

from __future__ import annotations

import asyncio
import email.utils
import ssl
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import aiohttp
import orjson
from yarl import URL

from aioserver import __version__
from aioserver.client import faults
from aioserver.monitoring.troubles import OF_A_BUG, met_a_bug
from aioserver.protocol import frames
from aioserver.protocol.stream_options import OPTIONS
from aioserver.tools import remote
from aioserver.tools.doctor import arrivals, silence
from aioserver.tools.doctor.network import Peer, Steps

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from aioserver.tools.doctor.findings import Report

# Seconds for one answer of the server, or of the proxy.
TIMEOUT = 10.0
# Bytes that are read of an answer.
MAX_ANSWER_BYTES = 1 << 20
# Seconds of difference between two clocks that make the times in two logs misleading. `Date` has
# whole seconds.
CLOCK_SKEW = 5.0
# Bytes of a header that programs send: a token of a single sign-on, cookies of a large site.
HEADER_BYTES = 7000
# The default of chat.websocket.max_message_size.
BODY_BYTES = 16 << 20
# Seconds after which a head was not refused at once.
REFUSAL_TIMEOUT = 1.0
# How the authority of a server is trusted that is our own.
TRUST = "trust its authority: SSL_CERT_FILE=authority.pem aioserver doctor …"
PING = '{"action": "ping", "request_id": "doctor"}'


class Answered(NamedTuple):
    """The answer to a small request: its status, its headers, and its JSON, if it has any."""

    status: int
    headers: Mapping[str, str]
    content: Any
    took: float

    @property
    def code(self) -> str:
        """The code of our error; empty if the answer is none of ours."""
        error = self.content.get("error") if isinstance(self.content, dict) else None
        return remote.printable(error.get("code") or "") if isinstance(error, dict) else ""


class Examination:
    """The examination of the server at *url* with a client's *key*."""

    def __init__(self, report: Report, url: str, key: str | None) -> None:
        self._report = report
        self._url = url
        self._key = key
        self._paths = remote.PATHS
        # An identifier that the list of models has, whose answers cost nothing.
        self._simulated: str | None = None

    async def run(self, *, ask: bool, idle: float) -> None:
        """Examine all. *ask*: an answer may cost money; *idle*: seconds of silence to bear."""
        if not await self._reach():
            return
        async with remote.session(self._key) as session, asyncio.TaskGroup() as tasks:
            if not await self._health(session):
                return
            await self._ready(session)
            await self._headers(session)
            if not await self._key_accepted(session):
                return
            await self._state(session)
            # It waits for what does not come.
            tasks.create_task(self._body(session))
            upgraded = await self._websocket(session)
            road = arrivals.Road(self._url, self._paths, self._key)
            await arrivals.examine(
                self._report, road, self._simulated, websocket=upgraded, ask=ask
            )
            if upgraded:
                await silence.examine(self._report, road, idle)

    async def _reach(self) -> bool:
        url = URL(self._url)
        context = None
        if url.scheme == "https":
            context = ssl.create_default_context()
            context.set_alpn_protocols(["h2", "http/1.1"])
        peer = Peer(url.host or "", url.port or 0, context, TIMEOUT, TRUST)
        protocol = await Steps(self._report, "server", peer).take()
        if protocol is None:
            return False
        if protocol == "h2":
            self._report.ok("server", "HTTP/2 is offered: a page may follow many streams at once")
        elif context is not None:
            self._report.warn(
                "server",
                "HTTP/2 is not offered: a browser opens six connections for all tabs, "
                "one for each EventSource",
                "a proxy in front gives it (nginx: http2 on); aioserver's own TLS has HTTP/1.1",
            )
        return True

    async def _ask(
        self, session: aiohttp.ClientSession, path: str, **options: Any
    ) -> Answered | None:
        """GET *path*, and read the answer; None, after a finding, if there is none."""
        began = time.perf_counter()
        try:
            async with (
                asyncio.timeout(TIMEOUT),
                session.get(f"{self._url}{path}", allow_redirects=False, **options) as response,
            ):
                body = await faults.read_body(response, MAX_ANSWER_BYTES)
                return Answered(
                    response.status, response.headers, _json(body), time.perf_counter() - began
                )
        except (aiohttp.ClientError, OSError, ValueError) as error:
            self._report.fail("server", f"GET {path}: {remote.describe(error)}")
            return None

    async def _health(self, session: aiohttp.ClientSession) -> bool:
        """Find out whether an aioserver answers; otherwise nothing else makes sense."""
        answer = await self._ask(session, "/health")
        if answer is None:
            return False
        if 300 <= answer.status < 400:
            location = answer.headers.get("Location", "")
            self._report.fail(
                "server", f"redirects to {location}", "give that address: a POST is not redirected"
            )
            return False
        if answer.code == "host_not_allowed":
            self._report.fail(
                "server",
                f"it does not answer to the name {URL(self._url).host}",
                "add it to auth.allowed_hosts, or make client keys (aioserver key NAME)",
            )
            return False
        if remote.SPEAK_TLS in str(answer.content):
            self._report.fail("server", remote.SPEAK_TLS, "give that address")
            return False
        content = answer.content if isinstance(answer.content, dict) else {}
        if answer.status != 200 or content.get("status") != "healthy":
            self._report.fail(
                "server",
                f"GET /health: HTTP {answer.status}, and no aioserver's answer",
                "does the proxy know where aioserver listens? Its log says why it failed",
            )
            return False
        version = content.get("version")
        shown = f"aioserver {version}" if version else "aioserver; its version is for admins"
        self._report.ok("server", f"healthy: {shown}", answer.took)
        if version and version != __version__:
            self._report.warn(
                "server", f"this doctor is of version {__version__}", "use that of the server"
            )
        self._clock(answer)
        return True

    def _clock(self, answer: Answered) -> None:
        try:
            there = email.utils.parsedate_to_datetime(answer.headers.get("Date", "")).timestamp()
        except ValueError:
            self._report.skip("server", "its clock: the answer has no Date")
            return
        skew = there - time.time()
        if abs(skew) > CLOCK_SKEW:
            self._report.warn(
                "server",
                f"its clock, or that of the proxy, differs from ours by {skew:.0f} s",
                "use NTP on both: logs cannot be compared, "
                "and sessions of browsers end early or late",
            )
        else:
            self._report.ok("server", "its clock agrees with ours")

    async def _ready(self, session: aiohttp.ClientSession) -> None:
        answer = await self._ask(session, "/ready")
        if answer is None:
            return
        if answer.status == 200:
            self._report.ok("server", "ready: it takes work", answer.took)
            return
        reason = answer.content.get("reason") if isinstance(answer.content, dict) else None
        self._report.fail(
            "server",
            f"not ready: {reason or f'HTTP {answer.status}'}",
            "`aioserver doctor` on its machine says what is wrong with its providers",
        )

    async def _headers(self, session: aiohttp.ClientSession) -> None:
        answer = await self._ask(session, "/health", headers={"X-Doctor": "x" * HEADER_BYTES})
        if answer is None:
            return
        if answer.status == 200:
            self._report.ok("server", f"a header of {HEADER_BYTES} bytes passes")
        else:
            self._report.warn(
                "server",
                f"a header of {HEADER_BYTES} bytes is refused: HTTP {answer.status}",
                "clients with long tokens or cookies fail (nginx: large_client_header_buffers)",
            )

    async def _body(self, session: aiohttp.ClientSession) -> None:
        """Announce a large body, send one byte, and see whether anybody refuses its size."""
        size = f"{BODY_BYTES >> 20} MiB"
        headers = {"Content-Length": str(BODY_BYTES), "Content-Type": "application/json"}
        try:
            async with (
                asyncio.timeout(REFUSAL_TIMEOUT),
                session.post(
                    f"{self._url}{self._paths['openai']}/chat/completions",
                    data=_begun(),
                    headers=headers,
                    allow_redirects=False,
                ) as response,
            ):
                status = response.status
                code, _ = faults.error_object(await faults.read_body(response, MAX_ANSWER_BYTES))
        except TimeoutError:
            self._report.ok("server", f"a body of {size} is not refused by its head")
            return
        except (aiohttp.ClientError, OSError) as error:
            self._report.warn("server", f"a body of {size} is refused: {remote.describe(error)}")
            return
        if status != 413:
            # Our server may refuse a client before it looks at the body.
            self._report.ok("server", f"a body of {size} is not refused for its size")
        elif code:
            self._report.ok("server", f"a body of {size} passes the proxy; aioserver takes less")
        else:
            self._report.warn(
                "server",
                f"the proxy refuses a body of {size}",
                "conversations with pictures fail there: allow more than "
                "chat.websocket.max_message_size (nginx: client_max_body_size)",
            )

    async def _key_accepted(self, session: aiohttp.ClientSession) -> bool:
        """Find out whether the server serves us; also its paths, and a model that costs
        nothing.
        """
        answer = await self._ask(session, "/v1/models")
        if answer is None:
            return False
        if answer.status == 401:
            hint = "`aioserver key NAME` makes one: give it by --key or AIOSERVER_KEY"
            text = (
                "the key is not known to it" if self._key else "it wants a key, and there is none"
            )
            self._report.fail("key", text, hint)
            return False
        if answer.status != 200:
            self._report.fail("key", f"GET /v1/models: HTTP {answer.status} {answer.code}")
            return False
        self._report.ok("key", "accepted" if self._key else "none is needed", answer.took)
        self._simulated = _simulated(answer.content)
        try:
            self._paths = await remote.paths(session, self._url) or remote.PATHS
        except remote.Unreachable as error:
            self._report.fail("server", str(error))
            return False
        return True

    async def _state(self, session: aiohttp.ClientSession) -> None:
        """Find out whether requests meet bugs of the server, whether its ledger is written, and
        which providers do not report what their streams cost, if the key may see its state.
        """
        answer = await self._ask(session, "/stats")
        if answer is None:
            return
        match answer.content:
            case {"bugs": {"last_minute": int(recent)}} if recent:
                self._report.fail("server", met_a_bug(recent), OF_A_BUG)
            case {"bugs": {"total": int(total)}} if total:
                self._report.warn("server", met_a_bug(total, "since its start"), OF_A_BUG)
            case {"bugs": _}:
                self._report.ok("server", "no request has met a bug of it since its start")
            case _:
                self._report.skip(
                    "server", f"its bugs: /stats: HTTP {answer.status} {answer.code}"
                )
        match answer.content:
            case {"usage": {"trouble": str(trouble)}}:
                hint = "make the directory of usage.path writable, and room on its disk"
                self._report.warn("server", f"its ledger cannot be written: {trouble}", hint)
            case {"usage": {"lost": int(lost)}} if lost:
                text = f"its ledger has lost {lost} lines since the start of the server"
                self._report.warn("server", text, "what callers have spent is more: docs/usage.md")
            case {"usage": {"ledger": True}}:
                self._report.ok("server", "its ledger is written")
        match answer.content:
            case {"providers": dict(providers)} if silent := _without_usage(providers):
                self._report.warn(
                    "server",
                    f"refused stream_options: {', '.join(silent)}: the tokens of streams are "
                    "estimated there",
                    "a later version of the engine may report them; a reload asks it again",
                )

    async def _websocket(self, session: aiohttp.ClientSession) -> bool:
        """Open a WebSocket as a page of this address does. Return whether a pong came."""
        path = self._paths["websocket"]
        origin = str(URL(self._url).origin())
        began = time.perf_counter()
        try:
            async with (
                asyncio.timeout(TIMEOUT),
                session.ws_connect(f"{self._url}{path}", origin=origin) as ws,
            ):
                await ws.send_str(PING)
                frame = frames.parse((await ws.receive_str()).encode())
        except aiohttp.WSServerHandshakeError as error:
            self._refused_upgrade(path, error.status)
        except (aiohttp.ClientError, OSError, TypeError, frames.BadFrame) as error:
            self._report.fail("WebSocket", f"{path}: no answer: {type(error).__name__}")
        else:
            took = time.perf_counter() - began
            if frame.status == "pong":
                self._report.ok("WebSocket", f"{path} upgrades, and a page of {origin} may", took)
                return True
            code = frame.chunk.code or frame.status
            self._report.warn("WebSocket", f"{path} upgrades, and says {code}")
        return False

    def _refused_upgrade(self, path: str, status: int) -> None:
        text = f"{path} is not upgraded: HTTP {status}"
        if status == 403:
            self._report.fail(
                "WebSocket",
                f"{text}: pages of this address may not connect",
                "let the proxy pass Host unchanged, or add the address to "
                "chat.websocket.allow_origins",
            )
        else:
            self._report.fail(
                "WebSocket",
                text,
                "the proxy must pass Upgrade and Connection on this path, "
                "by HTTP/1.1: docs/proxies.md",
            )


def _without_usage(providers: dict[str, Any]) -> list[str]:
    """Return those of *providers* that have refused to report what a stream has cost."""
    silent = []
    for name, provider in providers.items():
        match provider:
            case {"learned": {"refused_words": list(words)}} if OPTIONS.name in words:
                silent.append(name)
    return silent


def _simulated(content: Any) -> str | None:
    """Return the name of a simulated model in the list of models."""
    models = content.get("data") if isinstance(content, dict) else None
    for model in models if isinstance(models, list) else ():
        if isinstance(model, dict) and model.get("simulated") is True:
            return str(model.get("id"))
    return None


def _json(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None


async def _begun() -> AsyncIterator[bytes]:
    """Yield the first byte of a body, and do not end: aiohttp sends a head together with it."""
    yield b" "
    await asyncio.get_running_loop().create_future()
