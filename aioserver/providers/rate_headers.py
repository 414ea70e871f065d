"""The response headers by which a provider reports the rest of its limits.

x-ratelimit-{remaining,reset}-{requests,tokens}
    OpenAI, Groq and others. A window: the remainder is for the time until the reset, a duration
anthropic-ratelimit-{requests,tokens,input-tokens,output-tokens}-{limit,remaining,reset}
    Anthropic. A bucket that fills evenly: the reset is the time (RFC 3339) at which it has its
    limit again
"""

from __future__ import annotations

import re
from datetime import datetime
from email.utils import parsedate_to_datetime
from math import inf
from time import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

WINDOWS = {kind: f"x-ratelimit-remaining-{kind}" for kind in ("requests", "tokens")}
BUCKETS = {
    kind: f"anthropic-ratelimit-{kind}-remaining"
    for kind in ("requests", "tokens", "input-tokens", "output-tokens")
}
# This share of a bucket of tokens must be there before a request is worth sending. Anthropic
# rounds the remainder to thousands, so 0 may mean some hundreds.
USEFUL_SHARE = 0.1
_DURATION = re.compile(
    r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?"
)


class Left(NamedTuple):
    """The remainder of one limit: *left* units for *seconds*; 0: nothing may start for that long.

    *requests*: the units are starts, otherwise tokens.
    """

    requests: bool
    left: float
    seconds: float


def limits_left(headers: Mapping[str, str]) -> Iterator[Left]:
    """Yield the limits in *headers*, as far as they are plausible."""
    if WINDOWS["requests"] in headers or WINDOWS["tokens"] in headers:
        for kind, name in WINDOWS.items():
            left = number(headers.get(name, ""))
            reset = duration(headers.get(f"x-ratelimit-reset-{kind}", ""))
            if left is not None and left != inf and reset is not None and reset > 0:
                yield Left(kind == "requests", left, reset)
    if BUCKETS["requests"] in headers or BUCKETS["tokens"] in headers:
        now = _now(headers.get("date", ""))
        for kind, name in BUCKETS.items():
            left = number(headers.get(name, ""))
            reset = seconds_until(headers.get(f"anthropic-ratelimit-{kind}-reset", ""), now)
            limit = number(headers.get(f"anthropic-ratelimit-{kind}-limit", ""))
            if left is not None and left != inf and reset is not None and reset > 0:
                yield _of_bucket(kind == "requests", left, reset, limit)


def _of_bucket(requests: bool, left: float, reset: float, limit: float | None) -> Left:
    """Return the remainder of a bucket that is full again, with *limit* units, after *reset*
    seconds.
    """
    if limit is None or not max(1.0, left) <= limit < inf:
        return Left(requests, left, reset)
    if left < 1:
        # Wait until there is one request again, or a useful share of the tokens.
        return Left(requests, 0.0, reset * (1 / limit if requests else USEFUL_SHARE))
    # Until then as many may start as are left, and as come in.
    return Left(requests, limit, reset)


def duration(text: str) -> float | None:
    """Parse a duration as OpenAI and Groq write it ("1m30.5s", "17ms"), or a number of seconds.

    Returns seconds, or None if *text* is no duration.
    """
    text = text.strip()
    match = _DURATION.fullmatch(text)
    if text and match is not None:
        hours, minutes, whole, milliseconds = (float(part or 0) for part in match.groups())
        seconds = hours * 3600 + minutes * 60 + whole + milliseconds / 1000
    else:
        return number(text)
    return seconds


def seconds_until(text: str, now: float) -> float | None:
    """Return the seconds from *now* until the time *text* (RFC 3339); None if it is no such time,
    or has no zone.
    """
    try:
        moment = datetime.fromisoformat(text.strip())
        return None if moment.tzinfo is None else moment.timestamp() - now
    except (ValueError, OverflowError):
        return None


def _now(date: str) -> float:
    """Return the provider's time by its header `Date`, which may differ from ours."""
    try:
        return parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):
        return time()


def number(text: str) -> float | None:
    """Parse a number >= 0; None for anything else, such as -1, by which some mean "no limit".

    A number with more digits than a float can hold is infinite; the words "inf" and "nan", which
    Python would accept, are not numbers here.
    """
    try:
        value = float(text)
    except ValueError:
        return None
    return value if value >= 0 and "n" not in text.lower() else None
