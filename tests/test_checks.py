from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import voluptuous as vol

from aioserver import checks
from aioserver.setting import Secret

if TYPE_CHECKING:
    from aioserver.setting import Check


def refusal(check: Check, value: Any) -> str:
    with pytest.raises(vol.Invalid) as caught:
        check(value)
    return str(caught.value)


@pytest.mark.parametrize("value", [True, False, None, "5", 5.0, [5], {"a": 5}])
def test_a_count_is_a_whole_number_and_nothing_else(value: object) -> None:
    assert "expected a whole number, not" in refusal(checks.count, value)


@pytest.mark.parametrize("value", [True, None, "5", float("nan"), float("inf"), 10**400, -1, 0])
def test_seconds_are_finite_and_positive(value: object) -> None:
    assert refusal(checks.seconds, value)


def test_a_number_in_quotes_says_so() -> None:
    assert "without quotes" in refusal(checks.count, "5")
    assert "without quotes" in refusal(checks.seconds, "0.5")
    assert "1.0e+3" in refusal(checks.seconds, "1e3")


@pytest.mark.parametrize(
    ("check", "value"),
    [
        (checks.port_number, 0),
        (checks.port_number, 65535),
        (checks.seconds_or_0, 0),
        (checks.count_or_0, 0),
        (checks.ratio, 0),
        (checks.prose, "two\nlines"),
        (checks.route, "/ws/chat"),
        (checks.origin, "*"),
        (checks.origin, "https://chat.example:8443"),
        (checks.network, "10.0.0.0/8"),
        (checks.network, "::1/128"),
        (checks.label, "gpt-4.1_x"),
        (checks.variable, "OPENAI_API_KEY"),
        (checks.api, "http://127.0.0.1:11434/v1"),
        (checks.proxy, "http://me:word@proxy:3128"),
        (checks.redis, "redis://:word@host/0?protocol=3"),
        (checks.latin, "für"),
        (checks.log_level, "INFO"),
    ],
)
def test_what_a_check_accepts_stays_as_it_is(check: Check, value: object) -> None:
    assert check(value) == value


@pytest.mark.parametrize(
    ("check", "value"),
    [
        (checks.port_number, 65536),
        (checks.port_number, -1),
        (checks.count, 2**31),
        (checks.line, ""),
        (checks.line, "two\nlines"),
        (checks.prose, "\ud800"),
        (checks.route, "ws"),
        (checks.route, "/"),
        (checks.route, "/{name}"),
        (checks.origin, "http://localhost:8000/"),
        (checks.origin, "localhost"),
        (checks.network, "10.0.0.0/33"),
        (checks.network, "proxy"),
        (checks.label, "a/b"),
        (checks.label, ""),
        (checks.variable, "sk-0123"),
        (checks.variable, "gsk_0123"),
        (checks.api, "ftp://host"),
        (checks.api, "https://user:word@host/v1"),
        (checks.api, "https://host/v1?key=1"),
        (checks.header, "a b"),
        (checks.latin, "a\r\nb"),
        (checks.latin, "\u20ac"),
        (checks.digest, "00"),
        (checks.yes, 1),
        (checks.yes, "canary"),
        (checks.log_level, "LOUD"),
        (checks.log_format, "xml"),
        (checks.secret, ""),
        (checks.secret, "a b"),
        (checks.secret, 5),
    ],
)
def test_what_a_check_refuses_it_does_not_show(check: Check, value: object) -> None:
    message = refusal(check, value)

    assert not (isinstance(value, str) and len(value) > 3 and value in message)


def test_a_number_where_text_is_wanted_asks_for_quotes() -> None:
    assert "put it in quotes" in refusal(checks.line, 1.1)
    assert "put it in quotes" in refusal(checks.secret, 1234)
    assert refusal(checks.line, None) == "expected text, not nothing"


def test_log_level_may_be_written_small() -> None:
    assert checks.log_level("info") == "INFO"


def test_a_secret_shows_itself_only_when_asked() -> None:
    secret = Secret("canary")

    assert "canary" not in f"{secret} {secret!r}"
    assert secret.reveal() == "canary"
    assert secret == Secret("canary")
    assert secret != Secret("other")
    assert len({secret, Secret("canary")}) == 1
