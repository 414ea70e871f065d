"""Callers, and the pages that may connect."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aioserver.auth import Caller, Origins, anonymous
from aioserver.errors import OriginNotAllowed

LISTED = Origins(("http://localhost:8000", "https://Chat.Example/", "null"), credentials=True)
NONE = Origins((), credentials=True)
ANY = Origins(("*",), credentials=False)


def test_all_clients_without_a_key_are_one_caller_in_lines_of_their_own() -> None:
    one, two = anonymous("10.0.0.1"), anonymous("10.0.0.2")

    assert one == two
    assert hash(one) == hash(two)
    assert one.line != two.line
    assert anonymous(None) == one


def test_a_user_has_its_own_line_and_is_the_same_caller() -> None:
    caller = Caller("web", "web")

    ann, bob = caller.on_behalf_of("ann"), caller.on_behalf_of("bob")

    assert ann == bob == caller
    assert len({caller.line, ann.line, bob.line}) == 3
    assert ann.on_behalf_of(None) is ann


@pytest.mark.parametrize("user", [None, "", 7, ["ann"], {"a": 1}, True])
def test_what_names_no_user_changes_no_line(user: object) -> None:
    caller = anonymous("10.0.0.1")

    assert caller.on_behalf_of(user) is caller


def test_a_user_of_a_megabyte_makes_a_short_line() -> None:
    assert len(anonymous("").on_behalf_of("x" * 1_000_000).line) < 200


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
def test_what_is_not_quite_our_own_page_may_not(origin: str, host: str | None) -> None:
    assert not NONE.allows(origin, host)


def test_who_sends_no_origin_is_no_browser() -> None:
    NONE.check({"Host": "a.example"})


def test_a_foreign_page_is_refused_before_the_upgrade() -> None:
    with pytest.raises(OriginNotAllowed) as caught:
        LISTED.check({"Origin": "http://evil.example", "Host": "a.example"})

    assert caught.value.http_status == 403
    assert "evil" not in caught.value.message


@settings(deadline=None)
@given(st.text(), st.none() | st.text())
def test_any_header_is_an_answer_and_no_exception(origin: str, host: str | None) -> None:
    assert NONE.allows(origin, host) in {True, False}
    assert LISTED.cors({"Origin": origin, "Host": host or ""}) is not None


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
