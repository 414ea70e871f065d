"""One provider: its requests, the outcome of each answer, and the places that it gives back."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.auth.callers import NO_CALLER, anonymous
from aioserver.config import settings
from aioserver.config.schema import Secret
from aioserver.errors import InvalidRequest
from aioserver.protocol.openai import Reading
from aioserver.provider_errors import (
    ConnectError,
    ConnectionBroken,
    ProviderAuthError,
    ProviderBadResponse,
    ProviderDisconnected,
    ProviderError,
    ProviderFault,
    ProviderForbidden,
    ProviderPaced,
    ProviderQueueFull,
    ProviderQueueTimeout,
    ProviderRateLimited,
    ProviderRefused,
    StaleConnection,
)
from aioserver.providers.attempt import Attempt
from aioserver.providers.capacity import MAX_COOLING
from aioserver.providers.error_mapping import retry_after
from aioserver.providers.provider import Provider
from aioserver.providers.request import CHAT, Answer, ProviderRequest
from aioserver.streams.entries import COMPLETE
from aioserver.streams.stream import Stream
from tests.support.scripted_provider import EVENT_STREAM, LIMITS, Peer, ScriptedProvider
from tests.support.server import NOWHERE, QUICK, SILENT
from tests.support.simulator import Behaviour, Simulator
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from aioserver.auth.callers import Caller


def json_answer(body: bytes, status: bytes = b"200 OK", *lines: bytes) -> bytes:
    head = (b"HTTP/1.1 " + status, b"Content-Type: application/json", *lines)
    return b"\r\n".join((*head, b"Content-Length: %d" % len(body), b"", body))


JSON = json_answer(b"{}")


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator(QUICK, seed=1) as simulator:
        yield simulator


@asynccontextmanager
async def provider_at(
    base_url: str, limits: dict[str, Any] | None = None, **more: Any
) -> AsyncIterator[Provider]:
    """A provider; at its end nothing may be held."""
    http_client = dataclasses.replace(LIMITS, **{"queue_size": None, **(limits or {})})
    provider_settings = settings.Provider(
        name="sim", base_url=base_url, model="own-model", http_client=http_client, **more
    )
    provider = Provider(provider_settings, base_url, max_response_bytes=1 << 20)
    try:
        yield provider
        queue = provider.stats().queue
        assert (queue.inside, queue.waiting) == (0, 0)
        await until(lambda: provider.stats().pool.open == provider.stats().pool.idle)  # lingering
        assert provider.stats().pool.idle <= http_client.max_keepalive
    finally:
        await provider.close()


def new_stream(window: float = 30.0) -> Stream:
    return Stream("r1", "anybody", window=window, max_bytes=1 << 22)


def question(
    model: str = "m",
    *,
    streamed: bool = True,
    text: str = "Hello",
    frames: bool = False,
    caller: Caller = NO_CALLER,
    max_answer: int | None = None,
) -> ProviderRequest:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "stream": streamed}
    return ProviderRequest(
        CHAT,
        lambda _, __: json.dumps(body).encode(),
        streamed=streamed,
        caller=caller,
        reading=Reading() if frames else None,
        size=len(json.dumps(body)),
        allowed=(max_answer, 1),
    )


async def fill_stream(provider: Provider, stream: Stream, request: ProviderRequest) -> None:
    await provider.run(Attempt(provider, request, stream))


async def fill(provider: Provider, model: str = "m", **more: Any) -> Stream:
    stream = new_stream()
    await fill_stream(provider, stream, question(model, **more))
    return stream


async def call(provider: Provider, request: ProviderRequest) -> Answer:
    attempt = Attempt(provider, request, None)
    await provider.run(attempt)
    assert attempt.answer is not None
    return attempt.answer


def serving(answer: bytes = JSON) -> Any:
    async def play(peer: Peer) -> None:
        while True:
            played.append(await peer.request())
            await peer.send(answer)

    played: list[bytes] = []
    return play, played


def lines_of(request: bytes) -> list[str]:
    return request.partition(b"\r\n\r\n")[0].decode().split("\r\n")


# What is sent.


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", "/chat/completions"),
        ("/", "/chat/completions"),
        ("/v1", "/v1/chat/completions"),
        ("/v1/", "/v1/chat/completions"),
        ("/openai/deep%20er/v1", "/openai/deep%20er/v1/chat/completions"),
    ],
)
async def test_the_path_of_the_base_url_stays_in_front(path: str, expected: str) -> None:
    play, requests = serving()
    async with (
        ScriptedProvider(play) as server,
        provider_at(f"http://127.0.0.1:{server.port}{path}") as provider,
    ):
        await call(provider, question(streamed=False))

    assert lines_of(requests[0])[0] == f"POST {expected} HTTP/1.1"
    assert f"Host: 127.0.0.1:{server.port}" in lines_of(requests[0])


async def test_the_key_is_sent_and_a_netrc_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text(
        "machine 127.0.0.1 login somebody password else\ndefault login a password b\n"
    )
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    play, requests = serving()
    async with (
        ScriptedProvider(play) as server,
        provider_at(server.url, api_key=Secret("sk-1")) as provider,
    ):
        await call(provider, question(streamed=False))

    authorization = [
        line for line in lines_of(requests[0]) if line.lower().startswith("authorization")
    ]
    assert authorization == ["Authorization: Bearer sk-1"]


async def test_configured_headers_replace_ours_whatever_their_case_but_not_the_framing() -> None:
    play, requests = serving()
    headers = {
        "authorization": "Basic eDp5",
        "USER-AGENT": "mine",
        "X-Title": "caf\xe9",
        "content-length": "1",
        "Transfer-Encoding": "chunked",
        "Connection": "close",
    }
    async with (
        ScriptedProvider(play) as server,
        provider_at(server.url, api_key=Secret("sk-1"), headers=headers) as provider,
    ):
        await call(provider, question(streamed=False))
        await call(provider, question(streamed=False))

        assert server.accepted == 1
    head = requests[1].partition(b"\r\n\r\n")[0].decode("latin-1")
    names = [line.partition(":")[0].lower() for line in head.split("\r\n")[1:]]
    assert len(names) == len(set(names)), names
    assert {"transfer-encoding", "connection"}.isdisjoint(names)
    assert "authorization: Basic eDp5\r\n" in head
    assert "X-Title: caf\xe9\r\n" in head
    assert head.endswith(f"Content-Length: {len(requests[1]) - len(head) - 4}")


async def test_a_plain_proxy_gets_the_absolute_form_and_its_credentials(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    play, requests = serving()
    async with ScriptedProvider(play) as proxy:
        monkeypatch.setenv("http_proxy", f"http://user:pass@127.0.0.1:{proxy.port}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        async with provider_at("http://provider.test:81/v1", api_key=Secret("sk-1")) as provider:
            for _ in range(2):
                await call(provider, question(streamed=False))

        assert proxy.accepted == 1
    for request in requests:
        lines = lines_of(request)
        assert lines[0] == "POST http://provider.test:81/v1/chat/completions HTTP/1.1"
        assert "Host: provider.test:81" in lines
        assert "Proxy-Authorization: Basic dXNlcjpwYXNz" in lines
        assert "Authorization: Bearer sk-1" in lines


async def test_the_proxy_of_the_settings_comes_before_that_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    play, requests = serving()
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    async with ScriptedProvider(play) as proxy:
        address = f"http://127.0.0.1:{proxy.port}"
        async with provider_at("http://provider.test/v1", proxy=address) as provider:
            await call(provider, question(streamed=False))

    assert lines_of(requests[0])[0] == "POST http://provider.test/v1/chat/completions HTTP/1.1"


# What an answer means.


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize(
    ("model", "fault"),
    [
        ("fault-status-400", ProviderRefused),
        ("fault-status-401", ProviderAuthError),
        ("fault-status-402", ProviderForbidden),
        ("fault-status-403", ProviderForbidden),
        ("fault-status-404", ProviderRefused),
        ("fault-status-408", ProviderError),
        ("fault-status-409", ProviderRefused),
        ("fault-status-413", ProviderRefused),
        ("fault-status-422", ProviderRefused),
        ("fault-status-429", ProviderRateLimited),
        ("fault-status-498", ProviderRateLimited),
        ("fault-status-500", ProviderError),
        ("fault-status-502", ProviderError),
        ("fault-status-503", ProviderError),
        ("fault-status-504", ProviderError),
        ("fault-status-529", ProviderError),
        ("fault-quota", ProviderAuthError),
        ("fault-redirect", ProviderBadResponse),
        ("fault-capacity", ProviderRateLimited),
        ("fault-credits", ProviderForbidden),
        ("fault-html", ProviderBadResponse),
        ("fault-type-html", ProviderBadResponse),
        ("fault-type-text", ProviderBadResponse),
        ("fault-empty", ProviderBadResponse),
        ("fault-json-under-200-stream", ProviderBadResponse),
        ("fault-not-http", ProviderBadResponse),
        ("fault-headers", ProviderBadResponse),
        ("fault-gzip", ProviderBadResponse),
        ("fault-drop", ConnectionBroken),
    ],
)
async def test_each_bad_answer_is_its_fault(
    model: str, fault: type[ProviderFault], streamed: bool, simulator: Simulator
) -> None:
    async with provider_at(simulator.base_url) as provider:
        asked = question(model, streamed=streamed)
        answering = (
            fill_stream(provider, new_stream(), asked) if streamed else call(provider, asked)
        )
        with pytest.raises(ProviderFault) as raised:
            await answering

    assert type(raised.value) is fault
    assert simulator.stats().requests == 1


async def test_a_wrong_length_is_reported_where_something_is_missing(simulator: Simulator) -> None:
    async with provider_at(simulator.base_url) as provider:
        with pytest.raises(ProviderDisconnected):
            await call(provider, question("fault-wrong-length", streamed=False))

        # A stream has its [DONE] before the end that does not come: it is whole.
        assert (await fill(provider, "fault-wrong-length")).end_status == COMPLETE


@pytest.mark.parametrize(
    ("model", "seconds"),
    [
        ("fault-status-503", 1.0),
        ("fault-retry-after-7", 7.0),
        ("fault-retry-after-ms", 0.7),
        ("fault-retry-after-absurd", 120.0),
        ("fault-retry-after-86400", 120.0),
        ("fault-retry-after-3000", 120.0),
        ("fault-day-over", 2.0),
        ("fault-capacity", 1.0),
        ("fault-slow-down", 1.0),
    ],
)
async def test_retry_after_is_reported(model: str, seconds: float, simulator: Simulator) -> None:
    async with provider_at(simulator.base_url) as provider:
        with pytest.raises(ProviderFault) as raised:
            await fill(provider, model)

    assert raised.value.retry_after == seconds


@pytest.mark.parametrize(
    "value",
    [
        *("", "soon", "-1", "-1e400", "-" + "9" * 5000, "nan", "inf", "Infinity"),
        "Tue, 01 Jan 2030 00:00:00 +99999999999999999999",
        "Mon, 01 Jan 0001 00:00:00 -0000",
        "Tue, 99 Xyz 99999 99:99:99 GMT",
    ],
)
def test_a_retry_after_that_is_not_sane_is_none(value: str) -> None:
    assert retry_after({"retry-after": value}) is None
    assert retry_after({"retry-after-ms": value}) is None
    assert retry_after({"retry-after-ms": value, "retry-after": "7"}) == 7.0


@pytest.mark.parametrize("value", ["9" * 5000, "1e400", "9" * 400 + ".5"])
def test_a_retry_after_of_more_digits_than_any_number_is_as_long_as_any(value: str) -> None:
    assert retry_after({"retry-after": value}) == MAX_COOLING
    assert retry_after({"retry-after-ms": value}) == MAX_COOLING


async def test_how_long_a_5xx_wants_is_bounded_as_well() -> None:
    play, _ = serving(json_answer(b"{}", b"503 No", b"Retry-After: 3000"))
    async with ScriptedProvider(play) as server, provider_at(server.url) as provider:
        with pytest.raises(ProviderError) as raised:
            await call(provider, question(streamed=False))

    assert raised.value.retry_after == 120.0  # SDKs do not believe more


async def test_a_callers_word_does_not_use_up_the_quota() -> None:
    error_body = b'{"error":{"message":"Rate limit reached for insufficient_quota","code":"rate"}}'
    for body in (error_body, b"insufficient_quota", b'["insufficient_quota"]'):
        play, _ = serving(json_answer(body, b"429 No"))
        async with ScriptedProvider(play) as server, provider_at(server.url) as provider:
            with pytest.raises(ProviderRateLimited):
                await call(provider, question("insufficient_quota", streamed=False))


async def test_a_redirect_is_not_followed(simulator: Simulator) -> None:
    play, requests = serving()
    async with ScriptedProvider(play) as other:
        location = f"http://127.0.0.1:{other.port}/v1/chat/completions".encode()
        redirect = b"HTTP/1.1 307 T\r\nLocation: %b\r\nContent-Length: 0\r\n\r\n" % location
        there, _ = serving(redirect)
        async with ScriptedProvider(there) as server, provider_at(server.url) as provider:
            with pytest.raises(ProviderBadResponse):
                await call(provider, question(streamed=False))

    assert requests == []


async def test_an_answer_over_the_bound_is_refused() -> None:
    body = b"[" + b" " * (1 << 20) + b"]"
    play, _ = serving(json_answer(body))
    async with ScriptedProvider(play) as server, provider_at(server.url) as provider:
        with pytest.raises(ProviderBadResponse, match="1048576"):
            await call(provider, question(streamed=False))


async def test_only_harmless_headers_of_the_provider_pass() -> None:
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n"
        b"Set-Cookie: a=b\r\nServer: x\r\nX-RateLimit-Remaining-Requests: 9\r\n"
        b"x-ratelimit-odd: caf\xe9\r\nopenai-processing-ms: 12\r\n\r\n{}"
    )
    play, _ = serving(head)
    async with ScriptedProvider(play) as server, provider_at(server.url) as provider:
        answer = await call(provider, question(streamed=False))

    assert answer.outcome.headers == {
        "x-ratelimit-remaining-requests": "9",
        "openai-processing-ms": "12",
    }


async def test_a_response_that_has_failed_is_an_answer_and_passes() -> None:
    body = b'{"object":"response","status":"failed","error":{"message":"x"}}'
    play, _ = serving(json_answer(body))
    async with ScriptedProvider(play) as server, provider_at(server.url) as provider:
        assert (await call(provider, question(streamed=False))).body == body


# What is taken and given back.


@pytest.mark.parametrize("fault", ["fault-close-next", "fault-close-idle"])
@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "whole"])
async def test_a_dead_kept_connection_is_repeated_once_and_nobody_sees_it(
    fault: str, streamed: bool, simulator: Simulator
) -> None:
    async with provider_at(simulator.base_url) as provider:
        for number in range(1, 6):
            if streamed:
                assert (await fill(provider, fault)).end_status == COMPLETE
            else:
                assert (await call(provider, question(fault, streamed=False))).status == 200
            stats = simulator.stats()
            assert (stats.requests, stats.completed) == (number, number)

        assert simulator.stats().connections_accepted == 5


async def test_a_stale_connection_takes_the_other_idle_ones_with_it(simulator: Simulator) -> None:
    async with provider_at(simulator.base_url) as provider:
        await asyncio.gather(*(fill(provider, "fault-close-next") for _ in range(2)))
        assert provider.stats().pool.idle == 2

        await fill(provider)

        assert provider.stats().pool.idle == 1
        assert simulator.stats().requests == 3
        assert simulator.stats().connections_accepted == 3


@pytest.mark.parametrize(
    "part",
    [b"H", b"HTTP/1.1 200 OK\r\n", EVENT_STREAM, b"HTTP/1.1 103 Early\r\n\r\n"],
    ids=["a byte", "half a head", "a head", "early hints"],
)
async def test_part_of_an_answer_on_a_kept_connection_is_not_repeated(part: bytes) -> None:
    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(JSON)
        await peer.request()
        await peer.send(part)

    async with ScriptedProvider(play) as server, provider_at(server.url) as provider:
        await call(provider, question(streamed=False))
        with pytest.raises(ProviderDisconnected) as raised:
            await call(provider, question(streamed=False))

        assert not isinstance(raised.value, StaleConnection)
        assert server.accepted == 1


@pytest.mark.parametrize("frames", [True, False], ids=["frames", "bytes"])
async def test_a_reader_slower_than_the_read_timeout_does_not_end_the_stream(
    frames: bool, simulator: Simulator
) -> None:
    # The log takes what comes at the provider's pace; nobody has read anything of it meanwhile.
    async with provider_at(simulator.base_url, {"read_timeout": 0.4}) as provider:
        stream = new_stream()
        simulator.behaviour = Behaviour(ttft=0, interval=0.05, tokens=16)
        await fill_stream(provider, stream, question(frames=frames))

        assert stream.end_status == COMPLETE


@pytest.mark.parametrize("keepalive", [0, 2, 6])
async def test_many_requests_use_few_sockets(keepalive: int, simulator: Simulator) -> None:
    limits = {"max_keepalive": keepalive, "concurrent_requests": 6, "queue_size": 200}
    async with provider_at(simulator.base_url, limits) as provider:
        done = await asyncio.gather(*(fill(provider) for _ in range(96)))

        assert {stream.end_status for stream in done} == {COMPLETE}
        assert simulator.stats().peak_active <= 6
        assert simulator.stats().connections_accepted == 6
        await simulator.until(lambda stats: stats.open_connections == keepalive)
        assert provider.stats().pool.idle == keepalive


async def test_a_connection_kept_for_a_request_that_cannot_be_written_is_closed(
    simulator: Simulator,
) -> None:
    def refused(_: settings.Provider, _model: str | None) -> bytes:
        raise InvalidRequest("the options cannot be sent")

    limits = {"concurrent_requests": 1, "max_keepalive": 0, "queue_size": 5}
    simulator.behaviour = Behaviour(ttft=0.05, interval=0)
    async with provider_at(simulator.base_url, limits) as provider:
        first = asyncio.ensure_future(fill(provider))
        await until(lambda: provider.stats().queue.inside == 1)
        second = asyncio.ensure_future(
            fill_stream(provider, new_stream(), ProviderRequest(CHAT, refused, streamed=True))
        )
        await first
        with pytest.raises(InvalidRequest):
            await second

        assert provider.stats().pool.open == 0


async def test_the_queue_is_bounded_in_number_and_time(simulator: Simulator) -> None:
    limits = {
        "concurrent_requests": 1,
        "queue_size": 1,
        "queue_timeout": 0.1,
    }
    async with provider_at(simulator.base_url, limits) as provider:
        first = asyncio.ensure_future(fill(provider, "fault-silent"))
        await simulator.until(lambda stats: stats.active == 1)
        second = asyncio.ensure_future(fill(provider))
        await until(lambda: provider.stats().queue.waiting == 1)

        with pytest.raises(ProviderQueueFull):
            await fill(provider)
        with pytest.raises(ProviderQueueTimeout):
            await second

        first.cancel()
        await asyncio.wait([first])
        assert (await fill(provider)).end_status == COMPLETE


async def test_an_address_that_names_many_users_delays_another_by_one_turn(
    simulator: Simulator,
) -> None:
    async with provider_at(simulator.base_url, {"concurrent_requests": 1}) as provider:
        served: list[str] = []

        async def ask(caller: Caller) -> None:
            await fill(provider, caller=caller)
            served.append(caller.flow)

        simulator.behaviour = SILENT
        holder = asyncio.create_task(fill(provider))
        await simulator.until(lambda stats: stats.active == 1)
        simulator.behaviour = QUICK
        many = [anonymous("10.0.0.1").on_behalf_of(f"user {number}") for number in range(5)]
        asked = [asyncio.create_task(ask(caller)) for caller in (*many, anonymous("10.0.0.2"))]
        await until(lambda: provider.stats().queue.waiting == len(asked))
        holder.cancel()
        await asyncio.gather(*asked)

        assert served.index("10.0.0.2") == 1


async def test_a_storm_of_leavers_leaves_nothing_behind(simulator: Simulator) -> None:
    simulator.behaviour = Behaviour(ttft=0.002, interval=0.001, tokens=6)
    async with provider_at(simulator.base_url, {"queue_size": 100}) as provider:
        tasks = [asyncio.ensure_future(fill(provider)) for _ in range(60)]
        for number, task in enumerate(tasks):
            if number % 3:
                await asyncio.sleep(0.0005)
                task.cancel()
        await asyncio.wait(tasks)

        assert all(task.cancelled() or task.result().end_status == COMPLETE for task in tasks)
        await simulator.until(lambda stats: stats.active == 0)
        assert (await fill(provider)).end_status == COMPLETE


async def test_an_upload_that_is_larger_than_every_buffer_arrives_whole(
    simulator: Simulator,
) -> None:
    text = "x" * 900_000
    async with provider_at(simulator.base_url) as provider:
        for _ in range(2):
            assert (await fill(provider, text=text)).end_status == COMPLETE

        assert simulator.bodies[-1]["messages"][0]["content"] == text
        assert simulator.stats().connections_accepted == 1


# The pace.


async def test_starts_are_spread_over_the_minute(simulator: Simulator) -> None:
    limits = {"requests_per_minute": 1200, "concurrent_requests": 2}
    async with provider_at(simulator.base_url, limits) as provider:
        clock = asyncio.get_running_loop().time
        begun = clock()
        async with asyncio.TaskGroup() as group:
            streams = [group.create_task(fill(provider)) for _ in range(6)]
        assert clock() - begun >= 4 * 0.05 * 0.9  # two at once, then one each 50 ms
    assert {stream.result().end_status for stream in streams} == {COMPLETE}
    assert simulator.stats().requests == 6


async def test_an_attempt_that_cannot_start_in_time_is_refused_at_once(
    simulator: Simulator,
) -> None:
    limits = {"requests_per_minute": 1, "queue_timeout": 5.0}
    async with provider_at(simulator.base_url, limits) as provider:
        await fill(provider)
        with pytest.raises(ProviderPaced, match="requests_per_minute=1") as raised:
            await fill(provider)

        assert 50 < (raised.value.retry_after or 0) <= 60
        assert raised.value.http_status == 429
        assert provider.stats().pace.left == 0
        assert provider.meter.attempts["http_429"].value == 0
    assert simulator.stats().requests == 1


async def test_the_position_is_reported_while_the_pace_is_in_the_way(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"requests_per_minute": 300, "concurrent_requests": 1}
    heard: list[tuple[int, float]] = []
    async with provider_at(simulator.base_url, limits) as provider:
        await fill(provider)
        monkeypatch.setattr(
            Stream, "report_position", lambda _self, position, eta: heard.append((position, eta))
        )
        await fill(provider)
    assert heard
    assert heard[0][0] == 1
    assert 0 < heard[0][1] <= 0.2


@pytest.mark.parametrize(
    "headers",
    [
        b"x-ratelimit-remaining-requests: 0\r\nx-ratelimit-reset-requests: 1m0s\r\n",
        b"x-ratelimit-remaining-tokens: 0\r\nx-ratelimit-reset-tokens: 59.5s\r\n",
    ],
)
async def test_the_providers_remaining_requests_lower_the_pace(headers: bytes) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n"
    play, played = serving(head + headers + b"\r\n{}")
    async with ScriptedProvider(play) as server, provider_at(server.url) as provider:
        await call(provider, question(streamed=False))
        with pytest.raises(ProviderPaced):
            await call(provider, question(streamed=False))
        assert provider.stats().pace.cooling > 50
    assert len(played) == 1


@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [
        (b"Retry-After: 30", (30, 34)),
        (b"retry-after-ms: 20000\r\nRetry-After: 99", (20, 23)),
        (b"Retry-After: 99999", (120, 133)),
        (b"Retry-After: 3000", (120, 133)),  # bounded
        (b"Retry-After: " + b"9" * 5000, (120, 133)),
        (b"retry-after-ms: 1e400", (120, 133)),
        (b"Retry-After: soon", (1, 2)),
        (b"X: y", (1, 2)),
    ],
)
async def test_after_a_429_the_provider_is_left_alone(
    retry_after: bytes, seconds: tuple[float, float]
) -> None:
    body = b'{"error":{"message":"slow down"}}'
    play, played = serving(json_answer(body, b"429 No", retry_after))
    async with ScriptedProvider(play) as server, provider_at(server.url) as provider:
        with pytest.raises(ProviderRateLimited):
            await call(provider, question(streamed=False))
        low, high = seconds
        assert low - 0.5 <= provider.stats().pace.cooling <= high
        if low > 5:
            with pytest.raises(ProviderPaced):
                await call(provider, question(streamed=False))
            assert len(played) == 1


async def test_tokens_a_minute_are_expected_before_and_corrected_after(
    simulator: Simulator,
) -> None:
    limits = {"tokens_per_minute": 6000, "queue_timeout": 3.0}
    async with provider_at(simulator.base_url, limits) as provider:
        first = asyncio.create_task(fill(provider, max_answer=100_000))
        await asyncio.sleep(0)  # its first step takes its place; it may be over soon
        assert provider.stats().queue.inside == 1
        with pytest.raises(ProviderPaced):
            await fill(provider)  # forty seconds' tokens are expected to be on their way
        await first  # they were a few

        await fill(provider)


async def test_a_long_body_makes_others_wait_and_refuses_nobody() -> None:
    body = b'{"usage":{"total_tokens":9}}'  # it was an image
    play, _ = serving(json_answer(body))
    limits = {"tokens_per_minute": 60_000, "queue_timeout": 120.0}
    async with ScriptedProvider(play) as server, provider_at(server.url, limits) as provider:
        ask = question(streamed=False, text="image" * 200_000)
        first = asyncio.create_task(call(provider, ask))
        await asyncio.sleep(0)
        second = asyncio.create_task(call(provider, question(streamed=False)))
        await until(lambda: second.done() or provider.stats().queue.waiting == 1)
        await first

        assert (await second).status == 200


async def test_a_request_that_has_waited_asks_for_the_current_model() -> None:
    bodies: list[bytes] = []
    answers = asyncio.Event()

    async def play(peer: Peer) -> None:
        while True:
            bodies.append((await peer.request()).rpartition(b"\r\n\r\n")[2])
            await answers.wait()
            await peer.send(JSON)

    limits = {"tokens_per_minute": 1_000_000, "concurrent_requests": 1}
    async with ScriptedProvider(play) as server, provider_at(server.url, limits) as provider:

        def ask() -> ProviderRequest:
            return ProviderRequest(
                CHAT, lambda settings, _: settings.model.encode(), streamed=False
            )

        holder = asyncio.create_task(call(provider, ask()))
        await until(lambda: len(bodies) == 1)
        waiting = asyncio.create_task(call(provider, ask()))
        await until(lambda: provider.stats().queue.waiting == 1)

        now = dataclasses.replace(provider.settings, model="new-model")
        provider.prepare(now, server.url, max_response_bytes=1 << 20)()
        answers.set()
        await asyncio.gather(holder, waiting)

        assert bodies == [b"own-model", b"new-model"]


@pytest.mark.parametrize("fault", [ConnectError, ProviderError, asyncio.CancelledError])
async def test_expected_tokens_are_settled_however_the_attempt_ends(
    simulator: Simulator, fault: type[BaseException]
) -> None:
    simulator.behaviour = Behaviour(ttft=60, fail_rate=float(fault is ProviderError))
    address = NOWHERE if fault is ConnectError else simulator.base_url
    limits = {"tokens_per_minute": 600}
    async with provider_at(address, limits) as provider:
        attempt = Attempt(provider, question(), None)
        task = asyncio.create_task(provider.run(attempt))
        if fault is asyncio.CancelledError:
            await simulator.until(lambda stats: stats.active == 1)
            assert provider.stats().pace.left == 0, "it is expected to use up the minute"
            task.cancel()
        with pytest.raises(fault):
            await task

        assert provider.stats().pace.left > 0
        assert attempt.expected_tokens == 0


def test_a_date_to_retry_after() -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    earlier = format_datetime(datetime.now(UTC) - timedelta(seconds=90), usegmt=True)
    assert 85 <= (retry_after({"retry-after": later}) or 0) <= 90
    assert retry_after({"retry-after": earlier}) == 0.0
    assert retry_after({"retry-after": "Tue, 01 Jan 2999 00:00:00 GMT"}) == MAX_COOLING
    assert retry_after({"retry-after": "Tue, 01 Jan 2019 00:00:00 GMT"}) is None


@pytest.mark.parametrize("seconds", [120, 121, 86_399, 86_400, 31_536_000, 10**30])
def test_a_long_retry_after_is_as_long_as_any_in_every_form(seconds: int) -> None:
    assert retry_after({"retry-after": str(seconds)}) == MAX_COOLING
    assert retry_after({"retry-after-ms": str(1000 * seconds)}) == MAX_COOLING
    if seconds < 10**10:
        later = format_datetime(datetime.now(UTC) + timedelta(seconds=seconds + 5), usegmt=True)
        assert retry_after({"retry-after": later}) == MAX_COOLING
