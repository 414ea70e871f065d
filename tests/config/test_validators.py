from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import voluptuous as vol

from aioserver.config import validators
from aioserver.config.schema import Secret, WrongShape, section
from aioserver.config.settings import ClientKey

if TYPE_CHECKING:
    from aioserver.config.schema import Validator


def refusal(check: Validator, value: Any) -> str:
    with pytest.raises(vol.Invalid) as caught:
        check(value)
    return str(caught.value)


@pytest.mark.parametrize("value", [True, False, None, "5", 5.0, [5], {"a": 5}])
def test_a_count_is_a_whole_number_and_nothing_else(value: object) -> None:
    assert "expected a whole number, not" in refusal(validators.count, value)


@pytest.mark.parametrize("value", [True, None, "5", float("nan"), float("inf"), 10**400, -1, 0])
def test_seconds_are_finite_and_positive(value: object) -> None:
    assert refusal(validators.seconds, value)


def test_a_number_in_quotes_says_so() -> None:
    assert "without quotes" in refusal(validators.count, "5")
    assert "without quotes" in refusal(validators.seconds, "0.5")
    assert "1.0e+3" in refusal(validators.seconds, "1e3")


@pytest.mark.parametrize(
    ("check", "value"),
    [
        (validators.port_number, 0),
        (validators.port_number, 65535),
        (validators.seconds_or_0, 0),
        (validators.count_or_0, 0),
        (validators.ratio, 0),
        (validators.prose, "two\nlines"),
        (validators.route, "/ws/chat"),
        (validators.origin, "*"),
        (validators.origin, "https://chat.example:8443"),
        (validators.network, "10.0.0.0/8"),
        (validators.network, "::1/128"),
        (validators.label, "gpt-4.1_x"),
        (validators.variable, "OPENAI_API_KEY"),
        (validators.api, "http://127.0.0.1:11434/v1"),
        (validators.proxy, "http://me:word@proxy:3128"),
        (validators.redis, "redis://:word@host/0?protocol=3"),
        (validators.latin, "für"),
        (validators.log_level, "INFO"),
    ],
)
def test_an_accepted_value_stays_as_it_is(check: Validator, value: object) -> None:
    assert check(value) == value


@pytest.mark.parametrize(
    ("check", "value"),
    [
        (validators.port_number, 65536),
        (validators.port_number, -1),
        (validators.count, 2**31),
        (validators.line, ""),
        (validators.line, "two\nlines"),
        (validators.prose, "\ud800"),
        (validators.route, "ws"),
        (validators.route, "/"),
        (validators.route, "/{name}"),
        (validators.origin, "http://localhost:8000/"),
        (validators.origin, "localhost"),
        (validators.network, "10.0.0.0/33"),
        (validators.network, "proxy"),
        (validators.label, "a/b"),
        (validators.label, ""),
        (validators.variable, "sk-0123"),
        (validators.variable, "gsk_0123"),
        (validators.api, "ftp://host"),
        (validators.api, "https://user:word@host/v1"),
        (validators.api, "https://host/v1?key=1"),
        (validators.header, "a b"),
        (validators.latin, "a\r\nb"),
        (validators.latin, "\u20ac"),
        (validators.digest, "00"),
        (validators.boolean, 1),
        (validators.boolean, "canary"),
        (validators.log_level, "LOUD"),
        (validators.log_format, "xml"),
        (validators.secret, ""),
        (validators.secret, "a b"),
        (validators.secret, 5),
    ],
)
def test_a_value_is_refused(check: Validator, value: object) -> None:
    assert refusal(check, value)


SECRET = "canary"


