"""What a request has taken is given back, whatever fails after that: each call of each section
that takes something raises once.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import gc
import re
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from aioserver.providers.breaker import TURN
from tests.support.chat import CHAT, STREAMED, chat, to_end
from tests.support.failing import sicken
from tests.support.injected_bug import Function, bug_at, calls_of
from tests.support.keys import bearer, keys_of
from tests.support.package import MODULES
from tests.support.server import CONCURRENCY, SIM_HTTP_CLIENT, MakeServer, provider_entry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.server import RunningServer

# What takes a place, a connection, a key's count, a hold of bytes, a log, or a trial.
TAKES = re.compile(
    r"(\btry_enter|(gate|resource|slots|within)\.try_start|\bresource\.start"
    r"|_?scheduler\.(enter|granted|join|suspend|wait)|\b_take_slot"
    r"|(starts|rate|pace)\.try_(take|start)|admission\.(wait|connect|hold)"
    r"|quota\.(take|begin|connect|granted|used)|budget\.reserve|_?(minute|day)\.reserve"
    r"|request\.(begin|granted)|run_in_background|loan\.(lend|regain)"
    r"|_streams\.(open|open_mirror|hold)|pool\.(take|connect)|_connections\.(take|open_one)"
    r"|_connector\.connect|breaker\.start(_spared)?|_?group\.trial|\bSocketPlace|\bvisit\.enter"
    r"|_make_hold|responses\.hold|gateway\.hold|\b_place\.enter"
    r"|^enter|^granted|candidates\.start|self\._start_first|self\._provider\.run)$"
)
COUNTS = re.compile(
    r"\b(inside|running|connections\.value|connections|_trials|_pending|_opening|body_bytes|refused_closing|_?reserved|lent)$"
)
# Each function of the package that takes something, as the road of a request has them.
SECTIONS = {
    Function(*entry.split(" "))
    for entry in """
