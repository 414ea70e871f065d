"""Checks of a running server: whether it answers, and what a proxy in front of it lets pass."""

from __future__ import annotations

import asyncio
import email.utils
import time
from typing import TYPE_CHECKING, Any

import aiohttp
from yarl import URL

from aioserver import __version__
from aioserver.client import faults
from aioserver.monitoring.findings import CHANGED_PROMPTS, REORDERED
from aioserver.protocol import frames
from aioserver.tools import remote
from aioserver.tools.doctor.network import connect, context_for
from aioserver.tools.doctor.results import Result, fail, ok, skip, warn

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping

    from aioserver.tools.doctor.facts import Facts

# Seconds for one answer of the server or of the proxy, and bytes of it that are read at most.
TIMEOUT, MAX_BYTES = 10.0, 1 << 20
# Seconds of difference between two clocks from which on logs cannot be compared. `Date` has whole
# seconds.
CLOCK_SKEW = 5.0
# Bytes of a large header that clients send: a token of a single sign-on, cookies of a large site.
HEADER_BYTES = 7000
# The default of chat.websocket.max_message_size, and the seconds within which a proxy refuses a
# body of this length by its head.
BODY_BYTES, REFUSAL_TIMEOUT = 16 << 20, 1.0
BODY = f"a body of {BODY_BYTES >> 20} MiB"
# The hint for a server whose certificate has an authority of its own.
TRUST = "trust its authority: SSL_CERT_FILE=authority.pem aioserver doctor …"
PING = '{"action": "ping", "request_id": "doctor"}'


async def reach(facts: Facts) -> AsyncIterator[Result]:
    """Connect to the server, and open the session that the other checks use."""
    url = URL(facts.url)
    context = context_for(url)
    if context is not None:
        context.set_alpn_protocols(["h2", "http/1.1"])
    connected = await connect(url, context, TIMEOUT, trust=TRUST)
    for result in connected.results:
        yield result
    if not connected.reached:
        return
    session = remote.session(facts.key)
    facts.session = await facts.stack.enter_async_context(session)
    if connected.protocol == "h2":
        yield ok("HTTP/2 is offered: a page may follow many streams at once")
    elif context is not None:
        yield warn(
            "HTTP/2 is not offered: a browser opens six connections for all tabs, "
            "one for each EventSource",
            "a proxy in front gives it (nginx: http2 on); aioserver's own TLS has HTTP/1.1",
        )


async def health(facts: Facts) -> AsyncIterator[Result]:
    """Check whether an aioserver answers. Without one the other checks make no sense."""
    answer = await remote.get(facts.session, f"{facts.url}/health")
    if not answer.status:
        yield fail(answer.text)
    elif 300 <= answer.status < 400:
        text = f"redirects to {answer.headers.get('Location', '')}"
        yield fail(text, "give that address: a POST is not redirected")
    elif answer.code == "host_not_allowed":
        text = f"it does not answer to the name {URL(facts.url).host}"
        yield fail(text, "add it to auth.allowed_hosts, or make client keys (aioserver key NAME)")
    elif remote.SPEAK_TLS in str(answer.content):
        yield fail(remote.SPEAK_TLS, "give that address")
    elif not answer.healthy:
        text = f"GET /health: HTTP {answer.status}, and no aioserver's answer"
        yield fail(text, "does the proxy know where aioserver listens? Its log says why it failed")
    else:
        facts.healthy = True
        version = answer.content.get("version")
        shown = f"aioserver {version}" if version else "aioserver; its version is for admins"
        yield ok(f"healthy: {shown}", seconds=answer.took)
        if version and version != __version__:
            yield warn(f"this doctor is of version {__version__}", "use that of the server")
        yield _clock(answer.headers.get("Date", ""))


def _clock(date: str) -> Result:
    try:
        skew = email.utils.parsedate_to_datetime(date).timestamp() - time.time()
    except ValueError:
        return skip("its clock: the answer has no Date")
    if abs(skew) <= CLOCK_SKEW:
        return ok("its clock agrees with ours")
    return warn(
        f"its clock, or that of the proxy, differs from ours by {skew:.0f} s",
        "use NTP on both: logs cannot be compared, and sessions of browsers end early or late",
    )


async def ready(facts: Facts) -> AsyncIterator[Result]:
    """Check whether the server is ready."""
    answer = await remote.get(facts.session, f"{facts.url}/ready")
    if answer.status == 200:
        yield ok("ready: it takes work", seconds=answer.took)
    else:
        reason = answer.content.get("reason") or answer.text or f"HTTP {answer.status}"
        yield fail(f"not ready: {reason}")


async def headers(facts: Facts) -> AsyncIterator[Result]:
    """Check whether a large header passes."""
    large = {"X-Doctor": "x" * HEADER_BYTES}
    answer = await remote.get(facts.session, f"{facts.url}/health", headers=large)
    text = f"a header of {HEADER_BYTES} bytes"
    if answer.status == 200:
        yield ok(f"{text} passes")
    else:
        yield warn(f"{text} is refused: {answer.text or f'HTTP {answer.status}'}")


