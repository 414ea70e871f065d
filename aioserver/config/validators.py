"""What a value may be: the checks that the lines of `settings.py` name.

A check gives back the value to keep, or raises `vol.Invalid`. It never shows a text that it
refuses, which may be a secret in the wrong place; numbers it shows.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import voluptuous as vol

from aioserver.config.schema import FAULTY, Check, Faults, Secret, kind, refuse
from aioserver.protocol import addresses

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def whole(low: int, high: int, kind_: str) -> Check:
    """A whole number within bounds, both inclusive."""

    def test(value: Any) -> int:
        if type(value) is not int:
            refuse(f"expected a whole number, not {_not_a_number(value)}")
        if not low <= value <= high:
            refuse(
                f"must be at {'least' if value < low else 'most'} {low if value < low else high}"
            )
        return value

    return Check(kind_, test)


def number(low: float, kind_: str, *, above: bool = False) -> Check:
    """A finite number from *low*, or *above* it, as a float."""

    def test(value: Any) -> float:
        if type(value) not in {int, float}:
            refuse(f"expected a number, not {_not_a_number(value)}")
        if not -_MOST <= value <= _MOST:
            refuse(f"must be finite and at most {_MOST:.0f}")
        if value < low or (above and value == low):
            refuse(f"must be {'greater than' if above else 'at least'} {low:g}")
        return float(value)

    return Check(kind_, test)


def _not_a_number(value: object) -> str:
    """What *value* is instead, with a hint where only the quotes are wrong."""
    if isinstance(value, float):
        return "a fraction" if math.isfinite(value) else "a number that is not finite"
    if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9]+(\.[0-9]*)?", value):
        return "text (a number stands without quotes and leading zeros)"
    if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9.]+[eE][-+]?[0-9]+", value):
        return "text (YAML wants a point and a sign: 1.0e+3)"
    return kind(value)


_MOST = 1e9  # seconds: 31 years; what asyncio and the kernel still take for a timeout
count = whole(1, 2**31 - 1, "whole number > 0")  # what listen(2) takes
count_or_0 = whole(0, 2**31 - 1, "whole number")
size = whole(1, 2**53, "bytes > 0")  # what JSON can carry exactly
port_number = whole(0, 65535, "port")
seconds = number(0, "seconds > 0", above=True)
seconds_or_0 = number(0, "seconds")
ratio = number(0, "number")


def text(kind_: str, pattern: str | None = None, wanted: str = "") -> Check:
    """Text, which *pattern* must match as a whole; *wanted* says so in words."""
    compiled = re.compile(pattern) if pattern is not None else None

    def test(value: Any) -> str:
        if not isinstance(value, str):
            quote = "" if isinstance(value, list | dict | None) else " (put it in quotes)"
            refuse(f"expected text, not {kind(value)}{quote}")
        if not value.isascii() and re.search(r"[\ud800-\udfff]", value):
            refuse("is not valid Unicode")
        if compiled is not None and compiled.fullmatch(value) is None:
            refuse(f"expected {wanted}")
        return value

    return Check(kind_, test)


prose = text("text")
line = text("text", r"[^\x00-\x1f\x7f]+", "one line of text, not empty")
short = text("text", r"[^\x00-\x1f\x7f]*", "one line of text")
TAKEN = frozenset(  # paths without parameters, beside the pages' assets, that a face cannot have
    (
        *("/dashboard", "/events", "/metrics", "/session", "/stats"),
        *("/health", "/healthz", "/livez", "/ready", "/readyz"),
        *("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models"),
        "/v1/responses",
    )
)
route = text(
    "path",
    rf"(?!(?:{'|'.join(TAKEN)})\Z)/[A-Za-z0-9._~/-]*[A-Za-z0-9._~-]",
    'a path such as "/ws/chat", that nothing else is found by',
)
variable = text(
    "variable name",
    r"[A-Z_][A-Z0-9_]*",
    "the name of an environment variable in capitals, not the key itself",
)


def url(*schemes: str, rest: str = r"[^\s\x00-\x1f\x7f?#@]+") -> Check:
    """The address of a server."""
    pattern = rf"(?:{'|'.join(schemes)})://{rest}"
    return text("URL", pattern, f'an address that starts with "{schemes[0]}://"')


def _test_yes(value: Any) -> bool:
    if type(value) is not bool:
        refuse(f"expected true or false, not {kind(value)}")
    return value


def _test_network(value: Any) -> str:
    """An IP address or network, in its one spelling; or UNIX sockets."""
    if value == addresses.UNIX:
        return addresses.UNIX
    try:
        return addresses.network(line(value))
    except ValueError:
        refuse('expected an IP address or network such as "10.0.0.0/8", or "unix"')


def _test_format(value: Any) -> str:
    """The original gives a format of `logging`; what it means here is the console format."""
    return "console" if isinstance(value, str) and "%(" in value else _formats(value)


yes = Check("true or false", _test_yes)


def _test_secret(value: Any) -> Secret:
    if not isinstance(value, str):
        refuse(f"expected text, not {kind(value)} (put it in quotes)")
    if (why := unfit(value)) is not None:
        refuse(why)
    return Secret(value)


def unfit(key: str) -> str | None:
    """Why *key* cannot stand in an `Authorization` header; None: it can."""
    if not key:
        return "is empty"
    if not key.isascii() or not key.isprintable() or " " in key:
        return "holds a blank or a character that no key has"
    return None


def one_of(*words: str, fold: Callable[[str], str] = str) -> Check:
    """One of *words*; *fold* first brings the given one into their form."""

    def test(value: Any) -> str:
        if not isinstance(value, str) or fold(value) not in words:
            refuse(f"expected one of {', '.join(words)}")
        return fold(value)

    return Check(" \\| ".join(words), test)


def maybe(check: Check, nothing: object = None) -> Check:
    """*check*, or *nothing*."""

    def test(value: Any) -> Any:
        return value if value == nothing else check(value)

    return Check(check.kind, test, check.inner, check.suffix)


def listed(check: Check) -> Check:
    """A list of which every item passes *check*, as a tuple."""

    def test(values: Any) -> tuple[Any, ...]:
        if not isinstance(values, list):
            refuse(f"expected a list, not {kind(values)}")
        return tuple(_each(check, dict(enumerate(values))).values())

    return Check(f"list of {check.kind}", test, check.inner, "[]")


def mapped(name: Check, check: Check) -> Check:
    """A mapping from names to what passes *check*."""

    def test(values: Any) -> dict[str, Any]:
        if not isinstance(values, dict):
            refuse(f"expected a section of keys, not {kind(values)}")
        return _each(check, values, name)

    return Check(f"name: {check.kind}", test, check.inner, ".<name>")


def _each(check: Check, values: Mapping[Any, Any], name: Check | None = None) -> dict[Any, Any]:
    """Check every item, and the name it stands under, and raise all their faults at once."""
    passed: dict[Any, Any] = {}
    errors: list[vol.Invalid] = []
    for key, value in values.items():
        for test, given in ((name, key), (check, value)):
            try:
                passed[key] = test(given) if test is not None else None
            except vol.Invalid as exc:
                exc.prepend([key])
                errors.extend(exc.errors if isinstance(exc, vol.MultipleInvalid) else [exc])
                passed[key] = getattr(exc, "partial", FAULTY)
    if errors:
        raise Faults(errors, passed if name else tuple(passed.values()))
    return passed


_formats = one_of("json", "console")
log_format = Check(_formats.kind, _test_format)
log_level = one_of("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL", fold=str.upper)
network = Check("IP address, network or unix", _test_network)
origin = text("origin", r"\*|[a-z][a-z0-9+.-]*://[^\s/?#@]+", '"*" or scheme://host[:port]')
label = text("name", r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", "a name of letters, digits, - _ and .")
header = text("header name", r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", "the name of an HTTP header")
latin = text("text", r"[\x20-\x7e\xa0-\xff]*", "one line of Latin-1 text")
digest = text("SHA-256 in hex", r"[0-9A-Fa-f]{64}", "64 hexadecimal digits")
secret = Check("secret", _test_secret)
api = url("http", "https")  # a name and password in it are refused: there is `api_key`
proxy = url("http", "https", rest=r"[^\s\x00-\x1f\x7f?#]+")
redis = url("redis", "rediss", "unix", rest=r"[^\s\x00-\x1f\x7f#]+")