faces.admission Admission.connect
faces.admission BodyHold.grow
faces.admission Admission.try_enter
faces.admission Admission.wait
faces.admission counted.handler
faces.client_messages ClientMessages._read_head
faces.openai write_answer
faces.session _key_in_body
faces.socket Socket.give_way
faces.socket Socket.refused
faces.upgrade SocketPlace.__enter__
wings.responses.stored_face write
wings.responses.socket ResponsesSocket._prepare
faces.upgrade serve
wings.responses.draft Draft.take_input
gateway.gateway Gateway._begin
gateway.gateway Gateway._begin_at_key
gateway.gateway Gateway.hold
wings.responses.stored StoredResponses.hold
wings.responses.stored StoredResponses.make
faces.admission Visit.lend
faces.admission Visit.regain
gateway.request Request._regain
limits.resource Places.take
limits.resource Resource.try_start
limits.scheduler Scheduler._come
limits.scheduler Scheduler.enter
limits.quota Quota.take
limits.quota KeyRate.try_take
limits.quota Quota.connect
limits.resource Resource.start
limits.scheduler Scheduler._wait
limits.scheduler Scheduler._withdraw
limits.scheduler Scheduler.join
limits.scheduler Scheduler.suspend
limits.budget Budget.reserve
limits.budget Reservation.take
limits.budget _Day.reserve
limits.budget _Minute.reserve
gateway.request Request.begin
faces.admission Visit._come_back
gateway.attempts Attempts._go_on
gateway.attempts Attempts._start
gateway.calls Calls.answer
gateway.candidates Candidates._start_first
gateway.candidates Candidates._wait
gateway.candidates Candidates.start
gateway.gateway _once_granted.wait
gateway.request Request.granted
limits.quota Quota._connecting
limits.quota Quota.count
limits.quota Quota.granted
limits.scheduler Scheduler._start
providers.capacity ProviderRate.try_take
providers.pace Pace.try_start
providers.provider Provider.join
providers.provider enter
providers.provider granted
providers.breaker Breaker.start
providers.breaker Breaker.start_spared
providers.connections Connections.open_one
providers.connections Connections.take
providers.pool Pool._wait
providers.pool Pool.connect
providers.provider Provider.run
gateway.groups Group.trial
gateway.router Router.pass_on
providers.provider Provider.exchange
""".strip().splitlines()
}
# A socket that is refused or gives way, a trial of a sick or dead provider, a pool behind no gate, a
# response whose log is gone, and what calls nothing that may fail.
RARE = {
    # A reload while requests wait.
    Function("providers.provider", "Provider.join"),
    Function("faces.socket", "Socket.give_way"),
    Function("faces.socket", "Socket.refused"),
    Function("faces.admission", "BodyHold.grow"),
    Function("gateway.gateway", "Gateway.hold"),
    Function("wings.responses.stored", "StoredResponses.hold"),
    Function("limits.resource", "Places.take"),
    Function("limits.scheduler", "Scheduler._come"),
    Function("providers.breaker", "Breaker.start"),
    Function("providers.breaker", "Breaker.start_spared"),
    Function("wings.responses.stored_face", "write"),
    Function("providers.pool", "Pool._wait"),
    # Only the workers of a host share connections of a key; no key has bids for later.
    Function("limits.quota", "Quota._connecting"),
    Function("limits.quota", "Quota.connect"),
    # Deletions.
    Function("limits.quota", "Quota.count"),
    Function("limits.scheduler", "Scheduler._come"),
    Function("limits.scheduler", "Scheduler._withdraw"),
    Function("limits.scheduler", "Scheduler.join"),
    Function("limits.scheduler", "Scheduler.suspend"),
}
FULL: dict[str, Any] = {
    **keys_of(
        *("ann", "bob"),
        max_connections=9,
        max_concurrent=1,
        queue_size=9,
        tokens_per_minute=10**8,
        tokens_per_day=10**9,
    ),
    f"{CONCURRENCY}.max_connections": 2,
    f"{CONCURRENCY}.connection_queue_size": 50,
    f"{SIM_HTTP_CLIENT}.concurrent_requests": 1,
    f"{SIM_HTTP_CLIENT}.max_connections": 1,
    f"{SIM_HTTP_CLIENT}.max_keepalive": 1,
    "llm.models": {
        "pair": {
            "members": ["sim/one", "sim/two"],
            "choose": "least_busy",
            "affinity": "prefix",
        }
    },
}
# What those call for them, with what they have taken in their hands.
WITHIN = {
    Function("faces.admission", "Visit.enter"),
    Function("faces.idle_sockets", "IdleSockets.opened"),
    Function("faces.idle_sockets", "IdleSockets.waits"),
    Function("faces.socket", "Socket.entered"),
    Function("faces.upgrade", "SocketPlace._settle"),
    Function("gateway.gateway", "Gateway._start"),
    Function("gateway.producers", "Producers.start"),
    Function("limits.scheduler", "Scheduler._begin"),
    Function("limits.scheduler", "Scheduler._serve"),
    Function("limits.scheduler", "Scheduler._serve_all"),
    Function("limits.scheduler", "Scheduler._take_slot"),
    Function("providers.provider", "Provider._begin"),
}
# Other processes take part in these: tests/wings/cluster and tests/server; or hooks:
# tests/wings/hooks.
SHARED = {
    Function("wings.hooks.http_hook", "HttpHook._post"),
    Function("wings.cluster.shared_budget", "SharedBudget.reserve"),
    Function("wings.cluster.remote_streams", "RemoteStreams.mirror"),
    Function("wings.responses.redis", "SharedResponses.load"),
}
# These count something else: the starts of a caller, bytes on their way to a file, connections for
# the balance.
OTHERS = {
    Function("limits.fair_queue", "_Level.serve"),
    Function("limits.fair_queue", "_Level.start"),
    Function("wings.cluster.shared_tokens", "SharedTokens.delay"),
    Function("wings.responses.redis", "SharedResponses._encoded"),
    Function("faces.polling", "tell"),
    Function("workers.balance", "Balance.made"),
}
# These take over what their callers have taken: all that they do is within a `try`.
TAKE_OVER = {
    Function("faces.admission", "Visit.enter"),
    Function("faces.admission", "Visit._has"),
    Function("gateway.candidates", "Candidates.run"),
    Function("providers.exchange", "Exchange.run"),
}
# What gives back: if this itself fails, nothing else can do it.
GIVES = re.compile(
    r"(__exit__|release|_leave|closed|disconnect|give_back|ended|waited|finish|close|leave"
    r"|free_room|trim|resumed|_settle|Provider\._end|_end_trial|give_up|run_all)$"
)


def taking(node: ast.AST, names: tuple[str, ...] = ()) -> Iterator[str]:
    """The qualified names of the functions below *node* that take something."""
    for child in ast.iter_child_nodes(node):
        inner = names
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = (*names, child.name)
        if isinstance(child, ast.Call) and TAKES.search(ast.unparse(child.func)):
            yield ".".join(names)
        if (
            isinstance(child, ast.AugAssign)
            and isinstance(child.op, ast.Add)
            and COUNTS.search(ast.unparse(child.target))
        ):
            yield ".".join(names)
        yield from taking(child, inner)


def test_every_section_of_the_package_that_takes_something_is_known() -> None:
    sections = {
        Function(module, name) for module, tree in MODULES.items() for name in taking(tree)
    }

    assert sections == SECTIONS | SHARED | OTHERS


@pytest.mark.parametrize("function", sorted(TAKE_OVER))
def test_what_takes_over_begins_with_a_try(function: Function) -> None:
    node: Any = MODULES[function.module]
    for name in function.name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == name)
    first = next(
        statement
        for statement in node.body
        if not isinstance(statement, ast.Expr)  # the docstring
        and any(isinstance(part, ast.Call | ast.Try) for part in ast.walk(statement))
    )

    assert isinstance(first, ast.Try)


# The road of a request, by each face. Two clients of two keys share one place everywhere. So many
# seconds they wait for their answers, and with a bug, which may have left them none.
PATIENCE, WITH_A_BUG = 20.0, 3.0


async def _post(server: RunningServer, url: str, headers: dict[str, str], body: Any) -> None:
    async with server.session.post(url, headers=headers, json=body) as response:
        await response.read()


async def embeddings(server: RunningServer, headers: dict[str, str], _name: str) -> None:
    await _post(server, f"{server.v1}/embeddings", headers, {"input": "Hello"})


async def streamed(server: RunningServer, headers: dict[str, str], _name: str) -> None:
    await _post(server, f"{server.v1}/chat/completions", headers, STREAMED)


async def grouped(server: RunningServer, headers: dict[str, str], _name: str) -> None:
    body = {**CHAT, "model": "pair"}
    await _post(server, f"{server.v1}/chat/completions", headers, body)
    await _post(server, f"{server.v1}/moderations", headers, {"input": "Hello", "model": "pair"})


async def kept(server: RunningServer, headers: dict[str, str], name: str) -> None:
    await _post(server, f"{server.v1}/chat/completions", headers | {"Idempotency-Key": name}, CHAT)


async def response(server: RunningServer, headers: dict[str, str], _name: str) -> None:
    url = f"{server.v1}/responses"
    async with server.session.post(url, headers=headers, json={"input": "Hello"}) as answer:
        kept_response = await answer.json()
    items = f"{url}/{kept_response['id']}/input_items"
    async with server.session.get(items, headers=headers) as answer:
        await answer.read()


async def messages(server: RunningServer, headers: dict[str, str], _name: str) -> None:
    await _post(server, f"{server.v1}/messages", headers, {"max_tokens": 9, **CHAT})


async def passed(server: RunningServer, headers: dict[str, str], _name: str) -> None:
    await _post(server, f"{server.v1}/moderations", headers, {"input": "Hello"})


async def sse(server: RunningServer, headers: dict[str, str], name: str) -> None:
    await _post(server, server.sse, headers, {"request_id": name, "text": "Hello"})


async def background(server: RunningServer, headers: dict[str, str], name: str) -> None:
    body: dict[str, Any] = {"request_id": name, "text": "Hello"}
    await _post(server, server.sse, {**headers, "Prefer": "respond-async"}, body)
    body = {"input": "Hello", "model": "pair", "background": True}
    await _post(server, f"{server.v1}/responses", headers, body)


async def websocket(server: RunningServer, headers: dict[str, str], name: str) -> None:
    async with server.connect(headers=headers) as ws:
        await ws.send_json(chat(name))
        await to_end(ws, name)


async def response_socket(server: RunningServer, headers: dict[str, str], _name: str) -> None:
    url = server.v1.replace("http", "ws", 1) + "/responses"
    async with server.session.ws_connect(url, headers=headers) as ws:
        for generate in (False, True):
            frame = {"type": "response.create", "input": "Hello", "generate": generate}
            await ws.send_json(frame)
            event = await ws.receive_json(timeout=PATIENCE)
            while event["type"] not in {"response.completed", "error"}:
                event = await ws.receive_json(timeout=PATIENCE)


async def session(server: RunningServer, headers: dict[str, str], _name: str) -> None:
    await _post(server, f"{server.base}/session", {}, {"key": headers["Authorization"][7:]})
    server.session.cookie_jar.clear()


FACES = (
    embeddings,
    streamed,
    grouped,
    kept,
    response,
    messages,
    passed,
    sse,
    background,
    websocket,
    response_socket,
    session,
)


async def ask(
    server: RunningServer, face: Any, round_name: str, patience: float = PATIENCE
) -> None:
    """Let two clients of each of two keys ask at once, and leave, after *patience* seconds at the
    latest; what they are answered is no matter here.
    """

    async def ask_one(number: int) -> None:
        with contextlib.suppress(
            aiohttp.ClientError, TimeoutError, TypeError, KeyError, ValueError
        ):
            name = f"{round_name}-{number}"
            headers = bearer(("ann", "bob")[number % 2])
            await asyncio.wait_for(face(server, headers, name), patience)

    await asyncio.gather(*map(ask_one, range(4)))
    await server.nothing_held(5)


# A bug between the making of a coroutine and its first step leaves it as it is.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@pytest.mark.virtual_time
@pytest.mark.timeout(120)
@pytest.mark.parametrize("face", FACES, ids=lambda face: face.__name__)
async def test_whatever_a_section_calls_may_fail_and_nothing_is_held_afterwards(
    make_server: MakeServer, face: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server = await make_server(**FULL)
    await ask(server, face, "warm")
    with calls_of(SECTIONS | WITHIN) as calls:
        await ask(server, face, "look")
        server.provider.pools.pool.drop_idle()
        await ask(server, face, "look again")
    faults = [
        call
        for call in calls
        if call.callee not in TAKE_OVER and not GIVES.search(call.callee.name)
    ]

    for number, call in enumerate(faults):
        server.provider.pools.pool.drop_idle()
        with bug_at(call):
            try:
                await ask(server, face, str(number), WITH_A_BUG)
            except AssertionError as error:
                raise AssertionError(f"{call}: {error}") from error
    await ask(server, face, "well again")
    # What the bugs have left goes now, and not while another test begins.
    caplog.clear()
    gc.collect()

    assert faults or face is session


# Where a trial is given back: the first provider of two is sick.
TRIAL_SECTIONS = {
    Function("gateway.attempts", "Attempts._go_on"),
    Function("gateway.attempts", "Attempts._start"),
    Function("gateway.candidates", "Candidates._start_first"),
    Function("gateway.candidates", "Candidates._wait"),
    Function("gateway.candidates", "Candidates.start"),
    Function("gateway.groups", "Group.trial"),
    Function("gateway.router", "Router.pass_on"),
    Function("providers.provider", "Provider.run"),
    Function("providers.provider", "Provider._begin"),
}
TRIED = {"chat": ("chat/completions", CHAT), "passed on": ("moderations", {"input": "Hello"})}


@pytest.mark.real_time
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("model", "path"), [("pair", "chat"), ("pair", "passed on"), (None, "chat")]
)
async def test_a_trial_of_a_sick_provider_ends_whatever_fails(
    make_server: MakeServer, model: str | None, path: str
) -> None:
    server = await make_server()
    other = provider_entry(server.simulator.base_url, "other")
    pair = {"members": ["sim", "other"], "choose": "least_busy"}
    assert await server.change(
        **{"llm.providers.other": other, "llm.fallbacks": ["other"], "llm.models": {"pair": pair}}
    )
    breaker = server.provider.health.breaker
    url, body = TRIED[path]
    body = body | ({} if model is None else {"model": model})

    async def ask_as_a_trial() -> None:
        breaker.reset()
        sicken(breaker)
        # The next request is a trial.
        assert not any(breaker.start_spared(by_time=False) for _ in range(TURN - 1))
        with contextlib.suppress(aiohttp.ClientError, ValueError, KeyError):
            await _post(server, f"{server.v1}/{url}", {}, body)
        await server.nothing_held(5)

    await ask_as_a_trial()
    with calls_of(TRIAL_SECTIONS) as calls:
        await ask_as_a_trial()
    for call in calls:
        if call.callee not in TAKE_OVER and not GIVES.search(call.callee.name):
            with bug_at(call):
                await ask_as_a_trial()

    assert Function("providers.breaker", "Breaker.start_spared") in {each.callee for each in calls}


async def test_every_section_is_on_the_road_of_one_of_these(make_server: MakeServer) -> None:
    server = await make_server(**FULL)

    with calls_of(SECTIONS) as calls:
        for face in FACES:
            await ask(server, face, face.__name__)

    assert {call.section for call in calls} | {call.callee for call in calls} >= SECTIONS - RARE
