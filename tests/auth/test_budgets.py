"""A key's budgets of tokens, on each face: what a refusal says, what the headers say, and what is
left when answers have ended.
"""

from __future__ import annotations

import asyncio
import json
import re
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.limits.budget import Budget
from tests.support.chat import CHAT, STREAMED, chat, to_end
from tests.support.keys import bearer, keys_of
from tests.support.server import ENDLESS, QUICK, MakeServer
from tests.support.simulator import Behaviour
from tests.support.waiting import patience, until

if TYPE_CHECKING:
    from aioserver.limits.quota import Quota
    from tests.support.server import RunningServer

AGAIN = re.compile(
    r"tokens_per_(minute|day) of this key: limit \d+, used \d+, requested about \d+\."
    r" Please try again in (\d+\.\d)s\.$"
)
MESSAGE = {"max_tokens": 100, **CHAT}
RESPONSE = {"input": "Hello", "max_output_tokens": 100}
POSTS: dict[str, tuple[str, dict[str, Any]]] = {
    "stream": ("v1/chat/completions", STREAMED),
    "whole": ("v1/chat/completions", CHAT),
    "messages": ("v1/messages", MESSAGE),
    "messages stream": ("v1/messages", {**MESSAGE, "stream": True}),
    "responses": ("v1/responses", RESPONSE),
    "completions": ("v1/completions", {"prompt": "Hello"}),
    "sse": ("chat/stream", {"text": "Hello", "request_id": "s"}),
}


def quota(server: RunningServer) -> Quota:
    return server.context.access.keys.quotas()["web"]


async def post(server: RunningServer, face: str, **more: Any) -> tuple[int, Any, bytes]:
    path, body = POSTS[face]
    url = server.sse if face == "sse" else f"{server.base}/{path}"
    async with server.session.post(url, json={**body, **more}, headers=bearer("web")) as response:
        return response.status, response.headers, await response.read()


@pytest.mark.parametrize("face", POSTS)
async def test_a_budget_that_is_used_up_refuses_and_says_when_to_come_back(
    make_server: MakeServer, face: str
) -> None:
    server = await make_server(QUICK, **keys_of("web", tokens_per_minute=1000))
    quota(server).budget.reserve(1000).settle(1000)

    status, headers, body = await post(server, face)

    assert status == 429
    error = json.loads(body)["error"]
    assert error["code"] == "rate_limit_exceeded"
    assert error["type"] == ("rate_limit_error" if "messages" in face else "tokens")
    match = AGAIN.match(error["message"])
    assert match is not None
    seconds = float(match[2])
    assert float(headers["retry-after-ms"]) == pytest.approx(1000 * seconds)
    assert seconds <= int(headers["Retry-After"]) < seconds + 1
    assert "x-should-retry" not in headers
    _check_headers(headers, messages="messages" in face, remaining=0)
    refusals = server.context.metrics.budget_refusals
    assert {labels: counter.value for labels, counter in refusals.items()} == {
        ("web", "tokens_per_minute"): 1
    }
    assert quota(server).running == 0


def _check_headers(headers: Any, *, messages: bool, remaining: int | None = None) -> None:
    if messages:
        names = [name for name in headers if name.lower().startswith("x-ratelimit")]
        assert not names
        assert headers["anthropic-ratelimit-tokens-limit"] == "1000"
        assert re.fullmatch(
            r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", headers["anthropic-ratelimit-tokens-reset"]
        )
        left = headers["anthropic-ratelimit-tokens-remaining"]
    else:
        assert headers["x-ratelimit-limit-requests"] == "300"
        assert headers["x-ratelimit-limit-tokens"] == "1000"
        assert re.fullmatch(r"(\d+m)?[\d.]+(s|ms)", headers["x-ratelimit-reset-tokens"])
        left = headers["x-ratelimit-remaining-tokens"]
    if remaining is not None:
        # A little of it is there again.
        assert int(left) <= remaining + 50


