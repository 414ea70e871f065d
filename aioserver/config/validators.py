"""The validators of single values, by the names that declarations of settings use.

A validator returns the value to keep, or raises `vol.Invalid`. Its message shows a refused value
if that is short, and no value of a setting that may hold a secret; it quotes limits and bounds,
and says what to write instead (hints.py).

This file is one concept: the values that a single setting may have.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import voluptuous as vol

from aioserver.config import hints
from aioserver.config.hints import MAX_SHOWN, most_like
from aioserver.config.schema import (
    FAULTY,
    Faults,
    Secret,
    Validator,
    WrongShape,
    describe,
    refuse,
    show,
)
from aioserver.protocol import addresses, passable
from aioserver.protocol.request_headers import CREDENTIALS, NEVER_PASSED, TRACE_HEADERS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# Seconds: 31 years, which asyncio and the kernel still accept as a timeout.
MAX_NUMBER = 1e9
# The scheme in an address. What follows it may have a password.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,9})://")
# An address without a user and a query, which holds no key; and the most characters of it that are
# shown.
_ADDRESS, MAX_ADDRESS = re.compile(r"https?://[^\s?#@]+"), 100


def whole(low: int, high: int, kind: str) -> Validator:
    """Accept a whole number between *low* and *high*, both inclusive. A boolean is no number."""

    def test(value: Any) -> int:
        if type(value) is not int:
            refuse(f"expected a whole number, not {show(value)}{hints.number(value, kind)}")
        if value < low:
            refuse(f"must be at least {low}, not {show(value)}")
        if value > high:
            refuse(f"must be at most {high}, not {show(value)}")
        return value

    return Validator(kind, test, json={"type": "integer", "minimum": low, "maximum": high})


def number(low: float, kind: str, *, above: bool = False) -> Validator:
    """Accept a finite number from *low*, or only *above* it, and return it as a float."""

    def test(value: Any) -> float:
        if type(value) not in {int, float}:
            refuse(f"expected a number, not {show(value)}{hints.number(value, kind)}")
        if not -MAX_NUMBER <= value <= MAX_NUMBER:
            refuse(f"must be finite and at most {MAX_NUMBER:.0f}, not {show(value)}")
        if value < low or (above and value == low):
            bound = f"{'greater than' if above else 'at least'} {low:g}"
            refuse(f"must be {bound}, not {show(value)}")
        return float(value)

    bound = "exclusiveMinimum" if above else "minimum"
    return Validator(kind, test, json={"type": "number", bound: low, "maximum": MAX_NUMBER})


def text(
    kind: str,
    pattern: str | None = None,
    expected: str = "",
    *,
    shown: bool = False,
    masked: bool = False,
) -> Validator:
    """Accept text that matches the whole *pattern*, which *expected* puts into words.

    *shown*: whether a refused text is shown, because no secret belongs there. A refused number or
    boolean is shown unless the setting is *masked*.
    """

    def test(value: Any) -> str:
        if not isinstance(value, str):
            hint = "" if isinstance(value, list | dict | None) else " (put it in quotes)"
            refuse(f"expected text, not {describe(value) if masked else show(value)}{hint}")
        if not value.isascii() and re.search(r"[\ud800-\udfff]", value):
            refuse("is not valid Unicode")
        if pattern is not None and re.fullmatch(pattern, value) is None:
            most = MAX_SHOWN if _ADDRESS.fullmatch(value) is None else MAX_ADDRESS
            refuse(f"expected {expected}" + (f", not {show(value, most)}" if shown else ""))
        return value

    json = {"type": "string"} if pattern is None else matching(pattern)
    return Validator(kind, test, json=json)


def matching(pattern: str) -> dict[str, Any]:
    """Return the JSON Schema of text that matches the whole *pattern*."""
    return {"type": "string", "pattern": f"^(?:{pattern})$"}


def url(*schemes: str, rest: str = r"[^\s\x00-\x1f\x7f?#@]+", shown: bool = False) -> Validator:
    """Accept the URL of a server with one of *schemes*; the pattern *rest* is what follows `://`.

    *shown*: whether an address without a scheme is shown, because it is no secret.
    """
    pattern = rf"(?:{'|'.join(schemes)})://{rest}"
    plain = text("URL", pattern, "a URL", masked=not shown)
    starts = " or ".join(f'"{scheme}://"' for scheme in schemes)

    def test(value: Any) -> Any:
        match = _SCHEME.match(value) if isinstance(value, str) else None
        if match is not None and match[1] not in schemes:
            near = most_like(match[1].lower(), schemes)
            hint = f" (did you mean {near}://?)" if near else ""
            refuse(f'expected an address that starts with {starts}, not "{match[1]}://"{hint}')
        written = hints.address(value) if shown else None
        if written is not None:
            refuse(
                f'expected an address that starts with {starts}, not "{value}" (write {written})'
            )
        try:
            address = plain(value)
            if "://" in address:
                _ = urlsplit(address).port
        except ValueError:
            refuse("expected a host behind ://, and a port from 0 to 65535 if it has one")
        except vol.Invalid as error:
            if error.error_message == "expected a URL":
                refuse(
                    f"expected an address that starts with {starts}, then a host"
                    if match is None
                    else "expected a host and a path behind ://, nothing secret and no space"
                )
            raise
        else:
            return address

    return Validator("URL", test, json=plain.json)


def one_of(*words: str, fold: Callable[[str], str] = str) -> Validator:
    """Accept one of *words*, after *fold* has brought the value into their form."""

    def test(value: Any) -> str:
        if not isinstance(value, str) or fold(value) not in words:
            hint = hints.nearest(value, words)
            refuse(f"expected one of {', '.join(words)}, not {show(value)}{hint}")
        return fold(value)

    # The words themselves, which an editor offers.
    json: dict[str, Any] = {"enum": list(words)}
    if fold is not str:
        letters = ["".join(f"[{c.upper()}{c.lower()}]" for c in word) for word in words]
        json = {"anyOf": [json, matching("|".join(letters))]}
    return Validator(" \\| ".join(words), test, json=json)


def boolean_or(*words: str) -> Validator:
    """Accept true, false, or one of *words*."""

    def test(value: Any) -> bool | str:
        if isinstance(value, bool) or value in words:
            accepted: bool | str = value
            return accepted
        hint = hints.nearest(value, words)
        expected = f"true, false, {', '.join(words[:-1])} or {words[-1]}"
        refuse(f"expected {expected}, not {show(value)}{hint}")
        return None

    json = {"enum": [True, False, *words]}
    return Validator(" \\| ".join(("true", "false", *words)), test, json=json)


def optional(validator: Validator, nothing: object = None) -> Validator:
    """Accept the values of *validator*, and *nothing*, which stands for no value."""

    def test(value: Any) -> Any:
        return value if value == nothing else validator(value)

    json = {"anyOf": [validator.json, {"const": nothing}]}
    return Validator(validator.kind, test, validator.inner, validator.suffix, json)


def list_of(validator: Validator) -> Validator:
    """Accept a list whose every item passes *validator*, and return it as a tuple."""

    def test(values: Any) -> tuple[Any, ...]:
        if not isinstance(values, list):
            # A section has keys of its own, some of which hold secrets.
            simple = validator.inner is None
            raise WrongShape(
                f"expected a list, not {show(values) if simple else describe(values)}",
                hints.items(values) if simple else "[{…}, {…}]",
            )
        return tuple(_validate_each(validator, dict(enumerate(values))).values())

    json = {"type": "array", "items": validator.json}
    return Validator(f"list of {validator.kind}", test, validator.inner, "[]", json)


def mapping_of(name: Validator, validator: Validator) -> Validator:
    """Accept a mapping whose every key passes *name*, and every value *validator*."""

    def test(values: Any) -> dict[str, Any]:
        if not isinstance(values, dict):
            raise WrongShape(f"expected a section of keys, not {describe(values)}", "{a: …, b: …}")
        return _validate_each(validator, values, name)

    json = {"type": "object", "propertyNames": name.json, "additionalProperties": validator.json}
    return Validator(f"{name.kind}: {validator.kind}", test, validator.inner, ".<name>", json)


def _validate_each(
    validator: Validator, values: Mapping[Any, Any], name: Validator | None = None
) -> dict[Any, Any]:
    """Validate every item, and with a validator *name* its key as well.

    Raises:
        Faults: all faults of all items; `partial` has `FAULTY` in place of a faulty item.
    """
    passed: dict[Any, Any] = {}
    errors: list[vol.Invalid] = []
    for key, value in values.items():
        for test, tested in ((name, key), (validator, value)):
            try:
                passed[key] = test(tested) if test is not None else None
            except vol.Invalid as exc:
                exc.prepend([key])
                errors.extend(exc.errors if isinstance(exc, vol.MultipleInvalid) else [exc])
                passed[key] = getattr(exc, "partial", FAULTY)
    if errors:
        raise Faults(errors, passed if name else tuple(passed.values()))
    return passed


def unfit(key: str) -> str | None:
    """Return why *key* cannot be sent in an `Authorization` header; None: it can."""
    if not key:
        return "is empty"
    if not key.isascii() or not key.isprintable() or " " in key:
        return "contains a space, or a character that is not printable ASCII"
    return None


def _boolean(value: Any) -> bool:
    if type(value) is not bool:
        quoted = isinstance(value, str) and value.lower() in {"true", "false"}
        hint = " (write it without quotes)" if quoted else ""
        refuse(f"expected true or false, not {show(value)}{hint}")
    return value


def _secret(value: Any) -> Secret:
    value = _secret_text(value)
    if (reason := unfit(value)) is not None:
        refuse(reason)
    return Secret(value)


_secret_text = text("secret", masked=True)


def _passed_header(value: Any) -> str:
    """Accept the name of a client's header that may go on to a provider, and return it in lower
    case.
    """
    name: str = header(value).lower()
    if name in TRACE_HEADERS:
        refuse(f"{name} is passed on in any case, if it is valid")
    if name in CREDENTIALS:
        refuse(f"{name} may hold a key of this server, and is never passed on")
    if name in NEVER_PASSED:
        refuse(f"{name} belongs to one connection or body, and is never passed on")
    return name


def _network(value: Any) -> str:
    """Accept an IP address or network, in any spelling, or the word for UNIX sockets."""
    if value == addresses.UNIX:
        return addresses.UNIX
    try:
        return addresses.network(line(value))
    except ValueError:
        refuse(
            f'expected an IP address or network such as "10.0.0.0/8", or "unix", not {show(value)}'
        )


def _moment(value: Any) -> str:
    """Accept a date, or a date and a time of day, and return both in UTC (RFC 3339)."""
    expected = "a date, or a time such as 2027-01-31T18:00:00Z"
    if not isinstance(value, str):
        refuse(f"expected {expected}, not {show(value)}")
    try:
        moment = datetime.fromisoformat(value)
        moment = moment.replace(tzinfo=moment.tzinfo or UTC).astimezone(UTC)
    except (ValueError, OverflowError):
        refuse(f"expected {expected}, not {show(value)}")
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")


def _host(value: Any) -> str:
    """Accept one address or name to listen on; an IPv6 address may stand in brackets, as in URLs."""
    if isinstance(value, list) or (isinstance(value, str) and re.search(r"[,\s]", value)):
        several = "0.0.0.0 and :: listen on every address; systemd can pass several sockets"
        refuse(f"expected one address ({several}: docs/install.md)")
    host: str = line(value)
    if "/" in host:
        refuse(
            "expected an address: a UNIX socket is passed by systemd, ListenStream= of its .socket "
            "unit (docs/install.md)"
        )
    inner = host.removeprefix("[").removesuffix("]")
    return inner if ":" in inner and len(inner) + 2 == len(host) else host


def _log_format(value: Any) -> str:
    """Accept json and console.

    A format string of `logging`, as the old system has, means console.
    """
    return "console" if isinstance(value, str) and "%(" in value else _log_formats(value)


# Numbers. The bounds are those of listen(2), and of exact integers in JSON.
count = whole(1, 2**31 - 1, "whole number > 0")
count_or_0 = whole(0, 2**31 - 1, "whole number")
size = whole(1, 2**53, "bytes > 0")
port_number = whole(0, 65535, "port")
weight = whole(1, 10, "1 to 10")
seconds = number(0, "seconds > 0", above=True)
seconds_or_0 = number(0, "seconds")
days = number(0, "days > 0", above=True)
ratio = number(0, "number")

# Text.
prose = text("text")
line = text(
    "text",
    r"[^\x00-\x1f\x7f]+",
    "one line of text that is not empty and has no tab or other control character",
)
claim = text("claim", r"[^\x00-\x1f\x7f]+", "the name of a claim", shown=True)
optional_line = text(
    "text", r"[^\x00-\x1f\x7f]*", "one line of text without a tab or other control character"
)
latin = text("text", r"[\x20-\x7e\xa0-\xff]*", "one line of Latin-1 text", masked=True)
label = text(
    "name",
    r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}",
    "a name of letters, digits, - _ and .",
    shown=True,
)
python_class = text(
    "package.module:Class",
    r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*",
    "a class, as package.module:Class",
    shown=True,
)
header = text("header name", r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", "the name of an HTTP header")
passed_path = text(
    "path below /v1",
    passable.OPENED,
    "a path of OpenAI's API below /v1, as videos, that this server does not answer itself",
    shown=True,
)
passed_header = Validator("header name", _passed_header, json=header.json)
digest = text("SHA-256 in hex", r"[0-9A-Fa-f]{64}", "64 hexadecimal digits", masked=True)
secret = Validator("secret", _secret, json=matching(r"[\x21-\x7e]+"))
variable = text(
    "variable name",
    r"[A-Z_][A-Z0-9_]*",
    "the name of an environment variable in capitals, not the key itself",
    masked=True,
)

# Addresses.
listening = Validator("text", _host, json=matching(r"[^\s,/\x00-\x1f\x7f]+"))
network = Validator("IP address, network or unix", _network, json=line.json)
origin = text(
    "origin",
    r"\*|[a-z][a-z0-9+.-]*://[^\s/?#@]+",
    '"*" or scheme://host[:port], without a path or a slash at its end',
    shown=True,
)
# Addresses of instances. The host is an address or a name; IPv6 stands in brackets.
_peer_host = r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+)"
peer_address = text(
    "HOST or HOST:PORT",
    rf"{_peer_host}(?::[0-9]{{1,5}})?",
    "HOST or HOST:PORT; an IPv6 address stands in brackets",
    shown=True,
)
peer_ports = text(
    "HOST:PORT or HOST:FIRST-LAST",
    rf"{_peer_host}:[0-9]{{1,5}}(?:-[0-9]{{1,5}})?",
    "HOST:PORT or HOST:FIRST-LAST; an IPv6 address stands in brackets",
    shown=True,
)
proxy = url("http", "https", rest=r"[^\s\x00-\x1f\x7f?#]+")
redis = url("redis", "rediss", "unix", rest=r"[^\s\x00-\x1f\x7f#]+")
# A user's name and password in the URL of an API are refused, because there is `api_key`.
api = url("http", "https", shown=True)
# No third party on the way may change these keys.
jwks = text(
    "URL",
    r"(?:https://[^\s\x00-\x1f\x7f#@/]+"
    r"|http://(?:localhost|127(?:\.[0-9]{1,3}){3}|\[::1\])(?::[0-9]{1,5})?)"
    r"(?:/[^\s\x00-\x1f\x7f#]*)?",
    "https:// and what follows it, or http:// and a loopback address",
    shown=True,
)

# Paths that no face may have: the other routes without a parameter, except the pages' assets.
TAKEN = frozenset(
    (
        *("/client.js", "/client.d.ts", "/dashboard", "/events", "/metrics", "/session", "/stats"),
        "/openapi.json",
        "/usage",
        *("/health", "/healthz", "/livez", "/ready", "/readyz"),
        *("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models"),
        *("/v1/messages", "/v1/messages/count_tokens"),
        *("/v1/responses", "/v1/responses/compact", "/v1/responses/input_tokens"),
        "/conversations",
    )
)
route = text(
    "path",
    rf"(?!(?:{'|'.join(sorted(TAKEN))})$)/[A-Za-z0-9._~/-]*[A-Za-z0-9._~-]",
    'a path such as "/ws/chat" that no other route has',
    shown=True,
)

# A date alone has 10 characters.
moment = Validator("time", _moment, json=matching(r"[0-9TtZzW:., +-]{8,40}"))

# Words.
boolean = Validator("true or false", _boolean, json={"type": "boolean"})
retention = one_of("token_limit", "message_count", "time_based", "unlimited")
log_level = one_of("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL", fold=str.upper)
_log_formats = one_of("json", "console")
log_format = Validator(
    _log_formats.kind,
    _log_format,
    json={"anyOf": [_log_formats.json, {"type": "string", "pattern": r"%\("}]},
)
