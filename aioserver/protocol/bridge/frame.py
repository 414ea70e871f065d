"""The response object, around output items that are bytes already.

The members that repeat the request are written once, and stand in each copy of the object. OpenAI repeats the
instructions and the tools too; so do we, unless they are longer than MAX_REPEATED_BYTES.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from collections.abc import Mapping

# Bytes of a request that its response repeats: each of its events with a response object has them.
MAX_REPEATED_BYTES = 262_144
# Bytes that stand for one token where the provider reports no usage.
BYTES_PER_TOKEN = 4
# By a finish_reason: why an answer is not complete.
INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}


@dataclass(slots=True)
class Frame:
    """The response object, as far as it is known before its answer comes.

    *repeated* are the members that repeat the request, JSON without the braces. *model* is the model that was asked
    for, and *created_at* the time of the response, in whole seconds since 1970.
    """

    id: str
    created_at: int
    model: str
    repeated: bytes

    @property
    def size(self) -> int:
        """The bytes that it takes, about."""
        return len(self.repeated) + len(self.model) + len(self.id)

    def render(
        self,
        status: bytes,
        output: bytes = b"",
        *,
        usage: bytes = b"null",
        reason: str = "",
        completed_at: int | None = None,
    ) -> bytes:
        """Return the response object with a *status* and *output*, its items joined by commas.

        *reason* says why an answer is incomplete.
        """
        incomplete = b'{"reason":%b}' % orjson.dumps(reason) if reason else b"null"
        return (
            b'{"id":%b,"object":"response","created_at":%d,"status":"%b","background":false,"completed_at":%b,'
            b'"error":null,"incomplete_details":%b,"model":%b,"output":[%b],%b,"usage":%b}'
        ) % (
            orjson.dumps(self.id),
            self.created_at,
            status,
            b"null" if completed_at is None else b"%d" % completed_at,
            incomplete,
            orjson.dumps(self.model),
            output,
            self.repeated,
            usage,
        )


def usage_object(usage: Mapping[str, Any] | None, asked_bytes: int, answered_bytes: int) -> bytes:
    """Return the usage of a response for that of a chat completion.

    If the provider has reported none it is an estimate, since many clients cannot do without: a token for
    BYTES_PER_TOKEN bytes of the request and of the answer.
    """
    known = usage or {}
    asked = _count(known, "prompt_tokens")
    answered = _count(known, "completion_tokens")
    if asked is None:
        asked = -(-asked_bytes // BYTES_PER_TOKEN)
    if answered is None:
        answered = -(-answered_bytes // BYTES_PER_TOKEN)
    total = _count(known, "total_tokens")
    of_prompt, of_answer = (
        details if isinstance(details := known.get(name), dict) else {}
        for name in ("prompt_tokens_details", "completion_tokens_details")
    )
    cached = _count(of_prompt, "cached_tokens")
    if cached is None:
        # DeepSeek's own name.
        cached = _count(known, "prompt_cache_hit_tokens")
    return orjson.dumps(
        {
            "input_tokens": asked,
            "input_tokens_details": {
                "cache_write_tokens": _count(of_prompt, "cache_write_tokens") or 0,
                "cached_tokens": cached or 0,
            },
            "output_tokens": answered,
            "output_tokens_details": {
                "reasoning_tokens": _count(of_answer, "reasoning_tokens") or 0
            },
            "total_tokens": asked + answered if total is None else total,
        }
    )


def _count(counts: Mapping[str, Any], name: str) -> int | None:
    number = counts.get(name)
    plausible = isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 1 << 53
    return number if plausible else None