@pytest.mark.parametrize(
    ("check", "value"),
    [
        (validators.secret, f"{SECRET} x"),
        (validators.digest, SECRET),
        (validators.variable, SECRET),
        (validators.header, f"{SECRET} x"),
        (validators.latin, f"{SECRET}\u20ac"),
        (validators.line, f"{SECRET}\n"),
        (validators.api, SECRET),
        (validators.api, f"ftp://me:{SECRET}@host"),
        (validators.api, f"https://me:{SECRET}@host"),
        (validators.proxy, f"htps://me:{SECRET}@host"),
        (validators.redis, f"redi://:{SECRET}@host"),
        (validators.list_of(section(ClientKey)), SECRET),
        (validators.mapping_of(validators.header, validators.latin), SECRET),
        (validators.list_of(validators.line), f"{SECRET}-0123456789"),
        (validators.list_of(validators.line), f"a, {SECRET}-0123456789"),
        (validators.api, f"{SECRET}-0123456789.{SECRET}-0123456789"),
        (validators.api, f"{SECRET}.{SECRET}.{SECRET}"),
        (validators.api, f"me:{SECRET}@host.example"),
        (validators.proxy, f"{SECRET}.example:3128"),
        (validators.latin, 1234),
        (validators.proxy, 1234),
        (validators.secret, 1234),
        *(
            (check, f"{SECRET}-0123456789")
            for check in (validators.boolean, validators.count, validators.seconds)
        ),
        *(
            (check, f"{SECRET}-0123456789")
            for check in (validators.log_level, validators.route, validators.origin)
        ),
    ],
)
def test_a_refused_value_that_may_be_a_secret_is_not_shown(
    check: Validator, value: object
) -> None:
    message = refusal(check, value)

    assert SECRET not in message
    assert "1234" not in message


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (validators.count, "eight", 'expected a whole number, not text "eight"'),
        (validators.count, 0, "must be at least 1, not 0"),
        (validators.port_number, 80000, "must be at most 65535, not 80000"),
        (validators.seconds, -1.5, "must be greater than 0, not -1.5"),
        (validators.seconds, True, "expected a number, not true"),
        (validators.seconds, "5s", 'not text "5s" (write 5; it counts seconds)'),
        (validators.seconds, "1m30s", 'not text "1m30s" (write 90; it counts seconds)'),
        (validators.seconds, "1h 30m 5s", "(write 5405; it counts seconds)"),
        (validators.seconds, "20 min", "(write 1200; it counts seconds)"),
        (validators.seconds, "250ms", "(write 0.25; it counts seconds)"),
        (validators.seconds, "5kb", "(write the number alone; it counts seconds)"),
        (validators.seconds, "1.5.2s", 'not text "1.5.2s"'),
        (validators.days, "4 weeks", "(write 28; it counts days)"),
        (validators.size, "16MiB", 'not text "16MiB" (write 16777216; it counts bytes)'),
        (validators.size, "16M", "(write 16777216; it counts bytes)"),
        (validators.size, "4MB", "(write 4000000; it counts bytes)"),
        (validators.size, "16,777,216", "(write 16777216)"),
        (validators.count, 8000.0, "not 8000.0 (write 8000)"),
        (validators.count, "5s", "(write the number alone: this setting has no unit)"),
        (validators.count, "8000 ", 'not text "8000 " (write the number without a space around'),
        (validators.boolean, "true", 'not text "true" (write it without quotes)'),
        (validators.boolean, "ja", 'expected true or false, not text "ja"'),
        (validators.boolean, 1, "expected true or false, not 1"),
        (validators.log_level, "LOUD", 'CRITICAL, not text "LOUD"'),
        (validators.log_level, "debugg", 'not text "debugg" (did you mean DEBUG?)'),
        (validators.route, "ws", 'not text "ws"'),
        (validators.network, "10.0.0.0/33", 'not text "10.0.0.0/33"'),
        (validators.label, "a\x1b", 'not text "a\\u001b"'),
        (validators.api, "htps://host/v1", 'not "htps://" (did you mean https://?)'),
        (validators.api, "host/v1", 'starts with "http://" or "https://", then a host'),
        (
            validators.api,
            "127.0.0.1:11434/v1",
            'not "127.0.0.1:11434/v1" (write http://127.0.0.1:11434/v1)',
        ),
        (validators.size, "0.3KiB", "(write 307; it counts bytes)"),
        (validators.line, "a\tb", "no tab or other control character"),
        (validators.api, "10", 'starts with "http://" or "https://", then a host'),
        (validators.api, "127.0.0.1", "(write http://127.0.0.1)"),
        (validators.api, "localhost/v1", "(write http://localhost/v1)"),
        (validators.api, "[::1]:8000/v1", "(write http://[::1]:8000/v1)"),
        (validators.api, "vllm:8000/v1", "(write http://vllm:8000/v1)"),
        (validators.api, "api.openai.com/v1", "(write https://api.openai.com/v1)"),
        (validators.line, 1.5, "expected text, not 1.5 (put it in quotes)"),
        (validators.prose, True, "expected text, not true (put it in quotes)"),
        (validators.list_of(validators.line), "a,b", 'expected a list, not text "a,b"'),
    ],
)
def test_a_wrong_value_is_shown_with_what_to_write_instead(
    check: Validator, value: object, message: str
) -> None:
    assert message in refusal(check, value)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("local", "[local]"),
        ("local,groq", "[local, groq]"),
        ("[local, groq, openrouter]", "[local, groq, openrouter]"),
        ("*", '["*"]'),
        ("a, it's", "[a, b]"),
        ("", "[a, b]"),
        ("a,,b", "[a, b]"),
        (5, "[5]"),
        (None, "[]"),
        ({"a": 1}, "[a, b]"),
        (f"{SECRET}-0123456789", "[a, b]"),
    ],
)
def test_a_value_where_a_list_belongs_is_written_as_one(value: object, written: str) -> None:
    with pytest.raises(WrongShape) as caught:
        validators.list_of(validators.line)(value)

    assert caught.value.written == written


def test_a_number_where_text_is_wanted_asks_for_quotes() -> None:
    assert "put it in quotes" in refusal(validators.line, 1.1)
    assert "put it in quotes" in refusal(validators.secret, 1234)
    assert refusal(validators.line, None) == "expected text, not nothing"
    assert refusal(validators.secret, ["a"]) == "expected text, not a list"


def test_log_level_may_be_written_small() -> None:
    assert validators.log_level("info") == "INFO"


def test_a_secret_shows_itself_only_when_asked() -> None:
    secret = Secret("canary")

    assert "canary" not in f"{secret} {secret!r}"
    assert secret.reveal() == "canary"
    assert secret == Secret("canary")
    assert secret != Secret("other")
    assert len({secret, Secret("canary")}) == 1
