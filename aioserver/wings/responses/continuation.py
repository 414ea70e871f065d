"""Providers that keep no responses: how they refuse a request that continues one by its id.

OpenAI's API continues a response by `previous_response_id`, which its server has kept. Many engines have the path
and keep nothing. Some say that they do not support the field, others that there is no such response.
"""

from __future__ import annotations

import logging
import re
from typing import Protocol

import orjson

logger = logging.getLogger("aioserver.providers")

# The statuses with which engines refuse it.
STATUSES = frozenset({400, 404, 422, 501})
# Bytes of a refusal that is read.
MAX_READ = 1 << 16
_SUBJECT = re.compile(
    r"\bprevious[ _-]?response(?:_?id)?\b|\bresponse (?:with|id)\b|\bno response found",
    re.IGNORECASE,
)
_UNSUPPORTED = re.compile(
    r"not (?:yet )?(?:supported|implemented|allowed)|does(?: not|n't) support|unsupported|unknown|unrecognized"
    r"|unexpected|extra inputs",
    re.IGNORECASE,
)


class Keeper(Protocol):
    """A provider, as far as it keeps responses."""

    name: str
    keeps_responses: bool


def learn(
    provider: Keeper, status: int, body: bytes, *, previous_id: str | None, by_id: bool
) -> bool:
    """Learn from an answer with *status* and *body* whether *provider* keeps responses.

    Its request named the response *previous_id*; None: it named none, and says nothing. *by_id*: the provider has made that
    response, and we have it. Return whether the request is to be sent once more, as the provider does not know that response.
    """
    if previous_id is None or not refuses_continuation(status, body):
        return False
    # Refusals repeat the id, and a client could make one up that says more than the provider does.
    if by_id or (_UNSUPPORTED.search(previous_id) is None and supports_none(status, body)):
        if provider.keeps_responses:
            logger.info(
                "provider %s keeps no responses: those that continue others are asked for with the conversation",
                provider.name,
            )
        provider.keeps_responses = False
    return by_id


def refuses_continuation(status: int, body: bytes) -> bool:
    """Return whether an answer with this *status* and *body* refuses the `previous_response_id` of its request."""
    if status not in STATUSES or len(body) > MAX_READ:
        return False
    error = _error_in(body)
    if isinstance(error, dict):
        if error.get("param") == "previous_response_id":
            return True
        error = f"{error.get('message')} {error.get('code')}"
    return isinstance(error, str) and _SUBJECT.search(error) is not None


def supports_none(status: int, body: bytes) -> bool:
    """Return whether such a refusal says that no response at all can be continued, not only this one."""
    return status == 501 or _UNSUPPORTED.search(body.decode("utf-8", "replace")) is not None


def _error_in(body: bytes) -> object:
    """Return the error that *body* has: an object or a text; other content is its own."""
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body.decode("utf-8", "replace")
    if isinstance(content, dict):
        return content.get("error") or str(content)
    return str(content)
