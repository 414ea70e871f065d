"""A provider in trouble: tried again, replaced, left alone; and never paid for twice."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.auth.callers import NO_CALLER
from aioserver.config import settings
from aioserver.config.schema import Secret
from aioserver.gateway.request import Request
from aioserver.protocol.openai import Reading
from aioserver.provider_errors import (
    CircuitOpen,
    FirstTokenTimeout,
    ProviderAuthError,
    ProviderDisconnected,
    ProviderError,
    ProviderFault,
    ProviderFlagged,
    ProviderPaced,
    ProviderRateLimited,
    ProviderRefused,
    ReadTimeout,
)
from aioserver.providers import exchange
from aioserver.providers.breaker import (
    FEW,
    LONG_PATIENCE,
    MAX_TRIALS,
    MIN_ATTEMPTS,
    TRIAL_INTERVAL,
    TURN,
)
from aioserver.providers.capacity import MIN_RETRIES
from aioserver.providers.provider import Provider
from aioserver.providers.request import CHAT, ProviderRequest
from aioserver.streams.entries import COMPLETE
from aioserver.streams.stream import Stream
from tests.support.failing import kill, left_alone, sicken
from tests.support.routers import router_of
from tests.support.schedulers import scheduler
from tests.support.scripted_provider import (
    EVENT_STREAM,
    LAST_CHUNK,
    LIMITS,
    Peer,
    ScriptedProvider,
    chunk,
)
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aioserver.gateway.router import Router

JSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


def status(number: int, more: str = "", body: bytes = b'{"error":{"message":"no"}}') -> bytes:
    head = f"HTTP/1.1 {number} No\r\nContent-Type: application/json\r\n{more}"
    return head.encode() + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


def events(*data_lines: str) -> bytes:
    data = "".join(f"data: {line}\n\n" for line in data_lines).encode()
    return EVENT_STREAM + chunk(data) + LAST_CHUNK


def asked(fault: ProviderFault) -> tuple[str, int]:
    """The provider of which *fault* tells, and the attempts at all of them."""
    assert fault.request_outcome is not None
    return fault.request_outcome.provider, fault.request_outcome.attempts


def chunk_event(text: str | None, finish: str | None = None) -> str:
    return json.dumps({"choices": [{"delta": {"content": text}, "finish_reason": finish}]})


ROLE = json.dumps({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
ANSWER = events(chunk_event("hello"), chunk_event(None, "stop"), "[DONE]")


class Trouble:
    """A router, and providers that give the answers of a script, the last one for ever.

    An answer that is a tuple comes in so many pieces, an empty one is a reset.
    """

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self.providers: dict[str, Provider] = {}
        self.asked: dict[str, list[dict[str, Any]]] = {}
        self.servers: list[ScriptedProvider] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self._keys = 0

    async def add(
        self,
        name: str,
        *answers: bytes | tuple[bytes, ...],
        when_down: str = "fail",
        **limits: Any,
    ) -> Provider:
        script = list(answers)
        self.asked[name] = []

        async def play(peer: Peer) -> None:
            while True:
                request = await peer.request()
                self.asked[name].append(json.loads(request.partition(b"\r\n\r\n")[2]))
                await self.gate.wait()
                answer = script.pop(0) if len(script) > 1 else script[0]
                if not answer:
                    peer.writer.transport.abort()
                    return
                await peer.send(*((answer,) if isinstance(answer, bytes) else answer))

        server = await self._stack.enter_async_context(ScriptedProvider(play))
        self.servers.append(server)
        http_client = dataclasses.replace(
            LIMITS, **{"max_retries": 2, "queue_size": None, **limits}
        )
        provider_settings = settings.Provider(
            name=name,
            base_url=server.url,
            model=f"{name}-model",
            when_down=when_down,
            http_client=http_client,
        )
        provider = Provider(
            provider_settings, server.url, max_response_bytes=1 << 20, scheduler=scheduler()
        )
        self._stack.push_async_callback(provider.close)
        self.providers[name] = provider
        return provider

    @property
    def router(self) -> Router:
        first, *others = self.providers
        return router_of(self.providers, first, others, random_number=lambda: 0.0)

    async def fill(
        self, provider: str | None = None, *, frames: bool = True
    ) -> tuple[Stream, ProviderRequest]:
        router = self.router
        route = router.route(None, provider, caller=NO_CALLER)

        def body(provider_settings: settings.Provider, _model: str | None) -> bytes:
            return json.dumps({"model": provider_settings.model, "stream": True}).encode()

        asked = ProviderRequest(CHAT, body, streamed=True, reading=Reading() if frames else None)
        stream = Stream("r1", "anybody", window=30.0, max_bytes=1 << 22, outcome=asked.outcome)
        stream.record = asked.record
        await router.fill(Request(route, asked, "face", "r1"), stream)
        return stream, asked

    async def call(self) -> Any:
        def body(provider_settings: settings.Provider, _model: str | None) -> bytes:
            return json.dumps({"model": provider_settings.model}).encode()

        router = self.router
        asked = ProviderRequest(CHAT, body, streamed=False)
        return await router.call(
            Request(router.route(None, caller=NO_CALLER), asked, "face", "r1")
        )

    def renew(self, name: str) -> None:
        """Give *name* another key, as a reload would: a rest and a refused key are over."""
        provider = self.providers[name]
        self._keys += 1
        renewed = dataclasses.replace(provider.settings, api_key=Secret(f"key {self._keys}"))
        provider.prepare(renewed, renewed.base_url, max_response_bytes=1 << 20)()

    def counts(self) -> dict[str, int]:
        return {name: len(asked) for name, asked in self.asked.items()}


@pytest.fixture
async def trouble() -> AsyncIterator[Trouble]:
    async with AsyncExitStack() as stack:
        made = Trouble(stack)
        yield made
        for provider in made.providers.values():
            queue = provider.stats().queue
            assert (queue.inside, queue.waiting) == (0, 0)


# The same provider again.


@pytest.mark.parametrize("number", [408, 500, 502, 503, 504, 529])
async def test_faults_that_may_pass_are_tried_again(trouble: Trouble, number: int) -> None:
    provider = await trouble.add("a", status(number), status(number), ANSWER)

    stream, ask = await trouble.fill()

    assert (stream.end_status, stream.outcome.attempts, ask.record.outcome.attempts) == (
        COMPLETE,
        3,
        3,
    )
    assert trouble.counts() == {"a": 3}
    assert provider.meter.attempts["ok"].value == 1
    assert provider.meter.attempts["http_5xx"].value == 2
    assert provider.meter.retries["provider_error"].value == 2
    assert [entry.status for entry in stream.entries][:1] == [b"processing"]  # once


@pytest.mark.parametrize("frames", [True, False])
async def test_a_silence_before_the_first_event_is_none_of_the_answer(
    trouble: Trouble, *, frames: bool
) -> None:
    failed, begin = status(500), len(EVENT_STREAM)
    end = failed.index(b"{")
    head = ANSWER[:begin], chunk(b": soon\n\n"), ANSWER[begin:]
    await trouble.add("a", (failed[:end], failed[end:]), head)

    _, ask = await trouble.fill(frames=frames)

    assert ask.record.outcome.attempts == 2
    assert ask.record.silence == 0.0  # the answer itself came in one read


async def test_an_answer_that_is_not_streamed_is_tried_again_as_well(trouble: Trouble) -> None:
    await trouble.add("a", status(500), JSON)
    answer = await trouble.call()
    outcome = answer.outcome
    assert (answer.body, outcome.attempts, outcome.provider) == (b"{}", 2, "a")


OVERLOADED = '{"error":{"message":"overloaded"}}'


@pytest.mark.parametrize(
    "first",
    [events('{"error":{"code":502,"message":"overloaded"}}'), events(ROLE, OVERLOADED)],
    ids=["with a status", "behind a role"],
)
async def test_an_error_under_200_before_the_first_text_is_tried_again(
    trouble: Trouble, first: bytes
) -> None:
    await trouble.add("a", first, ANSWER)
    stream, _ = await trouble.fill()
    assert (stream.end_status, trouble.counts()) == (COMPLETE, {"a": 2})


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (status(400), ProviderRefused),
        (status(404), ProviderRefused),
        (status(409), ProviderRefused),
        (status(413), ProviderRefused),
        (status(422), ProviderRefused),
        (status(401), ProviderAuthError),
        (status(402), ProviderAuthError),
        (status(403), ProviderAuthError),
        (status(429, body=b'{"error":{"code":"insufficient_quota"}}'), ProviderAuthError),
        (events(chunk_event("half")), ProviderDisconnected),  # the model may have run
        (EVENT_STREAM, ReadTimeout),
    ],
)
async def test_faults_that_stay_or_may_have_been_paid_are_not_tried_again(
    trouble: Trouble, answer: bytes, fault: type[ProviderFault]
) -> None:
    await trouble.add("a", answer, ANSWER, read_timeout=0.1)
    with pytest.raises(fault):
        await trouble.fill()
    assert trouble.counts() == {"a": 1}


@pytest.mark.parametrize(
    "error", [OVERLOADED, '{"error":{"code":502,"message":"overloaded"}}'], ids=["plain", "502"]
)
async def test_after_the_first_text_nothing_is_tried_again(trouble: Trouble, error: str) -> None:
    await trouble.add("a", events(chunk_event("hel"), error), ANSWER)
    await trouble.add("b", ANSWER)

    with pytest.raises(ProviderError):
        await trouble.fill()

    assert trouble.counts() == {"a": 1, "b": 0}


async def test_a_429_is_tried_again_after_its_time(trouble: Trouble) -> None:
    provider = await trouble.add("a", status(429, "retry-after-ms: 60\r\n"), ANSWER)
    begun = asyncio.get_running_loop().time()

    stream, _ = await trouble.fill()

    assert asyncio.get_running_loop().time() - begun >= 0.06
    assert (stream.end_status, trouble.counts()) == (COMPLETE, {"a": 2})
    assert provider.meter.retries["provider_rate_limited"].value == 1


async def test_a_provider_that_asks_for_too_long_a_rest_is_passed_over(trouble: Trouble) -> None:
    await trouble.add("a", status(429, "Retry-After: 100\r\n"), ANSWER)
    with pytest.raises(ProviderRateLimited) as raised:
        await trouble.fill()
    assert raised.value.retry_after == 100
    assert trouble.counts() == {"a": 1}


async def test_the_place_is_free_between_two_tries_and_a_client_who_leaves_ends_the_backoff(
    trouble: Trouble,
) -> None:
    provider = await trouble.add("a", status(500), ANSWER, backoff_factor=30.0)
    task = asyncio.create_task(trouble.fill())
    await until(lambda: provider.meter.retries["provider_error"].value == 1)

    assert provider.stats().queue.inside == 0
    assert provider.stats().pool.open == provider.stats().pool.idle
    task.cancel()
    await asyncio.wait((task,))

    assert task.cancelled()
    assert trouble.counts() == {"a": 1}


@pytest.mark.parametrize("retries", [0, 1, 3])
async def test_a_new_connection_that_breaks_is_tried_once_more_at_once(
    trouble: Trouble, retries: int
) -> None:
    provider = await trouble.add("a", b"", b"", ANSWER, max_retries=retries, backoff_factor=30.0)
    with pytest.raises(ProviderDisconnected):
        await trouble.fill()
    assert trouble.counts() == {"a": min(2, 1 + retries)}
    assert provider.meter.retries["provider_disconnected"].value == min(1, retries)


async def test_one_retry_of_a_broken_connection_comes_before_the_next_provider(
    trouble: Trouble,
) -> None:
    await trouble.add("a", b"", b"", max_retries=3, backoff_factor=30.0)
    await trouble.add("b", ANSWER)
    stream, request = await trouble.fill()
    assert (stream.end_status, trouble.counts()) == (COMPLETE, {"a": 2, "b": 1})
    assert request.outcome.attempts == 3


SILENCES = {
    "a cut": events(ROLE),
    "no HTTP": EVENT_STREAM + chunk(b"data: %b\n\n" % ROLE.encode()) + b"nonsense\r\n",
    "no JSON": events(ROLE, "{nonsense"),
    "no event stream": JSON,
    "silence": EVENT_STREAM,
    "silence behind a role": EVENT_STREAM + chunk(b"data: %b\n\n" % ROLE.encode()),
}


@pytest.mark.parametrize("frames", [True, False], ids=["frames", "bytes"])
@pytest.mark.parametrize("name", SILENCES)
async def test_whatever_breaks_before_the_content_goes_to_the_next_provider(
    trouble: Trouble, name: str, frames: bool
) -> None:
    await trouble.add("a", SILENCES[name], read_timeout=0.1, max_retries=2)
    await trouble.add("b", ANSWER)
    stream, _ = await trouble.fill(frames=frames)
    assert (stream.end_status, trouble.counts()) == (COMPLETE, {"a": 1, "b": 1})
    assert b"".join(entry.data for entry in stream.entries).count(b"assistant") == 0


async def test_a_reload_bounds_the_wait_of_later_attempts_for_the_first_content(
    trouble: Trouble,
) -> None:
    provider = await trouble.add("a", EVENT_STREAM, read_timeout=30.0)
    running = asyncio.create_task(trouble.fill())
    await until(lambda: trouble.counts() == {"a": 1})

    client = dataclasses.replace(provider.settings.http_client, first_token_timeout=0.1)
    renewed = dataclasses.replace(provider.settings, http_client=client)
    provider.prepare(renewed, renewed.base_url, max_response_bytes=1 << 20)()
    with pytest.raises(FirstTokenTimeout, match="no content"):
        await trouble.fill()

    assert not running.done()
    running.cancel()
    await asyncio.wait((running,))


async def test_the_wait_for_the_first_content_has_a_bound_of_its_own(trouble: Trouble) -> None:
    role = EVENT_STREAM + chunk(b"data: %b\n\n" % ROLE.encode())
    await trouble.add("a", role, first_token_timeout=0.1, read_timeout=30.0, max_retries=2)
    with pytest.raises(FirstTokenTimeout):
        await trouble.fill()
    await trouble.add("b", ANSWER)
    stream, _ = await trouble.fill()
    assert (stream.end_status, trouble.counts()) == (COMPLETE, {"a": 2, "b": 1})


async def test_a_kept_connection_that_is_lost_late_is_not_stale(
    trouble: Trouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "STALE_WITHIN", 0.0)
    await trouble.add("a", JSON, b"", JSON)
    await trouble.call()
    with pytest.raises(ProviderDisconnected):
        await trouble.call()  # the model may have run
    assert trouble.counts() == {"a": 2}


async def test_a_storm_of_faults_makes_no_storm_of_retries(trouble: Trouble) -> None:
    provider = await trouble.add("a", status(503), max_retries=5, queue_size=100)

    done = await asyncio.gather(*(trouble.fill() for _ in range(30)), return_exceptions=True)

    assert all(isinstance(outcome, ProviderError) for outcome in done)
    assert trouble.counts()["a"] <= 30 + MIN_RETRIES
    assert provider.meter.retries_refused.value > 0
    assert provider.stats().budget == (MIN_RETRIES, MIN_RETRIES)


# Another provider.


@pytest.mark.parametrize("first", [status(503), status(429), status(401)])
async def test_a_fallback_answers_with_its_own_model(trouble: Trouble, first: bytes) -> None:
    provider = await trouble.add("a", first, max_retries=0)
    await trouble.add("b", ANSWER)

    stream, ask = await trouble.fill()

    assert stream.end_status == COMPLETE
    assert (stream.outcome.provider, ask.record.outcome.provider, stream.outcome.attempts) == (
        "b",
        "b",
        2,
    )
    assert ask.record.outcome.model == "b-model"
    assert [body["model"] for body in trouble.asked["b"]] == ["b-model"]
    assert sum(counter.value for counter in provider.meter.failovers.values()) == 1


async def test_a_provider_that_is_not_there_is_tried_and_then_replaced(trouble: Trouble) -> None:
    provider = await trouble.add("a", ANSWER)
    await trouble.servers.pop().__aexit__(None, None, None)
    await trouble.add("b", ANSWER)

    stream, _ = await trouble.fill()

    assert (stream.outcome.provider, stream.outcome.attempts) == ("b", 4)
    assert provider.meter.attempts["connect_error"].value == 3
    assert provider.meter.failovers["connect_error"].value == 1


async def test_the_fallbacks_are_asked_in_their_order_and_the_last_one_says_why(
    trouble: Trouble,
) -> None:
    for name in "abc":
        await trouble.add(name, status(500), max_retries=1)
    with pytest.raises(ProviderError) as raised:
        await trouble.fill()
    assert asked(raised.value) == ("c", 6)
    assert trouble.counts() == {"a": 2, "b": 2, "c": 2}


async def test_a_pinned_provider_is_not_replaced(trouble: Trouble) -> None:
    await trouble.add("a", ANSWER)
    await trouble.add("b", status(500), max_retries=0)
    await trouble.add("c", ANSWER)
    with pytest.raises(ProviderError):
        await trouble.fill("b")
    assert trouble.counts() == {"a": 0, "b": 1, "c": 0}


@pytest.mark.parametrize("answer", [status(400), status(404), events(chunk_event("half"))])
async def test_the_callers_fault_and_a_broken_answer_are_not_passed_on(
    trouble: Trouble, answer: bytes
) -> None:
    await trouble.add("a", answer)
    await trouble.add("b", ANSWER)
    with pytest.raises(ProviderFault):
        await trouble.fill()
    assert trouble.counts() == {"a": 1, "b": 0}


async def test_a_full_queue_fails_over_at_once(trouble: Trouble) -> None:
    await trouble.add("a", ANSWER, concurrent_requests=1, queue_size=1)
    await trouble.add("b", ANSWER)
    trouble.gate.clear()
    inside = asyncio.create_task(trouble.fill("a"))
    await until(lambda: trouble.counts()["a"] == 1)
    waits = asyncio.create_task(trouble.fill("a"))
    await until(lambda: trouble.providers["a"].stats().queue.waiting == 1)

    third = asyncio.create_task(trouble.fill())
    await until(lambda: trouble.counts()["b"] == 1)
    trouble.gate.set()

    assert (await third)[0].outcome.provider == "b"
    assert (await inside)[0].outcome.provider == (await waits)[0].outcome.provider == "a"


# Nobody answers: what a client is told, and when it may come back.

PACED = status(429, "Retry-After: 30\r\n")
LONGER = status(429, "Retry-After: 90\r\n")


async def test_where_all_are_dead_a_client_comes_back_soon(trouble: Trouble) -> None:
    providers = [await trouble.add(name, ANSWER) for name in "abc"]

    with left_alone(*(provider.health.breaker for provider in providers)):
        with pytest.raises(CircuitOpen) as raised:
            await trouble.fill()
        assert (providers[0].stats().state, providers[0].stats().next_try) == ("dead", 0.0)

    assert 0 <= (providers[0].stats().next_try or 0) <= TRIAL_INTERVAL
    assert 1 <= (raised.value.retry_after or 0) <= 1.1
    assert trouble.counts() == {"a": 0, "b": 0, "c": 0}
    headers = raised.value.headers()
    assert int(headers["Retry-After"]) >= (raised.value.retry_after or 0), "never too early"
    assert (raised.value.http_status, headers["x-aioserver-attempts"]) == (503, "0")
    assert "x-should-retry" not in headers, "nothing was sent"


@pytest.mark.parametrize("names", ["ab", "ba"])
async def test_where_all_limit_us_the_soonest_counts(trouble: Trouble, names: str) -> None:
    for name in names:
        await trouble.add(name, PACED if name == "a" else LONGER, max_retries=0)
    for _ in range(2):  # first they say so, then they need not be asked
        with pytest.raises(ProviderRateLimited) as raised:
            await trouble.fill()
        assert 29 < (raised.value.retry_after or 0) <= 33
        assert raised.value.http_status == 429
    assert trouble.counts() == {"a": 1, "b": 1}


async def test_a_429_is_reported_only_where_every_usable_one_says_it(trouble: Trouble) -> None:
    provider = await trouble.add("a", ANSWER)
    await trouble.add("b", PACED, max_retries=0)

    with left_alone(provider.health.breaker), pytest.raises(CircuitOpen) as raised:
        await trouble.fill()

    assert raised.value.http_status == 503
    assert 1 <= (raised.value.retry_after or 0) <= 1.1
    assert asked(raised.value) == ("a", 1)


@pytest.mark.parametrize("names", ["ab", "ba"])
async def test_a_provider_that_refuses_our_key_is_not_usable(trouble: Trouble, names: str) -> None:
    for name in names:
        await trouble.add(name, status(401) if name == "a" else PACED, max_retries=0)
    for _ in range(2):
        with pytest.raises(ProviderRateLimited) as raised:
            await trouble.fill()
        assert asked(raised.value)[0] == "b"
    assert trouble.counts() == {"a": 1, "b": 1}


async def test_where_every_one_refuses_our_key_that_is_told(trouble: Trouble) -> None:
    providers = [await trouble.add(name, status(403)) for name in "ab"]
    with pytest.raises(ProviderAuthError):
        await trouble.fill()
    assert all(provider.stats().flagged for provider in providers), "none has ever answered"


async def test_an_answer_that_may_have_been_paid_is_told_whatever_was_before(
    trouble: Trouble,
) -> None:
    provider = await trouble.add("a", ANSWER)
    await trouble.add("b", EVENT_STREAM, read_timeout=0.1)
    with left_alone(provider.health.breaker), pytest.raises(ReadTimeout):
        await trouble.fill()


# A rest.


async def test_while_a_provider_rests_its_fallback_is_asked_at_once(trouble: Trouble) -> None:
    provider = await trouble.add("a", PACED, ANSWER)
    await trouble.add("b", ANSWER)

    for number in range(1, 4):
        assert (await trouble.fill())[0].outcome.provider == "b"
        assert trouble.counts() == {"a": 1, "b": number}
    assert provider.meter.failovers["provider_rate_limited"].value == 3
    assert provider.meter.attempts["http_429"].value == 1

    trouble.renew("a")  # its rest is over
    assert (await trouble.fill())[0].outcome.provider == "a"


async def test_a_short_rest_is_waited_for(trouble: Trouble) -> None:
    await trouble.add("a", status(429, "retry-after-ms: 100\r\n"), ANSWER)
    await trouble.add("b", ANSWER)

    assert (await trouble.fill())[0].outcome.provider == "b"
    assert (await trouble.fill())[0].outcome.provider == "a"


async def test_waiters_of_a_provider_that_begins_to_rest_go_elsewhere(
    trouble: Trouble,
) -> None:
    provider = await trouble.add("a", PACED, concurrent_requests=1, queue_size=10)
    await trouble.add("b", ANSWER)
    trouble.gate.clear()
    tasks = [asyncio.create_task(trouble.fill()) for _ in range(4)]
    pinned = asyncio.create_task(trouble.fill("a"))
    await until(lambda: provider.stats().queue.waiting == 4)

    trouble.gate.set()
    done = await asyncio.gather(*tasks)

    assert {stream.outcome.provider for stream, _ in done} == {"b"}
    assert trouble.counts() == {"a": 1, "b": 4}
    with pytest.raises(ProviderPaced):  # 30 s are more than it would wait
        await pinned


async def test_waiters_where_nothing_is_left_go_elsewhere_before_the_429(
    trouble: Trouble,
) -> None:
    spent = b"\r\nx-ratelimit-remaining-requests: 0\r\nx-ratelimit-reset-requests: 1m0s\r\n\r\n"
    last = ANSWER.replace(b"\r\n\r\n", spent, 1)
    provider = await trouble.add("a", last, concurrent_requests=1, queue_size=10)
    await trouble.add("b", ANSWER)
    trouble.gate.clear()
    tasks = [asyncio.create_task(trouble.fill()) for _ in range(4)]
    await until(lambda: provider.stats().queue.waiting == 3)

    trouble.gate.set()
    done = await asyncio.gather(*tasks)

    assert [stream.outcome.provider for stream, _ in done] == ["a", "b", "b", "b"]
    assert provider.meter.failovers["provider_rate_limited"].value == 3
    assert provider.meter.attempts["http_429"].value == 0


async def test_a_storm_of_429_makes_no_wave_of_retries(trouble: Trouble) -> None:
    provider = await trouble.add(
        "a", status(429, "retry-after-ms: 20\r\n"), max_retries=5, queue_size=100
    )
    done = await asyncio.gather(*(trouble.fill() for _ in range(30)), return_exceptions=True)

    assert {type(outcome) for outcome in done} <= {ProviderRateLimited, ProviderPaced}
    assert trouble.counts()["a"] <= 30 + MIN_RETRIES
    assert provider.meter.attempts["http_429"].value == trouble.counts()["a"]
    assert provider.stats().state == "well"


async def test_a_limit_that_is_told_within_a_stream_is_a_rest_as_well(trouble: Trouble) -> None:
    limited = events('{"error":{"code":429,"message":"slow down"}}')
    provider = await trouble.add("a", limited, ANSWER, max_retries=0)

    with pytest.raises(ProviderRateLimited):
        await trouble.fill()

    assert provider.stats().pace.cooling > 0
    assert provider.stats().state == "well"
    assert provider.meter.attempts["http_429"].value == 1


async def test_credits_that_are_used_up_are_reported_within_a_stream(trouble: Trouble) -> None:
    provider = await trouble.add("a", events('{"error":{"code":402,"message":"no credits"}}'))
    with pytest.raises(ProviderAuthError):
        await trouble.fill()
    assert (provider.stats().flagged, trouble.counts()) == (True, {"a": 1})


# Dead, and sick.


async def died(
    trouble: Trouble, name: str, *answers: bytes | tuple[bytes, ...], **limits: Any
) -> Provider:
    """Add a provider that is dead, and whose next trial may start."""
    provider = await trouble.add(name, *answers, **{"max_retries": 0, **limits})
    kill(provider.health.breaker)
    await until(lambda: provider.health.breaker.delay(alternative=True) <= 0)
    return provider


def tried_in_vain(provider: Provider) -> None:
    """Let some trials of *provider* fail, so that those with another provider are rare."""
    for _ in range(8):
        provider.health.breaker.start()
        provider.health.breaker.failed(0.0, trial=True)


async def test_a_trial_finds_out_that_it_is_back(trouble: Trouble) -> None:
    provider = await died(trouble, "a", ANSWER)
    trouble.gate.clear()
    trial = asyncio.create_task(trouble.fill())
    await until(lambda: trouble.counts()["a"] == 1)

    with pytest.raises(CircuitOpen):
        await trouble.fill()
    assert (provider.stats().state, provider.stats().next_try) == ("dead", 0.0)
    trouble.gate.set()

    assert (await trial)[0].end_status == COMPLETE
    assert (provider.stats().state, provider.stats().next_try) == ("well", None)
    assert (await trouble.fill())[0].end_status == COMPLETE


async def test_the_first_event_of_a_trial_brings_the_provider_back(trouble: Trouble) -> None:
    begun = events(chunk_event("hel"))[: -len(LAST_CHUNK)]
    provider = await died(trouble, "a", begun, ANSWER)
    trial = asyncio.create_task(trouble.fill())

    await until(lambda: provider.stats().state == "well")

    assert not trial.done()
    assert (await trouble.fill())[0].end_status == COMPLETE
    trial.cancel()
    await asyncio.wait((trial,))


async def test_a_head_and_comments_bring_nobody_back(trouble: Trouble) -> None:
    provider = await died(trouble, "a", EVENT_STREAM + chunk(b": soon\n\n"), read_timeout=0.1)
    with pytest.raises(ReadTimeout):
        await trouble.fill()
    assert provider.stats().state == "dead"


async def test_a_trial_whose_client_leaves_proves_nothing(trouble: Trouble) -> None:
    provider = await died(trouble, "a", ANSWER)
    trouble.gate.clear()
    for number in range(1, 2 * MAX_TRIALS):
        trial = asyncio.create_task(trouble.fill())
        await until(lambda number=number: trouble.counts()["a"] == number)  # type: ignore[misc]
        trial.cancel()
        await asyncio.wait((trial,))
        assert provider.stats().state == "dead"
        await until(lambda: provider.health.breaker.delay() <= 0)


async def test_a_trial_that_must_wait_for_a_place_is_the_only_one(trouble: Trouble) -> None:
    provider = await trouble.add("a", ANSWER, concurrent_requests=1)
    trouble.gate.clear()
    stuck = asyncio.create_task(trouble.fill())
    await until(lambda: trouble.counts()["a"] == 1)
    kill(provider.health.breaker)
    await until(lambda: provider.health.breaker.delay() <= 0)

    trial = asyncio.create_task(trouble.fill())
    await until(lambda: provider.stats().queue.waiting == 1)
    with pytest.raises(CircuitOpen):
        await trouble.fill()
    stuck.cancel()
    await until(lambda: trouble.counts()["a"] == 2)
    trouble.gate.set()

    assert (await trial)[0].end_status == COMPLETE
    assert provider.stats().state == "well"
    await asyncio.wait((stuck,))


async def test_waiters_are_refused_when_their_provider_dies(trouble: Trouble) -> None:
    provider = await trouble.add(
        "a", status(500), max_retries=0, concurrent_requests=1, queue_size=50
    )
    trouble.gate.clear()
    tasks = [asyncio.create_task(trouble.fill("a")) for _ in range(12)]
    await until(lambda: provider.stats().queue.waiting == 11)
    # All but one of the failures that it dies of.
    for _ in range(FEW - 1):
        provider.health.breaker.failed(time.monotonic() - LONG_PATIENCE, trial=False)

    trouble.gate.set()
    done = await asyncio.gather(*tasks, return_exceptions=True)

    kinds = [type(outcome) for outcome in done]
    assert kinds == [ProviderError, *[CircuitOpen] * 11]
    assert trouble.counts()["a"] == 1


async def test_a_retry_that_meets_a_dead_provider_ends_with_what_killed_it(
    trouble: Trouble,
) -> None:
    provider = await trouble.add("a", status(500), max_retries=2, backoff_factor=0.01)
    trouble.gate.clear()
    tasks = [asyncio.create_task(trouble.fill()) for _ in range(5)]
    await until(lambda: trouble.counts()["a"] == 5)
    kill(provider.health.breaker)
    trouble.gate.set()

    done = await asyncio.gather(*tasks, return_exceptions=True)

    assert {type(outcome) for outcome in done} == {ProviderError}
    # Each is parked until the next trial may start; the first to come is that trial.
    assert 5 < trouble.counts()["a"] < 15


async def test_where_another_provider_is_there_nobody_is_tried_again_at_a_dead_one(
    trouble: Trouble,
) -> None:
    first = await died(trouble, "a", status(500), max_retries=2)
    await trouble.add("b", ANSWER)

    for _ in range(5):
        assert (await trouble.fill())[0].outcome.provider == "b"

    assert trouble.counts() == {"a": 1, "b": 5}
    assert first.meter.retries["provider_error"].value == 0
    assert 0 < first.health.breaker.delay(alternative=True) <= 1.0


async def test_a_pinned_request_tries_a_dead_provider_though_there_is_another(
    trouble: Trouble,
) -> None:
    provider = await died(trouble, "a", status(500), ANSWER)
    await trouble.add("b", ANSWER)
    await trouble.fill()
    tried_in_vain(provider)
    await until(lambda: provider.health.breaker.delay() <= 0)
    assert provider.health.breaker.delay(alternative=True) > 5

    assert (await trouble.fill("a"))[0].outcome.provider == "a"


async def test_a_dead_fallback_is_no_reason_to_try_rarely(trouble: Trouble) -> None:
    provider = await died(trouble, "a", status(500), ANSWER)
    await died(trouble, "b", status(500))
    with pytest.raises(ProviderError):
        await trouble.fill()
    tried_in_vain(provider)
    await until(lambda: provider.health.breaker.delay() <= 0)
    assert provider.health.breaker.delay(alternative=True) > 5

    assert (await trouble.fill())[0].outcome.provider == "a"


async def test_a_sick_provider_answers_where_the_fallback_does_not(trouble: Trouble) -> None:
    provider = await trouble.add("a", ANSWER)
    await trouble.add("b", status(500), max_retries=0)
    sicken(provider.health.breaker)

    stream, _ = await trouble.fill()

    assert (stream.outcome.provider, stream.outcome.model) == ("a", "a-model")
    assert trouble.counts() == {"a": 1, "b": 1}


async def test_a_sick_provider_without_a_fallback_is_asked_by_all(trouble: Trouble) -> None:
    provider = await trouble.add("a", ANSWER)
    sicken(provider.health.breaker)
    for _ in range(TURN):
        assert (await trouble.fill())[0].outcome.provider == "a"
    assert provider.stats().state == "well", "they were all answered"


async def test_a_wait_for_a_provider_that_is_away_costs_no_retry(trouble: Trouble) -> None:
    provider = await trouble.add(
        "a", status(503), status(503), ANSWER, when_down="wait", max_retries=0, backoff_factor=0.0
    )

    stream, ask = await trouble.fill()

    assert (stream.end_status, ask.record.outcome.attempts) == (COMPLETE, 3)
    assert ask.record.queue_wait > 0
    assert provider.stats().budget.used == 0


async def test_a_trial_that_has_waited_and_fails_otherwise_waits_on(trouble: Trouble) -> None:
    provider = await trouble.add(
        "a", status(503), status(500), ANSWER, when_down="wait", max_retries=0
    )
    filling = asyncio.create_task(trouble.fill())
    await until(lambda: trouble.counts()["a"] == 1)
    kill(provider.health.breaker, unreachable=True)

    assert (await filling)[0].end_status == COMPLETE
    assert trouble.counts() == {"a": 3}


async def test_a_parked_request_ends_with_its_own_fault_if_the_provider_dies_of_another(
    trouble: Trouble,
) -> None:
    provider = await trouble.add("a", status(503), status(500), when_down="wait", max_retries=0)
    filling = asyncio.create_task(trouble.fill())
    await until(lambda: provider.stats().queue.waiting == 1)
    # With the 503, all but one of the failures that it dies of.
    for _ in range(FEW - 2):
        provider.health.breaker.failed(time.monotonic() - LONG_PATIENCE, trial=False)
    with pytest.raises(ProviderError, match="500"):
        await trouble.fill()
    assert provider.stats().state == "dead"

    with pytest.raises(ProviderError, match="503"):
        await filling


async def test_an_answer_that_may_be_paid_for_is_not_waited_for_again(trouble: Trouble) -> None:
    provider = await trouble.add(
        "a", status(503), EVENT_STREAM, ANSWER, when_down="wait", max_retries=0, read_timeout=0.1
    )
    filling = asyncio.create_task(trouble.fill())
    await until(lambda: trouble.counts()["a"] == 1)
    kill(provider.health.breaker, unreachable=True)

    with pytest.raises(ReadTimeout):
        await filling


@pytest.mark.parametrize(
    "answer",
    [
        status(429),
        status(400),
        status(401),
        status(404, body=b"404 page not found"),
        status(413, body=b"<html>nginx</html>"),
    ],
)
async def test_faults_that_prove_nothing_count_neither_way(
    trouble: Trouble, answer: bytes
) -> None:
    provider = await trouble.add("a", answer, max_retries=0)
    for _ in range(MIN_ATTEMPTS + 1):
        trouble.renew("a")
        with pytest.raises(ProviderFault):
            await trouble.fill()
    assert provider.stats().state == "well"

    kill(provider.health.breaker)
    await until(lambda: provider.health.breaker.delay() <= 0)
    trouble.renew("a")
    with pytest.raises(ProviderFault):
        await trouble.fill()

    assert provider.stats().state == "dead"


async def test_answers_that_break_off_are_failures_on_every_face(trouble: Trouble) -> None:
    broken = events(chunk_event("hel"), '{"error":{"code":502,"message":"overloaded"}}')
    provider = await trouble.add("a", broken)
    for _ in range(MIN_ATTEMPTS + 1):
        await trouble.fill(frames=False)  # the OpenAI face: the error event passes as it is
    assert provider.stats().state == "sick", "it answers, but never to the end"
    assert provider.meter.attempts["ok"].value == 0


async def test_each_provider_has_a_wait_of_its_own(trouble: Trouble) -> None:
    await trouble.add("a", ANSWER, concurrent_requests=1, queue_timeout=0.05)
    await trouble.add("b", ANSWER, concurrent_requests=1, queue_timeout=5.0)
    trouble.gate.clear()
    busy = [asyncio.create_task(trouble.fill(name)) for name in "ab"]
    await until(lambda: trouble.counts() == {"a": 1, "b": 1})

    third = asyncio.create_task(trouble.fill())
    await until(lambda: trouble.providers["b"].stats().queue.waiting == 1)
    trouble.gate.set()

    assert (await third)[0].outcome.provider == "b"
    await asyncio.gather(*busy)


async def test_a_provider_that_refuses_our_key_is_not_asked_again_for_a_while(
    trouble: Trouble,
) -> None:
    provider = await trouble.add("a", status(401), ANSWER)
    with pytest.raises(ProviderAuthError):
        await trouble.fill()

    with pytest.raises(ProviderFlagged):
        await trouble.fill()
    assert provider.stats().flagged
    assert trouble.counts() == {"a": 1}
    trouble.renew("a")

    assert (await trouble.fill())[0].end_status == COMPLETE
    assert provider.meter.attempts["http_4xx"].value == 1


async def test_a_403_for_one_request_stops_nobody_else(trouble: Trouble) -> None:
    provider = await trouble.add("a", ANSWER, status(403), ANSWER)
    await trouble.fill()
    with pytest.raises(ProviderAuthError) as refused:
        await trouble.fill()

    assert not provider.stats().flagged
    assert (await trouble.fill())[0].end_status == COMPLETE
    assert refused.value.code == "provider_auth_error"
    assert provider.meter.key_refused.value == 0