async def key(facts: Facts) -> AsyncIterator[Result]:
    """Check whether the server accepts our key; find its paths, and a model that is free."""
    answer = await remote.get(facts.session, f"{facts.url}/v1/models")
    if answer.status == 401:
        text = "the key is not known to it" if facts.key else "it wants a key, and there is none"
        yield fail(text, "`aioserver key NAME` makes one: give it by --key or AIOSERVER_KEY")
        return
    if answer.status != 200:
        yield fail(answer.text or f"GET /v1/models: HTTP {answer.status} {answer.code}")
        return
    yield ok("accepted" if facts.key else "none is needed", seconds=answer.took)
    models = answer.content.get("data")
    for model in models if isinstance(models, list) else ():
        if isinstance(model, dict) and model.get("simulated") is True:
            facts.simulated = facts.simulated or str(model.get("id"))
    try:
        facts.paths = await remote.paths(facts.session, facts.url) or remote.PATHS
    except remote.Unreachable as error:
        yield fail(str(error))
    else:
        facts.accepted = True


async def state(facts: Facts) -> AsyncIterator[Result]:
    """Report, from `/stats`, the verdict of the server on itself, and the habits of clients that
    lose the caches of providers.
    """
    answer = await remote.get(facts.session, f"{facts.url}/stats")
    match answer.content.get("verdict"):
        case {"word": word, "text": text, "state": "open" | "busy"}:
            yield ok(f"{word}: {text}")
        case {"word": word, "text": text, "advice": advice, **more}:
            yield (fail if more.get("about") == "bug" else warn)(f"{word}: {text}", str(advice))
        case _:
            yield skip(f"its verdict: /stats: HTTP {answer.status} {answer.code}")
    match answer.content.get("cache_losses"):
        case {"last_hour": dict(verdicts), "regions": dict(regions)}:
            for result in _lost_caches(verdicts, regions):
                yield result


def _lost_caches(verdicts: Mapping[str, Any], regions: Mapping[str, Any]) -> Iterator[Result]:
    """Yield a warning for each habit by which the caches of providers were lost in the last hour:
    the tokens by verdict, and by region.
    """
    rows = {**CHANGED_PROMPTS} if verdicts.get("changed") else {}
    if isinstance(tokens := verdicts.get("reordered"), int):
        yield warn(REORDERED.text.format(count=f"{tokens:,}"), REORDERED.remedy)
        # The tokens of their regions are these.
        rows.pop("tools[", None)
    for name, tokens in regions.items():
        for start, row in rows.items():
            if name.startswith(start) and isinstance(tokens, int):
                yield warn(row.text.format(name=name, count=f"{tokens:,}"), row.remedy)


async def body(facts: Facts) -> AsyncIterator[Result]:
    """Announce a large body, send one byte, and check whether its size is refused."""

    async def begun() -> AsyncIterator[bytes]:
        # aiohttp sends a head together with the first byte.
        yield b" "
        await asyncio.get_running_loop().create_future()

    size = {"Content-Length": str(BODY_BYTES), "Content-Type": "application/json"}
    url = f"{facts.url}{facts.paths['openai']}/chat/completions"
    try:
        async with (
            asyncio.timeout(REFUSAL_TIMEOUT),
            facts.session.post(url, data=begun(), headers=size, allow_redirects=False) as response,
        ):
            code, _ = faults.error_object(await faults.read_body(response, MAX_BYTES))
    except TimeoutError:
        yield ok(f"{BODY} is not refused by its head")
    except (aiohttp.ClientError, OSError) as error:
        yield warn(f"{BODY} is refused: {remote.describe(error)}")
    else:
        if response.status != 413:
            # Our server may refuse a client before it looks at the body.
            yield ok(f"{BODY} is not refused for its size")
        elif code:
            yield ok(f"{BODY} passes the proxy; aioserver takes less")
        else:
            yield warn(f"the proxy refuses {BODY}")


async def websocket(facts: Facts) -> AsyncIterator[Result]:
    """Open a WebSocket as a page of this origin does, and wait for a pong."""
    path, origin = facts.paths["websocket"], str(URL(facts.url).origin())
    began = time.perf_counter()
    try:
        async with (
            asyncio.timeout(TIMEOUT),
            facts.session.ws_connect(f"{facts.url}{path}", origin=origin) as ws,
        ):
            await ws.send_str(PING)
            frame = frames.parse((await ws.receive_str()).encode())
    except aiohttp.WSServerHandshakeError as error:
        text = f"{path} is not upgraded: HTTP {error.status}"
        if error.status == 403:
            hint = "let the proxy pass Host unchanged, or add the address to "
            hint += "chat.websocket.allow_origins"
            yield fail(f"{text}: pages of this address may not connect", hint)
        else:
            yield fail(text)
    except (aiohttp.ClientError, OSError, TypeError, frames.BadFrame) as error:
        yield fail(f"{path}: no answer: {type(error).__name__}")
    else:
        facts.upgraded = frame.status == "pong"
        if facts.upgraded:
            took = time.perf_counter() - began
            yield ok(f"{path} upgrades, and a page of {origin} may", seconds=took)
        else:
            yield warn(f"{path} upgrades, and says {frame.chunk.code or frame.status}")
