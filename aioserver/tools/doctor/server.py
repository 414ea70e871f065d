"""Checks of a running server, as a client meets it, through any proxy in front of it.

An answer of the simulated provider takes more than a second, and its events are evenly spread.
Behind a proxy that buffers, they arrive in few **bursts**.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import time
from typing import TYPE_CHECKING

import aiohttp
from yarl import URL

from aioserver import __version__
from aioserver.client import faults
from aioserver.monitoring.findings import CHANGED_PROMPTS, REORDERED
from aioserver.protocol import frames
from aioserver.tools import remote
from aioserver.tools.bench.clients import FaceClient, Question
from aioserver.tools.bench.results import Attempt, Results
from aioserver.tools.doctor.network import connect
from aioserver.tools.doctor.results import Facts, Result, fail, ok, skip, warn

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

# Seconds for one answer of the server or of the proxy; for one of a model, whose provider may be
# slow; and within which a proxy refuses a body by its head.
TIMEOUT, ANSWER_TIMEOUT, REFUSAL_TIMEOUT = 10.0, 60.0, 1.0
# Seconds of difference between two clocks from which on logs cannot be compared. `Date` has whole
# seconds.
CLOCK_SKEW = 5.0
# Bytes of a large header that clients send: a token of a single sign-on, cookies of a large site.
HEADER_BYTES = 7000
# The default of chat.websocket.max_message_size.
BODY_BYTES = 16 << 20
# The faces on which an answer is asked for, each with the subject of its result.
SUBJECTS = {"websocket": "WebSocket", "sse": "SSE", "openai": "OpenAI"}
# Tokens of a simulated answer, which then takes more than a second. The question for a model that
# costs money has a long enough answer, too.
SIMULATED_TOKENS = 40
COSTLY = Question(prompt="Count from 1 to 40, with a space between.", max_tokens=120)
# Seconds between two events of one burst at most; the gaps without which an answer proves nothing;
# and the bursts in which a buffered answer comes at most.
TOGETHER, MIN_GAPS, MAX_BURSTS = 0.005, 11, 3
GATHERED = "switch buffering and gzip off in the proxy (nginx: proxy_buffering): docs/proxies.md"
# Seconds for which `/events` is watched. The first event comes at once, and one in each second.
WATCHED = 4.5
# The seconds in which the server pings twice with the default of chat.websocket.ping_interval.
TWO_PINGS = 41.0


async def reach(facts: Facts) -> AsyncIterator[Result]:
    """Connect to the server, and open the session that the other checks use."""
    url = URL(facts.url)
    trust = "SSL_CERT_FILE=authority.pem aioserver doctor …"
    results, protocol = await connect(url, TIMEOUT, trust=trust)
    for result in results:
        yield result
    if protocol is None:
        return
    facts.session = await facts.stack.enter_async_context(remote.session(facts.key))
    if protocol == "h2":
        yield ok("HTTP/2 is offered: a page may follow many streams at once")
    elif url.scheme == "https":
        text = "HTTP/2 is not offered: a browser opens six connections for all tabs together"
        hint = "a proxy in front gives it (nginx: http2 on); aioserver's own TLS has HTTP/1.1"
        yield warn(text, hint)


async def health(facts: Facts) -> AsyncIterator[Result]:
    """Check whether an aioserver answers, which the other checks need, takes work, and gets large
    headers.
    """
    answer = await facts.get("/health")
    if not answer.healthy:
        hint = "does the proxy know where aioserver listens? Its log says why it failed"
        if answer.code == "host_not_allowed":
            hint = "add the name to auth.allowed_hosts, or make client keys (aioserver key NAME)"
        yield fail(f"{answer.text}, and no aioserver's answer", hint)
        return
    facts.healthy = True
    version = answer.content.get("version")
    shown = f"aioserver {version}" if version else "aioserver; its version is for admins"
    yield ok(f"healthy: {shown}", seconds=answer.took)
    if version and version != __version__:
        yield warn(f"this doctor is of version {__version__}", "use that of the server")
    with contextlib.suppress(ValueError):
        date = email.utils.parsedate_to_datetime(answer.headers.get("Date", ""))
        skew = date.timestamp() - time.time()
        text = f"its clock, or that of the proxy, differs from ours by {skew:.0f} s"
        hint = "use NTP on both: logs cannot be compared, and sessions end early or late"
        skewed = abs(skew) > CLOCK_SKEW
        yield warn(text, hint) if skewed else ok("its clock agrees with ours")
    answer = await facts.get("/ready")
    if answer.status == 200:
        yield ok("ready: it takes work", seconds=answer.took)
    else:
        text = f"not ready: {answer.content.get('reason') or answer.text}"
        yield fail(text, "`aioserver doctor` on its machine says what is wrong with its providers")
    answer = await facts.get("/health", **{"X-Doctor": "x" * HEADER_BYTES})
    text = f"a header of {HEADER_BYTES} bytes"
    hint = "clients with long tokens or cookies fail (nginx: large_client_header_buffers)"
    passes = answer.status == 200
    yield ok(f"{text} passes") if passes else warn(f"{text} is refused: {answer.text}", hint)


async def key(facts: Facts) -> AsyncIterator[Result]:
    """Check whether the server accepts our key; find its paths, and a model that is free."""
    answer = await facts.get("/v1/models")
    if answer.status == 401:
        text = "the key is not known to it" if facts.key else "it wants a key, and there is none"
        yield fail(text, "`aioserver key NAME` makes one: give it by --key or AIOSERVER_KEY")
    elif answer.status != 200:
        yield fail(answer.text)
    else:
        yield ok("accepted" if facts.key else "none is needed", seconds=answer.took)
        models = answer.content.get("data")
        for model in models if isinstance(models, list) else ():
            if isinstance(model, dict) and model.get("simulated") is True:
                facts.simulated = facts.simulated or str(model.get("id"))
        facts.paths = await remote.paths(facts.session, facts.url) or remote.PATHS
        facts.accepted = True


async def state(facts: Facts) -> AsyncIterator[Result]:
    """Report, from `/stats`, the verdict of the server on itself, the deaths of its workers, and
    the habits of clients that lose the caches of providers.
    """
    answer = await facts.get("/stats")
    match answer.content.get("verdict"):
        case {"word": word, "text": text, "state": "open" | "busy"}:
            yield ok(f"{word}: {text}")
        case {"word": word, "text": text, "advice": advice, **more}:
            yield (fail if more.get("about") == "bug" else warn)(f"{word}: {text}", str(advice))
        case _:
            yield skip(f"its verdict: {answer.text}")
    match answer.content.get("worker_deaths"):
        case dict(deaths) if any(deaths.values()):
            causes = ", ".join(f"{cause}: {count}" for cause, count in deaths.items() if count)
            text = f"workers have died that nobody had told to end ({causes})"
            yield warn(text, "the log of the server's parent, and the kernel's, say why")
    match answer.content.get("cache_losses"):
        case {"last_hour": dict(verdicts), "regions": dict(regions)}:
            # The tokens by verdict, and by region.
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
    url, refusal = f"{facts.url}{facts.paths['openai']}/chat/completions", ""
    try:
        async with (
            asyncio.timeout(REFUSAL_TIMEOUT),
            facts.session.post(url, data=begun(), headers=size, allow_redirects=False) as response,
        ):
            data = await faults.read_body(response, faults.MAX_ERROR_BYTES)
            # Our server says why it refuses a client, or takes less.
            if response.status == 413 and not any(faults.error_object(data)):
                refusal = " by the proxy"
    except TimeoutError:
        pass
    except (aiohttp.ClientError, OSError) as error:
        refusal = f": {remote.describe(error)}"
    text = f"a body of {BODY_BYTES >> 20} MiB is"
    hint = "pictures fail there: allow more than max_message_size (nginx: client_max_body_size)"
    good = ok(f"{text} not refused by its head")
    yield warn(f"{text} refused{refusal}", hint) if refusal else good


async def websocket(facts: Facts) -> AsyncIterator[Result]:
    """Open a WebSocket as a page of this origin does, and wait for a pong. Keep it open in silence,
    and count the server's pings (RFC 6455, 5.5.2).
    """
    path, origin = facts.paths["websocket"], str(URL(facts.url).origin())
    began, close = time.perf_counter(), aiohttp.ClientWSTimeout(ws_close=TIMEOUT)
    try:
        async with asyncio.timeout(TIMEOUT):
            ws = await facts.session.ws_connect(
                facts.url + path, origin=origin, autoping=False, timeout=close
            )
    except aiohttp.WSServerHandshakeError as error:
        text = f"{path} is not upgraded: HTTP {error.status}"
        hint = "the proxy must pass Upgrade on this path, by HTTP/1.1: docs/proxies.md"
        if error.status == 403:
            text += ": pages of this address may not connect"
            hint = "let the proxy pass Host, or add the address to chat.websocket.allow_origins"
        yield fail(text, hint)
        return
    async with ws:
        async with asyncio.timeout(TIMEOUT):
            await ws.send_str('{"action": "ping", "request_id": "doctor"}')
            frame = frames.parse(str((await ws.receive()).data).encode())
        if frame.status == "pong":
            text = f"{path} upgrades, and a page of {origin} may"
            yield ok(text, seconds=time.perf_counter() - began)
        else:
            yield warn(f"{path} upgrades, and says {frame.chunk.code or frame.status}")
        pings, began = 0, time.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(facts.idle):
                async for message in ws:
                    if message.type is aiohttp.WSMsgType.PING:
                        pings += 1
                        await ws.pong(message.data)
        lived = time.monotonic() - began
        came = f"{lived:.0f} s of silence, with {pings} pings of the server"
        if ws.closed:
            hint = "raise the proxy's read timeout above 4 x ping_interval, or idle_timeout"
            yield fail(f"was closed after {came}", hint)
        elif not facts.idle:
            yield skip("silence is not tested", "--idle 90 keeps one open for so many seconds")
        elif lived >= TWO_PINGS and not pings:
            hint = "something on the way swallows pings, or ping_interval is long"
            yield warn(f"lives for {came}", hint)
        else:
            yield ok(f"lives for {came}")


async def answers(facts: Facts) -> AsyncIterator[Result]:
    """Check on each face, at the same time, that the events of an answer arrive one by one.

    If every model costs money, only SSE is checked.
    """
    if facts.simulated is not None:
        question = Question(prompt="Hello", model=facts.simulated, max_tokens=SIMULATED_TOKENS)
        faces = [*SUBJECTS]
    elif facts.ask:
        question, faces = COSTLY, ["sse"]
    else:
        yield await _snapshots(facts)
        return
    for result in await asyncio.gather(*(_answer(facts, face, question) for face in faces)):
        yield result


async def _answer(facts: Facts, face: str, question: Question) -> Result:
    results, subject = Results(), SUBJECTS[face]
    client = FaceClient(facts.session, face, facts.url, facts.paths[face], question)
    try:
        error = await client.request(Attempt(results), ANSWER_TIMEOUT)
    finally:
        await client.close()
    if error is not None:
        text = f"an answer failed: {remote.printable(error.code)}"
        return fail(text, "docs/errors.md explains its codes", subject=subject)
    gaps = results.gap.kept
    came = f"{len(gaps) + 1} events in {bursts(gaps)} bursts"
    if len(gaps) < MIN_GAPS or bursts(gaps) > MAX_BURSTS:
        text = f"an answer came whole, each event as it was said: {came}"
        return ok(text, seconds=sum(gaps), subject=subject)
    problem, model = (warn, " or the model") if facts.simulated is None else (fail, "")
    text = f"an answer came whole, but something on the way{model} gathers it: {came}"
    return problem(text, GATHERED, subject=subject)


def bursts(gaps: Sequence[float]) -> int:
    """Return the number of bursts of events with *gaps*, in seconds, between them."""
    return 1 + sum(gap > TOGETHER for gap in gaps)


async def _snapshots(facts: Facts) -> Result:
    """Check that the snapshots of `/events`, which are made once a second, arrive one by one."""
    gaps, last = list[float](), time.perf_counter()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(WATCHED), facts.session.get(f"{facts.url}/events") as response:
            if response.status != 200:
                return skip("no answer was asked for: --no-ask, and no model is simulated")
            async for _ in remote.events(response):
                gaps.append((now := time.perf_counter()) - last)
                last = now
    text = f"the snapshots of /events came in {bursts(gaps)} bursts in {WATCHED} s"
    return ok(text) if bursts(gaps) > MAX_BURSTS else warn(text, GATHERED)
