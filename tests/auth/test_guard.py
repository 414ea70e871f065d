"""The guard of a server: which caller may call which route, and with which credentials."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import WSServerHandshakeError

from aioserver.auth.guard import Policy
from aioserver.auth.sessions import SESSION_SECONDS
from tests.support.chat import CHAT, chat, text_of, to_end
from tests.support.keys import COOKIE, bearer, code_of, cookie, key_of, keys_of, log_in
from tests.support.logs import fields_of
from tests.support.raw import Raw

if TYPE_CHECKING:
    from tests.support.server import MakeServer, RunningServer


WEB_PAGE = "https://page.example"
PAGES = {"chat.websocket.allow_origins": [WEB_PAGE]}
UPGRADE = (
    *("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"),
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)


def routes(server: RunningServer) -> list[tuple[str, str, Policy]]:
    """Method, path and policy of each route."""
    rows = []
    for route in server.app.router.routes():
        assert route.resource is not None
        path = route.resource.canonical.replace("/assets/{path}", "/assets/chat/chat.js")
        path = re.sub(r"\{[^}]+\}", "x", path)
        rows.append((route.method, path, server.context.guard.policies[route]))
    return rows


async def asked(
    server: RunningServer, method: str, path: str, **headers: str
) -> tuple[int, str, Any]:
    """Status, code (of a body that has one) and headers."""
    async with server.session.request(method, server.base + path, headers=headers) as response:
        failed = response.status >= 400 and method != "HEAD"
        return response.status, await code_of(response) if failed else "", response.headers


# The table.


async def test_who_comes_without_a_key_is_told_each_header_for_one(
    make_server: MakeServer,
) -> None:
    server = await make_server(**keys_of("web"))
    async with server.session.get(f"{server.v1}/models") as response:
        message = (await response.json())["error"]["message"]

    headers = {"Authorization: Bearer": "Bearer ", "x-api-key": "", "api-key": ""}
    for name, prefix in headers.items():
        assert re.search(rf"(?<![\w-]){name},", message), name
        header = {name.partition(":")[0]: f"{prefix}{key_of('web')}"}
        async with server.session.get(f"{server.v1}/models", headers=header) as response:
            assert response.status == 200


async def test_every_route_has_a_policy_and_keeps_to_it(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web", "root"))
    table = routes(server)

    assert {policy for _, _, policy in table} == set(Policy)
    assert len(table) > 40
    for method, path, policy in table:
        where = f"{method} {path}"
        nobody, code, headers = await asked(server, method, path)
        if policy is Policy.OPEN:
            other = {"/ready": 503, "/client/x.js": 404}  # which is no version
            assert nobody in {200, 204, 400, 401, other.get(path)}, where
            assert nobody != 401 or where == "POST /session", "which is where the key goes"
            continue
        assert nobody == 401, where
        assert headers["WWW-Authenticate"] == "Bearer"
        assert method == "HEAD" or code == "missing_api_key", where
        wrong = {"Authorization": "Bearer aio-nobody"}
        status, code, _ = await asked(server, method, path, **wrong)
        assert status == 401, where
        assert method == "HEAD" or code == "invalid_api_key", where
        if policy is Policy.ADMIN:
            status, code, _ = await asked(server, method, path, **bearer("web"))
            assert status == 403, where
            assert method == "HEAD" or code == "permission_denied", where
    watch = {path for _, path, policy in table if policy is Policy.ADMIN}
    assert watch == {"/stats", "/events", "/metrics"}


async def test_without_keys_every_route_is_open(server: RunningServer) -> None:
    for method, path, policy in routes(server):
        if policy is Policy.ADMIN and path != "/events":
            assert (await asked(server, method, path))[0] == 200
        elif policy is Policy.KEY:
            assert (await asked(server, method, path))[0] not in {401, 403}


async def test_a_route_that_nobody_named_wants_an_admin(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web", "root"))
    policies = server.context.guard.policies
    for route in [
        route for route in policies if route.resource and route.resource.canonical == "/health"
    ]:
        del policies[route]

    assert (await asked(server, "GET", "/health"))[0] == 401
    assert (await asked(server, "GET", "/health", **bearer("web")))[0] == 403
    assert (await asked(server, "GET", "/health", **bearer("root")))[0] == 200
    assert (await asked(server, "GET", "/healthz"))[0] == 200


async def test_neither_host_nor_spelling_opens_a_route(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web"))
    for path in ["/stats", "//stats", "/%73tats", "/health/../stats", "/stats/"]:
        for host in ["evil.example", "localhost", "x/health", "x?y", "[::1]"]:
            async with Raw(server) as raw:
                await raw.send(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
                answer = await raw.answer()

            assert answer.status in {400, 401, 404}, (path, host)
            assert b"connections" not in answer.body, (path, host)


async def test_a_path_that_is_not_there_is_no_secret(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web"))

    assert (await asked(server, "GET", "/nothing"))[:2] == (404, "not_found")
    assert (await asked(server, "PUT", "/stats"))[:2] == (405, "method_not_allowed")


async def test_open_routes_hold_no_data(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web", "root"))
    for path in ("/health", "/healthz", "/livez"):
        async with server.session.get(server.base + path) as response:
            assert await response.json() == {"status": "healthy"}
    async with server.session.get(server.base + "/ready") as response:
        assert await response.json() == {"status": "ready"}
    for name in (None, "web", "root"):
        headers = {"Accept": "application/json"} | (bearer(name) if name else {})
        async with server.session.get(server.base + "/", headers=headers) as response:
            shown = await response.json()
        assert set(shown) == {"name", "endpoints"}
    for page in ("/", "/dashboard"):
        async with server.session.get(server.base + page, headers={"Accept": "text/html"}) as got:
            assert got.status == 200
            assert got.content_type == "text/html"


# Credentials.


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer "])
async def test_a_bearer_is_let_in_on_every_face(make_server: MakeServer, scheme: str) -> None:
    server = await make_server(**keys_of("web", "root"))
    headers = {"Authorization": f"{scheme} {key_of('web')}"}

    async with server.session.post(
        f"{server.v1}/chat/completions", json=CHAT, headers=headers
    ) as response:
        assert response.status == 200
    async with server.session.post(
        server.sse, json={"request_id": "r", **CHAT}, headers=headers
    ) as response:
        assert response.status == 200
        await response.read()
    async with server.connect(headers=headers) as ws:
        await ws.send_json(chat("w"))
        assert text_of(await to_end(ws))
    async with server.session.get(f"{server.base}/stats", headers=bearer("root")) as response:
        assert (await response.json())["name"] == "aioserver"


async def test_a_socket_may_bring_its_key_as_a_subprotocol(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web"))

    offer = (f"aioserver.key.{key_of('web')}", "aioserver")
    for protocols in (offer, offer[::-1], ("other", *offer)):
        async with server.connect(protocols=protocols) as ws:
            assert ws.protocol == "aioserver"
            await ws.send_json(chat(protocols[0]))
            assert text_of(await to_end(ws))
    async with Raw(server) as raw:
        await raw.get("/ws/chat", *UPGRADE, f"Sec-WebSocket-Protocol: {', '.join(offer)}")
        head = await raw.until(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 ")
    assert b"sec-websocket-protocol: aioserver\r\n" in head.lower()
    assert key_of("web").encode() not in head


async def test_no_other_subprotocol_lets_in(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = await make_server(**keys_of("web"))
    for protocols, status, code in [
        (("aioserver",), 401, "missing_api_key"),
        (("aioserver", "aioserver.key."), 401, "invalid_api_key"),
        (("aioserver", "aioserver.key.aio-nobody"), 401, "invalid_api_key"),
        (
            ("aioserver", f"aioserver.key.{key_of('web')}", "aioserver.key.aio-nobody"),
            401,
            "invalid_api_key",
        ),
        ((f"aioserver.key.{key_of('web')}",), 400, "invalid_request"),
        ((key_of("web"),), 401, "missing_api_key"),
    ]:
        async with Raw(server) as raw:
            await raw.get("/ws/chat", *UPGRADE, f"Sec-WebSocket-Protocol: {', '.join(protocols)}")
            answer = await raw.answer()

        assert (answer.status, answer.code) == (status, code), protocols
        assert key_of("web") not in caplog.text, protocols
        assert key_of("web").encode() not in answer.body, protocols


HOSTILE = [
    *("Bearer", "Bearer ", "Bearer  \t ", "bearer:x", "Bearer,", "Bearer a b", "Bearer \x80\xff"),
    *("Basic dXNlcjpwYXNz", "", " ", "Bearer " + "x" * 16000, "Bearer aio-\x85web", "Negotiate a"),
    *(
        "Bearer %73",
        "Bearer null",
        "Bearer undefined",
        "BearerBearer x",
        "\x00" * 0 + "Digest x=y",
    ),
    f"Basic {key_of('web')}",
    f"Token {key_of('web')}",
    f"Bearer {key_of('web')}, Bearer {key_of('web')}",
    f"Bearer {key_of('web').upper()}",
    f'Bearer "{key_of("web")}"',
    key_of("web"),
]


HEADERS = ("x-api-key", "api-key", "X-API-Key")


@pytest.mark.parametrize("name", HEADERS)
async def test_a_key_may_come_in_a_header_of_its_own(make_server: MakeServer, name: str) -> None:
    server = await make_server(**keys_of("web", "root"))
    headers = {name: f" {key_of('web')}\t"}

    assert (await asked(server, "GET", "/v1/models", **headers))[0] == 200
    assert (await asked(server, "POST", "/session", **headers))[0] == 200
    server.session.cookie_jar.clear()
    assert (await asked(server, "GET", "/stats", **headers))[:2] == (403, "permission_denied")
    assert (await asked(server, "GET", "/stats", **{name: key_of("root")}))[0] == 200
    async with server.session.post(
        server.sse, json={"request_id": "r", **CHAT}, headers=headers
    ) as response:
        assert response.status == 200
    async with server.connect(headers=headers) as ws:
        await ws.send_json(chat("w"))
        assert text_of(await to_end(ws))


HOSTILE_KEYS = [
    *("aio-nobody" if value == key_of("web") else value for value in HOSTILE[5:]),
    *(f"Bearer {key_of('web')}", f"{key_of('web')},", "x" * 16000),
]


@pytest.mark.parametrize(
    ("name", "prefix", "values"),
    [
        ("Authorization", len("Bearer "), HOSTILE),
        *((name, 0, HOSTILE_KEYS) for name in HEADERS[:2]),
    ],
    ids=["Authorization", *HEADERS[:2]],
)
async def test_a_hostile_header_is_a_401_and_in_no_log(
    make_server: MakeServer,
    caplog: pytest.LogCaptureFixture,
    name: str,
    prefix: int,
    values: list[str],
) -> None:
    caplog.set_level(logging.INFO)
    server = await make_server(**keys_of("web"))
    for value in values:
        secret = value[prefix:]
        # A short one may stand in the answer by chance.
        short = len(value) < (12 if prefix else 8)
        async with Raw(server) as raw:
            for path in ("/v1/models", "/ws/chat", "/stats"):
                await raw.get(path, f"{name}: {value}", *UPGRADE[2:])
                answer = await raw.answer()
                assert answer.status == 401, value
                assert answer.code in {"missing_api_key", "invalid_api_key"}, value
                assert answer.headers["www-authenticate"] == "Bearer"
                assert short or secret.encode("latin-1") not in answer.body

        assert short or secret not in caplog.text
    assert "xxxx" not in caplog.text


async def test_one_key_may_come_twice_and_two_keys_may_not(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web", "other"))
    bearing, own = f"Authorization: Bearer {key_of('web')}", f"x-api-key: {key_of('web')}"
    azure, foreign = f"api-key: {key_of('web')}", f"api-key: {key_of('other')}"
    offer = f"Sec-WebSocket-Protocol: aioserver, aioserver.key.{key_of('web')}"
    wrong = "x-api-key: aio-nobody"
    async with Raw(server) as raw:
        for lines in ((bearing, own), (own, azure), (bearing, "x-api-key: "), (offer, own)):
            await raw.get("/v1/models", *lines)
            assert (await raw.answer()).status == 200, lines
        for lines in (
            *((bearing, foreign), (own, foreign), (bearing, wrong), (wrong, azure), (own, own)),
            *((offer, foreign), (offer, "Authorization: Bearer x"), (foreign, offer)),
            *((bearing, bearing), (bearing, "Authorization: Bearer x")),
            ("Authorization: bearer x", bearing),
        ):
            await raw.get("/v1/models", *lines)
            answer = await raw.answer()
            assert (answer.status, answer.code) == (401, "invalid_api_key"), lines


# Sessions.


async def test_a_key_becomes_a_session(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web", "root"))
    url = f"{server.base}/session"
    web = ""
    for request in ({"json": {"key": f" {key_of('web')}\n"}}, {"headers": bearer("web")}):
        async with server.session.post(url, **request) as response:  # type: ignore[arg-type]
            assert response.status == 200
            assert await response.json() == {"key_required": True, "name": "web", "admin": False}
            assert response.headers["Cache-Control"] == "no-store"
            web = response.cookies[COOKIE].value
            attributes = response.headers["Set-Cookie"].partition("; ")[2].split("; ")
        server.session.cookie_jar.clear()
        assert set(attributes) == {
            *("HttpOnly", "SameSite=Strict", "Path=/", f"Max-Age={SESSION_SECONDS}")
        }
        assert key_of("web") not in web

    root = await log_in(server, "root")
    async with server.session.get(f"{server.v1}/models", headers=cookie(web)) as response:
        assert response.status == 200
    async with server.connect(headers=cookie(web)) as ws:
        await ws.send_json(chat("w"))
        assert text_of(await to_end(ws))
    assert (await asked(server, "GET", "/stats", **cookie(web)))[:2] == (403, "permission_denied")
    assert (await asked(server, "GET", "/stats", **cookie(root)))[0] == 200
    async with server.session.get(url, headers=cookie(root)) as response:
        assert await response.json() == {"key_required": True, "name": "root", "admin": True}


async def test_a_page_is_told_whether_it_needs_a_key(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web"))
    for headers in ({}, cookie("no.1.session"), bearer("web"), {"Authorization": "Bearer x"}):
        async with server.session.get(f"{server.base}/session", headers=headers) as response:
            assert response.status == 200
            assert await response.json() == {"key_required": True, "name": None, "admin": False}
    openly = await make_server()
    async with openly.session.get(f"{openly.base}/session") as response:
        assert await response.json() == {"key_required": False, "name": None, "admin": False}
    async with openly.session.post(f"{openly.base}/session", json={"key": "x"}) as response:
        assert response.status == 200
        assert "Set-Cookie" not in response.headers


async def test_a_log_in_that_fails_gives_no_cookie(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web"))
    for body, status, code in [
        ('{"key": "aio-nobody"}', 401, "invalid_api_key"),
        ('{"key": ""}', 401, "missing_api_key"),
        ('{"key": " "}', 401, "missing_api_key"),
        ('{"key": "\u00e9\\u0000"}', 401, "invalid_api_key"),
        ('{"key": 7}', 400, "invalid_request"),
        ('{"key": ["aio-web"]}', 400, "invalid_request"),
        ("[]", 400, "invalid_request"),
        ("{", 400, "invalid_json"),
        ('"' + "x" * 20000 + '"', 413, "request_too_large"),
    ]:
        async with server.session.post(
            f"{server.base}/session",
            data=body.encode(),
            headers={"Content-Type": "application/json"},
        ) as response:
            assert (response.status, await code_of(response)) == (status, code), body
            assert "Set-Cookie" not in response.headers, body
            assert "aio-" not in await response.text(), body


async def test_a_session_is_made_of_a_key_and_of_no_session(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web"))
    session = await log_in(server, "web")
    async with server.session.post(f"{server.base}/session", headers=cookie(session)) as response:
        assert (response.status, await code_of(response)) == (401, "missing_api_key")
        assert "Set-Cookie" not in response.headers


async def test_logging_out_takes_the_cookie_away(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web"))
    session = await log_in(server, "web")
    for headers in (cookie(session), {}):
        async with server.session.delete(f"{server.base}/session", headers=headers) as response:
            assert response.status == 204
            assert f'{COOKIE}="";' in response.headers["Set-Cookie"]
            assert "Max-Age=0" in response.headers["Set-Cookie"]


async def test_a_crooked_cookie_is_a_401(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web"))
    for crooked in [
        *("", "x", "a.b.c", "web.1.0", '"', "\xff\xfe", "web.99999999999." + "0" * 64, "=" * 99),
        *("web.9\xb9.x", "." * 500, "web." + "9" * 9000 + ".x"),
    ]:
        async with Raw(server) as raw:
            await raw.get("/v1/models", f"Cookie: a=b; {COOKIE}={crooked}; c=d")
            answer = await raw.answer()

        assert (answer.status, answer.code) == (401, "invalid_api_key"), crooked


async def test_another_cookie_of_that_name_does_not_lock_out(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web"))
    session = await log_in(server, "web")
    both = {"Cookie": f"theme=dark; {COOKIE}=tossed; {COOKIE}={session}"}

    assert (await asked(server, "GET", "/v1/models", **both))[0] == 200
    many = {"Cookie": f"{COOKIE}=tossed; " * 500 + f"{COOKIE}={session}"}
    assert (await asked(server, "GET", "/v1/models", **many))[0] == 401


# Pages and their cookies.


@pytest.mark.parametrize("allowed", [[WEB_PAGE], ["*"], []])
async def test_a_foreign_page_cannot_use_the_cookie(
    make_server: MakeServer, allowed: list[str]
) -> None:
    server = await make_server(**keys_of("web"), **{"chat.websocket.allow_origins": allowed})
    session = await log_in(server, "web")
    evil = {"Origin": "https://evil.example", **cookie(session)}

    for method, path in (
        ("POST", "/v1/chat/completions"),
        ("POST", "/sse/chat"),
        ("DELETE", "/sse/chat/x"),
        ("GET", "/v1/models"),
        ("GET", "/ws/chat"),
        ("DELETE", "/session"),
        ("POST", "/session"),
    ):
        status, code, headers = await asked(server, method, path, **evil)
        assert (status, code) == (403, "origin_not_allowed"), f"{method} {path}"
        assert "Set-Cookie" not in headers
    with pytest.raises(WSServerHandshakeError) as refused:
        await server.connect(headers=evil)
    assert refused.value.status == 403
    for page in (server.base, *[origin for origin in allowed if origin != "*"]):
        mine = {"Origin": page, **cookie(session)}
        assert (await asked(server, "GET", "/v1/models", **mine))[0] == 200
        async with server.connect(headers=mine) as ws:
            await ws.send_json(chat(page))
            assert text_of(await to_end(ws))
        assert await log_in(server, "web", Origin=page)


async def test_a_key_needs_no_page(make_server: MakeServer) -> None:
    """A header that a script has set is no browser's own doing: what CORS then shows is another
    thing.
    """
    server = await make_server(**keys_of("web"), **PAGES)
    headers = {"Origin": "https://evil.example", **bearer("web")}
    async with server.session.get(f"{server.v1}/models", headers=headers) as response:
        assert response.status == 200
        assert "Access-Control-Allow-Origin" not in response.headers


ERRORS: list[tuple[str, str, dict[str, str], int]] = [
    ("GET", "/v1/models", {}, 401),
    ("GET", "/v1/models", {"Authorization": "Bearer x"}, 401),
    ("GET", "/stats", bearer("web"), 403),
    ("GET", "/nothing", {}, 404),
    ("GET", "/sse/chat/unknown", bearer("web"), 404),
    ("PUT", "/stats", {}, 405),
    ("POST", "/v1/chat/completions", bearer("web"), 415),
    ("POST", "/v1/chat/completions", {**bearer("poor"), "Content-Type": "application/json"}, 429),
]


@pytest.mark.parametrize("allowed", [WEB_PAGE, "*"])
async def test_an_allowed_page_can_read_every_error(make_server: MakeServer, allowed: str) -> None:
    server = await make_server(
        **keys_of("web", "poor", requests_per_minute=1),
        **{"chat.websocket.allow_origins": [allowed]},
    )
    async with server.session.post(
        f"{server.v1}/chat/completions", json=CHAT, headers=bearer("poor")
    ) as response:
        assert response.status == 200
    for method, path, headers, status in ERRORS:
        body = b'{"messages": []}' if status == 429 else None
        async with server.session.request(
            method, server.base + path, headers={"Origin": WEB_PAGE, **headers}, data=body
        ) as response:
            assert response.status == status, path
            assert response.headers["Access-Control-Allow-Origin"] == WEB_PAGE
            assert response.headers["Access-Control-Allow-Credentials"] == "true"
            assert "Origin" in response.headers["Vary"]
            exposed = response.headers["Access-Control-Expose-Headers"]
            assert "retry-after-ms" in exposed
            assert (await response.json())["error"]["type"]
            if status == 429:
                assert int(response.headers["Retry-After"]) >= 1
                assert 1 <= int(response.headers["retry-after-ms"]) <= 60_000


async def test_a_preflight_brings_no_key(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web"), **PAGES)
    headers = {
        "Origin": WEB_PAGE,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type",
    }
    for path in ("/v1/chat/completions", "/sse/chat", "/stats"):
        async with server.session.options(server.base + path, headers=headers) as response:
            assert response.status == 200
            assert response.headers["Access-Control-Allow-Origin"] == WEB_PAGE
            assert "authorization" in response.headers["Access-Control-Allow-Headers"]
    headers["Origin"] = "https://evil.example"
    async with server.session.options(f"{server.v1}/models", headers=headers) as response:
        assert "Access-Control-Allow-Origin" not in response.headers


# The Host.


async def test_without_keys_only_names_of_this_machine_are_answered(
    make_server: MakeServer,
) -> None:
    server = await make_server(**{"auth.allowed_hosts": ["chat.example"]})
    paths = (
        "/health",
        "/stats",
        "/",
        "/v1/models",
        "/session",
        "/assets/chat/chat.js",
        "/nothing",
    )
    for host, status in [
        *(("localhost", 200), ("localhost:1", 200), ("127.0.0.1:8000", 200), ("[::1]:80", 200)),
        *(("chat.example", 200), ("chat.example:8000", 200), ("evil.example", 403)),
        *(("127.0.0.1.evil.example", 403), ("192.168.0.9:8000", 403), ("\xff", 403)),
    ]:
        async with Raw(server) as raw:
            for path in paths:
                await raw.send(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode("latin-1"))
                answer = await raw.answer()
                if status == 200:
                    assert answer.status == (404 if path == "/nothing" else 200), host
                else:
                    assert (answer.status, answer.code) == (403, "host_not_allowed"), host
                    assert b"evil" not in answer.body, host
        async with Raw(server) as raw:
            upgrade = "".join(f"{line}\r\n" for line in UPGRADE)
            await raw.send(
                f"GET /ws/chat HTTP/1.1\r\nHost: {host}\r\n{upgrade}\r\n".encode("latin-1")
            )
            head = await raw.until(b"\r\n\r\n")
            assert int(head.split()[1]) == (101 if status == 200 else 403), host


@pytest.mark.parametrize("changes", [{"auth.open": True}, keys_of("web")])
async def test_with_keys_or_without_a_guard_any_name_is_answered(
    make_server: MakeServer, changes: dict[str, Any]
) -> None:
    server = await make_server(**{"auth.allowed_hosts": []}, **changes)
    async with Raw(server) as raw:
        for line in ("Host: chat.example", f"Host: evil.example:{server.port}"):
            await raw.send(f"GET /health HTTP/1.1\r\n{line}\r\n\r\n".encode())
            assert (await raw.answer()).status == 200


# Proxies.


async def test_a_trusted_proxy_says_that_the_page_came_by_https(make_server: MakeServer) -> None:
    forwarded = {"X-Forwarded-Proto": "https", "X-Forwarded-For": "203.0.113.9"}
    body = {"key": key_of("web")}
    for trusted, secure in ((["127.0.0.0/8"], True), (["10.0.0.0/8"], False), ([], False)):
        server = await make_server(**keys_of("web"), **{"auth.trusted_proxies": trusted})
        async with server.session.post(
            f"{server.base}/session", json=body, headers=forwarded
        ) as response:
            assert ("; Secure" in response.headers["Set-Cookie"]) is secure


async def test_a_refused_client_is_one_line_with_its_address(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = await make_server(**keys_of("web"), **{"auth.trusted_proxies": ["127.0.0.1"]})
    for address in ("203.0.113.9", "203.0.113.10"):
        headers = {"X-Forwarded-For": f"9.9.9.9, {address}", "Authorization": "Bearer canary"}
        assert (await asked(server, "GET", "/sse/chat/secret", **headers))[0] == 401

    lines = fields_of(caplog, "access refused")
    assert [line["address"] for line in lines] == ["203.0.113.9", "203.0.113.10"]
    assert {line["reason"] for line in lines} == {"invalid_key"}
    assert {line["route"] for line in lines} == {"/sse/chat/{request_id}"}
    assert "canary" not in str(lines)


async def test_a_refused_page_is_logged_with_its_origin_and_the_setting_that_lets_it_in(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = await make_server(**PAGES)
    evil = "http://evil.example" + "x" * 300
    async with Raw(server) as raw:
        await raw.get("/ws/chat", f"Origin: {evil}", *UPGRADE)
        answer = await raw.answer()
        assert answer.status == 403
        assert "chat.websocket.allow_origins" in answer.body.decode()
    async with Raw(server) as raw:
        for origin in (evil, WEB_PAGE):
            await raw.send(
                b"OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
                b"Access-Control-Request-Method: POST\r\n"
                b"Origin: " + origin.encode() + b"\r\n\r\n"
            )
            assert (await raw.answer()).status == 200

    fields = fields_of(caplog, "access refused")
    assert [line["method"] for line in fields] == ["GET", "OPTIONS"]
    for refused in fields:
        assert (refused["reason"], refused["origin"]) == ("origin", evil[:200])
        assert refused["setting"] == "chat.websocket.allow_origins"


async def test_a_refused_host_is_logged_with_the_setting_that_lets_it_in(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    assert (await asked(server, "GET", "/health", Host="evil.example"))[0] == 403

    [fields] = fields_of(caplog, "access refused")
    assert (fields["host"], fields["setting"]) == ("evil.example", "auth.allowed_hosts")


async def test_guessing_keys_fills_no_log(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = await make_server(**keys_of("web"))
    for _ in range(60):
        await asked(server, "GET", "/stats", Authorization="Bearer x")

    assert 1 <= len(fields_of(caplog, "access refused")) < 60


async def test_a_client_behind_a_proxy_has_a_line_of_its_own(make_server: MakeServer) -> None:
    server = await make_server(**{"auth.trusted_proxies": ["127.0.0.1"]})
    callers = []
    for address in ("203.0.113.9", "203.0.113.10"):
        async with server.connect(headers={"X-Forwarded-For": address}) as ws:
            await ws.ping()
            callers += [socket.caller for socket in server.context.sockets]

    assert [caller.subflow for caller in callers] == ["203.0.113.9", "203.0.113.10"]
    assert callers[0] == callers[1]
