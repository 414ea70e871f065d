"""One request's fault is that of one request: it takes no provider away from others, and what
single answers have shown of a provider is bounded and soon forgotten.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from aiohttp import web

from aioserver.gateway.bridging import ChatCapabilities
from aioserver.gateway.continuation import ContinuationCapabilities
from aioserver.protocol.request_headers import HOP, MAX_HOPS
from aioserver.providers.verdicts import MAX_VERDICTS, VERDICT_FOR
from aioserver.wings.anthropic.attempt import CountingCapabilities
from aioserver.wings.anthropic.attempt import MessagesCapabilities as MessagesPath
from aioserver.wings.responses.attempt import ResponsesCapabilities as ResponsesPath
from tests.support.chat import CHAT
from tests.support.clock import FakeClock
from tests.support.faces import over_openai
from tests.support.server import QUICK, provider_entry
from tests.support.simulator import Simulator
from tests.support.web_app import served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from aioserver.providers.request import Capabilities
    from tests.support.server import MakeServer, RunningServer

ANSWER: dict[str, Any] = {
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi"}}]
}
AFFORD = (
    "This request requires more credits, or fewer max_tokens. "
    "You requested up to 64000 tokens, but can only afford 9000."
)
LARGE = (
    "Request too large for gpt-4o in organization org-x on tokens per min (TPM): Limit 30000, "
    "Requested 41000. The input or output tokens must be reduced in order to run successfully."
)
# A word that this engine knows, and values of it that it does not.
EFFORT = "reasoning_effort: Input should be 'low', 'medium' or 'high'"


class Engine:
    """A provider that answers well, and refuses a request whose question is `status TEXT` so."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []

    async def complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        question = body["messages"][-1]["content"]
        status, _, text = question.partition(" ")
        effort = body.get("reasoning_effort", "low")
        if effort not in {"low", "medium", "high"}:
            status, text = "400", EFFORT
        if status.isdigit():
            error = {"error": {"message": text, "code": text if "_" in text else None}}
            return web.json_response(error, status=int(status))
        return web.json_response(ANSWER)


@asynccontextmanager
async def asking(make_server: MakeServer) -> AsyncIterator[tuple[RunningServer, Engine]]:
    """A server whose active provider is an engine."""
    engine, app = Engine(), web.Application()
    app.router.add_post("/v1/chat/completions", engine.complete)
    async with served(app) as base:
        entry = provider_entry(f"{base}/v1", "m") | {"messages": "bridge", "responses": False}
        changes = {"llm.active": "engine", "llm.providers.engine": entry}
        yield await make_server(**changes), engine


async def ask(server: RunningServer, question: str, **headers: str) -> int:
    """Return the status of the answer to *question*."""
    body = {**CHAT, "model": "m", "messages": [{"role": "user", "content": question}]}
    url = f"{server.v1}/chat/completions"
    async with server.session.post(url, json=body, headers=headers) as response:
        await response.read()
        return response.status


@pytest.mark.parametrize(
    ("question", "seen", "headers", "accepted"),
    [
        ("508 loop_detected", 508, {HOP: "a, b"}, False),
        (f"402 {AFFORD}", 502, {}, False),
        (f"429 {LARGE}", 429, {}, False),
        (f"413 {LARGE}", 413, {}, False),
        ("401 The key may not use this model", 502, {}, True),
        ("401 The key may not use this model", 502, {}, False),
        ("402 Pay", 502, {}, True),
        ("402 Pay", 502, {}, False),
        ("403 Moderated", 502, {}, True),
        ("403 Moderated", 502, {}, False),
        ("400 This model's maximum context length is 100 tokens", 400, {}, True),
        ("404 no such model", 404, {}, True),
        ("422 what?", 422, {}, False),
    ],
)
async def test_a_request_that_is_refused_takes_the_provider_from_nobody_else(
    make_server: MakeServer, question: str, seen: int, headers: dict[str, str], accepted: bool
) -> None:
    # Of a key that was never accepted these may be the first refusals.
    doubtful = question in {
        "401 The key may not use this model",
        "402 Pay",
        "403 Moderated",
    }
    async with asking(make_server) as (server, _engine):
        if accepted:
            assert await ask(server, "Hello") == 200

        assert await ask(server, question, **headers) == seen
        flagged = doubtful and not accepted
        stats = server.provider_of("engine").stats()
        assert (stats.flagged, stats.state, stats.pace.cooling) == (flagged, "well", 0.0)
        assert await ask(server, "Hello") == (502 if flagged else 200)


async def test_a_circle_that_no_client_has_made_is_the_provider_s(
    make_server: MakeServer,
) -> None:
    async with asking(make_server) as (server, _engine):
        assert await ask(server, "508 loop_detected") == 508

        assert server.provider_of("engine").stats().flagged


@pytest.mark.parametrize("hops", [1, MAX_HOPS - 1])
async def test_a_client_s_own_hops_end_its_own_request_alone(
    make_server: MakeServer, hops: int
) -> None:
    inner = await make_server()
    outer = await make_server(
        **{"llm.active": "inner", "llm.providers.inner": provider_entry(inner.v1, "m")}
    )
    headers = {HOP: ",".join(f"h{number}" for number in range(hops))}

    # The request that has come through as many servers as there may be is refused by the next.
    assert await ask(outer, "Hello", **headers) == (200 if hops == 1 else 508)
    assert not outer.provider_of("inner").stats().flagged
    assert await ask(outer, "Hello") == 200


