"""`POST /v1/responses/compact` at a provider that has no such path: a summary by the same model.

The conversation goes to the provider with a question for its summary. The answer is a *compaction*
item, which the client has in its next input in place of the conversation. There it becomes a
message with the summary (bridge/summary.py).
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import msgspec
import orjson
from msgspec import Raw

from aioserver.auth.callers import CALLER
from aioserver.errors import InvalidRequest
from aioserver.faces import http, openai, passthrough, whole
from aioserver.gateway.bridging import ABSENT_STATUSES, path_absent
from aioserver.protocol.bridging.reading import members
from aioserver.protocol.json_body import ABSENT
from aioserver.protocol.model_body import ModelBody
from aioserver.provider_errors import ProviderBadResponse, ProviderRefused
from aioserver.wings.responses.attempt import ResponsesCapabilities
from aioserver.wings.responses.bridge.summary import question, summary_item
from aioserver.wings.responses.draft import draft_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp import web

    from aioserver.faces.admission import BodyHold
    from aioserver.faces.context import Context
    from aioserver.gateway.request import Request
    from aioserver.wings.responses.stored import StoredResponses


class _Part(msgspec.Struct, gc=False):
    text: str = ""


class _Item(msgspec.Struct, gc=False):
    type: str
    content: list[_Part] = []


class _Response(msgspec.Struct, gc=False):
    output: list[_Item]
    usage: Raw = ABSENT


_RESPONSE = msgspec.json.Decoder(_Response)


@dataclass
class Compaction:
    """A request to compact a conversation, which is *passed* on to its provider, unless the model
    is asked at once. *ask* makes the request to the model; None: the provider has the path.
    """

    passed: Request
    at_once: bool
    ask: Callable[[], Request] | None


async def prepare(
    context: Context,
    stored: StoredResponses,
    make_request: Callable[..., Request],
    request: web.Request,
    hold: BodyHold,
) -> Compaction:
    """Prepare a request to compact a conversation; *make_request* makes that to the model.

    Raises:
        InvalidRequest: the model shall be asked, and the request names none.
    """
    passed = await passthrough.prepare(context, request, hold)
    provider, asked = passed.route.provider, passed.provider_request
    learned = provider.capabilities(ResponsesCapabilities)
    at_once = learned.bridged or provider.settings.simulated
    if asked.model is None:
        if at_once:
            raise InvalidRequest("a conversation is compacted by a model", param="model")
        return Compaction(passed, at_once, None)
    conversation = partial(asked.body, provider.settings, asked.model)

    def ask() -> Request:
        body = ModelBody(question(conversation()))
        limit = context.settings.chat.websocket.max_message_size
        return make_request(
            context,
            body,
            face=openai.OPENAI.face,
            caller=asked.caller,
            name=http.request_id(request),
            hold=hold,
            client_headers=asked.client_headers,
            draft=draft_of(stored, request[CALLER], body, limit),
        )

    return Compaction(passed, at_once, ask if at_once or not learned.present else None)


async def serve(
    context: Context, request: web.Request, prepared: Compaction
) -> web.StreamResponse:
    """Answer with the compacted conversation.

    Raises:
        ProviderBadResponse: the model has written no summary.
    """
    passed, ask = prepared.passed, prepared.ask
    with context.gateway.hold() as held:
        if not prepared.at_once:
            # Its body may still be needed when the provider has it.
            held.grow(passed.provider_request.size if ask is not None else 0)
            try:
                return await passthrough.serve(context, request, passed)
            except ProviderRefused as refused:
                if ask is None or not _absent(refused):
                    raise
            held.reset()
        assert ask is not None, "the model is asked at once only if the request names it"
        asked = ask()
        asked.provider_request.hold_answer = lambda: held
        answer = await context.gateway.call(asked)
        answer.body = compacted(answer.body)
        response = openai.response_of(request, answer, openai.OPENAI)
        timeout, drop = context.admission.send_timeout, context.admission.dropped
        await whole.write(request, response, timeout, drop, openai.OPENAI.face)
        return response


def _absent(refused: ProviderRefused) -> bool:
    """Return whether *refused* says that the provider has no such path."""
    status = refused.http_status
    return status in ABSENT_STATUSES and path_absent(status, refused.provider_body)


def compacted(response: bytes) -> bytes:
    """Return the answer to the request, from the *response* with the summary.

    Raises:
        ProviderBadResponse: it has no text.
    """
    try:
        read = _RESPONSE.decode(response)
    except msgspec.DecodeError:
        raise ProviderBadResponse("the provider's answer is no response") from None
    text = "".join(
        part.text for item in read.output if item.type == "message" for part in item.content
    )
    if not text:
        raise ProviderBadResponse("the model has written no summary")
    written = orjson.dumps(
        {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response.compaction",
            "created_at": int(time.time()),
            "output": [summary_item(text)],
        }
    )
    return written[:-1] + members((b"usage", read.usage)) + b"}"