@pytest.mark.parametrize("face", POSTS)
async def test_an_answer_is_charged_with_what_it_has_cost(
    make_server: MakeServer, face: str
) -> None:
    server = await make_server(
        Behaviour(ttft=0, interval=0, tokens=7),
        **keys_of("web", tokens_per_minute=1000, tokens_per_day=100_000),
    )

    status, headers, _ = await post(server, face)

    assert status == 200
    _check_headers(headers, messages="messages" in face)
    await until(lambda: quota(server).running == 0)
    day = quota(server).budgets()["tokens_per_day"]
    assert day.reserved == quota(server).budget.reserved == 0
    spent = server.context.usage.sums.today("web")
    assert day.used == spent > 0


async def test_a_day_says_the_whole_time_and_that_no_sdk_should_wait(
    make_server: MakeServer,
) -> None:
    server = await make_server(QUICK, **keys_of("web", tokens_per_day=1000))
    quota(server).budget.reserve(1000).settle(1000)

    status, headers, body = await post(server, "whole")

    assert status == 429
    error = json.loads(body)["error"]
    match = AGAIN.match(error["message"])
    assert match is not None
    assert match[1] == "day"
    seconds = float(match[2])
    assert int(headers["Retry-After"]) - seconds < 1
    assert ("x-should-retry" in headers) == (seconds > 60)
    assert headers["x-ratelimit-limit-tokens"] == "1000"
    async with server.connect(headers=bearer("web")) as ws:
        await ws.send_json(chat("r"))
        (frame,) = await to_end(ws)
        assert frame["chunk"]["code"] == "rate_limit_exceeded"
        assert frame["chunk"]["retry_after"] == pytest.approx(seconds, abs=30)
        assert not ws.closed


async def test_a_month_that_is_spent_is_named_with_its_whole_time(make_server: MakeServer) -> None:
    limits = {"tokens_per_day": 10**6, "tokens_per_week": 2 * 10**6, "tokens_per_month": 3 * 10**6}
    server = await make_server(QUICK, **keys_of("web", **limits))
    assert {name: each.limit for name, each in quota(server).budgets().items()} == limits
    # 2025-12-01, the first moment of a month of 31 days.
    began = 1_764_547_200.0
    spent = Budget(0, 10**6, wall_clock=partial(float, began), per_month=1000)
    spent.reserve(1000).settle(1000)
    quota(server).budget = spent

    status, headers, body = await post(server, "whole")

    assert status == 429
    assert headers["Retry-After"] == str(31 * 86_400)
    assert headers["x-should-retry"] == "false"
    message = json.loads(body)["error"]["message"]
    assert message.startswith("tokens_per_month of this key: limit 1000, used 1000,")
    assert headers["x-ratelimit-limit-tokens"] == "1000000"
    assert headers["x-ratelimit-limit-tokens-month"] == "1000"
    assert headers["x-ratelimit-remaining-tokens-month"] == "0"
    assert headers["x-ratelimit-reset-tokens-month"] == "744h0m0s"
    refusals = server.context.metrics.budget_refusals
    assert {labels: counter.value for labels, counter in refusals.items()} == {
        ("web", "tokens_per_month"): 1
    }


@pytest.mark.parametrize("face", POSTS)
async def test_a_day_that_ends_soon_or_has_begun_says_to_the_second_when_the_next_one_comes(
    make_server: MakeServer, face: str
) -> None:
    server = await make_server(QUICK, **keys_of("web", tokens_per_day=1000))
    # At 23:59:59 of some day, down to its first moment.
    midnight = 20_000 * 86_400.0
    for left in [1, 30, 600, 86_400]:
        spent = Budget(per_day=1000, wall_clock=partial(float, midnight - left))
        spent.reserve(1000).settle(1000)
        quota(server).budget = spent

        status, headers, body = await post(server, face)

        assert status == 429, left
        assert headers["Retry-After"] == str(left), left
        assert headers["retry-after-ms"] == str(1000 * left), left
        assert headers.get("x-should-retry") == ("false" if left > 60 else None), left
        assert f"Please try again in {left}.0s." in json.loads(body)["error"]["message"], left
        async with server.connect(headers=bearer("web")) as ws:
            await ws.send_json(chat("r"))
            (frame,) = await to_end(ws)
            assert frame["chunk"]["retry_after"] == left, left


