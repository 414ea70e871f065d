"""Callers, and the pages that may connect."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aioserver.auth.access import Access
from aioserver.auth.callers import Caller, anonymous
from aioserver.auth.keys import Keys
from aioserver.auth.origins import Origins
from aioserver.auth.sessions import SECRET_BYTES, SESSION_SECONDS, Sessions
from aioserver.config.settings import Auth, ClientKey
from aioserver.errors import ConcurrencyExceeded, InvalidApiKey, OriginNotAllowed, SessionEnded
from tests.support.clock import FakeClock

LISTED = Origins(("http://localhost:8000", "https://Chat.Example/", "null"), credentials=True)
NONE = Origins((), credentials=True)
ANY = Origins(("*",), credentials=False)


def test_all_clients_without_a_key_are_one_caller_in_lines_of_their_own() -> None:
    first, second = anonymous("10.0.0.1"), anonymous("10.0.0.2")

    assert first == second
    assert hash(first) == hash(second)
    assert first.subflow != second.subflow
    assert anonymous(None) == first


def test_a_user_has_its_own_line_and_is_the_same_caller() -> None:
    caller = Caller("web", "web")

    ann, bob = caller.on_behalf_of("ann"), caller.on_behalf_of("bob")

    assert ann == bob == caller
    assert len({caller.subflow, ann.subflow, bob.subflow}) == 3
    assert ann.on_behalf_of(None) is ann


def test_a_client_that_names_many_users_has_the_turns_of_one() -> None:
    caller = anonymous("10.0.0.1")

    assert {caller.on_behalf_of(user).flow for user in ("ann", "bob")} == {caller.flow}
    assert caller.flow != anonymous("10.0.0.2").flow
    assert Caller("web", "10.0.0.1").on_behalf_of("ann").flow == "web"


@pytest.mark.parametrize("user", [None, "", 7, ["ann"], {"a": 1}, True])
def test_a_user_that_is_no_text_changes_no_flow(user: object) -> None:
    caller = anonymous("10.0.0.1")

    assert caller.on_behalf_of(user) is caller


def test_a_user_of_a_megabyte_makes_a_short_line() -> None:
    assert len(anonymous("").on_behalf_of("x" * 1_000_000).subflow) < 300


# Origins.


@pytest.mark.parametrize("origins", [LISTED, NONE, ANY])
@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://a.example", "a.example"),
        ("https://a.example", "a.example"),
        ("http://a.example:81", "a.example:81"),
        ("http://A.example", "a.EXAMPLE"),
        ("http://127.0.0.1:8000", "127.0.0.1:8000"),
        ("http://[::1]:8000", "[::1]:8000"),
    ],
)
def test_our_own_pages_always_may(origins: Origins, origin: str, host: str) -> None:
    assert origins.allows(origin, host)
    origins.check({"Origin": origin, "Host": host})


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://localhost:8000", True),
        ("http://localhost:8000/", True),
        ("HTTP://LOCALHOST:8000", True),
        ("https://chat.example", True),
        ("null", True),
        ("http://localhost", False),
        ("https://localhost:8000", False),
        ("http://localhost:8000.evil.example", False),
        ("http://evil.example/http://localhost:8000", False),
        ("http://chat.example", False),
        ("https://a.chat.example", False),
        ("", False),
        ("*", False),
    ],
)
def test_of_other_pages_only_those_listed_may(origin: str, allowed: bool) -> None:
    assert LISTED.allows(origin, "other.example") is allowed
    assert not NONE.allows(origin, "other.example")
    assert ANY.allows(origin, "other.example")


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://a.example", "a.example:81"),
        ("http://a.example:81", "a.example"),
        ("http://a.example", None),
        ("http://a.example", ""),
        ("null", ""),
        ("", ""),
        ("file://", ""),
        ("http://user@a.example", "a.example"),
        ("http://[", "["),
        ("http://[::1", "[::1"),
        ("http://a]b", "a]b"),
    ],
)
def test_a_page_that_is_almost_ours_is_refused(origin: str, host: str | None) -> None:
    assert not NONE.allows(origin, host)


def test_a_client_without_an_origin_is_no_browser() -> None:
    NONE.check({"Host": "a.example"})


def test_a_foreign_page_is_refused_before_the_upgrade() -> None:
    with pytest.raises(OriginNotAllowed) as caught:
        LISTED.check({"Origin": "http://evil.example", "Host": "a.example"})

    assert caught.value.http_status == 403
    assert "evil" not in caught.value.message


@given(st.text(), st.none() | st.text())
def test_any_header_is_an_answer_and_no_exception(origin: str, host: str | None) -> None:
    assert NONE.allows(origin, host) in {True, False}
    assert LISTED.cors({"Origin": origin, "Host": host or ""}) is not None


@pytest.mark.parametrize(
    ("origin", "trusted"),
    [
        ("http://own.example", True),
        ("http://localhost:8000", False),
        ("http://evil.example", False),
        ("null", False),
    ],
)
def test_any_origin_is_none_that_a_cookie_counts_from(origin: str, trusted: bool) -> None:
    assert ANY.allows(origin, "own.example")
    assert ANY.trusts(origin, "own.example") is trusted
    assert LISTED.trusts("http://localhost:8000", "own.example")


# CORS.


def test_an_allowed_page_may_read_our_answers() -> None:
    headers = {"Origin": "http://localhost:8000", "Host": "a.example"}

    assert LISTED.cors(headers) == {
        "Access-Control-Allow-Origin": "http://localhost:8000",
        "Access-Control-Allow-Credentials": "true",
        "Vary": "Origin",
    }
    assert ANY.cors(headers) == {
        "Access-Control-Allow-Origin": "http://localhost:8000",
        "Vary": "Origin",
    }


def test_a_foreign_page_may_not_and_caches_are_told() -> None:
    assert LISTED.cors({"Origin": "http://evil.example", "Host": "a"}) == {"Vary": "Origin"}


@pytest.mark.parametrize("origin", [None, "http://a\r\nSet-Cookie: b", "http://é.example", "\0"])
def test_no_origin_and_no_honest_one_are_not_echoed(origin: str | None) -> None:
    headers = {"Host": "a"} | ({} if origin is None else {"Origin": origin})

    assert "Access-Control-Allow-Origin" not in ANY.cors(headers)


# Keys.

WALL_TIME = 1_800_000_000.0


def client(name: str, key: str | None = None, **limits: Any) -> ClientKey:
    digest = hashlib.sha256((key or f"key of {name}").encode()).hexdigest()
    return ClientKey(name=name, sha256=digest, **limits)


def held(
    *client_keys: ClientKey, clock: FakeClock | None = None, secret: bytes = bytes(SECRET_BYTES)
) -> Keys:
    keys = Keys(Sessions(secret, clock or FakeClock(WALL_TIME)))
    keys.apply(client_keys)
    return keys


def test_a_key_is_its_caller_made_once() -> None:
    keys = held(client("web", priority=7, admin=True), client("app"))

    web, app = keys.caller(b"key of web"), keys.caller(b"key of app")

    assert (web.name, web.priority, web.admin) == ("web", 7, True)
    assert (app.name, app.priority, app.admin) == ("app", 1, False)
    assert web != app
    assert keys.caller(b"key of web") is web
    assert web.on_behalf_of("ann").quota is web.quota


@pytest.mark.parametrize("key", [b"", b"key of we", b"key of web ", b"KEY OF WEB", b"\xff" * 99])
def test_an_unknown_key_is_refused_and_not_shown(key: bytes) -> None:
    with pytest.raises(InvalidApiKey) as caught:
        held(client("web")).caller(key)

    assert caught.value.message == "this API key is not known"


def test_its_hash_is_no_key() -> None:
    web = client("web")
    assert web.sha256 is not None

    for wrong in (web.sha256.encode(), bytes.fromhex(web.sha256), web.name.encode()):
        with pytest.raises(InvalidApiKey):
            held(web).caller(wrong)


def test_a_change_tells_whose_key_is_gone_or_another() -> None:
    keys = held(client("stays"), client("goes"), client("turns"))
    stays, goes, turns = (keys.caller(f"key of {n}".encode()) for n in ("stays", "goes", "turns"))
    assert stays.quota is not None
    stays.quota.take()

    gone = keys.apply([client("new"), client("turns", "other"), client("stays", max_concurrent=1)])

    assert gone == {"goes", "turns"}
    with pytest.raises(InvalidApiKey):
        keys.caller(b"key of goes")
    with pytest.raises(InvalidApiKey):
        keys.caller(b"key of turns")
    assert keys.caller(b"other").name == "turns"
    assert keys.caller(b"key of new").name == "new"
    assert keys.current(goes) is None
    assert keys.current(turns) is None, "of the same name, and another key"
    assert keys.current(stays) is keys.caller(b"key of stays")
    with pytest.raises(ConcurrencyExceeded):
        keys.caller(b"key of stays").quota.take()  # type: ignore[union-attr]
    for caller in (goes, turns):
        with pytest.raises(InvalidApiKey):
            caller.quota.take()  # type: ignore[union-attr]


# Sessions.


def test_a_session_is_its_key_for_twelve_hours() -> None:
    clock = FakeClock(WALL_TIME)
    keys = held(client("a.b-c"), clock=clock)
    session, _ = keys.session(keys.caller(b"key of a.b-c"))

    clock.now += SESSION_SECONDS - 1
    assert keys.resume(session).name == "a.b-c"
    clock.now += 1
    with pytest.raises(SessionEnded) as caught:
        keys.resume(session)

    assert caught.value.code == "invalid_api_key"


def test_a_session_is_valid_in_every_process_that_has_the_secret() -> None:
    first, second = held(client("web")), held(client("web"), client("more"))

    session, _ = first.session(first.caller(b"key of web"))

    assert second.resume(session).name == "web"


def test_a_session_dies_with_its_key() -> None:
    keys = held(client("web"))
    session, _ = keys.session(keys.caller(b"key of web"))

    for others in ([client("web", "another key")], [client("app", "key of web")], []):
        keys.apply(others)
        with pytest.raises(SessionEnded):
            keys.resume(session)
    keys.apply([client("web")])
    assert keys.resume(session).name == "web"


def test_what_is_public_makes_no_session() -> None:
    """The hashes in a file, the settings and the keys of providers are known; nothing else is."""
    server, web = held(client("web"), secret=b"only the server knows this secret"), client("web")
    guesses = [bytes.fromhex(web.sha256 or ""), bytes(SECRET_BYTES)]
    guesses += [hashlib.sha256(word).digest() for word in (b"", b"EMPTY", b"ollama")]

    for guess in guesses:
        thief = held(web, secret=guess)
        with pytest.raises(SessionEnded):
            server.resume(thief.session(thief.caller(b"key of web"))[0])


def test_a_secret_is_random_and_long() -> None:
    assert len({Sessions().secret for _ in range(100)}) == 100
    for short in (b"", b"pepper", bytes(SECRET_BYTES - 1)):
        with pytest.raises(ValueError, match="secret"):
            Sessions(short)


def test_a_session_cannot_be_changed() -> None:
    keys = held(client("web"), client("root", admin=True))
    session, _ = keys.session(keys.caller(b"key of web"))
    name, expiry, mac = session.rsplit(".", 2)
    later = str(int(expiry) + 1)

    for forged in (
        f"root.{expiry}.{mac}",
        f"{name}.{later}.{mac}",
        f"{name}.{expiry}.{mac[:-1]}",
        f"{name}.{expiry}.{mac.upper()}",
        f"{name}.{expiry}.",
        f"{name}.{expiry}",
        f"{name}..{mac}",
        f"{name}.{expiry}.{mac}.{mac}",
        f"{name}.+{expiry}.{mac}",
        f"{name}. {expiry}.{mac}",
        f"{name}.{'9' * 5000}.{mac}",
        f"{name}.\u0661.{mac}",
        f"{name}.{expiry}.\udcff\ud800",
        "",
        ".",
        "..",
    ):
        with pytest.raises(SessionEnded):
            keys.resume(forged)


@given(st.text())
def test_any_session_is_an_answer_and_no_other_exception(session: str) -> None:
    with pytest.raises(SessionEnded):
        held(client("web")).resume(session)


# Access.


def test_without_keys_only_the_names_of_this_machine_are_answered() -> None:
    for given_auth in (None, Auth(), Auth(allowed_hosts=("chat.example",))):
        access = Access(given_auth)

        assert not access.keyed
        assert access.hosts is not None
        assert access.hosts.allows("localhost")
        assert access.hosts.allows("chat.example") is bool(given_auth and given_auth.allowed_hosts)


def test_with_keys_or_without_a_guard_any_name_is_answered() -> None:
    assert Access(Auth(open=True)).hosts is None
    assert not Access(Auth(open=True)).keyed
    assert Access(Auth(keys=(client("web"),))).hosts is None


@pytest.mark.parametrize(
    "auth", [Auth(keys=()), Auth(keys_file="keys.yaml"), Auth(keys=(), keys_file="keys.yaml")]
)
def test_where_keys_are_spoken_of_nobody_comes_in_without_one(auth: Auth) -> None:
    access = Access(Auth(keys=(client("web"),)))

    for change in (Access(auth), access):
        change.apply(auth)

        assert change.keyed
        assert change.current(anonymous("10.0.0.1")) is None
        with pytest.raises(InvalidApiKey):
            change.keys.caller(b"key of web")


def test_an_open_server_is_open_beside_an_empty_list() -> None:
    access = Access(Auth(keys=(), open=True))

    assert not access.keyed
    assert access.hosts is None


def test_clients_without_a_key_are_refused_when_keys_come() -> None:
    access = Access()
    nobody = anonymous("10.0.0.1")
    assert access.current(nobody) is nobody

    assert access.apply(Auth(keys=(client("web"),))) == {""}
    assert access.current(nobody) is None
    web = access.keys.caller(b"key of web")
    assert access.current(web) is web

    assert access.apply(None) == {"web"}
    assert access.current(nobody) is nobody
    assert access.current(web) is None
    assert access.apply(None) == frozenset()
