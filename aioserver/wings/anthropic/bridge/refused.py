"""The translation of refusals: a provider's refusal of a chat completion, for the Messages API."""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson

from aioserver.protocol.bridging.refusals import refusal
from aioserver.provider_errors import ContextTooLong, ProviderRateLimited, ProviderRefused
from aioserver.providers.error_mapping import reason_of
from aioserver.wings.anthropic.wire import type_of

if TYPE_CHECKING:
    from aioserver.provider_errors import ProviderFault

# The most bytes of a provider's message that a client gets.
MAX_MESSAGE = 2048
# The words on which Claude Code compacts its conversation.
TOO_LONG = "prompt is too long"


def translate(fault: ProviderFault, body: bytes) -> None:
    """Give *fault*, which a provider has raised with *body*, the form of this API."""
    if not isinstance(fault, ProviderRefused | ProviderRateLimited):
        # An engine's own error is in no form that the client knows.
        fault.provider_answer = None
        return
    said = refusal(body)
    if isinstance(fault, ProviderRefused):
        message = said.text[:MAX_MESSAGE]
    else:
        message = reason_of(fault.http_status, body)
    if isinstance(fault, ContextTooLong):
        if said.limit is not None and said.asked is not None and said.asked >= said.limit:
            message = f"{TOO_LONG}: {said.asked} tokens > {said.limit} maximum"
        elif TOO_LONG not in message:
            message = f"{TOO_LONG}: {message}"
    error = {
        "type": type_of(fault.http_status),
        "message": message.strip() or fault.message,
        "code": said.code or fault.code,
    }
    answer = orjson.dumps({"type": "error", "error": error})
    fault.provider_answer = fault.http_status, answer