async def test_a_question_that_is_too_long_to_go_on_leaves_continuation_on_for_others(
    make_server: MakeServer,
) -> None:
    async with Simulator(QUICK) as other:
        entry = provider_entry(other.base_url, "other-model") | {"continuation": "prefill"}
        server = await make_server(
            QUICK, **{"llm.fallbacks": ["other"], "llm.providers.other": entry}
        )
        whole = (await over_openai(server, "plain")).text
        other.behaviour = replace(QUICK, fail_rate=1.0, fault="too-long")
        assert (await over_openai(server, "fault-cut-12")).end == "error"
        other.behaviour = QUICK

        seen = await over_openai(server, "fault-cut-12")

        assert (seen.end, seen.text) == ("complete", whole)


@pytest.mark.parametrize("first", ["minimal", "low"])
async def test_a_value_that_an_engine_refuses_takes_the_word_from_nobody_else(
    make_server: MakeServer, first: str
) -> None:
    async with asking(make_server) as (server, engine):

        async def effort(value: str) -> str | None:
            body = {"model": "m", "input": "Hello", "reasoning": {"effort": value}}
            async with server.session.post(f"{server.v1}/responses", json=body) as response:
                assert response.status == 200
            seen: str | None = engine.bodies[-1].get("reasoning_effort")
            return seen

        await effort(first)
        # It is sent once more without.
        assert await effort("minimal") is None
        assert await effort("high") == "high"


class Remembered(NamedTuple):
    """Something that is remembered of a provider: how it is made, learned under a key, and read.

    *keyed*: it has a key that a client has named.
    """

    capabilities: type[Capabilities]
    learn: Callable[[Any, str], object]
    known: Callable[[Any, str], object]
    keyed: bool = True


OPTION = "stream_options"
NO_RESPONSE = b'{"error":{"message":"Previous response with id \'r\' not found."}}'
REMEMBERED: dict[str, Remembered] = {
    "a word that is refused": Remembered(
        ChatCapabilities,
        lambda capabilities, key: capabilities.refuse(OPTION, key),
        lambda capabilities, key: capabilities.refuses(OPTION, key),
    ),
    "the size of a context": Remembered(
        ChatCapabilities,
        lambda capabilities, key: capabilities.keep_limit(key, 4096),
        lambda capabilities, key: capabilities.limits.get(key) == 4096,
    ),
    "the tokens of an answer": Remembered(
        ChatCapabilities,
        lambda capabilities, key: capabilities.keep_most(key, 4096),
        lambda capabilities, key: capabilities.most.get(key) == 4096,
    ),
    "a model that is not continued": Remembered(
        ContinuationCapabilities,
        lambda capabilities, key: capabilities.refused.keep(key, value=None),
        lambda capabilities, key: key in capabilities.refused,
    ),
    "how an answer is continued": Remembered(
        ContinuationCapabilities,
        lambda capabilities, _: capabilities.learn(repeats=True),
        lambda capabilities, _: capabilities.repeats,
        keyed=False,
    ),
    **{
        f"a path that is there: {kind.__module__}.{kind.__name__}": Remembered(
            kind,
            lambda capabilities, _: capabilities.found(present=True),
            lambda capabilities, _: capabilities.present,
            keyed=False,
        )
        for kind in (MessagesPath, CountingCapabilities, ResponsesPath)
    },
    **{
        f"a path that is not there: {kind.__module__}.{kind.__name__}": Remembered(
            kind,
            lambda capabilities, _: capabilities.found(present=False),
            lambda capabilities, _: capabilities.lacking,
            keyed=False,
        )
        for kind in (MessagesPath, CountingCapabilities, ResponsesPath)
    },
    "that responses are not kept": Remembered(
        ResponsesPath,
        lambda capabilities, _: capabilities.learn(404, NO_RESPONSE, previous_id="r", by_id=True),
        lambda capabilities, _: not capabilities.keeps,
        keyed=False,
    ),
}


def settings_of(server: RunningServer) -> Any:
    return server.provider_of("sim").settings


@pytest.mark.parametrize("name", REMEMBERED)
async def test_what_one_answer_has_shown_is_bounded_and_soon_forgotten(
    make_server: MakeServer, name: str
) -> None:
    server, clock = await make_server(), FakeClock()
    kind, learn, known, keyed = REMEMBERED[name]
    capabilities = kind(settings_of(server), clock)
    assert not known(capabilities, "m0")

    learn(capabilities, "m0")
    assert known(capabilities, "m0")
    clock.now += VERDICT_FOR - 1
    assert known(capabilities, "m0")
    # The next answer that shows it says that it is still so.
    learn(capabilities, "m0")
    clock.now += VERDICT_FOR - 1
    assert known(capabilities, "m0")
    clock.now += 1
    assert not known(capabilities, "m0")

    for number in range(3 * MAX_VERDICTS):
        learn(capabilities, f"m{number}")
    assert known(capabilities, f"m{3 * MAX_VERDICTS - 1}")
    assert known(capabilities, "m0") is not keyed


async def test_what_was_learned_of_one_model_says_nothing_of_another(
    make_server: MakeServer,
) -> None:
    server = await make_server()
    capabilities = ChatCapabilities(settings_of(server))

    capabilities.refuse(OPTION, "a")
    capabilities.take("top_k", "a")
    capabilities.refuse("top_k", "a")

    assert capabilities.refuses(OPTION, "a")
    assert not capabilities.refuses(OPTION, "b")
    # It has taken the word: its refusal was about the value.
    assert not capabilities.refuses("top_k", "a")
    assert capabilities.refused_words == {OPTION}