# What a request says of the length of its answer, and how many tokens its answer reserves at least.
LENGTHS: dict[str, tuple[str, dict[str, Any], int]] = {
    "a bound of another API": ("stream", {"max_output_tokens": 1}, 1000),
    "the largest of several": ("stream", {"max_tokens": 1, "max_completion_tokens": 500}, 500),
    "the same in the other order": (
        "stream",
        {"max_completion_tokens": 1, "max_tokens": 500},
        500,
    ),
    "several choices": ("stream", {"n": 50, "max_tokens": 10}, 500),
    "choices as a text": ("stream", {"n": "50", "max_tokens": 10}, 500),
    "choices as a fraction": ("stream", {"n": 50.0}, 50_000),
    "no bound at all": ("stream", {"max_tokens": None, "n": 2}, 2000),
    "the best of several": ("completions", {"best_of": 5, "n": 2, "max_tokens": 100}, 500),
    "several prompts": ("completions", {"prompt": ["a", "b"] * 20, "max_tokens": 10}, 400),
    "prompts of tokens": ("completions", {"prompt": [[1, 2]] * 40, "max_tokens": 10}, 400),
    "a chat's in completions": ("completions", {"max_completion_tokens": 1}, 1000),
    "a chat's in a response": ("responses", {"max_output_tokens": None, "max_tokens": 1}, 1000),
    "a response's in a message": ("messages", {"max_tokens": 900, "max_output_tokens": 1}, 900),
    "choices in options": ("sse", {"options": {"n": 50, "max_tokens": 10}}, 500),
    "the largest in options": (
        "sse",
        {"options": {"max_tokens": 1, "max_completion_tokens": 500}},
        500,
    ),
}


async def test_a_request_reserves_what_the_api_that_is_asked_allows_it(
    make_server: MakeServer,
) -> None:
    limits = {"tokens_per_minute": 10**6, "tokens_per_day": 10**6}
    server = await make_server(Behaviour(ttft=1e6), **keys_of("web", **limits))
    for number, (length, (face, more, least)) in enumerate(LENGTHS.items()):
        name = {"request_id": f"r{number}"} if face == "sse" else {}
        asked = asyncio.create_task(post(server, face, **more, **name))
        await until(lambda: quota(server).running == 1)

        assert least <= quota(server).budget.reserved < least + 500, length
        if name:
            url = f"{server.sse}/r{number}"
            async with server.session.delete(url, headers=bearer("web")) as response:
                assert response.status == 204
        else:
            asked.cancel()
        await asyncio.wait((asked,))
        await until(lambda: quota(server).budget.reserved == 0)


async def test_an_attached_request_takes_nothing(make_server: MakeServer) -> None:
    server = await make_server(
        ENDLESS, **keys_of("web", tokens_per_minute=10_000, max_concurrent=1)
    )
    async with server.connect(headers=bearer("web")) as ws:
        await ws.send_json(chat("same"))
        await until(lambda: quota(server).running == 1)
        before = quota(server).budget.reserved
        async with server.connect(headers=bearer("web")) as other:
            await other.send_json(chat("same"))
            await other.receive_json(timeout=patience(20))
            assert quota(server).budget.reserved == before > 0
        await ws.send_json({"action": "cancel", "request_id": "same"})
        await to_end(ws)
    await until(lambda: quota(server).budget.reserved == 0)


@pytest.mark.parametrize("status", [400, 500])
async def test_what_fails_costs_nothing(make_server: MakeServer, status: int) -> None:
    server = await make_server(
        Behaviour(fail_rate=1.0, fail_status=status), **keys_of("web", tokens_per_day=10_000)
    )

    for face in ("stream", "whole"):
        await post(server, face)

    await until(lambda: quota(server).running == 0)
    assert quota(server).budgets()["tokens_per_day"].remaining == 10_000
