"""Where conversations are at home, and how long a request waits for its home."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.auth.callers import NO_CALLER
from aioserver.config.settings import Group, Member
from aioserver.gateway import affinity
from aioserver.gateway.affinity import MAX_DIGESTS, Affinity, measured
from aioserver.gateway.groups import READING
from aioserver.gateway.request import Request
from aioserver.provider_errors import ProviderError
from aioserver.providers.attempt import text_bytes
from aioserver.providers.request import CHAT, ProviderRequest
from tests.support.engines import Engine, nothing_is_held
from tests.support.regions import prefix_in
from tests.support.routers import llm_of, router_of
from tests.support.virtual_loop import virtually
from tests.support.waiting import ticks

if TYPE_CHECKING:
    from aioserver.gateway.router import Router
    from aioserver.protocol.prefix import Prefix


def chat(name: str, turns: int = 1, size: int = 4000) -> bytes:
    """The body of turn *turns* of the conversation *name*."""
    messages = []
    for turn in range(turns):
        if turn:
            messages.append({"role": "assistant", "content": f"{name} says {turn}"})
        messages.append({"role": "user", "content": f"{name} {turn} " + "x" * size})
    return json.dumps({"messages": messages}).encode()


def prefix(body: bytes, group: str = "all") -> Prefix:
    return prefix_in(body, group)


def _body(body: bytes, _settings: object, _model: str | None) -> bytes:
    return body


def router_over(
    engines: dict[str, Engine], choose: str = "least_busy", *, alone: bool = True
) -> Router:
    members = tuple(Member(provider=name) for name in engines)
    group = Group(members=members, choose=choose, affinity="prefix")
    return router_of(dict(engines), next(iter(engines)), models={"all": group}, alone=alone)


async def ask(
    router: Router, body: bytes, model: str = "all", homes: Counter[str] | None = None
) -> str:
    """The provider that has answered; *homes* counts whether that was the home."""
    asked = ProviderRequest(CHAT, lambda _settings, _model: body, streamed=False)
    answer = await router.call(
        Request(router.route(model, caller=NO_CALLER), asked, "openai", "r")
    )
    if homes is not None:
        assert answer.outcome.start is not None
        homes[answer.outcome.start.home] += 1
    return answer.outcome.provider


def engines_of(count: int, places: int = 2, **limits: Any) -> dict[str, Engine]:
    return {f"e{n}": Engine(f"e{n}", places, limits=limits) for n in range(count)}


@virtually
async def test_the_turns_of_a_conversation_stay_where_its_first_one_was() -> None:
    engines = engines_of(4)
    router = router_over(engines)
    homes: Counter[str] = Counter()
    for name in "abcdefghij":
        first = await ask(router, chat(name), homes=homes)
        for turn in range(2, 6):
            assert await ask(router, chat(name, turn), homes=homes) == first
    assert homes == {"new": 10, "home": 40}
    assert router.groups["all"].held_back == 0


@virtually
async def test_a_prompt_that_was_read_is_not_searched_for_pictures_again() -> None:
    router = router_over(engines_of(2))
    for text, pictures in (("an image is long in base64", False), ("data:a/b;base64,AA", True)):
        body = chat(text)
        asked = ProviderRequest(CHAT, partial(_body, body), streamed=False)
        assert asked.pictures is None

        await router.call(Request(router.route("all", caller=NO_CALLER), asked, "openai", "r"))

        assert asked.pictures is pictures
        assert text_bytes(body, pictures) == (0 if pictures else len(body))
        assert text_bytes(body, not pictures) == (len(body) if pictures else 0)
        # A search takes the word alone for a picture.
        assert text_bytes(body, None) == 0
    assert text_bytes(b"some text", None) == 9


@virtually
async def test_new_conversations_are_spread_though_they_share_a_system_prompt() -> None:
    engines = engines_of(4)
    router = router_over(engines)
    where: Counter[str] = Counter()
    for number in range(200):
        system = {"role": "system", "content": "s" * 20_000}
        messages = [system, {"role": "user", "content": f"question {number}"}]
        where[await ask(router, json.dumps({"messages": messages}).encode())] += 1
    assert min(where.values()) > 30


@virtually
async def test_all_instances_agree_on_the_home_of_a_conversation() -> None:
    routers = [router_over(engines_of(4), alone=False) for _ in range(3)]
    for name in "abcdefgh":
        assert len({await ask(router, chat(name)) for router in routers}) == 1
        assert len({await ask(router, chat(name, 3)) for router in routers}) == 1


@virtually
@pytest.mark.parametrize("alone", [True, False])
async def test_a_cache_key_keeps_a_conversation_at_home_though_its_beginning_has_changed(
    alone: bool,
) -> None:
    router, moved = router_over(engines_of(4), alone=alone), 0
    for name in "abcdefghijkl":
        named = {"prompt_cache_key": f"session-{name}"}
        bodies = [json.loads(chat(f"{name}{number}", number)) | named for number in (1, 2, 3)]
        where = {await ask(router, json.dumps(body).encode()) for body in bodies}
        assert len(where) == 1
        moved += len({await ask(router, chat(f"{name}{number}", number)) for number in (4, 5)}) > 1

    assert moved > 0


@virtually
async def test_without_a_member_only_its_own_conversations_have_another_home() -> None:
    names = [f"c{number}" for number in range(100)]
    engines = engines_of(4)
    all_four = {name: await ask(router_over(engines), chat(name)) for name in names}
    del engines["e1"]
    router = router_over(engines)
    three = {name: await ask(router, chat(name)) for name in names}

    stayed = {name: home for name, home in all_four.items() if home != "e1"}
    assert {name: three[name] for name in stayed} == stayed
    assert {three[name] for name in all_four.keys() - stayed.keys()} == {"e0", "e2", "e3"}


@virtually
async def test_a_conversation_waits_for_its_home_and_no_longer_than_reading_it_anew_takes() -> (
    None
):
    loop = asyncio.get_running_loop()
    engines = engines_of(2, 1)
    router = router_over(engines)
    home = await ask(router, chat("a"))
    other = next(name for name in engines if name != home)
    size = prefix(chat("a", 2)).size
    delay = affinity.PATIENCE * READING * size

    # The home is busy for a moment that is shorter than reading the prompt elsewhere.
    engines[home].seconds = delay / 2
    busy = asyncio.create_task(ask(router, chat("z"), home))
    await ticks(3)
    began = loop.time()
    assert await ask(router, chat("a", 2)) == home
    assert loop.time() - began == pytest.approx(delay, abs=1e-3)
    assert router.groups["all"].held_back == 1
    await busy

    # And longer.
    engines[home].seconds = 100.0
    busy = asyncio.create_task(ask(router, chat("z"), home))
    await ticks(3)
    began = loop.time()
    assert await ask(router, chat("a", 2)) == other
    assert loop.time() - began == pytest.approx(delay + engines[other].seconds)
    busy.cancel()
    await asyncio.wait([busy])
    nothing_is_held(router)


@virtually
async def test_no_wait_for_a_home_exceeds_a_quarter_of_the_queues_deadline() -> None:
    loop = asyncio.get_running_loop()
    engines = engines_of(2, 1, queue_timeout=8.0)
    router = router_over(engines)
    home = await ask(router, chat("a", size=100_000))
    other = next(name for name in engines if name != home)
    engines[home].seconds = 100.0
    busy = asyncio.create_task(ask(router, chat("z"), home))
    await ticks(3)
    began = loop.time()
    assert await ask(router, chat("a", 2, size=100_000)) == other
    assert loop.time() - began == pytest.approx(2.0 + engines[other].seconds)
    busy.cancel()
    await asyncio.wait([busy])


@virtually
async def test_nobody_waits_for_a_home_that_is_dead_sick_or_cooling() -> None:
    loop = asyncio.get_running_loop()
    engines = engines_of(2, 1)
    router = router_over(engines)
    home = await ask(router, chat("a"))
    other = next(name for name in engines if name != home)
    engines[home].fault = lambda _model: ProviderError("no")
    for number in range(40):
        with pytest.raises(ProviderError):
            await ask(router, chat(f"z{number}"), home)
        if engines[home].health.breaker.dead:
            break
    began = loop.time()
    assert await ask(router, chat("a", 2)) == other
    assert loop.time() - began == pytest.approx(engines[other].seconds)
    # Its cache is empty when it is back: the other one knows the conversation now.
    engines[home].fault = lambda _model: None
    await asyncio.sleep(100)
    assert await ask(router, chat("b"), home) == home
    assert engines[home].health.state != "dead"
    assert await ask(router, chat("a", 3)) == other


@virtually
async def test_a_popular_beginning_does_not_fill_one_engine_while_others_are_idle() -> None:
    engines = engines_of(4, 16)
    for engine in engines.values():
        engine.seconds = 10.0
    router = router_over(engines)
    body = chat("everybody", 3)
    await ask(router, body)
    homes: Counter[str] = Counter()
    tasks = [asyncio.create_task(ask(router, body, homes=homes)) for _ in range(32)]
    where = Counter(await asyncio.gather(*tasks))
    # Twice its share of 32, and two more.
    assert max(where.values()) <= 2 * 8 + 2 + 1
    assert len(where) >= 2
    assert homes["other"] > 0


@virtually
async def test_another_address_or_another_life_has_an_empty_cache() -> None:
    engines = engines_of(2)
    router = router_over(engines)
    home = await ask(router, chat("a"))
    body = prefix(chat("a", 2))
    member = next(each for each in router.groups["all"].members if each.provider.name == home)
    table = Affinity()
    table.sent(body, member)
    members = router.groups["all"].members
    assert table.place(body, members).known[member] > 0

    mark = member.mark
    changed = replace(engines[home].settings, base_url="http://127.0.0.1:10/v1")
    engines[home].prepare(changed, changed.base_url, max_response_bytes=1000)()

    assert table.place(body, members).known[member] == 0
    assert member.mark != mark


@virtually
async def test_a_life_that_ended_between_two_requests_of_a_group_has_ended() -> None:
    engines = engines_of(2)
    router = router_over(engines)
    home = await ask(router, chat("a"))
    # It dies and comes back while nobody asks for the group.
    engines[home].fault = lambda _model: ProviderError("no")
    while not engines[home].health.breaker.dead:
        with pytest.raises(ProviderError):
            await ask(router, chat("z"), home)
    engines[home].fault = lambda _model: None
    await asyncio.sleep(100)
    assert await ask(router, chat("z"), home) == home
    assert not engines[home].health.breaker.dead

    members = router.groups["all"].members
    known = router._affinity.place(prefix(chat("a", 2)), members).known  # noqa: SLF001

    assert not any(known.values())


@virtually
async def test_a_reload_keeps_what_is_known_of_members_that_stay() -> None:
    engines = engines_of(3)
    router = router_over(engines)
    where = {name: await ask(router, chat(name)) for name in "abcdef"}

    llm = llm_of(
        dict(engines),
        "e0",
        models={
            "all": Group(
                members=tuple(Member(provider=name) for name in ("e2", "e0", "e1")),
                choose="weighted",
                affinity="prefix",
            )
        },
    )
    router.apply(dict(engines), llm)

    assert {name: await ask(router, chat(name, 2)) for name in "abcdef"} == where


@virtually
async def test_a_request_may_start_at_a_member_that_came_while_it_waited() -> None:
    engines = engines_of(2, 1)
    router = router_over(engines)
    await ask(router, chat("a"))
    for engine in engines.values():
        engine.seconds = 100.0
    busy = [asyncio.create_task(ask(router, chat("z"), name)) for name in engines]
    await ticks(3)
    asking = asyncio.create_task(ask(router, chat("b", 2)))
    await ticks(3)

    engines["new"] = Engine("new", 1)
    members = tuple(Member(provider=name) for name in engines)
    group = Group(members=members, choose="least_busy", affinity="prefix")
    router.apply(dict(engines), llm_of(dict(engines), "e0", models={"all": group}))

    assert await asking == "new"
    # Nobody else has read its prompt.
    placed = router._affinity.place(prefix(chat("b", 2)), router.groups["all"].members)  # noqa: SLF001
    knowing = [member.provider.name for member, known in placed.known.items() if known]
    assert knowing == ["new"]
    for task in busy:
        task.cancel()
    await asyncio.wait(busy)


@virtually
async def test_no_more_is_remembered_than_the_bound_and_the_least_recent_goes_first() -> None:
    engines = engines_of(1)
    member = router_over(engines).groups["all"].members[0]
    table = Affinity()
    first, last = prefix(chat("first", 3)), prefix(chat("last", 3))
    table.sent(first, member)
    count = 0
    while count < MAX_DIGESTS:
        body = prefix(chat(f"c{count}", 4, size=3000))
        table.sent(body, member)
        count += len(body.digests)
        if count < MAX_DIGESTS // 2:
            table.sent(last, member)
    table.sent(last, member)
    assert len(table._members) == MAX_DIGESTS  # noqa: SLF001
    known = (
        table.place(first, [member]).known[member],
        table.place(last, [member]).known[member],
    )
    assert known == (0, last.lengths[-1])


def test_what_reading_costs_is_learned_within_bounds() -> None:
    assert measured(60e-6, 1.0, 4096) == 60e-6
    assert measured(60e-6, 0.5, 10_000) == pytest.approx(60e-6 + 0.1 * (50e-6 - 60e-6))
    assert measured(1e-3, 1e9, 10_000) == pytest.approx(1e-3)
    reading = 1e-3
    for _ in range(200):
        reading = measured(reading, 0.0, 10_000)
    assert reading == pytest.approx(1e-6)
