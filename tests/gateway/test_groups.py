"""Groups: which member answers, who stands in line where, and what becomes of faults."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from aioserver.auth.callers import NO_CALLER
from aioserver.config import settings
from aioserver.config.settings import Group, Member
from aioserver.errors import ModelNotFound
from aioserver.gateway.request import Request
from aioserver.protocol.request_headers import NO_HEADERS
from aioserver.provider_errors import (
    CircuitOpen,
    ConnectError,
    ContextTooLong,
    NoProvider,
    ProviderError,
    ProviderFault,
    ProviderQueueFull,
    ProviderQueueTimeout,
    ProviderRateLimited,
    ProviderRefused,
)
from aioserver.providers.capacity import MAX_COOLING
from aioserver.providers.passthrough import PassedAttempt, PassedRequest
from aioserver.providers.request import CHAT, ProviderRequest
from tests.support.engines import Engine, nothing_is_held
from tests.support.failing import kill, sicken
from tests.support.routers import llm_of, router_of
from tests.support.scripted_provider import LIMITS
from tests.support.virtual_loop import run_virtually, virtually
from tests.support.waiting import ticks

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.gateway.router import Router
    from aioserver.providers.request import Answer


def group(*members: str | Member, choose: str = "ordered") -> Group:
    made = [
        member if isinstance(member, Member) else Member(provider=member) for member in members
    ]
    return Group(members=tuple(made), choose=choose)


async def ask(router: Router, model: str | None = None, **further: Any) -> Answer:
    """Ask for an answer that is not streamed."""
    return await router.call(request_of(router, model, **further))


def request_of(
    router: Router, model: str | None = None, *, provider: str | None = None, body: bytes = b"{}"
) -> Request:
    asked = ProviderRequest(CHAT, lambda _settings, _model: body, streamed=False)
    return Request(router.route(model, provider, caller=NO_CALLER), asked, "openai", "r")


async def pass_on(router: Router, model: str) -> Answer:
    """Pass a request on, by its model."""
    passed = PassedRequest(
        "POST",
        "audio/speech",
        lambda _settings, model: (model or "").encode(),
        {},
        upload=None,
        caller=NO_CALLER,
        model=None,
        hold=None,
        client_headers=NO_HEADERS,
    )
    route = router.route(model, caller=NO_CALLER)
    return await router.pass_on(Request(route, passed, "openai", "r", make_attempt=PassedAttempt))


async def asking(count: int, router: Router, model: str) -> list[asyncio.Task[Answer]]:
    """So many requests under way."""
    tasks = [asyncio.create_task(ask(router, model)) for _ in range(count)]
    await ticks(3)
    return tasks


def engines(*names: str, **changes: Any) -> dict[str, Engine]:
    return {name: Engine(name, **changes) for name in names}


def router_over(
    providers: dict[str, Engine],
    active: str = "",
    fallbacks: tuple[str, ...] = (),
    models: dict[str, Group] | None = None,
    **more: Group,
) -> Router:
    first, groups = active or next(iter(providers)), {**(models or {}), **more}
    return router_of(dict(providers), first, fallbacks, groups, random_number=lambda: 1.0)


# Where a request goes.


@virtually
async def test_a_name_leads_to_its_group_before_anything_else_knows_it() -> None:
    providers = engines("a", "b", "c")
    router = router_over(
        providers,
        models={
            "fast": group(Member(provider="b", model="small")),
            "smart": group("b", "c"),
            "claude-*": group("c"),
            "claude-opus-*": group("b"),
        },
    )

    def way(model: str | None, provider: str | None = None) -> tuple[str, str | None, bool]:
        route = router.route(model, provider, caller=NO_CALLER)
        return route.provider.name, route.model, route.fallbacks

    assert way("fast") == ("b", "small", False)
    assert way(None, "fast") == ("b", "small", False)
    assert way("smart") == ("b", None, False)
    assert way("claude-sonnet") == ("c", None, False)
    assert way("claude-opus-4") == ("b", None, False)
    assert way("claude-*") == ("c", None, False)
    assert way("b/x") == ("b", "x", False)
    assert way("unknown") == ("a", "unknown", True)
    assert way(None) == ("a", None, True)
    assert router.route("smart", caller=NO_CALLER).group is router.groups["smart"]
    assert not router.route("b", caller=NO_CALLER).group.name


@virtually
async def test_who_lists_a_model_gets_it_and_a_providers_own_model_is_not_enough() -> None:
    providers = {
        "a": Engine("a", models=("both",)),
        "b": Engine("b", models=("both", "theirs")),
        "c": Engine("c", models=("theirs",)),
    }
    router = router_over(providers)

    assert router.route("both", caller=NO_CALLER).provider.name == "a"
    assert router.route("both", caller=NO_CALLER).fallbacks
    theirs = router.route("theirs", caller=NO_CALLER)
    assert (theirs.provider.name, theirs.model, theirs.fallbacks) == ("b", "theirs", False)
    assert theirs.group is not None
    assert theirs.group.name == ""
    # The names that are shown at the start are those that lead there.
    assert llm_of(providers, "a").bare_routes() == {("b", "c"): ["theirs"]}
    # Nobody is paid, and no text leaves, unasked.
    assert router.route("b-model", caller=NO_CALLER).provider.name == "a"

    providers["b"].fault = lambda _model: ProviderError("no")
    answer = await ask(router, "theirs")
    assert (answer.outcome.provider, answer.outcome.model) == ("c", "theirs")


@virtually
async def test_a_model_that_nobody_has_can_be_refused() -> None:
    providers = {"a": Engine("a", models=("large",)), "b": Engine("b", models=("listed",))}
    router = router_of(dict(providers), "a", models={"smart": group("b")}, unknown_models="refuse")
    for known in ("a", "a/anything", "a-model", "large", "listed", "smart", None):
        router.route(known, caller=NO_CALLER)
    with pytest.raises(ModelNotFound, match=r'"smrt" \(did you mean smart\?\)'):
        router.route("smrt", caller=NO_CALLER)
    with pytest.raises(ModelNotFound):
        router.route("b-model", caller=NO_CALLER)


@virtually
async def test_an_active_group_replaces_the_name_and_its_fallbacks_follow() -> None:
    providers = engines("a", "b", "c")
    for name in "ab":
        providers[name].fault = lambda _model: ProviderError("no")
    router = router_over(providers, "both", ("c", "both"), both=group("a", "b"))

    answer = await ask(router, "whatever")

    assert answer.outcome.provider == "c"
    assert [next(zip(*engine.asked, strict=True)) for engine in providers.values()] == [
        ("a-model",),
        ("b-model",),
        ("c-model",),
    ]
    assert (router.active.name, router.fallbacks) == ("a", ["c"])
    nothing_is_held(router)


# One fair queue.


@virtually
async def test_twenty_at_once_use_every_member_and_wait_for_the_first_place() -> None:
    loop = asyncio.get_running_loop()
    providers = engines("a", "b")
    router = router_over(providers, pair=group("a", "b"))
    began = loop.time()

    tasks = await asking(20, router, "pair")
    assert router.groups["pair"].waiting == 18
    assert [engine.stats().queue.waiting for engine in providers.values()] == [18, 18]
    await asyncio.gather(*tasks)

    assert [len(engine.asked) for engine in providers.values()] == [10, 10]
    assert [engine.most for engine in providers.values()] == [1, 1]
    nothing_is_held(router)
    assert loop.time() - began == pytest.approx(10.0)


@virtually
async def test_the_room_of_a_group_is_that_of_its_members_together() -> None:
    providers = engines("a", "b", limits={"queue_size": 2})
    router = router_over(providers, pair=group("a", "b"))
    tasks = await asking(7, router, "pair")

    done = [task for task in tasks if task.done()]
    assert len(done) == 1
    assert isinstance(done[0].exception(), ProviderQueueFull)
    await asyncio.wait(tasks)
    assert sum(task.exception() is None for task in tasks) == 6
    nothing_is_held(router)


@virtually
async def test_ordered_asks_the_first_that_can_start() -> None:
    providers = {"a": Engine("a", 2), "b": Engine("b", 9)}
    router = router_over(providers, pair=group("a", "b"))
    await asyncio.gather(*await asking(5, router, "pair"))
    assert [len(engine.asked) for engine in providers.values()] == [2, 3]


@virtually
async def test_least_busy_asks_where_the_smallest_share_is_taken() -> None:
    providers = {"a": Engine("a", 2), "b": Engine("b", 8)}
    router = router_over(providers, pair=group("a", "b", choose="least_busy"))
    await asyncio.gather(*await asking(5, router, "pair"))
    assert [len(engine.asked) for engine in providers.values()] == [1, 4]

    # One that is free everywhere goes to each in turn.
    for _ in range(6):
        await ask(router, "pair")
    assert [len(engine.asked) for engine in providers.values()] == [4, 7]


@virtually
async def test_starts_follow_the_weights_as_closely_as_places_allow() -> None:
    providers = {"a": Engine("a", 5), "b": Engine("b", 1)}
    weighted = group(
        Member(provider="a", weight=1), Member(provider="b", weight=3), choose="weighted"
    )
    router = router_over(providers, pair=weighted)
    for _ in range(8):
        await ask(router, "pair")
    starts = [len(engine.asked) for engine in providers.values()]
    assert starts == [2, 6]

    # `b` has one place; who finds it taken goes to `a`, and `b` is owed no burst for it.
    await asyncio.gather(*await asking(4, router, "pair"))
    for _ in range(8):
        await ask(router, "pair")
    assert len(providers["a"].asked) - starts[0] in {4, 5, 6}


# Groups that lead to others.


def alias(name: str) -> Group:
    return Group(members=(Member(provider=name),), written=None)


@pytest.mark.parametrize("name", ["pair", "same", "claude-3"])
@virtually
async def test_fallbacks_of_a_group_are_asked_when_it_has_nobody_left(name: str) -> None:
    providers = engines("a", "b", "c", "d", "e")
    pair = replace(group("a", "b", choose="least_busy"), fallbacks=("next", "e"))
    router = router_over(
        providers,
        "e",
        models={
            "same": alias("pair"),
            "claude-*": alias("same"),
            "pair": pair,
            "next": replace(group("c"), fallbacks=("d",)),
        },
    )
    no: Callable[[str], ProviderFault] = lambda _model: ProviderError("no")  # noqa: E731
    for failing in "abcd":
        providers[failing].fault = no

    answer = await ask(router, name)

    assert (answer.outcome.provider, answer.outcome.attempts) == ("e", 5)
    times = [engine.asked[0][1] for engine in providers.values()]
    # The first two are those of the least busy group.
    assert [time - min(times) for time in (*sorted(times[:2]), *times[2:])] == [0, 1, 2, 3, 4]
    assert [engine.asked[0][0] for engine in providers.values()] == [
        f"{each}-model" for each in providers
    ]
    # Embeddings go to no other model.
    pinned = request_of(router, name)
    pinned.route.pinned = True
    with pytest.raises(ProviderFault):
        await router.call(pinned)
    nothing_is_held(router)


@virtually
async def test_a_full_group_waits_for_its_own_members_and_not_for_its_fallbacks() -> None:
    providers = engines("a", "b")
    router = router_over(providers, one=replace(group("a"), fallbacks=("b",)))
    await asyncio.gather(*await asking(3, router, "one"))
    assert [len(engine.asked) for engine in providers.values()] == [3, 0]


@virtually
async def test_a_group_that_is_off_is_its_fallback() -> None:
    providers = engines("b", "c") | {"a": Engine("a", api_key_env="NOT_SET")}
    router = router_over(
        providers,
        "off",
        ("c",),
        off=replace(group("a"), fallbacks=("more", "b")),
        more=group(Member(provider="b", model="large"), "c"),
    )
    assert (router.active.name, router.usable, router.fallbacks) == (
        "b",
        True,
        ["more", "b", "c"],
    )
    for model in (None, "off", "unknown"):
        answer = await ask(router, model)
        assert (answer.outcome.provider, answer.outcome.model) == ("b", "large")
    passed = await pass_on(router, "off")
    assert passed.outcome.model == "large"


@pytest.mark.parametrize("choose", ["least_busy", "weighted"])
@virtually
async def test_a_group_in_an_ordered_one_chooses_among_its_own_members(choose: str) -> None:
    providers = {"a": Engine("a", 2), "b": Engine("b", 2), "paid": Engine("paid", 9)}
    router = router_over(
        providers, smart=group("pair", "paid"), pair=group("a", "b", choose=choose)
    )
    for model in ("smart", "pair") * 3:
        await ask(router, model)
    assert [len(engine.asked) for engine in providers.values()] == [3, 3, 0]

    # Those behind it are asked where it has no place.
    await asyncio.gather(*await asking(6, router, "smart"))
    assert [len(engine.asked) for engine in providers.values()] == [5, 5, 2]

    providers["a"].fault = providers["b"].fault = lambda _model: ProviderError("no")
    assert (await ask(router, "smart")).outcome.attempts == 3
    nothing_is_held(router)


@pytest.mark.parametrize("names", [("b", "a"), ("a", "b")])
@virtually
async def test_a_sick_member_in_an_inner_group_has_its_trials(names: tuple[str, str]) -> None:
    providers = engines("a", "b", "paid")
    pair = group(*names, choose="least_busy")
    router = router_over(providers, smart=group("pair", "paid"), pair=pair)
    sicken(providers["b"].health.breaker, asyncio.get_running_loop().time)
    for _ in range(60):
        await ask(router, "smart")
    assert not providers["b"].health.breaker.sick
    assert len(providers["b"].asked) > 10
    assert not providers["paid"].asked


@virtually
async def test_a_reload_changes_a_group_wherever_it_stands() -> None:
    providers = engines("a", "b", "c")
    models = {"same": alias("smart"), "smart": group("inner"), "inner": group("a")}
    router = router_over(providers, models=models)
    tasks = await asking(4, router, "same")

    change(router, providers, models | {"inner": group("a", "b")})
    await ticks(3)
    assert [len(engine.asked) for engine in providers.values()] == [1, 1, 0]
    change(router, providers, models | {"same": group("c")})
    assert (await ask(router, "same")).outcome.provider == "c"
    await asyncio.gather(*tasks)
    nothing_is_held(router)


# Members that fail.


@virtually
async def test_a_fault_leads_to_the_next_member_at_once() -> None:
    loop = asyncio.get_running_loop()
    providers = engines("a", "b", limits={"max_retries": 3})
    providers["a"].fault = lambda _model: ProviderError("no", retry_after=9.0)
    router = router_over(providers, pair=group("a", "b"))
    began = loop.time()

    answer = await ask(router, "pair")

    assert answer.outcome.provider == "b"
    assert answer.outcome.attempts == 2
    assert providers["a"].meter.failovers["provider_error"].value == 1
    nothing_is_held(router)
    assert loop.time() - began == pytest.approx(2.0)


@virtually
async def test_only_when_every_member_has_failed_a_backoff_begins() -> None:
    loop = asyncio.get_running_loop()
    providers = engines("a", "b", limits={"max_retries": 2, "backoff_factor": 1.0})
    providers["a"].fault = lambda _model: ProviderError("no")
    # A refusal of our key is not asked again.
    providers["b"].fault = lambda _model: ProviderError("no")
    router = router_over(providers, pair=group("a", "b"))
    began = loop.time()

    with pytest.raises(ProviderError) as caught:
        await ask(router, "pair")

    assert caught.value.request_outcome is not None
    assert caught.value.request_outcome.attempts == 6
    times = [[when - began for _, when in engine.asked] for engine in providers.values()]
    # 1 s for each attempt, and backoffs of 1 and 2 s.
    assert times == [pytest.approx([0, 3, 7]), pytest.approx([1, 4, 8])]
    nothing_is_held(router)


@virtually
async def test_a_retry_counts_where_it_was_allowed_and_by_the_fault_that_allowed_it() -> None:
    """The last fault of a round may be one that allows none."""
    providers = {
        "a": Engine("a", limits={"max_retries": 1}),
        "b": Engine("b", limits={"queue_timeout": 0.5}),
    }
    providers["a"].fault = lambda _model: ProviderError("no")
    providers["b"].seconds = 100.0
    router = router_over(providers, pair=group("a", "b"))
    busy = await asking(1, router, "b")

    with pytest.raises(ProviderFault):
        await ask(router, "pair")

    assert len(providers["a"].asked) == 2
    assert providers["a"].meter.retries["provider_error"].value == 1
    busy[0].cancel()
    await asyncio.wait(busy)
    nothing_is_held(router)


@virtually
async def test_a_request_that_is_refused_for_what_it_is_goes_to_nobody_else() -> None:
    providers = engines("a", "b")
    providers["a"].fault = lambda _model: ProviderRefused("bad request", 400, b"")
    router = router_over(providers, pair=group("a", "b"))
    with pytest.raises(ProviderRefused):
        await ask(router, "pair")
    assert providers["b"].asked == []
    nothing_is_held(router)


@virtually
async def test_a_member_that_cools_is_left_out_and_the_others_go_on() -> None:
    loop = asyncio.get_running_loop()
    providers = engines("a", "b")
    providers["a"].fault = lambda _model: ProviderRateLimited("slow down", retry_after=20.0)
    router = router_over(providers, pair=group("a", "b"))
    await ask(router, "pair")
    providers["a"].fault = lambda _model: None

    for _ in range(5):
        await ask(router, "pair")
    assert [len(engine.asked) for engine in providers.values()] == [1, 6]

    # While all cool, a request waits in line for the first that is back.
    providers["b"].fault = lambda _model: ProviderRateLimited("slow down", retry_after=30.0)
    answer = await ask(router, "pair")
    assert answer.outcome.provider == "a"
    # A second until `a` had refused, 20 more and some jitter, and one for the answer.
    assert 22 <= loop.time() - providers["a"].asked[0][1] < 24


@virtually
async def test_a_member_whose_day_is_spent_is_tried_again_every_two_minutes() -> None:
    loop = asyncio.get_running_loop()
    providers = engines("a", "b")
    providers["a"].fault = lambda _model: ProviderRateLimited("spent", retry_after=86_400.0)
    router = router_over(providers, pair=group("a", "b"))
    end = loop.time() + 3600

    while loop.time() < end:
        assert (await ask(router, "pair")).outcome.provider == "b"
        await asyncio.sleep(1.0)
    asked = [moment for _, moment, *_ in providers["a"].asked]
    pauses = [later - earlier for earlier, later in itertools.pairwise(asked)]

    # As often as is needed to learn within minutes that the account has more again.
    assert len(pauses) >= 3600 / (1.1 * MAX_COOLING + 5) - 1
    assert min(pauses) >= MAX_COOLING
    nothing_is_held(router)


@virtually
async def test_one_whose_time_ends_before_the_first_is_back_is_refused_at_once() -> None:
    loop = asyncio.get_running_loop()
    providers = engines("a", "b", limits={"queue_timeout": 5.0})
    router = router_over(providers, pair=group("a", "b"))
    for name, seconds in (("a", 40.0), ("b", 20.0)):
        providers[name].fault = lambda _model, seconds=seconds: ProviderRateLimited(  # type: ignore[misc]
            "slow down", retry_after=seconds
        )
    with pytest.raises(ProviderRateLimited):
        await ask(router, "pair")
    began = loop.time()

    with pytest.raises(ProviderRateLimited) as caught:
        await ask(router, "pair")

    assert loop.time() == began
    assert caught.value.retry_after is not None
    assert 20 <= caught.value.retry_after < 24
    nothing_is_held(router)


@virtually
async def test_dead_members_are_out_but_for_trials() -> None:
    providers = engines("a", "b")
    providers["a"].fault = lambda _model: ProviderError("no")
    router = router_over(providers, pair=group("a", "b"))
    for _ in range(40):
        await ask(router, "pair")
    assert providers["a"].health.state == "dead"
    asked = len(providers["a"].asked)

    for _ in range(20):
        answer = await ask(router, "pair")
        assert answer.outcome.provider == "b"
    assert len(providers["a"].asked) - asked <= 4

    providers["a"].fault = lambda _model: None
    await asyncio.sleep(60)
    for _ in range(3):
        await ask(router, "pair")
    assert providers["a"].health.state == "well"


@virtually
async def test_the_waiting_of_a_member_that_dies_go_on_in_the_other_lines() -> None:
    providers = engines("a", "b")
    router = router_over(providers, pair=group("a", "b"))
    providers["a"].fault = lambda _model: ProviderError("no")
    tasks = await asking(12, router, "pair")
    await asyncio.wait(tasks)
    assert all(task.exception() is None for task in tasks)
    nothing_is_held(router)


@virtually
async def test_the_waiting_of_a_member_that_dies_start_elsewhere_in_the_order_of_their_arrival() -> (
    None
):
    """Twenty conversations, each with a home, of which one dies."""
    loop = asyncio.get_running_loop()
    limits = {"queue_size": 40, "queue_timeout": 300.0}
    providers = {name: Engine(name, places=2, limits={**limits}) for name in ("a", "b")}
    for engine in providers.values():
        engine.seconds = 2.0
    router = router_over(
        providers, both=replace(group("a", "b", choose="least_busy"), affinity="prefix")
    )

    def turn(number: int, turns: int) -> bytes:
        said = [
            {"role": "user" if at % 2 == 0 else "assistant", "content": f"{number}" * 9000}
            for at in range(2 * turns - 1)
        ]
        return orjson.dumps({"model": "both", "messages": said})

    for number in range(20):
        await ask(router, "both", body=turn(number, 1))
    waits: dict[int, float] = {}

    async def go_on(number: int) -> None:
        came = loop.time()
        await ask(router, "both", body=turn(number, 2))
        waits[number] = loop.time() - came

    def refuse(_model: str) -> ProviderFault:
        return ConnectError("it is away")

    tasks = []
    for number in range(20):
        tasks.append(asyncio.create_task(go_on(number)))
        await asyncio.sleep(0.05)
    at_home = providers["a"].stats().queue.waiting
    assert at_home > 5, "some have their home where it dies"
    providers["a"].fault, providers["a"].seconds = refuse, 0.0
    await asyncio.sleep(2.0)
    kill(providers["a"].health.breaker, clock=loop.time)
    providers["a"].capacity.refuse(providers["a"].health.refusal)
    began_early = set(waits)
    await asyncio.gather(*tasks)

    waited = [waits[number] for number in range(20) if number not in began_early]
    assert len(waited) > 12
    for number, wait in enumerate(waited):
        assert wait <= 2 * min(waited[number:]), (number, waited)
    nothing_is_held(router)


@virtually
async def test_all_dead_is_said_with_the_fault_that_killed_the_last() -> None:
    providers = engines("a", "b")
    for engine in providers.values():
        engine.fault = lambda _model: ProviderError("no")
    router = router_over(providers, pair=group("a", "b"))
    for _ in range(40):
        with pytest.raises(ProviderFault):
            await ask(router, "pair")
    with pytest.raises(CircuitOpen) as caught:
        await ask(router, "pair")
    assert (caught.value.retry_after or 0) >= 1
    nothing_is_held(router)


def test_leaving_loses_no_place_wherever_it_happens() -> None:
    async def scene(seed: int) -> None:
        dice = random.Random(seed)
        providers = engines("a", "b", "c", limits={"queue_timeout": 3.0})
        for engine in providers.values():
            engine.fault = lambda _model: ProviderError("no") if dice.random() < 0.2 else None
        router = router_over(
            providers,
            pair=group("a", "b", choose="least_busy"),
            all=group("c", "a", "b"),
            weighted=group(
                Member(provider="b", weight=2), Member(provider="c", weight=5), choose="weighted"
            ),
        )
        outcomes: Counter[str] = Counter()

        async def client() -> None:
            model = dice.choice(["pair", "all", "weighted", "a", "b", "c"])
            try:
                async with asyncio.timeout(dice.expovariate(0.3)):
                    await ask(router, model)
            except (ProviderFault, TimeoutError) as fault:
                outcomes[type(fault).__name__] += 1
            else:
                outcomes["answered"] += 1

        async with asyncio.TaskGroup() as clients:
            for _ in range(200):
                clients.create_task(client())
                await asyncio.sleep(dice.expovariate(4))
                for engine in providers.values():
                    stats = engine.stats().queue
                    assert stats.inside <= 1
                    free = stats.inside < stats.limit and engine.health.available
                    assert not (free and stats.waiting), "a place is free, and requests wait"
        assert outcomes["answered"] > 50
        assert all(engine.most == 1 for engine in providers.values())
        nothing_is_held(router)

    for seed in range(8):
        run_virtually(scene(seed))


# What a group is asked for.


@virtually
async def test_a_prompt_that_is_certainly_too_long_is_not_sent_to_a_smaller_member() -> None:
    providers = engines("a", "b", "c")
    router = router_over(
        providers,
        some=group(
            Member(provider="a", max_context=100),
            Member(provider="b", max_context=1000),
            Member(provider="c", max_context=500),
        ),
    )
    # 4 bytes a token, and an estimate that may be wrong by half.
    for size, expected in ((600, "a"), (601, "b"), (6001, "b"), (100_000, "b")):
        answer = await ask(router, "some", body=b"x" * size)
        assert answer.outcome.provider == expected


def too_long(name: str) -> Callable[[str], ProviderFault]:
    return lambda _model: ContextTooLong(f"{name} answered 400", 400, name.encode())


@virtually
async def test_what_is_too_long_for_one_goes_to_those_that_take_more() -> None:
    providers = engines("a", "b", "c", "d", "e")
    for name in "abcd":
        providers[name].fault = too_long(name)
    router = router_over(
        providers,
        some=group(
            Member(provider="a", max_context=500),
            Member(provider="b", max_context=100),
            Member(provider="c", max_context=900),
            Member(provider="d", max_context=900),
            Member(provider="e"),
        ),
    )

    answer = await ask(router, "some")

    assert (answer.outcome.provider, answer.outcome.attempts) == ("e", 3)
    asked = {name: len(engine.asked) for name, engine in providers.items()}
    assert asked == {"a": 1, "b": 0, "c": 1, "d": 0, "e": 1}
    assert providers["a"].meter.failovers["provider_error"].value == 1

    # Nobody is known to take more than one of which nothing is known.
    providers["e"].fault = too_long("e")
    with pytest.raises(ContextTooLong) as caught:
        await ask(router, "some")
    assert caught.value.body() == b"a"
    assert caught.value.request_outcome is not None
    assert caught.value.request_outcome.provider == "a"
    assert caught.value.request_outcome.attempts == 3
    nothing_is_held(router)


@pytest.mark.parametrize("known", ["small", "large", "both", "none"])
@virtually
async def test_what_is_too_long_for_one_of_unknown_size_goes_to_one_that_may_take_it(
    known: str,
) -> None:
    providers = engines("small", "large")
    providers["small"].fault = too_long("small")
    sizes = {"small": 400, "large": 20_000}
    members = [
        Member(provider=name, max_context=size if known in {name, "both"} else None)
        for name, size in sizes.items()
    ]
    router = router_over(providers, some=group(*members))

    # Some 500 tokens by the estimate: it may be that wrong.
    answer = await ask(router, "some", body=b"x" * 2000)

    assert (answer.outcome.provider, answer.outcome.attempts) == ("large", 2)
    nothing_is_held(router)


@pytest.mark.parametrize("first", ["a", "b"])
@virtually
async def test_one_that_takes_no_more_is_not_asked_again_either(first: str) -> None:
    """The small one has failed in another way, and may be tried again; or the large one has."""
    providers = engines("a", "b", limits={"max_retries": 2})
    providers["a"].fault = providers["b"].fault = lambda _model: ProviderError("no")
    providers[first].fault = too_long(first)
    other = "b" if first == "a" else "a"
    router = router_over(
        providers,
        some=group(
            Member(provider=other, max_context=100),
            Member(provider=first, max_context=200),
        ),
    )
    with pytest.raises(ContextTooLong) as caught:
        await ask(router, "some")
    assert caught.value.body() == first.encode()
    assert [len(engine.asked) for engine in providers.values()] == [1, 1]

    large = group(Member(provider=first, max_context=100), Member(provider=other, max_context=200))
    router = router_over(providers, some=large)
    with pytest.raises(ContextTooLong) as caught:
        await ask(router, "some")
    assert caught.value.body() == first.encode()
    assert len(providers[first].asked) == 2
    assert len(providers[other].asked) == 4
    nothing_is_held(router)


@virtually
async def test_what_is_too_long_goes_to_the_fallbacks_that_may_take_more() -> None:
    providers = engines("a", "b", "c", "d")
    for name in "ab":
        providers[name].fault = too_long(name)
    router = router_over(
        providers,
        "pair",
        ("b", "small", "one", "large"),
        pair=group(Member(provider="a", max_context=500), "b"),
        small=group(Member(provider="c", max_context=400), Member(provider="d", max_context=500)),
        one=group(Member(provider="c", max_context=500)),
        large=group(Member(provider="c", max_context=500), Member(provider="d", max_context=501)),
    )

    answer = await ask(router)

    assert (answer.outcome.provider, answer.outcome.attempts) == ("d", 4)
    assert [len(engine.asked) for engine in providers.values()] == [1, 2, 0, 1]

    providers["d"].fault = lambda _model: ProviderError("no")
    with pytest.raises(ContextTooLong) as caught:
        await ask(router)
    assert caught.value.body() == b"a"
    nothing_is_held(router)


@virtually
async def test_a_pinned_model_is_asked_of_the_members_that_have_it() -> None:
    providers = engines("a", "b", "c")
    router = router_over(
        providers,
        vectors=group(
            Member(provider="a", model="e1"),
            Member(provider="b", model="e2"),
            Member(provider="c", model="e1"),
        ),
    )
    providers["a"].fault = lambda _model: ProviderError("no")
    request = request_of(router, "vectors")
    request.route.pinned = True

    answer = await router.call(request)

    assert (answer.outcome.provider, answer.outcome.model) == ("c", "e1")
    assert providers["b"].asked == []


@virtually
async def test_one_provider_may_be_two_members_with_two_models() -> None:
    providers = {"a": Engine("a", 4)}
    providers["a"].fault = lambda model: ProviderError("no") if model == "large" else None
    router = router_over(
        providers,
        sizes=group(Member(provider="a", model="large"), Member(provider="a", model="small")),
    )
    answer = await ask(router, "sizes")
    assert [model for model, _ in providers["a"].asked] == ["large", "small"]
    assert answer.outcome.model == "small"
    providers["a"].fault = lambda _model: None
    # Full, it stands in that line once for each.
    before = len(providers["a"].asked)
    tasks = await asking(6, router, "sizes")
    answers = await asyncio.gather(*tasks)
    assert len(providers["a"].asked) - before == 6
    assert Counter(answer.outcome.model for answer in answers) == Counter(
        model for model, _ in providers["a"].asked[before:]
    )
    nothing_is_held(router)


@virtually
async def test_a_request_that_is_passed_on_waits_for_the_first_member_too() -> None:
    loop = asyncio.get_running_loop()
    providers = engines("a", "b")
    providers["a"].seconds, providers["b"].seconds = 5.0, 2.0
    router = router_over(providers, pair=group("a", "b"))
    tasks = await asking(2, router, "pair")
    began = loop.time()
    answer = await pass_on(router, "pair")

    assert (answer.outcome.provider, answer.outcome.model) == ("b", "b-model")
    assert loop.time() - began == pytest.approx(4.0)
    await asyncio.gather(*tasks)
    nothing_is_held(router)


# A reload.


@virtually
async def test_new_settings_keep_the_counts_of_members_that_stay() -> None:
    providers = engines("a", "b", "c")
    router = router_over(providers, pair=group("a", "b"))
    for _ in range(3):
        await ask(router, "pair")
    pair = router.groups["pair"]

    llm = llm_of(dict(providers), "a", models={"pair": group("c", "a"), "new": group("b")})
    router.apply(dict(providers), llm)

    assert router.groups["pair"] is pair
    assert [(one.provider.name, one.starts) for one in pair.members] == [("c", 0), ("a", 3)]
    assert (await ask(router, "pair")).outcome.provider == "c"
    assert (await ask(router, "new")).outcome.provider == "b"


def change(router: Router, providers: dict[str, Engine], models: dict[str, Group]) -> None:
    """Reload: these providers and groups are all that there are."""
    for name, provider in router.providers.items():
        if name not in providers:
            provider.remove()
    first = next(iter(providers))
    router.apply(dict(providers), llm_of(dict(providers), first, models=models))


@virtually
async def test_who_waits_stands_in_the_line_of_a_new_member_at_once() -> None:
    loop = asyncio.get_running_loop()
    providers = engines("a", "b", "c")
    providers["a"].seconds = providers["b"].seconds = 100.0
    router = router_over(providers, pair=group("a", "b"))
    tasks = await asking(5, router, "pair")
    busy = await asking(1, router, "c")
    waiting, began = tasks[2:], loop.time()

    change(router, providers, {"pair": group("a", "b", "c")})

    assert router.groups["pair"].waiting == 3
    assert [engine.stats().queue.waiting for engine in providers.values()] == [3, 3, 3]
    answers = await asyncio.gather(*waiting)
    assert {answer.outcome.provider for answer in answers} == {"c"}
    assert loop.time() - began == pytest.approx(4.0)
    for task in tasks:
        task.cancel()
    await asyncio.wait([*tasks, *busy])
    nothing_is_held(router)


@virtually
async def test_a_new_member_with_a_free_place_starts_who_waits_longest() -> None:
    providers = engines("a", "b", limits={"queue_timeout": 30.0})
    providers["a"].seconds = 100.0
    router = router_over(providers, pair=group("a"))
    # A group of one, to which another member comes.
    tasks = await asking(4, router, "pair")

    change(router, providers, {"pair": group("a", "b")})

    assert providers["b"].stats().queue.inside == 1
    answers = await asyncio.gather(*tasks[1:])
    assert [answer.outcome.provider for answer in answers] == ["b"] * 3
    first = providers["a"].asked[0][1]
    assert [when - first for _, when in providers["b"].asked] == pytest.approx([0, 1, 2])
    tasks[0].cancel()
    await asyncio.wait(tasks)
    nothing_is_held(router)


@pytest.mark.parametrize("how", ["the provider", "the member"])
@virtually
async def test_whose_lines_are_all_removed_are_asked_of_the_group_as_it_is_now(how: str) -> None:
    providers = engines("a", "b", "c", "d")
    for engine in providers.values():
        engine.seconds = 10.0
    router = router_over(providers, pair=group("a", "b"))
    tasks = await asking(5, router, "pair")
    direct = await asking(2, router, "c")

    left = {
        name: engine for name, engine in providers.items() if how == "the member" or name in "cd"
    }
    change(router, left, {"pair": group("d", "c")})

    assert providers["a"].stats().queue.waiting == 0
    assert providers["b"].stats().queue.waiting == 0
    answers = await asyncio.gather(*tasks, *direct)
    # Two have started before the change.
    asked = Counter(answer.outcome.provider for answer in answers[:5])
    assert asked["a"] == asked["b"] == 1
    assert asked["c"] + asked["d"] == 3
    nothing_is_held(router)


@virtually
async def test_who_comes_to_a_member_that_cools_waits_for_it() -> None:
    """The new one is not asked at the moment, so that the old line was the last one."""
    providers = engines("a", "b", "c")
    providers["a"].seconds = providers["b"].seconds = 100.0
    providers["c"].fault = lambda _model: ProviderRateLimited("slow down", retry_after=20.0)
    router = router_over(providers, pair=group("a", "b"))
    with pytest.raises(ProviderRateLimited):
        await ask(router, "c")
    providers["c"].fault = lambda _model: None
    tasks = await asking(3, router, "pair")

    change(router, providers, {"pair": group("c")})

    answer = await tasks[2]
    assert answer.outcome.provider == "c"
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    nothing_is_held(router)


@virtually
async def test_only_a_group_without_a_usable_member_refuses_who_waits() -> None:
    providers = engines("a", "b", "c")
    router = router_over(providers, pair=group("a", "b"))
    tasks = await asking(4, router, "pair")
    key = settings.Provider(
        name="c", base_url="http://127.0.0.1:9/v1", model="c-model", http_client=LIMITS
    )
    providers["c"].settings = replace(key, api_key_env="MISSING", api_key=None)
    assert not providers["c"].settings.usable

    change(router, providers, {"pair": group("c")})

    for task in tasks[2:]:
        with pytest.raises(NoProvider):
            await task
    assert [task.exception() for task in (await asyncio.wait(tasks[:2]))[0]] == [None, None]
    nothing_is_held(router)


@virtually
async def test_a_request_that_fails_is_asked_of_the_members_of_now() -> None:
    providers = engines("a", "b", "c", limits={"max_retries": 1, "backoff_factor": 10.0})
    for name in "ab":
        providers[name].fault = lambda _model: ProviderError("no")
    router = router_over(providers, pair=group("a", "b"))
    under_way, resting = await asking(1, router, "pair"), await asking(1, router, "pair")
    await asyncio.sleep(1.5)

    change(router, providers, {"pair": group("a", "c")})
    answers = await asyncio.gather(*under_way, *resting)

    assert [answer.outcome.provider for answer in answers] == ["c", "c"]
    nothing_is_held(router)


@virtually
async def test_a_member_that_has_failed_and_left_is_not_asked_again() -> None:
    providers = engines("a", "b", limits={"max_retries": 2, "backoff_factor": 1.0})
    for engine in providers.values():
        engine.fault = lambda _model: ProviderError("no")
    router = router_over(providers, pair=group("a", "b"))
    (asked,) = await asking(1, router, "pair")
    # The first has failed, and the second is asked.
    await asyncio.sleep(1.5)

    change(router, providers, {"pair": group("b")})

    with pytest.raises(ProviderError):
        await asked
    assert [len(engine.asked) for engine in providers.values()] == [1, 3]
    nothing_is_held(router)


@virtually
async def test_a_member_that_left_in_the_wait_for_a_permit_is_asked_no_more() -> None:
    providers = engines("a", "b")
    providers["a"].seconds, providers["b"].seconds = 5.0, 2.0
    router = router_over(providers, pair=group("a", "b"))

    def in_background(model: str) -> asyncio.Task[Answer]:
        request = request_of(router, model)
        request.provider_request.background = True
        return asyncio.create_task(router.call(request))

    busy = [in_background("a"), in_background("b")]
    await ticks(3)
    # It gets the place of the second, which one in the background then has a permit for.
    busy += await asking(1, router, "b")
    waiting = in_background("pair")
    await asyncio.sleep(1.0)
    providers["b"].seconds = 10.0

    change(router, providers, {"pair": group("b")})

    assert (await waiting).outcome.provider == "b"
    assert len(providers["a"].asked) == 1
    await asyncio.gather(*busy)
    nothing_is_held(router)


@virtually
async def test_another_weight_and_choice_hold_from_the_next_start() -> None:
    providers = {"a": Engine("a", 9), "b": Engine("b", 9)}

    def weighted(a: int, b: int) -> Group:
        return group(
            Member(provider="a", weight=a), Member(provider="b", weight=b), choose="weighted"
        )

    router = router_over(providers, pair=weighted(1, 1))
    for _ in range(4):
        await ask(router, "pair")
    change(router, providers, {"pair": weighted(1, 3)})
    for _ in range(8):
        await ask(router, "pair")
    assert [len(engine.asked) for engine in providers.values()] == [4, 8]
    change(router, providers, {"pair": group("b", "a")})
    for _ in range(3):
        await ask(router, "pair")
    assert [len(engine.asked) for engine in providers.values()] == [4, 11]


@virtually
async def test_what_is_passed_on_follows_its_group_too() -> None:
    providers = engines("a", "b", "c", "d")
    router = router_over(providers, pair=group("a", "b"))
    for name in "ab":
        providers[name].seconds = 100.0
    tasks = await asking(2, router, "pair")
    passed = [asyncio.create_task(pass_on(router, "pair")) for _ in range(2)]
    await ticks(3)
    assert router.groups["pair"].waiting == 2

    change(router, providers, {"pair": group("c", "d")})

    answers = await asyncio.gather(*passed)
    assert {answer.outcome.provider for answer in answers} == {"c", "d"}
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    nothing_is_held(router)


@virtually
async def test_a_wait_ends_at_its_time_in_all_lines() -> None:
    loop = asyncio.get_running_loop()
    providers = {
        "a": Engine("a", limits={"queue_timeout": 2.0}),
        "b": Engine("b", limits={"queue_timeout": 4.0}),
    }
    for engine in providers.values():
        engine.seconds = 100.0
    router = router_over(providers, pair=group("a", "b"))
    tasks = await asking(2, router, "pair")
    began = loop.time()

    with pytest.raises(ProviderQueueTimeout):
        await ask(router, "pair")

    assert loop.time() - began == pytest.approx(4.0)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    nothing_is_held(router)
