"""The correct way to write a wrong value: the hints behind the messages of validators.

A hint repeats a part of the value only if that cannot be a secret. It may be a number, a short
word of a list, or an address without a user, a query or a long label.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

# The most characters of a wrong value that a fault shows. Keys are longer: OpenAI's have at least
# 51.
MAX_SHOWN = 15
# Keys by which other programs (LiteLLM, SDKs, nginx) name a setting of ours.
OTHER_WORDS = {
    **dict.fromkeys(("api_base", "api_url", "url", "endpoint_url", "baseurl"), "base_url"),
    **dict.fromkeys(("apikey", "api-key", "key", "token"), "api_key_env"),
    **dict.fromkeys(("timeout", "request_timeout"), "read_timeout"),
    "stream_timeout": "first_token_timeout",
    **dict.fromkeys(("num_retries", "retries"), "max_retries"),
    "rpm": "requests_per_minute",
    "tpm": "tokens_per_minute",
    **dict.fromkeys(("max_parallel_requests", "concurrency_limit"), "concurrent_requests"),
    **dict.fromkeys(("rpm_limit", "rate_limit"), "requests_per_minute"),
    "tpm_limit": "tokens_per_minute",
    **dict.fromkeys(("routing_strategy", "strategy"), "choose"),
    "extra_headers": "headers",
    **dict.fromkeys(("bind", "address", "listen"), "host"),
    "deployments": "members",
    "model_name": "model",
    **dict.fromkeys(("cors_origins", "origins"), "allow_origins"),
}
# Keys at the top of a LiteLLM file.
LITELLM = frozenset(("model_list", "litellm_settings", "router_settings", "general_settings"))

_UNITS: dict[str, dict[str, float]] = {
    "seconds": {
        **dict.fromkeys(("ms", "msec", "msecs"), 0.001),
        **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1),
        **dict.fromkeys(("m", "min", "mins", "minute", "minutes"), 60),
        **dict.fromkeys(("h", "hour", "hours"), 3600),
        **dict.fromkeys(("d", "day", "days"), 86400),
    },
    "days": {
        **dict.fromkeys(("h", "hour", "hours"), 1 / 24),
        **dict.fromkeys(("d", "day", "days"), 1),
        **dict.fromkeys(("w", "week", "weeks"), 7),
    },
    "bytes": {
        **dict.fromkeys(("b", "byte", "bytes"), 1),
        **dict.fromkeys(("k", "kib"), 2**10),
        **dict.fromkeys(("m", "mib"), 2**20),
        **dict.fromkeys(("g", "gib"), 2**30),
        "kb": 10**3,
        "mb": 10**6,
        "gb": 10**9,
    },
}
# Patterns, compiled for the first value that needs a hint.
_PART = r"([0-9]{1,12}(?:\.[0-9]{1,6})?) ?([A-Za-z]{1,7}) ?"
_PARTS = rf"(?:{_PART}){{1,5}}"
_THOUSANDS = r"[0-9]{1,3}(?:,[0-9]{3}){1,4}"
# The labels of a host are shorter than those of a token with dots, such as a JSON Web Token.
_ADDRESS = (
    r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9-]{1,15}(?:\.[A-Za-z0-9-]{1,15}){0,5})"
    r"(:[0-9]{1,5})?((?:/[A-Za-z0-9._-]{0,20}){0,4})"
)
_IPV4 = r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}"
_PLAIN = r"[A-Za-z0-9/.][A-Za-z0-9._/-]*"


def number(value: object, kind: str) -> str:
    """Return how to write the number that *value* probably means.

    *kind* is that of the setting.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return f" (write {value:.0f})"
    if not isinstance(value, str):
        return ""
    text = value.strip()
    if re.fullmatch(r"[-+]?[0-9]+(\.[0-9]*)?", text):
        return (
            " (write a number without quotes and without leading zeros)"
            if text == value
            else " (write the number without a space around it)"
        )
    if re.fullmatch(r"[-+]?[0-9.]+[eE][-+]?[0-9]+", text):
        return " (YAML requires a point and a sign: 1.0e+3)"
    if re.fullmatch(_THOUSANDS, text):
        return f" (write {text.replace(',', '')})"
    unit = kind.split(maxsplit=1)[0]
    if re.fullmatch(_PARTS, text) is None:
        return ""
    units = _UNITS.get(unit)
    if units is None:
        return " (write the number alone: this setting has no unit)"
    parts = [(float(amount), name.lower()) for amount, name in re.findall(_PART, text)]
    if any(name not in units for _, name in parts):
        return f" (write the number alone; it counts {unit})"
    total = round(sum(amount * units[name] for amount, name in parts), 0 if unit == "bytes" else 6)
    return f" (write {total:.15g}; it counts {unit})"


def items(value: object) -> str:
    """Return the list in YAML that *value*, which is not a list, probably means; else `[a, b]`."""
    if value is None:
        return "[]"
    if type(value) in {int, float}:
        return f"[{value}]"
    if not isinstance(value, str):
        return "[a, b]"
    words = [word.strip().strip("\"'") for word in value.strip(" []").split(",")]
    if len(words) > MAX_SHOWN or not all(0 < len(word) <= MAX_SHOWN for word in words):
        return "[a, b]"
    if any("'" in word or not word.isprintable() for word in words):
        return "[a, b]"
    return f"[{', '.join(w if re.fullmatch(_PLAIN, w) else json.dumps(w) for w in words)}]"


def address(value: object) -> str | None:
    """Return *value*, the address of a server, with the scheme that it lacks.

    None: it is no address.
    """
    match = re.fullmatch(_ADDRESS, value) if isinstance(value, str) else None
    if match is None:
        return None
    host, port, path = match.groups()
    number = re.fullmatch(_IPV4, host) is not None or host.startswith("[")
    # Words alone, with dots or without, may be a key.
    if not port and not (path and "." in host) and not number and host != "localhost":
        return None
    local = number or "." not in host
    return f"{'http' if local else 'https'}://{host}{port or ''}{path}"


def nearest(word: object, words: Iterable[str]) -> str:
    """Return the one of *words* that *word* probably means; empty if there is none."""
    folded = {known.lower(): known for known in words}
    text = word.lower()[:64] if isinstance(word, str) else ""
    meant = most_like(text, folded)
    return f" (did you mean {folded[meant]}?)" if meant is not None else ""


def most_like(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the *known* word that is most similar to *word*; None: no similarity reaches
    *cutoff*.
    """
    # Only faults need it.
    from difflib import get_close_matches  # noqa: PLC0415

    matches = get_close_matches(word, tuple(known), n=1, cutoff=cutoff)
    return matches[0] if matches else None
